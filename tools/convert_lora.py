"""Convert a LoRA between kohya's file, diffusers' file and PEFT's folders, and an adapter of any kind to kohya's names.

python tools/convert_lora.py dog.safetensors dog_diffusers
python tools/convert_lora.py dog.safetensors dog_peft --to peft
python tools/convert_lora.py dog_peft dog.safetensors
python tools/convert_lora.py dog_comfyui.safetensors dog.safetensors

Weights, alphas and DoRA magnitudes stay the same, bit for bit, in both directions. A file with layers that the target
format cannot hold is refused, and nothing is written. Besides these formats it reads files of ComfyUI, LyCORIS,
OneTrainer, SimpleTuner and earlier diffusers. Other kinds than LoRA get kohya's names; OFT is written with its
constraint applied, as WebUIs read it.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script started by path sees only its own folder

from library.messages import counted
from library.options.flag import flag
from library.options.tool_command import Tool, run_tool
from tools.lora_files import explain_write_errors

if TYPE_CHECKING:
    from networks.formats.convert_keys import Format

FORMATS: tuple[Format, ...] = ("kohya", "diffusers", "peft")


@dataclass(frozen=True)
class ConvertLoraOptions:
    """Command-line options."""

    source: Path = flag(None, "a file of any program, or the folder of diffusers or PEFT")
    target: Path = flag(None, "the new file or folder, which must not exist")
    to: Format | None = flag(
        None, "format to write. Not set: kohya, or diffusers if the source is kohya", choices=FORMATS
    )


def work(options: ConvertLoraOptions) -> None:
    """Convert the LoRA and print a summary. Raises UserError; nothing is written then."""
    from library.families.registry import FAMILIES
    from networks.formats.read_write import read_lora, read_other_kind, write_lora, write_other_kind

    families = [family.adapters for family in FAMILIES]
    with explain_write_errors(options.source):
        other = read_other_kind(options.source, *families) if options.to in (None, "kohya") else None
        if other is not None:
            write_other_kind(options.target, other)
            layers = counted(len({key.partition(".")[0] for key in other.tensors}), "layer")
            print("\n".join([*other.notes, f"{options.source} -> {options.target} (kohya): {layers}"]))
            return
        lora, found = read_lora(options.source, *families)
        target_format: Format = options.to or ("diffusers" if found == "kohya" else "kohya")
        path = write_lora(options.target, lora, target_format)
    by_module = Counter(layer.place.part.module for layer in lora.layers)
    counts = ", ".join(f"{module} {number}" for module, number in by_module.items())
    print("\n".join([*lora.notes, f"{options.source} ({found}) -> {path} ({target_format}): layers of {counts}"]))


TOOL = Tool(
    "Convert a LoRA between kohya's, diffusers' and PEFT's formats, or an adapter of any kind to kohya's names.",
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
