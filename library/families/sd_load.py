"""Loading Stable Diffusion 1 and 2: modules made without weights on the meta device, then filled tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from library.checkpoints import sd_layout
from library.checkpoints.files import TensorReader
from library.checkpoints.header import CheckpointError, Header
from library.checkpoints.lazy import LazyTensor
from library.checkpoints.vae_file import read_vae
from library.families import clip_text, unet, vae
from library.families.family import Family, Model
from library.families.sd import Variant, noted_prediction
from library.families.shapes import Shapes
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
    text = {name.removeprefix("text_model."): tensor for name, tensor in parts["text_encoder"].items()}
    prediction = options.prediction or noted_prediction(source) or "epsilon"
    configs = read_configs(variant, family, source, parts["unet"], parts["vae"], text, prediction)
    filler = Filler(str(source.path), options.dtype or torch.float32, options.device)
    model = Model(
        family=family,
        unet=filler.fill("U-Net", unet.make_unet, configs["unet"], parts["unet"]),
        vae=filler.fill("VAE", vae.make_vae, configs["vae"], parts["vae"]),
        text_encoder=filler.fill("text encoder", clip_text.make_text_encoder, configs["text_encoder"], text),
        tokenizer=family.tokenizer(source, options.tokenizer_cache_dir),
        prediction=prediction,
        source=source,
        # copies, so that the source file is let go of and may be written over
        kept={name: tensor.load().clone() for name, tensor in split.kept.items()},
        notes=tuple(notes),
    )
    clip_text.restore_buffers(model.text_encoder)
    reader.close()
    return model


@dataclass(frozen=True)
class Filler:
    """Makes a module on the meta device and gives it its tensors, one after the other: no second copy of a model."""

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
        state = {
            # always a copy: an in-place update must not write through to the mapped file
            name: tensors[name].load().to(device=self.device, dtype=self.dtype, copy=True)
            for name in expected
        }
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


def read_configs(
    variant: Variant,
    family: Family,
    source: Header,
    unet_tensors: Tensors,
    vae_tensors_: Tensors,
    text_tensors: Tensors,
    prediction: Prediction,
) -> dict[str, dict[str, Any]]:
    """The arguments of the three modules, read from the tensors; a diffusers folder's config.json files must agree."""
    try:
        configs = {
            "unet": unet.unet_config(_shapes(unet_tensors), heads=variant.heads, head_size=variant.head_size),
            "vae": vae.vae_config(_shapes(vae_tensors_), variant.scale),
            "text_encoder": clip_text.text_config(_shapes(text_tensors), variant.activation),
        }
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"{source.path}: its sizes cannot be read ({error}). The file is not whole.") from error
    side = family.preview[prediction][0] // family.latent.stride
    configs["unet"]["sample_size"] = source.configs.get("unet", {}).get("sample_size", side)
    configs["unet"]["upcast_attention"] = source.configs.get("unet", {}).get("upcast_attention", variant.linear)
    configs["vae"]["sample_size"] = source.configs.get("vae", {}).get("sample_size", side * family.latent.stride)
    _check_sizes(family, variant, source, configs)
    for part, config in configs.items():
        _compare(source, part, config)
    return configs


def _shapes(tensors: Tensors) -> Shapes:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _check_sizes(family: Family, variant: Variant, source: Header, configs: Mapping[str, Mapping[str, Any]]) -> None:
    unet_config, vae_config, text = configs["unet"], configs["vae"], configs["text_encoder"]
    faults = []
    if vae_config["latent_channels"] != family.latent.channels or 2 ** (len(vae_config["block_out_channels"]) - 1) != (
        family.latent.stride
    ):
        faults.append("its VAE has other latents")
    if unet_config["cross_attention_dim"] != text["hidden_size"]:
        faults.append(
            f"its U-Net takes text states of width {unet_config['cross_attention_dim']}, its text encoder gives "
            f"{text['hidden_size']}"
        )
    step = variant.heads or variant.head_size or 1
    if any(width % step for width in unet_config["block_out_channels"]) or text["hidden_size"] % clip_text.HEAD_SIZE:
        faults.append("its widths cannot be divided into attention heads")
    if faults:
        raise CheckpointError(f"{source.path}: not a model of {family.title}: {'; '.join(faults)}.")


# config.json entries that the tensors (and the rule for heads) decide as well
_COMPARED = {
    "unet": ("in_channels", "out_channels", "block_out_channels", "layers_per_block", "cross_attention_dim",
             "use_linear_projection", "attention_head_dim"),
    "vae": ("latent_channels", "block_out_channels", "layers_per_block", "scaling_factor"),
    "text_encoder": ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "hidden_act"),
}  # fmt: skip


def _compare(source: Header, part: str, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError where a diffusers folder's config.json says other than its tensors."""
    written = source.configs.get(part, {})
    levels = len(config.get("block_out_channels", ()))
    for key in _COMPARED[part]:
        if written.get(key) is None:
            continue
        said, read = written[key], config[key]
        if key == "attention_head_dim":  # one number stands for as many equal ones
            said, read = _per_level(said, levels), _per_level(read, levels)
        if said != read:
            raise CheckpointError(
                f"{source.path / part / 'config.json'}: says {key} = {written[key]}, but the weights beside it "
                f"are of a model with {config[key]}. Get the folder again, or repair the file."
            )


def _per_level(value: int | Sequence[int], levels: int) -> list[int]:
    return [value] * levels if isinstance(value, int) else list(value)
