"""Extract LoRAs of lower ranks from a DyLoRA: NAME-0004.safetensors, NAME-0008.safetensors and so on.

python networks/extract_lora_from_dylora.py --model dog.safetensors --save_to out/dog.safetensors --unit 4
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script started by path sees only its own folder

from library.options.flag import flag
from library.options.mistakes import Mistake, Mistakes, UserError
from library.options.tool_command import Tool, run_tool
from tools.lora_files import check_ending, layers_of, precision_of, read_files, write_layers


@dataclass(frozen=True)
class SplitOptions:
    """Command-line options, named as in sd-scripts."""

    model: Path = flag(None, "the DyLoRA")
    save_to: Path = flag(None, "name of the new files; the rank is appended, as four digits")
    unit: int = flag(
        None, "step between the ranks of the new files, which stay below the rank of the DyLoRA", at_least=1
    )
    keep_alpha: bool = flag(False, "keep alpha unchanged as sd-scripts does, which makes the new LoRAs stronger")


def check(options: SplitOptions, mistakes: Mistakes) -> None:
    """Add mistakes that concern more than one flag."""
    check_ending(options.save_to, mistakes)


def work(options: SplitOptions) -> None:
    """Read the DyLoRA and write one file per rank."""
    from networks.arithmetic.result_metadata import resized_metadata
    from networks.arithmetic.splitting import split

    file = read_files([options.model])[0]
    layers = layers_of([(options.model, file)])[0]
    largest = max(layer.rank for layer in layers.values())
    if options.unit >= largest:
        what = f"--unit {options.unit} is not below the rank of {options.model}, which is {largest}"
        raise UserError([Mistake(what, f"use a smaller value, such as {max(1, largest // 4)}")])
    for rank, part in split(layers, options.unit, keep_alpha=options.keep_alpha):
        path = options.save_to.with_name(f"{options.save_to.stem}-{rank:04d}{options.save_to.suffix}")
        metadata = resized_metadata(file.metadata, part, f"split from DyLoRA, rank {largest} to {rank}")
        write_layers(path, part, precision_of(file), metadata)
        print(path)


TOOL = Tool(
    "Extract LoRAs of lower ranks from a DyLoRA.",
    "python networks/extract_lora_from_dylora.py --model LORA --save_to FILE --unit 4",
    SplitOptions,
    work,
    required={
        "model": "give the DyLoRA: --model dog.safetensors",
        "save_to": "give the name of the new files: --save_to dog.safetensors",
        "unit": "give the step between ranks: --unit 4",
    },
    check=check,
)


def main(words: Sequence[str] | None = None) -> int:
    """Split one file. Returns the exit code: 0 done, 2 user error, 130 interrupted."""
    return run_tool(TOOL, words)


if __name__ == "__main__":
    raise SystemExit(main())
