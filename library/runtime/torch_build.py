"""What the installed torch is built for, read from the text of its version file: torch itself is not imported."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TorchBuild:
    """Version of the installed torch, and of the CUDA, ROCm (HIP) and oneAPI (Intel) that it is built for; empty if it
    was built without, or is not installed."""

    version: str = ""
    cuda: str = ""
    hip: str = ""
    xpu: str = ""


def read_torch_build(package: Path | None = None) -> TorchBuild:
    """Read the torch build from its `version.py` as text. `package` is torch's folder."""
    if package is None:
        try:
            found = importlib.util.find_spec("torch")
        except (ImportError, ValueError):
            found = None
        if found is None or found.origin is None:
            return TorchBuild()
        package = Path(found.origin).parent
    try:
        text = (package / "version.py").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return TorchBuild()

    def value(name: str) -> str:
        found = re.search(rf"^{name}\s*(?::[^=\n]*)?=\s*['\"]([^'\"]*)['\"]", text, re.MULTILINE)
        return found.group(1) if found else ""

    return TorchBuild(value("__version__"), value("cuda"), value("hip"), value("xpu"))
