"""Load Stable Diffusion: modules are made on the meta device, then filled tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from library.checkpoints.files import TensorReader
from library.checkpoints.header import Header
from library.checkpoints.lazy import LazyTensor
from library.checkpoints.loading import load_tensors
from library.families.clip import text_encoder as clip_text
from library.families.clip.tokenizer import keep_tokenizer
from library.families.family import Family, Model, Pack
from library.families.sd import unet, vae
from library.families.sd.checkpoint_parts import split_checkpoint
from library.families.sd.configs import check_tensors
from library.families.sd.variant import Variant
from library.objective.process import Prediction
from library.runtime.imports import NOT_NEEDED, import_in_thread, large_imports

Tensors = Mapping[str, LazyTensor]


@dataclass(frozen=True)
class LoadOptions:
    """How to load; see families.family.Load. `dtype` None: float32; `prediction` None: as the checkpoint declares,
    otherwise epsilon; `only` None: all parts (see TITLES)."""

    vae: Path | str | None = None
    dtype: torch.dtype | None = None
    matrix_dtype: torch.dtype | None = None
    device: torch.device | str = "cpu"
    prediction: Prediction | None = None
    tokenizer_cache_dir: Path | None = None
    only: Collection[str] | None = None
    mapped: bool = True
    pack: Pack | None = None


def load(family: Family, variant: Variant, source: Header, options: LoadOptions) -> Model:
    """Load a model. Raises CheckpointError for a missing part, an unknown key or sizes that do not fit."""
    reader = TensorReader(source, mapped=options.mapped)
    split = split_checkpoint(family, variant, reader, options.vae, options.prediction)
    chosen = [part for part in variant.parts if options.only is None or part in options.only]
    modules: dict[str, Any] = dict.fromkeys(variant.parts)
    dtype = options.dtype or torch.float32
    formats = {part: (dtype, options.matrix_dtype if part != "vae" else None) for part in chosen}
    if options.pack is not None:
        import_packages()  # before it begins to read: a quantiser must not be imported while packages do not see it
    with Filler(str(source.path), split.parts, formats, options.device, reader.release, options.pack) as filler:
        import_packages()
        modules.update({part: filler.fill(part, makers(variant)[part], split.configs[part]) for part in chosen})
    model = Model(
        family=family,
        backbone=modules["unet"],
        vae=modules["vae"],
        text_encoders={text.name: modules[text.name] for text in variant.texts},
        tokenizer=family.tokenizer(source, options.tokenizer_cache_dir),
        prediction=split.prediction,
        source=source,
        zero_terminal_snr=split.zero_terminal_snr,
        # copies, so that the source file is released and may be overwritten
        kept={name: tensor.load().clone() for name, tensor in split.kept.items()},
        notes=split.notes,
        broken=tuple(f"{part}.{name}" for part in chosen for name in filler.broken[part]),
    )
    for text_encoder in model.text_encoders.values():
        if text_encoder is not None:
            clip_text.restore_buffers(text_encoder)
    reader.close()
    if options.tokenizer_cache_dir is not None:
        for text in variant.texts:
            keep_tokenizer(model.tokenizer.by_encoder[text.name], options.tokenizer_cache_dir, text.tokenizer_id)
    return model


def makers(variant: Variant) -> dict[str, Callable[[Mapping[str, Any]], nn.Module]]:
    """Return a function for each part that makes its module from a configuration."""
    texts = {text.name: partial(clip_text.make_text_encoder, projects=text.projects) for text in variant.texts}
    return {"unet": unet.make_unet, "vae": vae.make_vae, **texts}


def import_packages() -> None:
    """Import diffusers and transformers, without the packages that they would import for features that are not used."""
    import_in_thread(_import_packages)


def _import_packages() -> None:
    with large_imports(without=NOT_NEEDED):
        from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: F401
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection  # noqa: F401


class _WithoutFirstValues(TorchFunctionMode):
    """Modules made in this context get no first values from torch.nn.init, a third of the time on the meta device: the
    checkpoint replaces them."""

    def __torch_function__(
        self, function: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return named["tensor"] if "tensor" in named else args[0]
        return function(*args, **named)


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a module's tensors by name."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


class Filler:
    """Makes modules on the meta device and fills them with converted tensors, without a second copy in memory.

    `formats`: for each part its dtype and the dtype of its matrices (None: the same). A thread reads the tensors from
    the start, while Python imports the packages and makes the modules.
    """

    def __init__(
        self,
        where: str,
        parts: Mapping[str, Tensors],
        formats: Mapping[str, tuple[torch.dtype, torch.dtype | None]],
        device: torch.device | str,
        release: Callable[[], None] | None = None,
        pack: Pack | None = None,
    ) -> None:
        self.where, self.parts = where, parts
        self.broken: dict[str, list[str]] = {part: [] for part in formats}
        self._reader = ThreadPoolExecutor(1)
        self._states = {
            part: self._reader.submit(
                load_tensors,
                parts[part],
                *dtypes,
                device,
                release,
                self.broken[part],
                None if pack is None else partial(pack, part),
            )
            for part, dtypes in formats.items()
        }

    def __enter__(self) -> Filler:
        return self

    def __exit__(self, *_: object) -> None:
        """Stop reading after the current part."""
        self._reader.shutdown(cancel_futures=True)

    def fill(self, part: str, make: Callable[[Mapping[str, Any]], nn.Module], config: Mapping[str, Any]) -> Any:
        """Return the filled module in evaluation mode. Raises CheckpointError if names or shapes do not match."""
        with torch.device("meta"), _WithoutFirstValues():
            module = make(config)
        check_tensors(self.where, part, self.parts[part], shapes_of(module))
        module.load_state_dict(self._states.pop(part).result(), assign=True)
        return module.eval()
