"""Read and check the configurations of Stable Diffusion's modules from a header. No torch: the plan uses it too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from library.checkpoints.header import CheckpointError, Header
from library.checkpoints.lazy import LazyTensor
from library.families.clip import text_encoder as clip_text
from library.families.family import Family
from library.families.sd import unet, vae
from library.families.sd.shapes import Shapes

if TYPE_CHECKING:
    from library.families.sd.variant import Variant
    from library.objective.process import Prediction

Tensors = Mapping[str, LazyTensor]
Configs = dict[str, dict[str, Any]]


def read_configs(
    variant: Variant,
    family: Family,
    source: Header,
    parts: Mapping[str, Tensors],
    prediction: Prediction,
    *,
    foreign_vae: bool = False,
) -> Configs:
    """Return the arguments of each module from its tensor shapes; config.json files of a folder must agree.

    `parts`: tensors under diffusers' and transformers' names. `foreign_vae`: the VAE is not the folder's own.
    Raises CheckpointError.
    """
    try:
        configs = {
            "unet": unet.unet_config(
                _shapes(parts["unet"]), heads=variant.heads, head_size=variant.head_size, ids=variant.ids
            ),
            "vae": vae.vae_config(_shapes(parts["vae"]), family.latent.scale),
            **{text.name: clip_text.text_config(_shapes(parts[text.name]), text) for text in variant.texts},
        }
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"{source.path}: its sizes cannot be read ({error}). The file is incomplete: get it again."
        ) from error
    side = family.preview[prediction][0] // family.latent.stride
    written = source.configs.get("unet", {})
    configs["unet"]["sample_size"] = written.get("sample_size", side)
    configs["unet"]["upcast_attention"] = written.get("upcast_attention", variant.upcast_attention)
    configs["vae"]["sample_size"] = source.configs.get("vae", {}).get("sample_size", side * family.latent.stride)
    _check_sizes(family, variant, source, configs)
    for part, config in configs.items():
        if not (part == "vae" and foreign_vae):
            _compare(source, part, config)
    return configs


def _shapes(tensors: Tensors) -> Shapes:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _check_sizes(family: Family, variant: Variant, source: Header, configs: Mapping[str, Mapping[str, Any]]) -> None:
    unet_config, vae_config = configs["unet"], configs["vae"]
    widths = [configs[text.name]["hidden_size"] for text in variant.texts]
    faults = []
    if vae_config["latent_channels"] != family.latent.channels or 2 ** (len(vae_config["block_out_channels"]) - 1) != (
        family.latent.stride
    ):
        faults.append("its VAE has latents of another size")
    if unet_config["cross_attention_dim"] != sum(widths):
        encoders = "text encoder gives" if len(widths) == 1 else "text encoders give"
        faults.append(
            f"its U-Net needs hidden states of width {unet_config['cross_attention_dim']}, its {encoders} {sum(widths)}"
        )
    pooled = configs[variant.texts[-1].name]["projection_dim"] if variant.ids else 0
    expected = pooled + variant.ids * unet.ID_WIDTH
    if variant.ids and unet_config["projection_class_embeddings_input_dim"] != expected:
        faults.append(
            f"its U-Net has {unet_config['projection_class_embeddings_input_dim']} additional inputs, where "
            f"{variant.ids} sizes and the pooled text have {expected}"
        )
    step = variant.heads or variant.head_size or 1
    if any(width % step for width in unet_config["block_out_channels"]) or any(
        width % clip_text.HEAD_SIZE for width in widths
    ):
        faults.append("its widths cannot be divided into attention heads")
    if faults:
        raise CheckpointError(f"{source.path}: not a model of {family.title}: {'; '.join(faults)}.")


# config.json entries that also follow from the tensors (and the rule for heads)
_TEXT = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "hidden_act")
_COMPARED = {
    "unet": ("in_channels", "out_channels", "block_out_channels", "layers_per_block", "cross_attention_dim",
             "use_linear_projection", "attention_head_dim", "addition_embed_type",
             "addition_time_embed_dim", "projection_class_embeddings_input_dim"),
    "vae": ("latent_channels", "block_out_channels", "layers_per_block", "scaling_factor"),
}  # fmt: skip


def _compare(source: Header, part: str, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError if a diffusers folder's config.json contradicts its tensors."""
    written = source.configs.get(part, {})
    levels = len(config.get("block_out_channels", ()))
    for key in _COMPARED.get(part, _TEXT):
        if written.get(key) is None:
            continue
        declared, actual = written[key], config.get(key)
        if key == "attention_head_dim":  # one number stands for all levels
            declared, actual = _per_level(declared, levels), _per_level(config[key], levels)
        if declared != actual:
            raise CheckpointError(
                f"{source.path / part / 'config.json'}: has {key} = {written[key]}, but the weights have "
                f"{config.get(key)}. Get the folder again, or correct the file."
            )


def _per_level(value: int | Sequence[int], levels: int) -> list[int]:
    return [value] * levels if isinstance(value, int) else list(value)
