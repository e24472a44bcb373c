"""Saving Stable Diffusion 1 and 2: one original file, or a diffusers folder; whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from library.checkpoints import sd_layout
from library.checkpoints.header import CheckpointError
from library.checkpoints.lazy import LazyTensor, dtype_name
from library.checkpoints.writer import refuse_nonfinite, replacing, write_ckpt, write_json, write_safetensors
from library.families.family import Model, SaveAs
from library.families.sd_variant import Variant
from library.objective.process import Prediction

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class SaveOptions:
    """How to save. `dtype` None keeps each tensor's own; `steps` and `epoch` are added to those of a .ckpt source."""

    save_as: SaveAs
    dtype: torch.dtype | None = None
    metadata: Mapping[str, str] | None = None
    steps: int = 0
    epoch: int = 0


def save(variant: Variant, model: Model, path: Path, options: SaveOptions) -> tuple[str, ...]:
    """Write the model to `path` and return what the user should be told. CheckpointError leaves all as it was."""
    if options.save_as in ("diffusers", "diffusers_safetensors"):
        with replacing_folder(path) as folder:
            _write_folder(model, folder, options)
        return ()
    dtype = None if options.dtype is None else dtype_name(options.dtype)
    parts = {part: module.state_dict() for part, module in _modules(model).items()}
    joined = sd_layout.to_original(parts, model.kept, variant.layout, like=model.source, dtype=dtype)
    if options.save_as == "safetensors":
        write_safetensors(path, joined.tensors, options.metadata)
    else:
        write_ckpt(path, joined.tensors, extra=_counters(model, options))
    return joined.notes


def _modules(model: Model) -> dict[str, Any]:
    return {"unet": model.unet, "vae": model.vae, "text_encoder": model.text_encoder}


def _counters(model: Model, options: SaveOptions) -> dict[str, int]:
    """epoch and global_step of a .ckpt: those of its source and what was trained on top."""
    before = model.source.metadata if model.source.kind == "ckpt" else {}
    return {
        "epoch": _whole(before.get("epoch")) + options.epoch,
        "global_step": _whole(before.get("global_step")) + options.steps,
    }


def _whole(text: str | None) -> int:
    try:
        return int(float(text or 0))
    except ValueError:
        return 0


# --- diffusers folders ----------------------------------------------------------------------------------------------


def _write_folder(model: Model, folder: Path, options: SaveOptions) -> None:
    safe = options.save_as == "diffusers_safetensors"
    for part, module in _modules(model).items():
        tensors = module.state_dict()
        stem = "diffusion_pytorch_model"
        if part == "text_encoder":
            # the names of transformers before version 5, which every reader takes
            tensors = {f"text_model.{name}": tensor for name, tensor in tensors.items()}
            stem = "model" if safe else "pytorch_model"
            write_json(folder / part / "config.json", _text_config(module.config))
        else:
            write_json(folder / part / "config.json", json.loads(module.to_json_string()))
        _write_part(folder / part, stem, tensors, options.dtype, safe)
    model.tokenizer.save(folder / "tokenizer")
    write_json(folder / "scheduler" / "scheduler_config.json", _scheduler(model))
    write_json(folder / "model_index.json", _model_index(_scheduler(model)["_class_name"]))


def _write_part(folder: Path, stem: str, tensors: Tensors, dtype: torch.dtype | None, safe: bool) -> None:
    name = None if dtype is None else dtype_name(dtype)
    if safe:
        write_safetensors(folder / f"{stem}.safetensors", tensors, {"format": "pt"}, name)
        return
    path = folder / f"{stem}.bin"
    loaded = {}
    for key, tensor in tensors.items():
        lazy = LazyTensor.of(tensor)
        loaded[key] = (lazy if name is None else lazy.cast(name)).load().to("cpu")
        refuse_nonfinite(path, key, loaded[key])
    with replacing(path) as stream:
        torch.save(loaded, stream)


_TEXT_KEYS = (
    "attention_dropout", "bos_token_id", "eos_token_id", "hidden_act", "hidden_size", "intermediate_size",
    "layer_norm_eps", "max_position_embeddings", "num_attention_heads", "num_hidden_layers", "pad_token_id",
    "projection_dim", "vocab_size",
)  # fmt: skip


def _text_config(config: Any) -> dict[str, Any]:
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        **{key: getattr(config, key) for key in _TEXT_KEYS},
    }


def _scheduler(model: Model) -> dict[str, Any]:
    """The source folder's scheduler, or DDIM; with the prediction of the model."""
    process = {
        "_class_name": "DDIMScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": model.family.process.timesteps,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    prediction: dict[Prediction, str] = {"epsilon": "epsilon", "v": "v_prediction"}
    # arXiv 2305.08891: such a model must be sampled from its last timestep on
    rescaled = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if model.zero_terminal_snr else {}
    source = model.source.configs.get("scheduler", process)
    return {**source, **rescaled, "prediction_type": prediction[model.prediction]}


def _model_index(scheduler: str) -> dict[str, Any]:
    import diffusers

    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A new folder that becomes `path` when the block ends well; else `path` stays as it was and nothing is left.

    Raises CheckpointError when `path` is something else than a model folder: that is never removed.
    """
    if path.exists() and not (path / "model_index.json").is_file() and (path.is_file() or any(path.iterdir())):
        raise CheckpointError(f"{path}: exists and is no diffusers model; it is left as it is. Choose another name.")
    part, old = (path.with_name(f"{path.name}.{os.getpid()}.{word}") for word in ("tmp", "old"))
    try:
        part.mkdir(parents=True)
        yield part
        if path.exists():
            os.replace(path, old)
        try:
            os.replace(part, path)
        except OSError:
            if old.exists():
                os.replace(old, path)
            raise
    except OSError as error:
        raise CheckpointError(
            f"{path}: could not be written ({error.strerror or error}). Nothing was changed. Check the path, its "
            "permissions and the free space."
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if path.exists():  # never the only copy
            shutil.rmtree(old, ignore_errors=True)
