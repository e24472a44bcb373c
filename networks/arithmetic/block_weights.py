"""Merge ratios by U-Net block (--lbws), numbered as in WebUIs' "LoRA block weight" and sd-scripts. No torch.

26 numbers: BASE (the text encoders), IN00 to IN11, MID, OUT00 to OUT11. 17: the blocks with attention in SD1 and SD2.
20: the blocks of SDXL. 12: those of SDXL with attention. Blocks that are not in a list have the ratio 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from library.bounded import json_of

IN, MID, OUT = 1, 13, 14  # indices in the list of 26
INDICES: Mapping[int, tuple[int, ...]] = MappingProxyType(
    {
        12: (0, *(IN + n for n in (4, 5, 7, 8)), MID, *(OUT + n for n in range(6))),
        17: (0, *(IN + n for n in (1, 2, 4, 5, 7, 8)), MID, *(OUT + n for n in range(3, 12))),
        20: (0, *(IN + n for n in range(9)), MID, *(OUT + n for n in range(9))),
        26: tuple(range(26)),
    }
)
_LEVEL = re.compile(r"_unet_(down|up)_blocks_(\d+)_(resnets|attentions|downsamplers|upsamplers)_(\d+)_")
_NUMBERED = re.compile(r"_unet_(input|output)_blocks_(\d+)_")


def read_block_weights(text: str) -> dict[int, float]:
    """Ratios by index from a JSON list of numbers. ValueError("is …") for anything else."""
    try:
        numbers = json_of(text)
    except ValueError:
        raise ValueError("is not a JSON list") from None
    if not isinstance(numbers, list) or any(isinstance(n, bool) or not isinstance(n, (int, float)) for n in numbers):
        raise ValueError("is not a list of numbers")
    if len(numbers) not in INDICES:
        raise ValueError(f"has {len(numbers)} numbers, expected {', '.join(map(str, INDICES))}")
    return dict(zip(INDICES[len(numbers)], map(float, numbers), strict=True))


def block_index(name: str) -> int | None:
    """The index of a layer's block in the list of 26, by the layer's name in files; None outside the blocks."""
    if "_te" in name.partition("_unet_")[0]:
        return 0
    if (match := _LEVEL.search(name)) is not None:
        level, index = int(match[2]), int(match[4])
        if match[3] == "downsamplers":
            return IN + 3 * (level + 1)
        if match[3] == "upsamplers":
            return OUT + 3 * level + 2
        return IN + 3 * level + index + 1 if match[1] == "down" else OUT + 3 * level + index
    if (match := _NUMBERED.search(name)) is not None:
        return (IN if match[1] == "input" else OUT) + int(match[2])
    return MID if "_unet_mid" in name else None


def block_weight(weights: Mapping[int, float], name: str) -> float:
    """The ratio of a layer."""
    index = block_index(name)
    return 1.0 if index is None else weights.get(index, 1.0)
