"""Merge LoRAs of any rank into one LoRA of a given rank, by SVD.

python networks/svd_merge_lora.py --models dog.safetensors ink.safetensors --ratios 0.7 0.5 --new_rank 16 \
    --save_to both.safetensors
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script started by path sees only its own folder

from library.options.flag import flag
from library.options.mistakes import Mistakes
from library.options.tool_command import Tool, run_tool
from tools.lora_files import check_ending, compute_device, explain_write_errors
from tools.lora_sums import REQUIRED, SumOptions, check_sum, read_sources, write_sum

if TYPE_CHECKING:
    from networks.arithmetic.factors import Factors


@dataclass(frozen=True)
class SvdMergeOptions(SumOptions):
    """Further command-line options, named as in sd-scripts."""

    new_rank: int = flag(4, "rank of the new LoRA", at_least=1)
    new_conv_rank: int | None = flag(
        None, "the same for convolutions larger than 1x1. Not set: --new_rank", at_least=1, zero_is_off=True
    )
    device: str | None = flag(None, "device to compute on, such as cuda. Not set: cpu")
    clamp_quantile: float = flag(1.0, "clamp outliers to this quantile; 1 = off (sd-scripts: 0.99)", above=0, at_most=1)


def check(options: SvdMergeOptions, mistakes: Mistakes) -> None:
    """Add mistakes that concern more than one flag."""
    check_sum(options, mistakes)
    check_ending(options.save_to, mistakes)


def work(options: SvdMergeOptions) -> None:
    """Read the LoRAs, sum them, reduce the rank and write the result."""
    from networks.arithmetic.combining import combine

    def rank(terms: Sequence[tuple[Factors, float]]) -> int:
        return (options.new_conv_rank if terms[0][0].is_kernel else None) or options.new_rank

    device = compute_device(options.device)
    files, sources = read_sources(options)
    with explain_write_errors():
        combined = combine(sources, rank, device, options.clamp_quantile)
    write_sum(options, files, combined)


TOOL = Tool(
    "Merge LoRAs of any rank into one LoRA of a given rank.",
    "python networks/svd_merge_lora.py --models A B --ratios 0.7 0.3 --save_to FILE --new_rank 16 [more flags]",
    SvdMergeOptions,
    work,
    required=REQUIRED,
    check=check,
)


def main(words: Sequence[str] | None = None) -> int:
    """Merge. Returns the exit code: 0 done, 2 user error, 130 interrupted."""
    return run_tool(TOOL, words)


if __name__ == "__main__":
    raise SystemExit(main())
