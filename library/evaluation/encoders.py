"""Encoders of images and texts from local transformers folders: DINO, DINOv2 and CLIP, in float32.

Images are resized, cropped and normalised by the settings in the encoder's own folder, generated and real ones alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.evaluation.encoder_folders import FLAGS, MODEL_TYPES, EncoderFolder
from library.options.mistakes import Mistake, UserError
from library.runtime.imports import ONLY_LOCAL, large_imports, quiet_libraries

if TYPE_CHECKING:
    from PIL.Image import Image

AT_ONCE = 16
_CLASSES = {
    "vit": "ViTModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "clip": "CLIPModel",
}
_UNUSED = ("pooler.", "mask_token")  # of modules that have no part in an embedding; DINO's folders lack them


@dataclass
class ImageEncoder:
    """Embeds images: DINO's class token after the last norm, or CLIP's projected one."""

    model: Any
    processor: Any
    device: torch.device

    def images(self, images: Sequence[Image]) -> Tensor:
        """Embeddings (n, d) float32 on the CPU of RGB images of any sizes."""
        rows = []
        with torch.no_grad(), _on_device(self.model, self.device):
            for start in range(0, len(images), AT_ONCE):
                batch = [*images[start : start + AT_ONCE]]
                pixels = self.processor(images=batch, return_tensors="pt")["pixel_values"]
                rows.append(self._embed(pixels.to(self.device)).float().cpu())
        return torch.cat(rows)

    def _embed(self, pixels: Tensor) -> Tensor:
        # not pooler_output: DINO's folders have no pooler
        states: Tensor = self.model(pixel_values=pixels).last_hidden_state
        return states[:, 0]


@dataclass
class ClipEncoder(ImageEncoder):
    """Embeds images and texts into one space (Radford et al. 2021, arXiv 2103.00020)."""

    tokenizer: Any

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings (n, d) float32 on the CPU; what exceeds the text encoder's length is cut, see `is_cut`."""
        ids = self.tokenizer([*texts], padding=True, truncation=True, max_length=self.longest, return_tensors="pt")
        with torch.no_grad(), _on_device(self.model, self.device):
            given = {name: ids[name].to(self.device) for name in ("input_ids", "attention_mask")}
            rows: Tensor = self.model.text_projection(self.model.text_model(**given).pooler_output)
        return rows.float().cpu()

    def is_cut(self, text: str) -> bool:
        """Whether the end of a text is not read."""
        return len(self.tokenizer(text)["input_ids"]) > self.longest

    @property
    def longest(self) -> int:
        """The most tokens of a text, with begin and end: 77."""
        return int(self.model.config.text_config.max_position_embeddings)

    def _embed(self, pixels: Tensor) -> Tensor:
        rows: Tensor = self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)
        return rows


def load_dino(folder: EncoderFolder, device: torch.device) -> ImageEncoder:
    """DINO or DINOv2. Raises UserError."""
    return ImageEncoder(*_load(folder), device)


def load_clip(folder: EncoderFolder, device: torch.device) -> ClipEncoder:
    """CLIP with its tokenizer. Raises UserError."""
    import transformers

    model, processor = _load(folder)
    tokenizer = _read(folder, lambda: transformers.AutoTokenizer.from_pretrained(folder.path, **ONLY_LOCAL))
    return ClipEncoder(model, processor, device, tokenizer)


def _load(folder: EncoderFolder) -> tuple[Any, Any]:
    """The model on the CPU, in evaluation mode, and its image processor. Raises UserError if weights are missing: their
    random replacements would give figures of no meaning."""
    quiet_libraries()
    with large_imports():
        import transformers

    processor = _read(folder, lambda: _image_processor(folder))
    model_class = getattr(transformers, _CLASSES[folder.model_type])
    logging: Any = transformers.utils.logging
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # else it prints a table of missing weights, the unused ones included
    try:
        with _random_state_kept():  # its modules are initialised before they are filled
            model, info = _read(
                folder,
                lambda: model_class.from_pretrained(folder.path, **ONLY_LOCAL, output_loading_info=True),
            )
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
    missing = sorted(name for name in info["missing_keys"] if not any(part in name for part in _UNUSED))
    if missing:
        raise _unreadable(folder, f"{len(missing)} of its weights are missing, such as {missing[0]}")
    return model.float().requires_grad_(requires_grad=False).eval(), processor


def _image_processor(folder: EncoderFolder) -> Any:
    import transformers

    # by PIL in any case: torchvision resizes otherwise, and figures would depend on what is installed
    major = int(transformers.__version__.partition(".")[0])
    by_pil: dict[str, Any] = {"backend": "pil"} if major >= 5 else {"use_fast": False}
    read: Any = transformers.AutoImageProcessor.from_pretrained
    return read(folder.path, **ONLY_LOCAL, **by_pil)


def _read(folder: EncoderFolder, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception as error:  # transformers raises anything for a damaged or foreign folder
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise _unreadable(folder, f"transformers cannot load it ({reason})") from error


def _unreadable(folder: EncoderFolder, why: str) -> UserError:
    flag = FLAGS[MODEL_TYPES[folder.model_type]]
    return UserError([Mistake(f"--{flag} {folder.path}: {why}", "get the whole folder again")])


@contextmanager
def _random_state_kept() -> Iterator[None]:
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)


@contextmanager
def _on_device(model: Any, device: torch.device) -> Iterator[None]:
    """The model on the device while it computes; its memory is the training's afterwards."""
    home = model.device
    model.to(device)
    try:
        yield
    finally:
        model.to(home)
