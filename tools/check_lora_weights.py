"""The numbers of an adapter's file: shape, mean and least magnitude of each tensor, and what is wrong with them.

python networks/check_lora_weights.py dog.safetensors
python networks/check_lora_weights.py dog.safetensors --show_all_keys
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started by its path, a script finds its own folder only

from library.options.flag import flag
from library.options.tool_command import Tool, run_tool
from tools.lora_files import read_files

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class CheckOptions:
    """What it is told, in kohya's spelling."""

    file: Path = flag(None, "the adapter's file; its name alone will do")
    show_all_keys: bool = flag(False, "all tensors, not the factors alone; or -s")


def work(options: CheckOptions) -> None:
    """Read and print."""
    tensors = read_files([options.file])[0].tensors
    factors = [key for key in tensors if ".lora_down." in key or ".lora_up." in key]
    shown = list(tensors) if options.show_all_keys or not factors else factors
    print(f"number of layers: {len({key.partition('.')[0] for key in tensors})}")
    print(f"number of tensors: {len(tensors)}, shown: {len(shown)}")
    for key in shown:
        print(line(key, tensors[key]))
    for warning in warnings(tensors):
        print(warning)


def line(key: str, tensor: Tensor) -> str:
    """name,(rows-columns),mean magnitude,least magnitude: as sd-scripts prints it."""
    shape = str(tuple(tensor.shape)).replace(", ", "-")
    if not tensor.numel():
        return f"{key},{shape},,"
    magnitudes = tensor.float().abs()
    return f"{key},{shape},{float(magnitudes.mean())},{float(magnitudes.min())}"


def warnings(tensors: dict[str, Tensor]) -> list[str]:
    """What a user should know: numbers that are not finite, layers that do nothing."""
    found = []
    broken = [key for key, tensor in tensors.items() if not bool(tensor.float().isfinite().all())]
    if broken:
        found.append(f"NaN or infinite numbers in {len(broken)} tensors: {', '.join(broken[:3])}")
    idle = [key.partition(".")[0] for key, tensor in tensors.items() if ".lora_up." in key and not bool(tensor.any())]
    if idle:
        found.append(f"{len(idle)} layers do nothing, their lora_up is 0: {', '.join(idle[:3])}")
    return found


TOOL = Tool(
    "Show the numbers of an adapter's file.",
    "python networks/check_lora_weights.py FILE [--show_all_keys]",
    CheckOptions,
    work,
    required={"file": "give the adapter's file: check_lora_weights.py dog.safetensors"},
)


def main(words: Sequence[str] | None = None) -> int:
    """Show one file. Returns the exit code: 0 done, 2 mistakes of the user, 130 interrupted."""
    return run_tool(TOOL, named(sys.argv[1:] if words is None else words))


def named(words: Sequence[str]) -> list[str]:
    """The words with the name of the file behind --file, and -s in full."""
    found: list[str] = []
    for word in words:
        if word == "-s":
            found.append("--show_all_keys")
        elif word.startswith("-") or found[-1:] == ["--file"]:
            found.append(word)
        else:
            found += ["--file", word]
    return found


if __name__ == "__main__":
    raise SystemExit(main())
