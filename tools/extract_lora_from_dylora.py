"""LoRAs of lower ranks, cut out of a DyLoRA: NAME-0004.safetensors, NAME-0008.safetensors and so on.

python networks/extract_lora_from_dylora.py --model dog.safetensors --save_to out/dog.safetensors --unit 4
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started by its path, a script finds its own folder only

from library.options.flag import flag
from library.options.mistakes import Mistake, Mistakes, UserError
from library.options.tool_command import Tool, run_tool
from tools.lora_files import check_ending, layers_of, precision_of, read_files, write_layers


@dataclass(frozen=True)
class SplitOptions:
    """What it is told, in kohya's spelling."""

    model: Path = flag(None, "the LoRA that networks.dylora trained")
    save_to: Path = flag(None, "name of the new files; each gets its rank in four digits before the ending")
    unit: int = flag(None, "the ranks of the new files are its multiples, below that of the DyLoRA", at_least=1)
    keep_alpha: bool = flag(False, "leave alpha as it is, as sd-scripts does: the new files are stronger then")


def check(options: SplitOptions, mistakes: Mistakes) -> None:
    """What is wrong with options as a whole."""
    check_ending(options.save_to, mistakes)


def work(options: SplitOptions) -> None:
    """Read, cut, write one file a rank."""
    from networks.arithmetic.result_metadata import resized_metadata
    from networks.arithmetic.splitting import split

    file = read_files([options.model])[0]
    layers = layers_of([(options.model, file)])[0]
    largest = max(layer.rank for layer in layers.values())
    if options.unit >= largest:
        what = f"--unit {options.unit} is no less than the rank of {options.model}, {largest}"
        raise UserError([Mistake(what, f"give a smaller one, such as {max(1, largest // 4)}")])
    for rank, part in split(layers, options.unit, keep_alpha=options.keep_alpha):
        path = options.save_to.with_name(f"{options.save_to.stem}-{rank:04d}{options.save_to.suffix}")
        metadata = resized_metadata(file.metadata, part, f"split from DyLoRA, rank {largest} to {rank}")
        write_layers(path, part, precision_of(file), metadata)
        print(path)


TOOL = Tool(
    "Cut LoRAs of lower ranks out of a DyLoRA.",
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
    """Split one file. Returns the exit code: 0 done, 2 mistakes of the user, 130 interrupted."""
    return run_tool(TOOL, words)


if __name__ == "__main__":
    raise SystemExit(main())
