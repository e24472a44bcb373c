"""A model family: data and a few functions. To add one, write a file (sd/sdxl.py is an example) and add it to
registry.FAMILIES.

No torch at module level: plans are made before torch is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from library.data.batch import TextInput, Tokenize
from library.options.flag import Capability

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from library.checkpoints.adapter_key_names import AdapterPart
    from library.checkpoints.header import Header
    from library.footprint.model import Footprint
    from library.objective.process import ForwardProcess, Prediction

Conditioning = Mapping[str, "Tensor"]
"""Inputs of a backbone besides latents and timesteps, by name, one row per sample: "states" (B, L, width), the text's
hidden states; "pooled" (B, width), if the family has a pooled vector; "sizes" (B, 6) float32: height and width of the
image file, top and left of the crop, height and width of the crop; "score" (B,) float32, the aesthetic score. A family
uses those it knows."""

SaveAs = Literal["ckpt", "safetensors", "diffusers", "diffusers_safetensors"]
"""Values of --save_model_as: one file, or a diffusers folder with .bin or with .safetensors files."""


@dataclass(frozen=True)
class LatentSpace:
    """The VAE's latents: `channels`, `stride` in pixels, and `shift` and `scale` to about zero mean and unit variance.
    The VAE and latent caches use unscaled latents, the backbone scaled ones.

    `cache_suffix`: suffix of latent cache files, as in sd-scripts. `fp16`: the VAE's activations fit half precision
    (those of Stable Diffusion XL do not: huggingface.co/madebyollin).
    """

    channels: int
    stride: int
    scale: float
    cache_suffix: str
    fp16: bool = True
    shift: float = 0.0

    def scaled(self, latents: Tensor) -> Tensor:
        """Scale latents for the backbone: (z - shift) * scale   (diffusers' AutoencoderKL, scaling_factor and
        shift_factor; arXiv 2112.10752, appendix G)."""
        return (latents - self.shift if self.shift else latents) * self.scale

    def unscaled(self, latents: Tensor) -> Tensor:
        """Inverse of `scaled`: latents for the VAE's decoder."""
        return latents / self.scale + self.shift if self.shift else latents / self.scale


@dataclass(frozen=True)
class PartSizes:
    """Parameter counts of a checkpoint's modules, by name (see Model.modules), and the bytes of its other tensors,
    which are saved unchanged. `shapes`: module -> name of a tensor in it -> shape."""

    parameters: Mapping[str, int]
    kept_bytes: int
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)

    def total(self, names: Collection[str] | None = None) -> int:
        """Number of parameters of all modules, or of those named."""
        return sum(count for name, count in self.parameters.items() if names is None or name in names)

    def largest(self, names: Collection[str]) -> int:
        """Number of values of the largest tensor of the modules named."""
        return max((math.prod(shape) for name in names for shape in self.shapes[name].values()), default=0)

    def layers(self, module: str) -> int:
        """Number of layers of a text encoder."""
        behind = (name.partition("encoder.layers.")[2] for name in self.shapes[module])
        return len({name.partition(".")[0] for name in behind if name})


@dataclass(frozen=True)
class TextSettings:
    """How captions are encoded.

    `clip_skip` k uses the hidden states of the k-th last layer (None: as the model was trained). `kohya_projection`:
    use the transposed text projection, as sd-scripts does. `empty_is_zero`: empty texts are encoded as zeros.
    """

    clip_skip: int | None = None
    kohya_projection: bool = False
    empty_is_zero: bool = False


AS_TRAINED = TextSettings()


class EncoderTokenizer(Protocol):
    """The tokenizer of one text encoder."""

    def encode(self, caption: str) -> list[int]:
        """Return the caption's ids, uncut, without begin and end tokens."""

    def ids(self, captions: Sequence[str], chunks: int = 1, *, padded: bool = True) -> list[list[list[int]]]:
        """Return ids as nested lists (B, chunks, length of a pass), with begin and end tokens, or (B, 1, L) with no
        padding behind the longest caption if not `padded`."""

    def pieces(self, caption: str) -> list[str]:
        """Return the text of each token of the caption."""

    def whole_words(self) -> Mapping[str, int]:
        """Return the tokens that stand for a whole word or for the end of one: its text and id."""

    def save(self, folder: Path) -> None:
        """Write the files of a diffusers folder's `tokenizer/` to `folder`."""


class Tokenizer(Tokenize, Protocol):
    """Converts captions to text inputs of each text encoder, including length, padding and mask.

    `name` differs if a caption's tokens differ. `limit`: maximum number of tokens of a caption, without begin and end.
    `by_encoder`: one tokenizer per text encoder, by the encoder's name.
    """

    @property
    def name(self) -> str: ...

    @property
    def limit(self) -> int: ...

    @property
    def by_encoder(self) -> Mapping[str, EncoderTokenizer]: ...

    def configured(self, *, max_tokens: int | None = None, padded: bool = True, weighted: bool = False) -> Tokenizer:
        """Return a tokenizer that reads at least `max_tokens` tokens, if the encoders can (None: the length of one
        pass); pads to the longest caption of a batch if not `padded`; parses weights such as (x:1.3) if `weighted`."""

    def count(self, caption: str) -> int:
        """Count the tokens of a caption, without begin and end and, if `weighted`, without the weights' syntax."""

    def counts(self, captions: Sequence[str]) -> list[int]:
        """Count the tokens of many captions, faster than one by one."""


@dataclass(eq=False)
class Model:
    """A loaded model: modules in evaluation mode, and the source's other tensors.

    `kept`: tensors of the source that belong to no module, under their original names and in their own dtype (schedule
    tables, SD2's last layer); they are saved unchanged. `text_encoders` by name, in the family's order.
    `zero_terminal_snr`: the noise schedule ends in pure noise. `notes`: messages about loading. `broken`: names of
    tensors with NaN or infinite values.
    """

    family: Family
    backbone: Any
    vae: Any
    text_encoders: dict[str, Any]
    tokenizer: Tokenizer
    prediction: Prediction
    source: Header
    zero_terminal_snr: bool = False
    kept: dict[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()

    def modules(self) -> dict[str, Any]:
        """Return the loaded modules by name: the backbone under the family's name for it, vae, the text encoders."""
        modules = {self.family.backbone: self.backbone, "vae": self.vae, **self.text_encoders}
        return {name: module for name, module in modules.items() if module is not None}


Pack = Callable[[str, str, "Tensor"], "Tensor"]
"""(name of the module, name of the tensor, tensor) -> the tensor to keep in its place."""


class Load(Protocol):
    """Load a checkpoint of the family, or only the modules named in `only`; the other modules are then None.

    `matrix_dtype`: the dtype of weights with two or more dimensions in the backbone and the text encoders; None: same
    as `dtype`. `mapped`: files are memory-mapped, otherwise read. `pack` is called for each tensor when it has been
    read, with the names of its module and of the tensor in it, and returns what to keep. Raises CheckpointError.
    """

    def __call__(  # noqa: PLR0913 - independent settings, passed by name; a record of them would only repeat the names
        self,
        source: Header,
        *,
        vae: Path | str | None = None,
        dtype: torch.dtype | None = None,
        matrix_dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        prediction: Prediction | None = None,
        tokenizer_cache_dir: Path | None = None,
        only: Collection[str] | None = None,
        mapped: bool = True,
        pack: Pack | None = None,
    ) -> Model: ...


class Save(Protocol):
    """Write a model atomically and return messages for the user (such as tensors that had to be made up).

    `dtype` None keeps each tensor's dtype. `steps` and `epoch` are added to those of a .ckpt source. Raises
    CheckpointError; existing files are left unchanged then.
    """

    def __call__(
        self,
        model: Model,
        path: Path,
        *,
        save_as: SaveAs,
        dtype: torch.dtype | None = None,
        metadata: Mapping[str, str] | None = None,
        steps: int = 0,
        epoch: int = 0,
    ) -> tuple[str, ...]: ...


class EncodeText(Protocol):
    """Encode text inputs, given by text encoder name and on its device, to conditioning: "states" (B, L, width),
    multiplied by caption weights if there are any, and "pooled" (B, width) if the family has it."""

    def __call__(
        self,
        text_encoders: Mapping[str, Any],
        text_inputs: Mapping[str, TextInput],
        settings: TextSettings = AS_TRAINED,
    ) -> dict[str, Tensor]: ...


class Predict(Protocol):
    """Run the backbone: noisy latents (B, C, h, w), timesteps (B,) and conditioning to its output (B, C, h, w)."""

    def __call__(self, backbone: Any, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor: ...


class EncodeImages(Protocol):
    """Encode pixels (B, 3, H, W) in [-1, 1] to unscaled latents (B, C, h, w) float32, with one CPU generator per
    sample."""

    def __call__(self, vae: Any, pixels: Tensor, generators: Sequence[torch.Generator]) -> Tensor: ...


class DecodeLatents(Protocol):
    """Decode unscaled latents (B, C, h, w) to pixels (B, 3, H, W) float32 in about [-1, 1]."""

    def __call__(self, vae: Any, latents: Tensor) -> Tensor: ...


class MakeTokenizer(Protocol):
    """Return the family's tokenizer: the source folder's own, the one in the cache folder, or the built-in one."""

    def __call__(self, source: Header | None = None, tokenizer_cache_dir: Path | None = None) -> Tokenizer: ...


class ReadSizes(Protocol):
    """Count the parameters of each module from the header. Raises CheckpointError if keys or sizes do not fit."""

    def __call__(self, source: Header, vae: Path | str | None = None) -> PartSizes: ...


class Recognise(Protocol):
    """Whether a checkpoint belongs to this family, by tensor names and shapes."""

    def __call__(self, header: Header) -> bool: ...


@dataclass(frozen=True)
class Family:
    """One model family. Its functions take modules as arguments, so that a recipe can pass wrapped ones.

    `backbone`: name of the denoising network ("unet") in logs, diffusers folders and adapters; `backbone_title`: its
    name in messages. `versions`: ss_base_model_version of adapters; `architectures`: modelspec.architecture; `preview`:
    default (W, H) of an image in pixels; all three by prediction. `capabilities`: features that flags may require.
    `adapters`: modules that adapters apply to, in the order of files and optimizer groups; `text_encoders`: names in
    the same order. `refines`: a refiner, trained only on the last, least noisy timesteps. `block_of`: block of a
    parameter of the backbone, 0 to `blocks` - 1. `not_quantised`: by module, regular expressions for the beginning of
    the names of weights that stay as they are when the others are quantised. `shard_units`: by module, regular
    expressions for the names of the blocks that are whole one after the other in a sharded run. `adapter_names`: naming
    scheme of backbone layers in adapter files. `footprint`: the passes of its modules over shapes, by which the plan
    predicts memory. `variant`: data private to the family.
    """

    name: str
    title: str
    backbone: str
    backbone_title: str
    versions: Mapping[Prediction, str]
    architectures: Mapping[Prediction, str]
    capabilities: frozenset[Capability]
    latent: LatentSpace
    process: ForwardProcess
    preview: Mapping[Prediction, tuple[int, int]]
    adapters: tuple[AdapterPart, ...]
    recognise: Recognise
    sizes: ReadSizes
    tokenizer: MakeTokenizer
    load: Load
    save: Save
    encode_text: EncodeText
    predict: Predict
    encode_images: EncodeImages
    decode_latents: DecodeLatents
    text_encoders: tuple[str, ...] = ("text_encoder",)
    refines: bool = False
    not_quantised: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    shard_units: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    block_of: Callable[[str], int] | None = None
    blocks: int = 0
    adapter_names: Literal["diffusers", "original"] = "diffusers"
    footprint: Footprint | None = None
    variant: Any = None

    @property
    def module_titles(self) -> dict[str, str]:
        """The names of backbone and text encoders in messages: {"unet": "U-Net", "text_encoder": "text encoder"}."""
        count = len(self.text_encoders)
        texts = {name: f"text encoder {number}" if count > 1 else "text encoder"
                 for number, name in enumerate(self.text_encoders, 1)}  # fmt: skip
        return {self.backbone: self.backbone_title, **texts}
