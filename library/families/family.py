"""What a model family is: data and a few functions. To add one, write families/x.py and name it in registry.FAMILIES.

No torch at module level: plans are made before torch is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from library.data.batch import TextInput, Tokenize
from library.options.flag import Capability

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from library.checkpoints.adapter_names import AdapterPart
    from library.checkpoints.header import Header
    from library.objective.process import ForwardProcess, Prediction

Conditioning = Mapping[str, "Tensor"]
"""What a backbone is told beside latents and timesteps, by name, a row for each sample: "states" (B, L, width) of
the text and, where the family has one, its "pooled" vector (B, width); "sizes" (B, 6) float32, height and width of
the image's file, top and left of the crop, height and width of the crop; "score" (B,) float32, how beautiful it
is. A family takes of it what it knows."""

SaveAs = Literal["ckpt", "safetensors", "diffusers", "diffusers_safetensors"]
"""kohya's names (--save_model_as): one file, or a diffusers folder with torch's or with safetensors' files."""


@dataclass(frozen=True)
class LatentSpace:
    """The VAE's latents: `channels`, `stride` pixels a cell, and the `shift` and `scale` that bring them to about zero
    mean and unit variance. VAEs and caches hold them as they are, the backbone is trained on scaled ones.

    `cache_suffix` ends the names of the files that latents are cached in, as users' other tools know them. `fp16`: the
    VAE's own numbers fit half precision (those of Stable Diffusion XL do not: huggingface.co/madebyollin).
    """

    channels: int
    stride: int
    scale: float
    cache_suffix: str
    fp16: bool = True
    shift: float = 0.0

    def scaled(self, latents: Tensor) -> Tensor:
        """Latents as the backbone sees them: (z - shift) * scale   (diffusers' AutoencoderKL, scaling_factor and
        shift_factor; arXiv 2112.10752, appendix G)."""
        return (latents - self.shift if self.shift else latents) * self.scale

    def unscaled(self, latents: Tensor) -> Tensor:
        """The inverse of `scaled`: latents as the VAE decodes them."""
        return latents / self.scale + self.shift if self.shift else latents / self.scale


@dataclass(frozen=True)
class PartSizes:
    """Numbers of parameters of a checkpoint's modules, by name (see Model.modules), and the bytes of what else it holds
    and a save writes back."""

    parameters: Mapping[str, int]
    kept_bytes: int

    def total(self, names: Collection[str] | None = None) -> int:
        """Parameters of all modules, or of those with these names."""
        return sum(count for name, count in self.parameters.items() if names is None or name in names)


@dataclass(frozen=True)
class TextSettings:
    """How captions are read.

    `clip_skip` k takes the states of the k-th last layer (None: as the model was trained). `kohya_projection`: the
    pooled vector is projected by the matrix as sd-scripts reads it, transposed. `empty_is_zero`: a text without a word
    is zeros in place of what the encoders give for it.
    """

    clip_skip: int | None = None
    kohya_projection: bool = False
    empty_is_zero: bool = False


AS_TRAINED = TextSettings()


class EncoderTokenizer(Protocol):
    """The tokenizer of one text encoder."""

    def save(self, folder: Path) -> None:
        """Write the files of a diffusers folder's `tokenizer/`."""


class Tokenizer(Tokenize, Protocol):
    """Captions to what each text encoder reads of them: lengths, padding and masks are its own affair.

    `name`: other tokens of a caption, another name. `limit`: how many tokens of a caption are read, without begin and
    end. `by_encoder`: one tokenizer for each of the family's text encoders, by their names.
    """

    @property
    def name(self) -> str: ...

    @property
    def limit(self) -> int: ...

    @property
    def by_encoder(self) -> Mapping[str, EncoderTokenizer]: ...

    def configured(self, *, max_tokens: int | None = None, padded: bool = True, weighted: bool = False) -> Tokenizer:
        """One that reads at least `max_tokens` tokens where the encoders can (None: as many as they read at once),
        pads to the longest of a batch only with `padded` off, and with `weighted` reads weights such as (x:1.3)."""

    def count(self, caption: str) -> int:
        """Tokens of a caption, without begin and end; with `weighted` without the marks of its weights."""

    def counts(self, captions: Sequence[str]) -> list[int]:
        """`count` of each caption, quicker than one by one."""


@dataclass(eq=False)
class Model:
    """A loaded model: modules in evaluation mode, and what of the source has no place in them.

    `kept` holds the source's other tensors under their original names (EMA copies, schedule tables, SD2's last layer),
    in their own dtype; a save writes them back. `text_encoders` are by name, those of the family in its order.
    `zero_terminal_snr`: it is (being) trained with such a schedule, which
    a diffusers folder tells. `notes` says what a user should know about how it was loaded, `broken` which tensors hold
    values that are not finite.
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
        """The modules that are loaded, by name: the backbone by its family's, vae and the text encoders."""
        found = {self.family.backbone: self.backbone, "vae": self.vae, **self.text_encoders}
        return {name: module for name, module in found.items() if module is not None}


class Load(Protocol):
    """Load a checkpoint of the family, or only the modules named in `only`; the other modules are then None.

    `matrix_dtype`: the dtype of weights with two or more dimensions in the backbone and the text encoders; None: same
    as `dtype`. `mapped`: files are memory-mapped, otherwise read. Raises CheckpointError.
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
    ) -> Model: ...


class Save(Protocol):
    """Write a model, whole or not at all, and return what the user should be told (such as tensors made up).

    `dtype` None keeps each tensor's dtype. `steps` and `epoch` are added to
    those of a .ckpt source. Raises CheckpointError, leaving what was there.
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
    """Text inputs, by the names of the text encoders and on their device, to what `predict` takes of a text: "states"
    (B, L, width), multiplied with the weights of captions that have such, and "pooled" (B, width) where the family has
    it."""

    def __call__(
        self,
        text_encoders: Mapping[str, Any],
        text_inputs: Mapping[str, TextInput],
        settings: TextSettings = AS_TRAINED,
    ) -> dict[str, Tensor]: ...


class Predict(Protocol):
    """The backbone's output (B, C, h, w) for noisy latents (B, C, h, w) at timesteps (B,) under what it is told."""

    def __call__(self, backbone: Any, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor: ...


class EncodeImages(Protocol):
    """Pixels (B, 3, H, W) in [-1, 1] to unscaled latents (B, C, h, w) float32, each sample by its own CPU generator."""

    def __call__(self, vae: Any, pixels: Tensor, generators: Sequence[torch.Generator]) -> Tensor: ...


class DecodeLatents(Protocol):
    """Unscaled latents (B, C, h, w) to pixels (B, 3, H, W) float32 in about [-1, 1]."""

    def __call__(self, vae: Any, latents: Tensor) -> Tensor: ...


class MakeTokenizer(Protocol):
    """The family's tokenizer: the source folder's own, that of the cache folder, or the shipped one."""

    def __call__(self, source: Header | None = None, tokenizer_cache_dir: Path | None = None) -> Tokenizer: ...


class ReadSizes(Protocol):
    """Parameters of each part, from the header alone. Raises CheckpointError when the header cannot be mapped."""

    def __call__(self, source: Header, vae: Path | str | None = None) -> PartSizes: ...


class Recognise(Protocol):
    """Whether a header is of this family, by names and shapes."""

    def __call__(self, header: Header) -> bool: ...


@dataclass(frozen=True)
class Family:
    """One model family. Functions take what they need, so that a recipe may hand in wrapped modules.

    `backbone`: the name of the network that denoises ("unet"), which logs, diffusers folders and adapters have for it,
    and `backbone_title`: how messages call it.
    `versions`: what adapters call it in ss_base_model_version, and `architectures`: modelspec.architecture, both by
    prediction. `capabilities`: what flags may ask of it. `preview`: (W, H) of an image in pixels, by prediction.
    `adapters`: where adapters sit, in the order that files and optimiser groups have them. `text_encoders`: their
    names, in the same order. `refines`: its own range are the last, least noisy timesteps, so it draws no image from
    noise alone. `block_of` tells the block of a parameter of the backbone, 0 to `blocks` - 1. `adapter_names`: by whose
    names adapters' files call the layers of the backbone. `variant` is the families' own.
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
    block_of: Callable[[str], int] | None = None
    blocks: int = 0
    adapter_names: Literal["diffusers", "original"] = "diffusers"
    variant: Any = None
