"""A LoRA as another program wants it: kohya's file, diffusers' file or PEFT's folders, each into each other.

python tools/convert_lora.py dog.safetensors dog_diffusers
python tools/convert_lora.py dog.safetensors dog_peft --to peft
python tools/convert_lora.py dog_peft dog.safetensors

Weights, alphas and DoRA's lengths stay as they are, bit for bit, there and back. What the other format has no place for
is refused, and then nothing is written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started by its path, a script finds its own folder only

from library.options.mistakes import UserError
from tools.lora_files import explain_write_errors

if TYPE_CHECKING:
    from networks.formats.key_names import Format

FORMATS: tuple[Format, ...] = ("kohya", "diffusers", "peft")


def main(words: Sequence[str] | None = None) -> int:
    """Convert one LoRA. Returns the exit code: 0 done, 2 mistakes of the user."""
    for stream in (sys.stdout, sys.stderr):  # names of files are in any script, also where the output is sent to a file
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="kohya's or diffusers' file, or the folder of diffusers or PEFT")
    parser.add_argument("target", type=Path, help="the new file or folder, which must not be there yet")
    parser.add_argument("--to", choices=FORMATS, help="what to write; not set: kohya's, and from kohya's diffusers'")
    try:
        options = parser.parse_args(words)
    except SystemExit as end:  # --help, or a mistake that argparse has told
        return int(end.code or 0)
    try:
        told = convert(options.source, options.target, options.to)
    except UserError as error:
        print(f"\n{error}", file=sys.stderr)
        return 2
    print(told)
    return 0


def convert(source: Path, target: Path, to: str | None) -> str:
    """Convert a LoRA and say what was done. Raises UserError; then nothing is written."""
    from library.families.registry import FAMILIES
    from networks.formats.read_write import read_lora, write_lora

    with explain_write_errors(source):
        lora, found = read_lora(source, *(family.adapters for family in FAMILIES))
        wanted: Format = next((name for name in FORMATS if name == to), "diffusers" if found == "kohya" else "kohya")
        place = write_lora(target, lora, wanted)
    by_module: dict[str, int] = {}
    for layer in lora.layers:
        by_module[layer.place.part.module] = by_module.get(layer.place.part.module, 0) + 1
    counts = ", ".join(f"{module} {number}" for module, number in by_module.items())
    return f"{source} ({found}) -> {place} ({wanted}): layers of {counts}"


if __name__ == "__main__":
    raise SystemExit(main())
