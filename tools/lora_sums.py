"""What merge_lora.py and svd_merge_lora.py have in common: several LoRAs, each with its ratio.

No program, and no torch at module level.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from library.options.flag import flag
from library.options.mistakes import Mistake, Mistakes, UserError
from networks.arithmetic.block_weights import block_weight, read_block_weights
from tools.lora_files import PRECISIONS, layers_of, read_files, write_layers
from tools.lora_models import lora_facts

if TYPE_CHECKING:
    from networks.adapter_files import AdapterFile
    from networks.arithmetic.combining import Combined, WeightedFactors

REQUIRED = {
    "models": "give the LoRAs: --models a.safetensors b.safetensors",
    "ratios": "give one number for each LoRA: --ratios 0.7 0.3",
    "save_to": "give the new file: --save_to sum.safetensors",
}


@dataclass(frozen=True)
class SumOptions:
    """What both are told, in kohya's spelling."""

    models: tuple[Path, ...] = flag((), "the LoRAs")
    ratios: tuple[float, ...] = flag((), "what each is multiplied with; may be below 0")
    save_to: Path = flag(None, "the new file: .safetensors, .ckpt, .pt or .pth")
    save_precision: str | None = flag(None, "numbers of the new file. Not set: --precision", choices=PRECISIONS)
    precision: str = flag("float", "it is computed in float always; stands in for --save_precision", choices=PRECISIONS)
    no_metadata: bool = flag(False, "write only the metadata that loaders need")
    lbws: tuple[str, ...] = flag((), "for each LoRA, ratios by block as a JSON list of 12, 17, 20 or 26 numbers")

    @property
    def dtype(self) -> str:
        """The precision of the new file."""
        return self.save_precision or self.precision


def check_sum(options: SumOptions, mistakes: Mistakes) -> None:
    """What is wrong with the LoRAs and their ratios."""
    count = len(options.models)
    for name, given in (("ratios", options.ratios), ("lbws", options.lbws)):
        if options.models and given and len(given) != count:
            what = f"--models has {count} files and --{name} {len(given)} values"
            mistakes.add(what, "give one for each LoRA, in the same order")
    for text in options.lbws:
        try:
            read_block_weights(text)
        except ValueError as error:
            mistakes.add(f"--lbws {text} {error}", "give a list such as [1,1,0.5,…] in quotes")


def ratios_by_layer(options: SumOptions) -> list[Callable[[str], float]]:
    """For each LoRA, what a layer is multiplied with, by the layer's name."""
    weights = [read_block_weights(text) for text in options.lbws] or [{} for _ in options.models]
    return [partial(_ratio, ratio, by_block) for ratio, by_block in zip(options.ratios, weights, strict=True)]


def _ratio(ratio: float, by_block: Mapping[int, float], name: str) -> float:
    return ratio * block_weight(by_block, name)


def read_sources(options: SumOptions) -> tuple[list[AdapterFile], list[WeightedFactors]]:
    """The files and what of them is summed. Raises UserError with every file that cannot be."""
    from networks.arithmetic.combining import WeightedFactors

    files = read_files(options.models)
    check_bases(options.models, files)
    layers = layers_of(list(zip(options.models, files, strict=True)))
    sources = [
        WeightedFactors(str(path), found, ratio)
        for path, found, ratio in zip(options.models, layers, ratios_by_layer(options), strict=True)
    ]
    return files, sources


def check_bases(paths: Sequence[Path], files: Sequence[AdapterFile]) -> None:
    """Refuse LoRAs of different kinds of models, where their metadata tell."""
    bases: dict[str, Path] = {}
    for path, file in zip(paths, files, strict=True):
        if base := file.metadata.get("ss_base_model_version"):
            bases.setdefault(base.removesuffix("_v"), path)
    if len(bases) > 1:
        what = "; ".join(f"{path} is of {base}" for base, path in bases.items())
        raise UserError([Mistake(f"the LoRAs are of different kinds of models: {what}", "sum LoRAs of one kind")])


def write_sum(options: SumOptions, files: Sequence[AdapterFile], combined: Combined) -> None:
    """Write the new LoRA and tell what it is. Raises UserError."""
    from library.training.saving.model_file import time_of_saving
    from networks.arithmetic.result_metadata import ResultInfo, merged_metadata, minimal_metadata, title_of

    names = [title_of(file.metadata, path.stem) for path, file in zip(options.models, files, strict=True)]
    base = next((file.metadata[key] for file in files if (key := "ss_base_model_version") in file.metadata), "")
    about = ResultInfo(options.save_to.stem, time_of_saving(), names, lora_facts(base))
    metadata = merged_metadata([file.metadata for file in files], combined.layers, about)
    dim = metadata["ss_network_dim"]
    metadata = minimal_metadata(metadata) if options.no_metadata else metadata
    write_layers(options.save_to, combined.layers, options.dtype, metadata)
    print(f"{options.save_to}: {len(combined.layers)} layers, rank {dim}, {combined.kept:.2%} of the sum's norm")
    if options.precision != "float":
        print(f"--precision {options.precision}: it was computed in float all the same")
