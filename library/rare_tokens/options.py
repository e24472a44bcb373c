"""Command-line options of tools/find_rare_tokens.py. No torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from library.families.registry import FAMILIES
from library.options.flag import flag
from library.options.mistakes import Mistakes
from library.rare_tokens.candidates import LONGEST, SHORTEST
from library.runtime.device import DEVICES

FORMATS = (".json", ".csv")


@dataclass(frozen=True)
class RareTokenOptions:
    """Flags of the tool. `family` gives the tokenizer only; `ckpt` also the text encoders."""

    ckpt: str | None = flag(
        None,
        "the model whose text encoders measure the names: a file or a diffusers folder; U-Net and VAE are not read",
    )
    family: str | None = flag(
        None,
        "instead of --ckpt: list candidates by the tokenizer of this family alone, in the order of its merges",
        choices=tuple(family.name for family in FAMILIES),
    )
    check: tuple[str, ...] = flag((), "names to check: how many tokens they are, and how rare")
    like: str | None = flag(None, "list the candidates nearest to this name, such as a known word. Needs --ckpt")
    max_length: int = flag(LONGEST, "letters of a candidate at most", at_least=SHORTEST, at_most=LONGEST)
    class_word: str = flag("person", 'the class in the prompts: "a photo of X person"')
    count: int = flag(20, "number of candidates to print", at_least=1)
    save_to: Path | None = flag(None, "write all candidates and checked names to this .json or .csv file")
    batch_size: int = flag(64, "prompts encoded at once", at_least=1)
    device: str | None = flag(None, "device to compute on. Not set: the best available", choices=DEVICES)
    tokenizer_cache_dir: Path | None = flag(None, "folder for tokenizer files")


def check(options: RareTokenOptions, mistakes: Mistakes) -> None:
    """Add mistakes for flags that do not go together."""
    if options.ckpt is None and options.family is None:
        mistakes.add(
            "no --ckpt and no --family", "give the model, or a family to see candidates of its tokenizer alone"
        )
    if options.ckpt is not None and options.family is not None:
        mistakes.add(f"--family {options.family} with --ckpt, which says the family itself", "remove one of the two")
    if options.like is not None and options.ckpt is None:
        mistakes.add("--like needs a text encoder", "add --ckpt with the model")
    if options.save_to is not None and options.save_to.suffix.lower() not in FORMATS:
        mistakes.add(f"--save_to {options.save_to} is neither .json nor .csv", "use one of these extensions")
    elif options.save_to is not None and (problem := _problem(options.save_to)) is not None:
        mistakes.add(f"--save_to {options.save_to} cannot be written: {problem}", "choose another path")


def _problem(path: Path) -> str | None:
    """What keeps a file from being written, as far as it is known before: measuring takes minutes."""
    if path.is_dir():
        return "it is a folder"
    folder = path.absolute().parent
    while not os.path.exists(folder) and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        return f"{folder} is a file"
    return None if os.access(folder, os.W_OK) else f"no permission for {folder}"
