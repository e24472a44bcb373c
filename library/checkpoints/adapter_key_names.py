"""The layers of a model that adapters apply to, and their names in adapter files. Data of a family; no torch.

Names are those of sd-scripts: prefix, `_`, the layer's path with underscores for dots. Classes are given by name, so
that nothing has to be imported. The tensor names after them (lora_down.weight, alpha) are in each kind of networks/;
other formats are converted by networks/formats/convert_keys.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class AdapterPart:
    """One module of a model that adapters apply to.

    `module`: its name in the model (unet, text_encoder); `group`: name of its learning rate in logs (unet,
    text_encoder1); `prefix`: of its layers' names in files. All Linear and 1x1 Conv2d layers inside modules of the
    classes `containers` are adapted; `segments` are the names of such modules in paths, `conv_segments` those of
    `conv_containers`; with a rank for convolutions also those in `conv_containers`: 3x3 with that rank,
    the others with the usual one. `rename` maps a layer's path to its path in files (both with dots; raises ValueError
    for other paths), `original` to that in the model's own single files, which some programs use instead; `level` is a
    prefix that only adapter files have. `layers` lists the paths of all layers in any model of
    the family. `block` returns the block of a path in a file, 0 to `blocks` - 1 (--network_args block_dims=…); None:
    not divided into blocks.
    """

    module: str
    group: str
    prefix: str
    containers: frozenset[str]
    conv_containers: frozenset[str] = frozenset()
    segments: frozenset[str] = frozenset()
    conv_segments: frozenset[str] = frozenset()
    rename: Callable[[str], str] = str
    original: Callable[[str], str] = str
    level: str = ""
    layers: Callable[[], Iterable[str]] = tuple
    block: Callable[[str], int] | None = None
    blocks: int = 0

    def to_file(self, path: str) -> str:
        """Return a layer's path in files."""
        return self.level + self.rename(path)

    def name(self, path: str) -> str:
        """Return a layer's name in files: `lora_unet_mid_block_attentions_0_proj_in`."""
        return f"{self.prefix}_{self.to_file(path).replace('.', '_')}"
