"""Layer paths of Stable Diffusion's U-Nets and text encoders, and a U-Net's original paths and blocks, from the tables
that files are loaded with. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from library.checkpoints.keymap import Row, Rule, Sizes, expand
from library.checkpoints.tables import clip_hf

_CONTAINER = re.compile(r"((?:down|up)_blocks\.(\d+)|mid_block)\.(resnets|attentions|downsamplers|upsamplers)\.\d+\.")
_TRANSFORMER = re.compile(r"\.transformer_blocks\.(\d+)\.")
_PLACE = re.compile(r"(?:(?:in|out)put_blocks\.\d+|middle_block)\.\d+(?=\.)")
_BLOCK = re.compile(r"(input|middle|output)_blocks?\.(\d+)\.")
_MIDDLE = 3  # residual block, attention, residual block


def text_layers(layers: int, level: str = "") -> tuple[str, ...]:
    """Return the paths of a CLIP text encoder's layers in transformers' naming, without `level`, a prefix that only
    files have."""
    return tuple(name.removeprefix(level) for name in _modules(expand(clip_hf.ROWS, Sizes({"n": layers}, {}))))


def _modules(rules: Iterable[Rule]) -> Mapping[str, str]:
    """Map diffusers' path to original path of the modules in the rules."""
    pairs = ((rule.diffusers[0].rpartition("."), rule.original.rpartition(".")[0]) for rule in rules)
    return {path: original for (path, _, leaf), original in pairs if leaf == "weight"}


@dataclass(frozen=True)
class UnetNames:
    """Maps paths of a U-Net's layers from diffusers' to the original naming, and to blocks, counted as in sd-scripts.

    `rows`: the table that files are loaded with. `depths`: transformer blocks per attention for each down level (0: no
    attention); `middle`: in the middle block. A level has two residual blocks down and three up.
    """

    rows: tuple[Row, ...]
    depths: tuple[int, ...]
    middle: int

    @property
    def levels(self) -> int:
        """Number of levels."""
        return len(self.depths)

    @cached_property
    def _original(self) -> Mapping[str, str]:
        """diffusers' path -> original path of all layers."""
        depth = max(self.middle, *self.depths)
        # an upsampler comes after the attention, where its level has one
        upsamplers = tuple(2 if depth else 1 for depth in reversed(self.depths))
        sizes = Sizes({"i": self.levels, "j": 2, "k": 3, "d": depth}, {"s": 3, "u": upsamplers})
        return {path: name for path, name in _modules(expand(self.rows, sizes)).items() if self._has(path)}

    @cached_property
    def _containers(self) -> Mapping[str, str]:
        """diffusers' path -> original path of residual blocks, attentions and samplers."""
        pairs = ((_CONTAINER.match(path), _PLACE.match(name)) for path, name in self._original.items())
        return {found[0][:-1]: place[0] for found, place in pairs if found and place}

    def _has(self, path: str) -> bool:
        found = _CONTAINER.match(path)
        if found is None:
            return True
        level = -1 if found[2] is None else int(found[2])
        if found[3].endswith("samplers"):
            return level < self.levels - 1
        if found[3] == "resnets":
            return True
        depth = self.middle if level < 0 else (self.depths if path.startswith("down") else self.depths[::-1])[level]
        inner = _TRANSFORMER.search(path)
        return depth > (int(inner[1]) if inner else 0)

    def layers(self) -> tuple[str, ...]:
        """Return the paths of all layers in diffusers' naming."""
        return tuple(self._original)

    def to_file(self, path: str) -> str:
        """Return the original path of a layer, residual block, attention or sampler from its path in diffusers. Raises
        ValueError for any other path."""
        found = self._original.get(path) or self._containers.get(path)
        if found is None:
            raise ValueError(f"{path} is no layer of this U-Net")
        return found

    @property
    def blocks(self) -> int:
        """Number of blocks: embeddings, input, middle, output, output layers (SDXL: 23)."""
        return 1 + 3 * self.levels + _MIDDLE + 3 * self.levels + 1

    def block(self, path: str) -> int:
        """Return the block of a layer by its original path. SDXL: 0 embeddings, 1 + n input_blocks.n, 10 + n
        middle_block.n, 13 + n output_blocks.n, 22 output layers. Raises ValueError outside all blocks."""
        if path.startswith(("time_embed.", "label_emb.")):
            return 0
        if path.startswith("out."):
            return self.blocks - 1
        found = _BLOCK.match(path)
        if found is None:
            raise ValueError(f"{path} is in no block")
        middle = 1 + 3 * self.levels
        first = {"input": 1, "middle": middle, "output": middle + _MIDDLE}[found[1]]
        return first + int(found[2])

    def block_of(self, path: str) -> int:
        """Return the block of a parameter or layer by its path in diffusers' naming. Raises ValueError otherwise."""
        return self.block(self.to_file(path if path in self._original else path.rpartition(".")[0]))
