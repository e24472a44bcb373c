"""Loading Stable Diffusion 1 and 2: modules made without weights on the meta device, then filled tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from library.checkpoints import sd_layout
from library.checkpoints.files import TensorReader
from library.checkpoints.header import CheckpointError, Header
from library.checkpoints.lazy import LazyTensor
from library.checkpoints.loading import load_tensors
from library.checkpoints.vae_file import read_vae
from library.families import clip_text, unet, vae
from library.families.clip_tokenizer import keep_tokenizer
from library.families.family import Family, Model
from library.families.sd_configs import read_configs
from library.families.sd_variant import Variant, noted_prediction, without_text_model
from library.objective.process import Prediction

Tensors = Mapping[str, LazyTensor]


@dataclass(frozen=True)
class LoadOptions:
    """How to load. `dtype` None is float32; `prediction` None is what the source says, else epsilon."""

    vae: Path | str | None = None
    dtype: torch.dtype | None = None
    device: torch.device | str = "cpu"
    prediction: Prediction | None = None
    tokenizer_cache_dir: Path | None = None


def load(family: Family, variant: Variant, source: Header, options: LoadOptions) -> Model:
    """The model of a checkpoint. CheckpointError: a missing part, a key without a place, sizes that do not fit."""
    wanted = ("unet", "text_encoder") if options.vae is not None else ("unet", "vae", "text_encoder")
    reader = TensorReader(source)
    split = sd_layout.to_diffusers(reader, variant.layout, wanted)
    parts: dict[str, Tensors] = {**split.parts}
    notes = list(split.notes)
    if options.vae is not None:
        alone = read_vae(options.vae)
        parts["vae"] = alone.tensors
        notes += [f"VAE from {options.vae}", *alone.notes]
    parts["text_encoder"] = without_text_model(parts["text_encoder"])
    prediction = options.prediction or noted_prediction(source) or "epsilon"
    configs = read_configs(variant, family, source, parts, prediction, foreign_vae=options.vae is not None)
    filler = Filler(str(source.path), options.dtype or torch.float32, options.device)
    model = Model(
        family=family,
        unet=filler.fill("U-Net", unet.make_unet, configs["unet"], parts["unet"]),
        vae=filler.fill("VAE", vae.make_vae, configs["vae"], parts["vae"]),
        text_encoder=filler.fill(
            "text encoder", clip_text.make_text_encoder, configs["text_encoder"], parts["text_encoder"]
        ),
        tokenizer=family.tokenizer(source, options.tokenizer_cache_dir),
        prediction=prediction,
        source=source,
        # copies, so that the source file is let go of and may be written over
        kept={name: tensor.load().clone() for name, tensor in split.kept.items()},
        notes=tuple(notes),
    )
    clip_text.restore_buffers(model.text_encoder)
    reader.close()
    if options.tokenizer_cache_dir is not None:
        keep_tokenizer(model.tokenizer, options.tokenizer_cache_dir, variant.tokenizer_id)
    return model


@dataclass(frozen=True)
class Filler:
    """Makes a module on the meta device and gives it its tensors, each converted by itself: no second copy."""

    where: str
    dtype: torch.dtype
    device: torch.device | str

    def fill(
        self, part: str, make: Callable[[Mapping[str, Any]], nn.Module], config: Mapping[str, Any], tensors: Tensors
    ) -> Any:
        """The module in evaluation mode. Raises CheckpointError when names or shapes are not those of the module."""
        with torch.device("meta"):
            module = make(config)
        expected = module.state_dict()
        self._check(part, expected, tensors)
        state = load_tensors({name: tensors[name] for name in expected}, self.dtype, self.device)
        module.load_state_dict(state, assign=True)
        return module.eval()

    def _check(self, part: str, expected: Mapping[str, torch.Tensor], tensors: Tensors) -> None:
        missing = [name for name in expected if name not in tensors]
        spare = [name for name in tensors if name not in expected]
        if missing or spare:
            names = ", ".join((missing or spare)[:5])
            what = "lacks" if missing else "has too many"
            raise CheckpointError(
                f"{self.where}: its {part} {what} tensors: {names}. It is not whole or not of this kind."
            )
        for name, tensor in expected.items():
            if tuple(tensor.shape) != tensors[name].shape:
                raise CheckpointError(
                    f"{self.where}: tensor {name} of its {part} has the shape {tensors[name].shape}, where the rest of "
                    f"the file asks for {tuple(tensor.shape)}. The file is damaged or not of this kind."
                )
