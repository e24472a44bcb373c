"""Read and check the configurations of Stable Diffusion's modules from a header. No torch: the plan uses it too."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints.header import CheckpointError, Header
from library.checkpoints.lazy import LazyTensor
from library.families.clip import text_encoder as clip_text
from library.families.family import Family
from library.families.sd import expected_tensors, unet, vae
from library.families.sd.shapes import Shapes
from library.families.sd.vae_kind import check_kind
from library.families.sd.variant import TITLES
from library.messages import listed

if TYPE_CHECKING:
    from library.checkpoints.vae_file import VaeFile
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
    foreign_vae: VaeFile | None = None,
) -> Configs:
    """Return the arguments of each module from its tensor shapes; config.json files of a folder must agree.

    `parts`: tensors under diffusers' and transformers' names. `foreign_vae`: another VAE than the
    checkpoint's own.
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
    configs["unet"]["sample_size"] = _said(written, "sample_size", side)
    configs["unet"]["upcast_attention"] = _said(written, "upcast_attention", variant.upcast_attention)
    configs["vae"]["sample_size"] = _said(source.configs.get("vae", {}), "sample_size", side * family.latent.stride)
    _check_sizes(family, variant, source, configs)
    for part, config in configs.items():
        if part == "vae" and foreign_vae is not None:
            check_kind(foreign_vae, family)
            _compare(
                foreign_vae.header.path / "config.json", part, foreign_vae.header.configs.get("config", {}), config
            )
        else:
            _compare(source.path / part / "config.json", part, source.configs.get(part, {}), config)
    _check_parts(variant, source, parts, configs, foreign_vae)
    return configs


def _check_parts(
    variant: Variant, source: Header, parts: Mapping[str, Tensors], configs: Configs, foreign_vae: VaeFile | None
) -> None:
    """Raise CheckpointError if the tensors of a part are not those of a module of its configuration."""
    expected = {
        "unet": expected_tensors.unet_tensors(configs["unet"]),
        "vae": expected_tensors.vae_tensors(configs["vae"]),
        **{
            text.name: {
                text.module_name(name): shape
                for name, shape in expected_tensors.text_tensors(configs[text.name], projects=text.projects).items()
            }
            for text in variant.texts
        },
    }
    for part, tensors in parts.items():
        where = foreign_vae.header.path if part == "vae" and foreign_vae is not None else source.path
        check_tensors(str(where), part, tensors, expected[part])


_DISTILLED = ", or a model from which layers were taken, such as SSD-1B and Segmind Vega, which is not supported"


def _varies_in_depth(missing: Sequence[str], unexpected: Sequence[str], tensors: Tensors) -> bool:
    """Whether a whole transformer block is missing, or more than on the way down, by which the others are judged."""
    if any(".transformer_blocks." in name for name in unexpected):
        return True
    blocks = {found[0] for name in missing if (found := re.match(r".*\.transformer_blocks\.\d+\.", name))}
    return any(not any(name.startswith(block) for name in tensors) for block in blocks)


def check_tensors(where: str, part: str, tensors: Tensors, expected: Shapes) -> None:
    """Raise CheckpointError unless the names and shapes of a part's tensors match its module."""
    title = TITLES[part]
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected]
    if missing or unexpected:
        what = "lacks tensors" if missing else "has unexpected tensors"
        names = listed(missing or unexpected, 5)
        raise CheckpointError(
            f"{where}: its {title} {what}: {names}. The file is incomplete or of another kind"
            f"{_DISTILLED if _varies_in_depth(missing, unexpected, tensors) else ''}."
        )
    for name, shape in expected.items():
        if shape != tensors[name].shape:
            raise CheckpointError(
                f"{where}: tensor {name} of its {title} has the shape {tensors[name].shape} instead of {shape}. The "
                "file is damaged or of another kind."
            )


def _said(written: Mapping[str, Any], key: str, usual: int) -> int:
    """Return an entry of a config.json that changes nothing, if it is of the usual type."""
    value = written.get(key)
    return value if type(value) is type(usual) else usual


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
# entries that no tensor shows; the modules are made with these values, as in all published models
_ASSUMED: Mapping[str, Mapping[str, Any]] = {
    "unet": {
        "act_fn": "silu", "norm_eps": 1e-5, "norm_num_groups": 32, "flip_sin_to_cos": True, "freq_shift": 0,
        "center_input_sample": False, "dual_cross_attention": False, "only_cross_attention": False,
        "resnet_time_scale_shift": "default", "time_embedding_type": "positional", "mid_block_scale_factor": 1,
    },
    "vae": {
        "act_fn": "silu", "norm_eps": 1e-6, "norm_num_groups": 32, "shift_factor": 0, "latents_mean": 0,
        "latents_std": 1, "mid_block_add_attention": True,
    },
    "text": {"layer_norm_eps": 1e-5},
}  # fmt: skip


def _compare(file: Path, part: str, written: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Raise CheckpointError if the config.json of a part, `written`, contradicts its tensors, or says of it what the
    modules do not do."""
    levels = len(config.get("block_out_channels", ()))
    for key in _COMPARED.get(part, _TEXT):
        if written.get(key) is None:
            continue
        declared, actual = written[key], config.get(key)
        if key == "attention_head_dim":  # one number stands for all levels
            declared, actual = _per_level(declared, levels), _per_level(config[key], levels)
        if declared != actual:
            owner = "a VAE for this model has" if key == "scaling_factor" else "the weights have"
            raise CheckpointError(
                f"{file}: has {key} = {written[key]}, but {owner} {config.get(key)}. Get the folder again, or correct "
                "the file."
            )
    for key, value in _ASSUMED.get(part, _ASSUMED["text"]).items():
        said = written.get(key)
        if said is not None and any(each != value for each in (said if isinstance(said, list) else [said])):
            raise CheckpointError(
                f"{file}: has {key} = {said}, but only models with {key} = {value} are supported. Give another model; "
                "if the entry is wrong, correct the file."
            )


def _per_level(value: Any, levels: int) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value] * levels
