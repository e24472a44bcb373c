"""Print shape, mean magnitude and smallest magnitude of an adapter's tensors, with warnings about broken ones.

python networks/check_lora_weights.py dog.safetensors
python networks/check_lora_weights.py dog.safetensors --show_all_keys
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script started by path sees only its own folder

from library.messages import counted, listed
from library.options.flag import flag
from library.options.tool_command import Tool, run_tool
from tools.lora_files import read_as_they_are

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class CheckOptions:
    """Command-line options, named as in sd-scripts."""

    file: Path = flag(None, "the adapter file")
    show_all_keys: bool = flag(False, "show all tensors, not only lora_down and lora_up (short: -s)")


def work(options: CheckOptions) -> None:
    """Read the file and print one line per tensor."""
    tensors = read_as_they_are([options.file], damaged=True)[0].tensors
    factors = [key for key in tensors if ".lora_down." in key or ".lora_up." in key]
    shown = list(tensors) if options.show_all_keys or not factors else factors
    print(f"number of layers: {len({key.partition('.')[0] for key in tensors})}")
    print(f"number of tensors: {len(tensors)}, shown: {len(shown)}")
    for key in shown:
        print(line(key, tensors[key]))
    for warning in warnings(tensors):
        print(warning)


def line(key: str, tensor: Tensor) -> str:
    """Return "name,(rows-columns),mean magnitude,smallest magnitude", the format of sd-scripts."""
    shape = str(tuple(tensor.shape)).replace(", ", "-")
    if not tensor.numel():
        return f"{key},{shape},,"
    magnitudes = tensor.float().abs()
    return f"{key},{shape},{float(magnitudes.mean())},{float(magnitudes.min())}"


def warnings(tensors: dict[str, Tensor]) -> list[str]:
    """Return warnings about tensors with NaN or infinite values and layers without effect."""
    found = []
    broken = [key for key, tensor in tensors.items() if not bool(tensor.float().isfinite().all())]
    if broken:
        found.append(f"NaN or infinite values in {counted(len(broken), 'tensor')}: {listed(broken)}")
    idle = [key.partition(".")[0] for key, tensor in tensors.items() if ".lora_up." in key and not bool(tensor.any())]
    if idle:
        found.append(f"no effect, as lora_up is 0: {counted(len(idle), 'layer')}: {listed(idle)}")
    return found


TOOL = Tool(
    "Show statistics of an adapter's tensors.",
    "python networks/check_lora_weights.py FILE [--show_all_keys]",
    CheckOptions,
    work,
    required={"file": "give the adapter file: check_lora_weights.py dog.safetensors"},
    positional=("file",),
    aliases={"-s": "--show_all_keys"},
)


def main(words: Sequence[str] | None = None) -> int:
    """Check one file. Returns the exit code: 0 done, 2 user error, 130 interrupted."""
    return run_tool(TOOL, words)


if __name__ == "__main__":
    raise SystemExit(main())
