"""A LoRA from the difference of two models: what a training changed, at a rank.

python networks/extract_lora_from_models.py --model_org sd15.safetensors --model_tuned dog.safetensors --dim 16 \
    --save_to dog_lora.safetensors
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started by its path, a script finds its own folder only

from library.options.flag import flag
from library.options.mistakes import Mistake, Mistakes, UserError
from library.options.tool_command import Tool, run_tool
from tools.lora_files import PRECISIONS, check_ending, compute_device, explain_write_errors, write_layers
from tools.lora_models import Opened, adapted_modules, coarsest, load, lora_facts, open_models

if TYPE_CHECKING:
    from networks.arithmetic.extraction import Extracted


@dataclass(frozen=True)
class ExtractOptions:
    """What it is told, in kohya's spelling."""

    model_org: str = flag(None, "the model that the training began with: a file or a diffusers folder")
    model_tuned: str = flag(None, "the model that came out of it")
    save_to: Path = flag(None, "the new LoRA: .safetensors, .ckpt, .pt or .pth")
    dim: int = flag(4, "its rank", at_least=1)
    conv_dim: int | None = flag(
        None, "its rank on 3x3 convolutions. Not set: without them", at_least=1, zero_is_off=True
    )
    save_precision: str | None = flag(None, "numbers of the new file. Not set: float", choices=PRECISIONS)
    load_precision: str | None = flag(None, "numbers of the models in memory. Not set: float", choices=PRECISIONS)
    device: str | None = flag(None, "where it is computed, such as cuda. Not set: cpu")
    clamp_quantile: float = flag(1.0, "cut outliers beyond this quantile; sd-scripts: 0.99, 1: not", above=0, at_most=1)
    min_diff: float = flag(
        0.0, "leave a text encoder out if no number of it differs by more; sd-scripts: 0.01", at_least=0
    )
    v2: bool = flag(False, "the models are Stable Diffusion 2.x; the files tell, a contradiction is an error")
    sdxl: bool = flag(False, "the models are SDXL; the files tell, a contradiction is an error")
    v_parameterization: bool = flag(False, "note v-prediction in the new file; a diffusers folder tells itself")
    no_metadata: bool = flag(False, "write only the metadata that loaders need")
    load_original_model_to: str | None = flag(None, "not needed: one layer at a time goes to --device")
    load_tuned_model_to: str | None = flag(None, "not needed: one layer at a time goes to --device")


def check(options: ExtractOptions, mistakes: Mistakes) -> None:
    """What is wrong with options as a whole."""
    check_ending(options.save_to, mistakes)
    if options.v2 and options.sdxl:
        mistakes.add("--v2 and --sdxl exclude each other", "leave both out: the files tell what they are")


def work(options: ExtractOptions) -> None:
    """Load both, take the differences, write, tell."""
    device = compute_device(options.device)
    named = {"model_org": options.model_org, "model_tuned": options.model_tuned}
    before, after = open_models(named, v2=options.v2, sdxl=options.sdxl, v_parameterization=options.v_parameterization)
    from library.runtime.precision import torch_dtype
    from networks.arithmetic.extraction import Depth, extract, find_changes, left_out

    parts = before.family.adapters
    only = {part.module for part in parts}
    dtype = torch_dtype(options.load_precision or "float")
    original, tuned = (adapted_modules(load(each, dtype, only)) for each in (before, after))
    depth = Depth(
        options.dim,
        options.conv_dim,
        {part.module: options.min_diff for part in parts if part.module != before.family.backbone},
        options.clamp_quantile,
        coarsest(before, after),
    )
    with explain_write_errors():
        changes = find_changes(original, tuned, parts, kernels=options.conv_dim is not None)
        found = extract(changes, depth, device)
    for part in found.skipped:
        print(f"{part}: left out, as it differs by {found.largest[part]:g} at most (--min_diff {options.min_diff:g})")
    if not found.layers:
        what = f"no layer of {options.model_tuned} differs from {options.model_org}"
        raise UserError([Mistake(what, "give the model before and the one after the training")])
    told = metadata(options, before, after, found)
    write_layers(options.save_to, found.layers, options.save_precision or "float", told)
    tell(options, found, left_out(original, tuned, parts, found.layers, depth.unchanged_in))


def metadata(options: ExtractOptions, before: Opened, after: Opened, found: Extracted) -> dict[str, str]:
    """What the new file says of itself."""
    from library.training.saving.model_file import time_of_saving
    from networks.arithmetic.result_metadata import About, extracted, minimum

    prediction = after.prediction or before.prediction
    if prediction is None and len(set(after.family.architectures.values())) > 1:
        print("the models do not tell what they predict: noted as epsilon; add --v_parameterization if it is v")
    version = after.family.versions[prediction or "epsilon"]
    about = About(options.save_to.stem, time_of_saving(), model=lora_facts(version, prediction))
    full = extracted(found.layers, about, v2="v2" in after.family.capabilities, base_version=version)
    return minimum(full) if options.no_metadata else full


def tell(options: ExtractOptions, found: Extracted, missing: tuple[int, int]) -> None:
    """What is in the new file, and what of the difference is not."""
    print(f"{options.save_to}: {len(found.layers)} layers, {found.kept:.2%} of their differences' norm")
    if found.same:
        print(f"{found.same} layers did not change and are not in it")
    kernels, others = missing
    if kernels:
        print(f"{kernels} convolutions changed and are not in it" + ("" if options.conv_dim else ": add --conv_dim"))
    if others:
        print(f"{others} other tensors (norms, biases, embeddings …) changed, which a LoRA does not hold")
    for name in ("load_original_model_to", "load_tuned_model_to"):
        if getattr(options, name):
            print(f"--{name} is not needed: one layer at a time goes to --device")


TOOL = Tool(
    "Extract a LoRA from the difference of two models.",
    "python networks/extract_lora_from_models.py --model_org MODEL --model_tuned MODEL --save_to FILE [more flags]",
    ExtractOptions,
    work,
    required={
        "model_org": "give the model that the training began with: --model_org sd15.safetensors",
        "model_tuned": "give the model that came out of it: --model_tuned dog.safetensors",
        "save_to": "give the new file: --save_to dog_lora.safetensors",
    },
    check=check,
)


def main(words: Sequence[str] | None = None) -> int:
    """Extract. Returns the exit code: 0 done, 2 mistakes of the user, 130 interrupted."""
    return run_tool(TOOL, words)


if __name__ == "__main__":
    raise SystemExit(main())
