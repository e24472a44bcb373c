"""Names of sd-scripts that kohya_ss's own tools import from `library.sdxl_model_util`: its extraction of LyCORIS, and
its conversion to LCM, which hands a U-Net of diffusers from one of these to the next."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from library.checkpoints.sd_layout import SDXL, to_original
from library.model_util import load_with_names_of_files

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

_UNET = next(part.prefix for part in SDXL.parts if part.name == "unet")


def load_models_from_sdxl_checkpoint(
    model_version: str | None, ckpt_path: str | Path, map_location: str, dtype: torch.dtype | None = None
) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module, Tensor | None, None]:
    """Text encoders, VAE and U-Net of a file, whose layers have the names of adapter files, and the scale of CLIP's
    logits if the file has it. The last value is always None; `model_version` is not needed."""
    modules, model = load_with_names_of_files(ckpt_path, map_location, dtype)
    scale = next((tensor for name, tensor in model.kept.items() if name.endswith(".logit_scale")), None)
    return modules["text_encoder"], modules["text_encoder_2"], model.vae, modules["unet"], scale, None


class SdxlUNet2DConditionModel:
    """Stands for the U-Net that is saved: its tensors under the names of original files."""

    tensors: Mapping[str, Tensor] = {}


sdxl_original_unet = SimpleNamespace(SdxlUNet2DConditionModel=SdxlUNet2DConditionModel)


def convert_diffusers_unet_state_dict_to_sdxl(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a U-Net from diffusers' names to those of original files."""
    tensors = to_original({"unet": state_dict}, {}, SDXL).tensors
    return {name.removeprefix(_UNET): tensor.load() for name, tensor in tensors.items()}


def _load_state_dict_on_device(
    model: SdxlUNet2DConditionModel, state_dict: Mapping[str, Tensor], device: Any, dtype: torch.dtype | None = None
) -> None:
    model.tensors = {name: tensor.to(device, dtype) for name, tensor in state_dict.items()}


def save_stable_diffusion_checkpoint(  # noqa: PLR0913 - as kohya_ss calls it
    output_file: str | Path,
    text_encoder1: nn.Module,
    text_encoder2: nn.Module,
    unet: SdxlUNet2DConditionModel,
    epochs: int | None,
    steps: int | None,
    ckpt_info: None,
    vae: nn.Module,
    logit_scale: Tensor | None,
    metadata: Mapping[str, str] | None,
    save_dtype: torch.dtype | None = None,
) -> None:
    """Write one .safetensors file of SDXL. `epochs`, `steps` and `ckpt_info` are of .ckpt files. Raises
    CheckpointError."""
    from library.checkpoints.lazy import dtype_name
    from library.checkpoints.writer import write_safetensors

    modules = {"vae": vae, "text_encoder": text_encoder1, "text_encoder_2": text_encoder2}
    kept = {f"{_UNET}{name}": tensor for name, tensor in unet.tensors.items()}
    if logit_scale is not None:
        kept["conditioner.embedders.1.model.logit_scale"] = logit_scale
    joined = to_original({part: module.state_dict() for part, module in modules.items()}, kept, SDXL)
    write_safetensors(
        output_file, joined.tensors, metadata, dtype=None if save_dtype is None else dtype_name(save_dtype)
    )
