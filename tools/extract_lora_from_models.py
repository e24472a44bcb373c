"""Extract a LoRA from the difference of two models: the low-rank approximation of what training changed.

python networks/extract_lora_from_models.py --model_org sd15.safetensors --model_tuned dog.safetensors --dim 16 \
    --save_to dog_lora.safetensors
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script started by path sees only its own folder

from library.messages import counted
from library.options.flag import flag
from library.options.mistakes import Mistake, Mistakes, UserError
from library.options.tool_command import Tool, run_tool
from tools.lora_files import PRECISIONS, check_ending, compute_device, explain_write_errors, write_layers
from tools.lora_models import Opened, adapted_modules, load, lora_facts, lowest_precision, open_models

if TYPE_CHECKING:
    from networks.arithmetic.extraction import Extracted


@dataclass(frozen=True)
class ExtractOptions:
    """Command-line options, named as in sd-scripts."""

    model_org: str = flag(None, "the base model: a file or a diffusers folder")
    model_tuned: str = flag(None, "the fine-tuned model")
    save_to: Path = flag(None, "the new LoRA: .safetensors, .ckpt, .pt or .pth")
    dim: int = flag(4, "rank of the new LoRA", at_least=1)
    conv_dim: int | None = flag(
        None, "rank for 3x3 convolutions. Not set: convolutions are left out", at_least=1, zero_is_off=True
    )
    save_precision: str | None = flag(None, "precision of the new file. Not set: float", choices=PRECISIONS)
    load_precision: str | None = flag(None, "precision of the models in memory. Not set: float", choices=PRECISIONS)
    device: str | None = flag(None, "device to compute on, such as cuda. Not set: cpu")
    clamp_quantile: float = flag(1.0, "clamp outliers to this quantile; 1 = off (sd-scripts: 0.99)", above=0, at_most=1)
    min_diff: float = flag(
        0.0, "leave out a text encoder whose weights differ by no more than this (sd-scripts: 0.01)", at_least=0
    )
    v2: bool = flag(False, "the models are SD 2.x; detected from the files, an error if they are not")
    sdxl: bool = flag(False, "the models are SDXL; detected from the files, an error if they are not")
    v_parameterization: bool = flag(
        False, "record v-prediction in the new file; diffusers folders declare it themselves"
    )
    no_metadata: bool = flag(False, "write only the metadata needed to load the file")
    load_original_model_to: str | None = flag(None, "no effect: layers are moved to --device one at a time")
    load_tuned_model_to: str | None = flag(None, "no effect: layers are moved to --device one at a time")


def check(options: ExtractOptions, mistakes: Mistakes) -> None:
    """Add mistakes that concern more than one flag."""
    check_ending(options.save_to, mistakes)
    if options.v2 and options.sdxl:
        mistakes.add("--v2 and --sdxl exclude each other", "remove both: the kind is detected from the files")


def work(options: ExtractOptions) -> None:
    """Load both models, extract their difference, write the LoRA and print a summary."""
    device = compute_device(options.device)
    named = {"model_org": options.model_org, "model_tuned": options.model_tuned}
    before, after = open_models(named, v2=options.v2, sdxl=options.sdxl, v_parameterization=options.v_parameterization)
    from library.runtime.precision import torch_dtype
    from networks.arithmetic.extraction import ExtractionSettings, count_unextracted, extract, find_changes

    parts = before.family.adapters
    only = {part.module for part in parts}
    dtype = torch_dtype(options.load_precision or "float")
    original, tuned = (adapted_modules(load(each, dtype, only)) for each in (before, after))
    depth = ExtractionSettings(
        options.dim,
        options.conv_dim,
        {part.module: options.min_diff for part in parts if part.module != before.family.backbone},
        options.clamp_quantile,
        lowest_precision(before, after),
    )
    with explain_write_errors():
        changes = find_changes(original, tuned, parts, kernels=options.conv_dim is not None)
        found = extract(changes, depth, device)
    for part in found.skipped:
        print(f"{part}: left out, the largest difference is {found.largest[part]:g} (--min_diff {options.min_diff:g})")
    if not found.layers:
        what = f"no layer of {options.model_tuned} differs from {options.model_org}"
        raise UserError([Mistake(what, "give the base model and the fine-tuned model")])
    new_metadata = metadata(options, before, after, found)
    write_layers(options.save_to, found.layers, options.save_precision or "float", new_metadata)
    print_summary(options, found, count_unextracted(original, tuned, parts, found.layers, depth.unchanged_in))


def metadata(options: ExtractOptions, before: Opened, after: Opened, found: Extracted) -> dict[str, str]:
    """Return the metadata of the new file."""
    from library.training.saving.model_file import time_of_saving
    from networks.arithmetic.result_metadata import ResultInfo, extracted_metadata, minimal_metadata

    prediction = after.prediction or before.prediction
    if prediction is None and len(set(after.family.architectures.values())) > 1:
        print("the models do not declare their prediction type: recorded as epsilon; for v add --v_parameterization")
    version = after.family.versions[prediction or "epsilon"]
    about = ResultInfo(options.save_to.stem, time_of_saving(), model=lora_facts(version, prediction))
    full = extracted_metadata(found.layers, about, v2="v2" in after.family.capabilities, base_version=version)
    return minimal_metadata(full) if options.no_metadata else full


def print_summary(options: ExtractOptions, found: Extracted, missing: tuple[int, int]) -> None:
    """Print what the new file contains and which changes it does not."""
    print(f"{options.save_to}: {counted(len(found.layers), 'layer')}, {found.kept:.2%} of the difference's norm")
    if found.same:
        print(f"unchanged and left out: {counted(found.same, 'layer')}")
    kernels, others = missing
    if kernels:
        remedy = "" if options.conv_dim else "; add --conv_dim to include them"
        print(f"changed but left out: {counted(kernels, 'convolution')}{remedy}")
    if others:
        print(f"changed, but a LoRA cannot hold them: {counted(others, 'tensor')} (norms, biases, embeddings)")
    for name in ("load_original_model_to", "load_tuned_model_to"):
        if getattr(options, name):
            print(f"--{name} has no effect: layers are moved to --device one at a time")


TOOL = Tool(
    "Extract a LoRA from the difference of two models.",
    "python networks/extract_lora_from_models.py --model_org MODEL --model_tuned MODEL --save_to FILE [more flags]",
    ExtractOptions,
    work,
    required={
        "model_org": "give the base model: --model_org sd15.safetensors",
        "model_tuned": "give the fine-tuned model: --model_tuned dog.safetensors",
        "save_to": "give the new file: --save_to dog_lora.safetensors",
    },
    check=check,
)


def main(words: Sequence[str] | None = None) -> int:
    """Extract a LoRA. Returns the exit code: 0 done, 2 user error, 130 interrupted."""
    return run_tool(TOOL, words)


if __name__ == "__main__":
    raise SystemExit(main())
