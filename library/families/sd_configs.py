"""The configurations of Stable Diffusion's modules, read from a header and checked. No torch: plans ask for it too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from library.checkpoints.header import CheckpointError, Header
from library.checkpoints.lazy import LazyTensor
from library.families import clip_text, unet, vae
from library.families.family import Family
from library.families.shapes import Shapes

if TYPE_CHECKING:
    from library.families.sd_variant import Variant
    from library.objective.process import Prediction

Tensors = Mapping[str, LazyTensor]


def read_configs(
    variant: Variant,
    family: Family,
    source: Header,
    parts: Mapping[str, Tensors],
    prediction: Prediction,
    *,
    foreign_vae: bool = False,
) -> dict[str, dict[str, Any]]:
    """The arguments of the three modules, read from the tensors; a diffusers folder's config.json files must agree.

    `parts`: tensors by diffusers' and transformers' names. `foreign_vae`: the VAE is not the folder's own.
    Raises CheckpointError.
    """
    try:
        configs = {
            "unet": unet.unet_config(_shapes(parts["unet"]), heads=variant.heads, head_size=variant.head_size),
            "vae": vae.vae_config(_shapes(parts["vae"]), variant.scale),
            "text_encoder": clip_text.text_config(_shapes(parts["text_encoder"]), variant.activation),
        }
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"{source.path}: its sizes cannot be read ({error}). The file is not whole.") from error
    side = family.preview[prediction][0] // family.latent.stride
    configs["unet"]["sample_size"] = source.configs.get("unet", {}).get("sample_size", side)
    configs["unet"]["upcast_attention"] = source.configs.get("unet", {}).get("upcast_attention", variant.linear)
    configs["vae"]["sample_size"] = source.configs.get("vae", {}).get("sample_size", side * family.latent.stride)
    _check_sizes(family, variant, source, configs)
    for part, config in configs.items():
        if not (part == "vae" and foreign_vae):
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
