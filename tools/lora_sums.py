"""Shared by merge_lora.py and svd_merge_lora.py: summing several LoRAs, each with its ratio.

Not a program. No torch at module level.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from library.messages import counted
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
    "ratios": "give one number per LoRA: --ratios 0.7 0.3",
    "save_to": "give the new file: --save_to sum.safetensors",
}


@dataclass(frozen=True)
class SumOptions:
    """Command-line options of both, named as in sd-scripts."""

    models: tuple[Path, ...] = flag((), "the LoRAs")
    ratios: tuple[float, ...] = flag((), "the factor of each LoRA; may be negative")
    save_to: Path = flag(None, "the new file: .safetensors, .ckpt, .pt or .pth")
    save_precision: str | None = flag(None, "precision of the new file. Not set: --precision", choices=PRECISIONS)
    precision: str = flag("float", "default of --save_precision; the sum is computed in float", choices=PRECISIONS)
    no_metadata: bool = flag(False, "write only the metadata needed to load the file")
    lbws: tuple[str, ...] = flag((), "per LoRA, ratios per block as a JSON list of 12, 17, 20 or 26 numbers")

    @property
    def dtype(self) -> str:
        """The precision of the new file."""
        return self.save_precision or self.precision


def check_sum(options: SumOptions, mistakes: Mistakes) -> None:
    """Add mistakes in the LoRAs and their ratios."""
    count = len(options.models)
    for name, given in (("ratios", options.ratios), ("lbws", options.lbws)):
        if options.models and given and len(given) != count:
            what = f"--models has {counted(count, 'file')} and --{name} {counted(len(given), 'value')}"
            mistakes.add(what, "give one per LoRA, in the same order")
    for text in options.lbws:
        try:
            read_block_weights(text)
        except ValueError as error:
            mistakes.add(f"--lbws {text} {error}", "give a list such as [1,1,0.5,…] in quotes")


def ratios_by_layer(options: SumOptions) -> list[Callable[[str], float]]:
    """Return for each LoRA a function from a layer's name to its factor."""
    weights = [read_block_weights(text) for text in options.lbws] or [{} for _ in options.models]
    return [partial(_ratio, ratio, by_block) for ratio, by_block in zip(options.ratios, weights, strict=True)]


def _ratio(ratio: float, by_block: Mapping[int, float], name: str) -> float:
    return ratio * block_weight(by_block, name)


def read_sources(options: SumOptions) -> tuple[list[AdapterFile], list[WeightedFactors]]:
    """Read the files and their layers with ratios. Raises UserError that names every unsuitable file."""
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
    """Raise UserError if the LoRAs were trained on different kinds of models, as far as their metadata say."""
    bases: dict[str, Path] = {}
    for path, file in zip(paths, files, strict=True):
        if base := file.metadata.get("ss_base_model_version"):
            bases.setdefault(base.removesuffix("_v"), path)
    if len(bases) > 1:
        what = "; ".join(f"{path} is for {base}" for base, path in bases.items())
        raise UserError([Mistake(f"the LoRAs are for different kinds of models: {what}", "give LoRAs of one kind")])


def write_sum(options: SumOptions, files: Sequence[AdapterFile], combined: Combined) -> None:
    """Write the new LoRA and print a summary. Raises UserError."""
    from library.training.saving.model_file import time_of_saving
    from networks.arithmetic.result_metadata import ResultInfo, merged_metadata, minimal_metadata, title_of

    names = [title_of(file.metadata, path.stem) for path, file in zip(options.models, files, strict=True)]
    base = next((file.metadata[key] for file in files if (key := "ss_base_model_version") in file.metadata), "")
    about = ResultInfo(options.save_to.stem, time_of_saving(), names, lora_facts(base))
    metadata = merged_metadata([file.metadata for file in files], combined.layers, about)
    dim = metadata["ss_network_dim"]
    metadata = minimal_metadata(metadata) if options.no_metadata else metadata
    write_layers(options.save_to, combined.layers, options.dtype, metadata)
    layers = counted(len(combined.layers), "layer")
    print(f"{options.save_to}: {layers}, rank {dim}, {combined.kept:.2%} of the sum's norm")
    if options.precision != "float":
        print(f"--precision {options.precision}: the computation is always in float")
