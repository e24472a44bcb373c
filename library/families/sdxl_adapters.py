"""Where adapters sit in Stable Diffusion XL, under the names that kohya-style files have (sd-scripts networks/lora.py):
the U-Net's layers as in the original file (input_blocks_4_1_…), text encoders as transformers before 5. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from library.checkpoints.adapter_names import AdapterPart
from library.checkpoints.keymap import Row, Sizes, expand
from library.checkpoints.tables import unet_sd
from library.families.sd_adapters import text_path

TEXT_CONTAINERS = frozenset({"CLIPAttention", "CLIPMLP"})
UNET_CONTAINERS = frozenset({"Transformer2DModel"})
UNET_CONV_CONTAINERS = frozenset({"ResnetBlock2D", "Downsample2D", "Upsample2D"})
_ROWS = (*unet_sd.ROWS, Row("add_embedding.linear_1", "label_emb.0.0"), Row("add_embedding.linear_2", "label_emb.0.2"))
_CONTAINER = re.compile(
    r"(?:(?:down|up)_blocks\.\d+|mid_block)\.(?:resnets|attentions|downsamplers|upsamplers)\.\d+(?=\.)"
)
_PLACE = re.compile(r"(?:(?:in|out)put_blocks\.\d+|middle_block)\.\d+(?=\.)")
_BLOCK = re.compile(r"(input|middle|output)_blocks?\.(\d+)\.")
_MIDDLE = 3  # residual block, attention, residual block


@dataclass(frozen=True)
class UnetNames:
    """Paths of a U-Net's layers in diffusers' naming and in the original one, there and back, by the rows that files
    are loaded with; and the blocks they lie in, as kohya counts those of SDXL.

    `levels` of two residual blocks and a downsampler; up to `depth` transformer blocks in one attention; `upsamplers`:
    the place of each level's, on the way up.
    """

    levels: int
    depth: int
    upsamplers: tuple[int, ...]

    @cached_property
    def _original(self) -> Mapping[str, str]:
        sizes = Sizes(
            {"i": self.levels, "j": 2, "k": 3, "d": self.depth}, {"s": 3, "u": (*self.upsamplers, 0)[: self.levels]}
        )
        names: dict[str, str] = {}
        for rule in expand(_ROWS, sizes):
            ours, theirs = (name.removesuffix(".weight") for name in (rule.diffusers[0], rule.original))
            if not ours.endswith(".bias"):
                names[ours] = theirs
                if (outer := _CONTAINER.match(ours)) and (place := _PLACE.match(theirs)):
                    names[outer[0]] = place[0]
        return names

    @cached_property
    def _diffusers(self) -> Mapping[str, str]:
        return {theirs: ours for ours, theirs in self._original.items() if not _CONTAINER.fullmatch(f"{ours}.")}

    def to_file(self, path: str) -> str:
        """The original path of a layer (or of the module of a block around it) by its path in diffusers' naming.
        ValueError for what no such U-Net has."""
        try:
            return self._original[path] if path else ""
        except KeyError:
            raise ValueError(f"{path} is no layer of this U-Net") from None

    def from_file(self, path: str) -> str:
        """The inverse of `to_file`."""
        try:
            return self._diffusers[path]
        except KeyError:
            raise ValueError(f"{path} is no layer of this U-Net") from None

    @property
    def blocks(self) -> int:
        """How many blocks there are: embeddings, input, middle, output, what comes out (SDXL: 23)."""
        return 1 + 3 * self.levels + _MIDDLE + 3 * self.levels + 1

    def block(self, path: str) -> int:
        """The block of a layer by its original path: SDXL's are 0 the embeddings, 1 + n input_blocks.n, 10 + n
        middle_block.n, 13 + n output_blocks.n, 22 what comes out. ValueError outside of all blocks."""
        if path.startswith(("time_embed.", "label_emb.")):
            return 0
        if path.startswith("out."):
            return self.blocks - 1
        found = _BLOCK.match(path)
        if found is None:
            raise ValueError(f"{path} lies in no block")
        middle = 1 + 3 * self.levels
        first = {"input": 1, "middle": middle, "output": middle + _MIDDLE}[found[1]]
        return first + int(found[2])

    def block_of(self, path: str) -> int:
        """The block of a layer or a parameter by its path in diffusers' naming."""
        layer = path if path in self._original else path.rpartition(".")[0]
        return self.block(self.to_file(layer))


def unet_part(names: UnetNames) -> AdapterPart:
    """The U-Net as adapters see it."""
    return AdapterPart(
        module="unet",
        group="unet",
        prefix="lora_unet",
        containers=UNET_CONTAINERS,
        conv_containers=UNET_CONV_CONTAINERS,
        to_file=names.to_file,
        block=names.block,
        blocks=names.blocks,
    )


_NAMES = UnetNames(levels=3, depth=10, upsamplers=(2, 2))
BLOCKS = _NAMES.blocks  # 23

SDXL_ADAPTERS = (
    AdapterPart(
        module="text_encoder",
        group="text_encoder1",
        prefix="lora_te1",
        containers=TEXT_CONTAINERS,
        to_file=text_path,
    ),
    AdapterPart(
        module="text_encoder_2",
        group="text_encoder2",
        prefix="lora_te2",
        containers=TEXT_CONTAINERS,
    ),
    unet_part(_NAMES),
)


def unet_block(path: str) -> int:
    """The block, 0 to 22, of a parameter of the U-Net by its path in diffusers' naming (--block_lr). ValueError for
    what is none."""
    return _NAMES.block_of(path)
