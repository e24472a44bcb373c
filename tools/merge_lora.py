"""Merge adapters into a model, or several LoRAs into one LoRA.

python networks/merge_lora.py --sd_model sd15.safetensors --models dog.safetensors --ratios 0.8 --save_to m.safetensors
python networks/merge_lora.py --models dog.safetensors ink.safetensors --ratios 0.7 0.5 --save_to both.safetensors
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script started by path sees only its own folder

from library.messages import counted
from library.options.flag import flag
from library.options.mistakes import Mistakes
from library.options.tool_command import Tool, run_tool
from tools.lora_files import check_ending, explain_write_errors, read_files, together
from tools.lora_sums import REQUIRED, SumOptions, check_sum, ratios_by_layer, read_sources, write_sum

if TYPE_CHECKING:
    from torch import Tensor

    from library.families.family import Model, SaveAs
    from networks.adapter_files import AdapterFile


@dataclass(frozen=True)
class MergeOptions(SumOptions):
    """Further command-line options, named as in sd-scripts."""

    sd_model: str | None = flag(
        None, "the model to merge adapters of any kind into. Not set: merge LoRAs into one LoRA"
    )
    v2: bool = flag(False, "the model is Stable Diffusion 2.x; detected from the file, an error if it is not")
    v_parameterization: bool = flag(False, "the model uses v-prediction; diffusers folders declare it themselves")
    concat: bool = flag(False, "keep the whole sum: the new rank is the sum of all ranks. Not set: the largest")
    shuffle: bool = flag(False, "shuffle the ranks of the new LoRA; its effect stays the same")


def check(options: MergeOptions, mistakes: Mistakes) -> None:
    """Add mistakes that concern more than one flag."""
    check_sum(options, mistakes)
    if options.sd_model is None:
        check_ending(options.save_to, mistakes)
        return
    if options.save_to is not None and options.save_to.suffix:
        check_ending(options.save_to, mistakes, (".safetensors", ".ckpt"))
    for name in ("concat", "shuffle"):
        if getattr(options, name):
            mistakes.add(f"--{name} has no effect with --sd_model", f"remove --{name} or --sd_model")


def work(options: MergeOptions) -> None:
    """Merge into --sd_model if set, otherwise into one LoRA."""
    if options.sd_model is not None:
        merge_into_model(options, options.sd_model)
        return
    from networks.arithmetic.combining import combine, largest_rank, shuffle_ranks

    files, sources = read_sources(options)
    with explain_write_errors():
        combined = combine(sources, None if options.concat else largest_rank)
    if options.shuffle:
        combined.layers.update({name: shuffle_ranks(layer) for name, layer in combined.layers.items()})
    write_sum(options, files, combined)
    if combined.kept < 0.9999:
        print("add --concat to keep the whole sum, at a higher rank")


def merge_into_model(options: MergeOptions, name: str) -> None:
    """Compute W + ratio * ΔW for each adapter in turn, in float32; rounded once when saved. Raises UserError."""
    from library.families.registry import save_model
    from library.runtime.precision import torch_dtype
    from networks.arithmetic.result_metadata import title_of
    from tools.lora_models import load, merged_metadata, open_models

    is_v = options.v_parameterization
    [opened], files = together(
        lambda: open_models({"sd_model": name}, v2=options.v2, v_parameterization=is_v),
        lambda: read_files(options.models),
    )
    model = load(opened)
    for path, file, ratio in zip(options.models, files, ratios_by_layer(options), strict=True):
        merge_file(model, path, file, ratio)
    names = [title_of(file.metadata, path.stem) for path, file in zip(options.models, files, strict=True)]
    metadata = None if options.no_metadata else merged_metadata(opened, options.save_to.stem, names)
    kinds: dict[str, SaveAs] = {".safetensors": "safetensors", ".ckpt": "ckpt", "": "diffusers_safetensors"}
    with explain_write_errors():
        notes = save_model(
            model,
            options.save_to,
            save_as=kinds[options.save_to.suffix],
            dtype=torch_dtype(options.dtype),
            metadata=metadata,
        )
    print("\n".join([*model.notes, *notes, str(options.save_to)]))


def merge_file(model: Model, path: Path, file: AdapterFile, ratio: Callable[[str], float]) -> None:
    """Merge one file, each layer with its own ratio; layers with ratio 0 are skipped. Raises UserError."""
    from networks.network import from_tensors
    from tools.lora_models import adapted_modules

    by_ratio: dict[float, dict[str, Tensor]] = {}
    for key, tensor in file.tensors.items():
        by_ratio.setdefault(ratio(key.partition(".")[0]), {})[key] = tensor
    for share, tensors in by_ratio.items():
        with explain_write_errors(path):
            network = from_tensors(adapted_modules(model), model.family.adapters, tensors)
            if share != 0:
                network.merge(share)
        print(f"{path}: {counted(len({key.partition('.')[0] for key in tensors}), 'layer')}, ratio {share:g}")


TOOL = Tool(
    "Merge adapters into a model, or several LoRAs into one LoRA.",
    "python networks/merge_lora.py [--sd_model MODEL] --models A B --ratios 0.7 0.3 --save_to FILE [more flags]",
    MergeOptions,
    work,
    required=REQUIRED,
    check=check,
)


def main(words: Sequence[str] | None = None) -> int:
    """Merge. Returns the exit code: 0 done, 2 user error, 130 interrupted."""
    return run_tool(TOOL, words)


if __name__ == "__main__":
    raise SystemExit(main())
