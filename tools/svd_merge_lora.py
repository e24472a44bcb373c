"""LoRAs of any ranks added up to one LoRA of a rank of its own: the best one there is, by SVD.

python networks/svd_merge_lora.py --models dog.safetensors ink.safetensors --ratios 0.7 0.5 --new_rank 16 \
    --save_to both.safetensors
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started by its path, a script finds its own folder only

from library.options.flag import flag
from library.options.mistakes import Mistakes
from library.options.tool_command import Tool, run_tool
from tools.lora_files import check_ending, compute_device, explain_write_errors
from tools.lora_sums import REQUIRED, SumOptions, check_sum, read_sources, write_sum

if TYPE_CHECKING:
    from networks.arithmetic.factors import Factors


@dataclass(frozen=True)
class SvdMergeOptions(SumOptions):
    """What it is told besides, in kohya's spelling."""

    new_rank: int = flag(4, "rank of the new LoRA", at_least=1)
    new_conv_rank: int | None = flag(
        None, "the same for convolutions larger than 1x1. Not set: --new_rank", at_least=1, zero_is_off=True
    )
    device: str | None = flag(None, "where it is computed, such as cuda. Not set: cpu")
    clamp_quantile: float = flag(1.0, "cut outliers beyond this quantile; sd-scripts: 0.99, 1: not", above=0, at_most=1)


def check(options: SvdMergeOptions, mistakes: Mistakes) -> None:
    """What is wrong with options as a whole."""
    check_sum(options, mistakes)
    check_ending(options.save_to, mistakes)


def work(options: SvdMergeOptions) -> None:
    """Read, add, approximate, write."""
    from networks.arithmetic.combining import combine

    def rank(terms: Sequence[tuple[Factors, float]]) -> int:
        return (options.new_conv_rank if terms[0][0].is_kernel else None) or options.new_rank

    device = compute_device(options.device)
    files, sources = read_sources(options)
    with explain_write_errors():
        combined = combine(sources, rank, device, options.clamp_quantile)
    write_sum(options, files, combined)


TOOL = Tool(
    "Add LoRAs up to one LoRA of a rank of its own.",
    "python networks/svd_merge_lora.py --models A B --ratios 0.7 0.3 --save_to FILE --new_rank 16 [more flags]",
    SvdMergeOptions,
    work,
    required=REQUIRED,
    check=check,
)


def main(words: Sequence[str] | None = None) -> int:
    """Merge. Returns the exit code: 0 done, 2 mistakes of the user, 130 interrupted."""
    return run_tool(TOOL, words)


if __name__ == "__main__":
    raise SystemExit(main())
