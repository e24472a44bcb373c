"""Convert a LoRA between kohya's file, diffusers' file and PEFT's folders.

python tools/convert_lora.py dog.safetensors dog_diffusers
python tools/convert_lora.py dog.safetensors dog_peft --to peft
python tools/convert_lora.py dog_peft dog.safetensors

Weights, alphas and DoRA magnitudes stay the same, bit for bit, in both directions. A file with layers that the target
format cannot hold is refused, and nothing is written.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script started by path sees only its own folder

from library.options.flag import flag
from library.options.tool_command import Tool, run_tool
from tools.lora_files import explain_write_errors

if TYPE_CHECKING:
    from networks.formats.convert_keys import Format

FORMATS: tuple[Format, ...] = ("kohya", "diffusers", "peft")


@dataclass(frozen=True)
class ConvertLoraOptions:
    """Command-line options."""

    source: Path = flag(None, "kohya's or diffusers' file, or the folder of diffusers or PEFT")
    target: Path = flag(None, "the new file or folder, which must not exist")
    to: Format | None = flag(
        None, "format to write. Not set: kohya, or diffusers if the source is kohya", choices=FORMATS
    )


def work(options: ConvertLoraOptions) -> None:
    """Convert the LoRA and print a summary. Raises UserError; nothing is written then."""
    from library.families.registry import FAMILIES
    from networks.formats.read_write import read_lora, write_lora

    with explain_write_errors(options.source):
        lora, found = read_lora(options.source, *(family.adapters for family in FAMILIES))
        target_format: Format = options.to or ("diffusers" if found == "kohya" else "kohya")
        path = write_lora(options.target, lora, target_format)
    by_module = Counter(layer.place.part.module for layer in lora.layers)
    counts = ", ".join(f"{module} {number}" for module, number in by_module.items())
    print(f"{options.source} ({found}) -> {path} ({target_format}): layers of {counts}")


TOOL = Tool(
    "Convert a LoRA between kohya's, diffusers' and PEFT's formats.",
    "python tools/convert_lora.py SOURCE TARGET [--to FORMAT]",
    ConvertLoraOptions,
    work,
    required={
        "source": "give the LoRA to convert: convert_lora.py dog.safetensors dog_diffusers",
        "target": "give the new file or folder after the source",
    },
    positional=("source", "target"),
)


def main(words: Sequence[str] | None = None) -> int:
    """Convert one LoRA. Returns the exit code: 0 done, 2 user error, 130 interrupted."""
    return run_tool(TOOL, words)


if __name__ == "__main__":
    raise SystemExit(main())
