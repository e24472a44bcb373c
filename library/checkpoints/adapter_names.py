"""Which layers of a model adapters reach, and what these are called in adapters' files. Data of a family; no torch.

Names are those that kohya-style files carry: prefix, `_`, the layer's path with dots as underscores. Classes are told
by name, so that nothing has to be imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class AdapterPart:
    """One module of a model as adapters see it.

    `module` is its name in the model (unet, text_encoder), `group` the name of its learning rate in logs (unet,
    text_encoder1), `prefix` begins its names in files. In modules of the classes `containers` all Linear and 1x1 Conv2d
    layers are reached; with a rank for convolutions also those in `conv_containers`: 3x3 with that rank, the others
    with the usual one. `rename` turns a layer's path into its path in files (both with dots; ValueError for what is no
    layer of such a module), and `level` goes before that where files have a level more than the module. `layers` lists
    the layers by path, as far as any model of the family has them. `block` tells the block of a path in a file, 0 to
    `blocks` - 1 (--network_args block_dims=…); None: not divided into blocks.
    """

    module: str
    group: str
    prefix: str
    containers: frozenset[str]
    conv_containers: frozenset[str] = frozenset()
    rename: Callable[[str], str] = str
    level: str = ""
    layers: Callable[[], Iterable[str]] = tuple
    block: Callable[[str], int] | None = None
    blocks: int = 0

    def to_file(self, path: str) -> str:
        """A layer's path in files."""
        return self.level + self.rename(path)

    def name(self, path: str) -> str:
        """The name of a layer in files: `lora_unet_mid_block_attentions_0_proj_in`."""
        return f"{self.prefix}_{self.to_file(path).replace('.', '_')}"
