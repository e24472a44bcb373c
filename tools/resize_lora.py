"""Change the rank of a LoRA: to a fixed rank, or per layer by its singular values.

python networks/resize_lora.py --model dog.safetensors --save_to small.safetensors --new_rank 4
python networks/resize_lora.py --model dog.safetensors --save_to small.safetensors --new_rank 32 \
    --dynamic_method sv_fro --dynamic_param 0.95
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script started by path sees only its own folder

from library.messages import counted
from library.options.flag import flag
from library.options.mistakes import Mistakes
from library.options.tool_command import Tool, run_tool
from tools.lora_files import PRECISIONS, check_ending, compute_device, layers_of, read_files, write_layers

if TYPE_CHECKING:
    from networks.arithmetic.factors import Factors
    from networks.arithmetic.resizing import Resized

METHODS = ("sv_ratio", "sv_fro", "sv_cumulative")


@dataclass(frozen=True)
class ResizeOptions:
    """Command-line options, named as in sd-scripts."""

    model: Path = flag(None, "the LoRA")
    save_to: Path = flag(None, "the new file: .safetensors, .ckpt, .pt or .pth")
    new_rank: int = flag(4, "rank of the new LoRA; with --dynamic_method the maximum per layer", at_least=1)
    new_conv_rank: int | None = flag(
        None, "the same for convolutions larger than 1x1. Not set: --new_rank", at_least=1, zero_is_off=True
    )
    dynamic_method: str | None = flag(None, "choose the rank of each layer by its singular values", choices=METHODS)
    dynamic_param: float | None = flag(
        None, "sv_ratio: largest / smallest singular value; sv_fro: share of the norm; sv_cumulative: of the sum",
        above=0,
    )  # fmt: skip
    save_precision: str | None = flag(None, "precision of the new file. Not set: float", choices=PRECISIONS)
    device: str | None = flag(None, "device to compute on, such as cuda. Not set: cpu")
    verbose: bool = flag(False, "print what is kept of each layer")
    svd_lowrank_niter: int | None = flag(None, "no effect: the decomposition is exact", at_least=0)


def check(options: ResizeOptions, mistakes: Mistakes) -> None:
    """Add mistakes that concern more than one flag."""
    check_ending(options.save_to, mistakes)
    method, target = options.dynamic_method, options.dynamic_param
    if method is None and target is not None:
        mistakes.add("--dynamic_param without --dynamic_method", f"add --dynamic_method {METHODS[0]}, or remove it")
    if method is not None and target is None:
        mistakes.add(f"--dynamic_method {method} without --dynamic_param", "add --dynamic_param, such as 0.95")
    if method == "sv_ratio" and target is not None and target < 1:
        mistakes.add(f"--dynamic_param {target:g} with sv_ratio is below 1", "use a ratio such as 10")
    if method in ("sv_fro", "sv_cumulative") and target is not None and target > 1:
        mistakes.add(f"--dynamic_param {target:g} with {method} is above 1", "use a share such as 0.95")


def work(options: ResizeOptions) -> None:
    """Read the LoRA, resize it, write it and print a summary."""
    from networks.arithmetic.resizing import RankRule, resize_all
    from networks.arithmetic.result_metadata import resized_metadata

    device = compute_device(options.device)
    file = read_files([options.model])[0]
    layers = layers_of([(options.model, file)])[0]
    conv_rank = options.new_conv_rank or options.new_rank
    rule = RankRule(options.new_rank, conv_rank, options.dynamic_method, options.dynamic_param or 0.0)
    resized = resize_all(layers, rule, device)
    new = {name: each.layer for name, each in resized.items()}
    dynamic = options.dynamic_method is not None
    if options.verbose:
        print_layers(resized, dynamic=dynamic)
    metadata = resized_metadata(file.metadata, new, comment(options, layers), dynamic=dynamic)
    write_layers(options.save_to, new, options.save_precision or "float", metadata)
    print_summary(options, layers, resized)


def comment(options: ResizeOptions, layers: Mapping[str, Factors]) -> str:
    """Return the text put before ss_training_comment, in the words of sd-scripts."""
    before = max(layer.rank for layer in layers.values())
    if options.dynamic_method is not None:
        return f"Dynamic resize with {options.dynamic_method}: {options.dynamic_param} from {before}"
    conv = options.new_conv_rank
    of_kernels = "" if conv in (None, options.new_rank) else f" (conv: {conv})"
    return f"dimension is resized from {before} to {options.new_rank}{of_kernels}"


def print_layers(resized: Mapping[str, Resized], *, dynamic: bool) -> None:
    """Print one line per layer, in the format of sd-scripts."""
    for name, each in resized.items():
        line = f"{name:75} | sum(S) retained: {each.kept_sum:.1%}, fro retained: {each.kept:.1%}"
        line += f", max(S) ratio: {each.ratio:0.1f}"
        print(line + (f", dynamic | dim: {each.layer.rank}, alpha: {each.layer.alpha}" if dynamic else ""))


def print_summary(options: ResizeOptions, before: Mapping[str, Factors], resized: Mapping[str, Resized]) -> None:
    """Print the new ranks and how much of the LoRA was kept."""
    shares = [each.kept for each in resized.values()]
    smaller = sum(each.layer.rank < before[name].rank for name, each in resized.items())
    ranks = sorted({each.layer.rank for each in resized.values()})
    rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    print(f"{options.save_to}: rank {rank}; lower rank than before in {smaller} of {counted(len(resized), 'layer')}")
    print(f"Average Frobenius norm retention: {sum(shares) / len(shares):.2%}, least {min(shares):.2%}")
    if not smaller:
        print("no layer had a higher rank: the weights are unchanged")
    if options.svd_lowrank_niter is not None:
        print("--svd_lowrank_niter has no effect: the decomposition is exact")


TOOL = Tool(
    "Change the rank of a LoRA.",
    "python networks/resize_lora.py --model LORA --save_to FILE --new_rank 4 [more flags]",
    ResizeOptions,
    work,
    required={
        "model": "give the LoRA: --model dog.safetensors",
        "save_to": "give the new file: --save_to small.safetensors",
    },
    check=check,
)


def main(words: Sequence[str] | None = None) -> int:
    """Resize one LoRA. Returns the exit code: 0 done, 2 user error, 130 interrupted."""
    return run_tool(TOOL, words)


if __name__ == "__main__":
    raise SystemExit(main())
