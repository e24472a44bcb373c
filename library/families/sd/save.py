"""Save Stable Diffusion as an original file or a diffusers folder, atomically."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.checkpoints import sd_layout
from library.checkpoints.header import CheckpointError, Header
from library.checkpoints.lazy import LazyTensor, dtype_name
from library.checkpoints.prediction_marks import MARKS, marks
from library.checkpoints.writer import replacing_folder, write_bin, write_ckpt, write_json, write_safetensors
from library.families.family import EncoderTokenizer, Model, SaveAs
from library.families.sd.variant import TextKind, Variant
from library.objective.process import ForwardProcess, Prediction
from library.whole_files import remove_leftovers

Tensors = Mapping[str, Tensor | LazyTensor]


@dataclass(frozen=True)
class SaveOptions:
    """How to save. `dtype` None keeps each tensor's dtype; `steps` and `epoch` are added to those of a .ckpt source."""

    save_as: SaveAs
    dtype: torch.dtype | None = None
    metadata: Mapping[str, str] | None = None
    steps: int = 0
    epoch: int = 0
    variant: str = ""
    """Variant of a diffusers folder's files: "fp16" for diffusion_pytorch_model.fp16.safetensors."""


@dataclass(frozen=True)
class Contents:
    """The contents to write: of a model in memory, or of one converted tensor by tensor.

    `parts`: part -> name in its module -> tensor. `modules`: for the configurations; may be on the meta device. `kept`:
    other tensors under their names in single files. `tokenizers`: by text encoder name.
    """

    parts: Mapping[str, Tensors]
    modules: Mapping[str, Any]
    kept: Tensors
    tokenizers: Mapping[str, EncoderTokenizer]
    source: Header
    process: ForwardProcess
    prediction: Prediction
    zero_terminal_snr: bool


def save(variant: Variant, model: Model, path: Path, options: SaveOptions) -> tuple[str, ...]:
    """Write a model to `path` and return messages for the user. Raises CheckpointError; nothing is changed then."""
    modules = model.modules()
    contents = Contents(
        parts={part: module.state_dict() for part, module in modules.items()},
        modules=modules,
        kept=model.kept,
        tokenizers=model.tokenizer.by_encoder,
        source=model.source,
        process=model.family.process,
        prediction=model.prediction,
        zero_terminal_snr=model.zero_terminal_snr,
    )
    return write(variant, contents, path, options)


def write(
    variant: Variant,
    contents: Contents,
    path: Path,
    options: SaveOptions,
    check: Callable[[], None] | None = None,
) -> tuple[str, ...]:
    """Write contents to `path`, like `save`. `check` is called before the new file replaces an old one; if it raises,
    nothing is changed."""
    remove_leftovers(path.parent, only=path.name)
    if options.save_as in ("diffusers", "diffusers_safetensors"):
        refuse_other_folder(path)
        with replacing_folder(path) as folder:
            _write_folder(variant, contents, folder, options)
            if check is not None:
                check()
        return ()
    dtype = None if options.dtype is None else dtype_name(options.dtype)
    parts = {part: _file_names(variant, part, tensors) for part, tensors in contents.parts.items()}
    kept = {name: tensor for name, tensor in contents.kept.items() if name not in MARKS}
    # a .ckpt has no metadata for the prediction, and metadata have no entry for the schedule
    no_metadata = contents.zero_terminal_snr or options.save_as == "ckpt"
    if variant.marks_prediction or no_metadata or len(kept) < len(contents.kept):
        kept |= marks(contents.prediction, zero_terminal_snr=contents.zero_terminal_snr)
    joined = sd_layout.to_original(parts, kept, variant.layout, like=contents.source, dtype=dtype)
    if options.save_as == "safetensors":
        write_safetensors(path, joined.tensors, options.metadata, check=check)
    else:
        write_ckpt(path, joined.tensors, extra=_counters(contents.source, options), check=check)
    return joined.notes


def _file_names(variant: Variant, part: str, tensors: Tensors) -> Tensors:
    """Rename tensors from the module's names to those in files."""
    text = next((text for text in variant.texts if text.name == part), None)
    return tensors if text is None else {text.file_name(name): tensor for name, tensor in tensors.items()}


def _counters(source: Header, options: SaveOptions) -> dict[str, int]:
    """Return epoch and global_step of a .ckpt, added to those of its source."""
    before = source.metadata if source.kind == "ckpt" else {}
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


def _write_folder(variant: Variant, contents: Contents, folder: Path, options: SaveOptions) -> None:
    safe = options.save_as == "diffusers_safetensors"
    texts = {text.name: text for text in variant.texts}
    dtype = None if options.dtype is None else dtype_name(options.dtype)
    for part, tensors in contents.parts.items():
        stem = "diffusion_pytorch_model" if part not in texts else "model" if safe else "pytorch_model"
        stem += f".{options.variant}" if options.variant else ""
        named = _file_names(variant, part, tensors)
        if safe:
            write_safetensors(folder / part / f"{stem}.safetensors", named, {"format": "pt"}, dtype)
        else:
            write_bin(folder / part / f"{stem}.bin", named, dtype)
    for part in contents.parts:  # after the weights, as modules may still be made by another thread
        module = contents.modules[part]
        config = _text_config(module.config, texts[part]) if part in texts else json.loads(module.to_json_string())
        write_json(folder / part / "config.json", config)
    for text in variant.texts:
        contents.tokenizers[text.name].save(folder / text.tokenizer_folder)
    scheduler = _scheduler(contents)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    write_json(folder / "model_index.json", _model_index(variant, contents, scheduler["_class_name"]))


_TEXT_KEYS = (
    "attention_dropout", "bos_token_id", "eos_token_id", "hidden_act", "hidden_size", "intermediate_size",
    "layer_norm_eps", "max_position_embeddings", "num_attention_heads", "num_hidden_layers", "pad_token_id",
    "projection_dim", "vocab_size",
)  # fmt: skip


def _text_config(config: Any, kind: TextKind) -> dict[str, Any]:
    return {
        "architectures": [kind.class_name],
        "model_type": "clip_text_model",
        **{key: getattr(config, key) for key in _TEXT_KEYS},
        "eos_token_id": 2,  # as in published files: see clip_text.text_config
    }


def _scheduler(contents: Contents) -> dict[str, Any]:
    """Return the source folder's scheduler, or DDIM, with the model's prediction type."""
    process = {
        "_class_name": "DDIMScheduler",
        **contents.process.scheduler_arguments(),
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    prediction: dict[Prediction, str] = {"epsilon": "epsilon", "v": "v_prediction"}
    # arXiv 2305.08891: sampling must start at the last timestep
    rescaled = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if contents.zero_terminal_snr else {}
    source = contents.source.configs.get("scheduler", {})
    return {
        **(source if "_class_name" in source else process),
        **rescaled,
        "prediction_type": prediction[contents.prediction],
    }


def _model_index(variant: Variant, contents: Contents, scheduler: str) -> dict[str, Any]:
    import diffusers

    source = contents.source.configs.get("model_index", {})
    facts = {name: source.get(name, value) for name, value in variant.pipeline_facts.items()}
    texts = {text.name: ["transformers", text.class_name] for text in variant.texts}
    tokenizers = {text.tokenizer_folder: ["transformers", "CLIPTokenizer"] for text in variant.texts}
    return {
        "_class_name": variant.pipeline,
        "_diffusers_version": diffusers.__version__,
        **facts,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", scheduler],
        **texts,
        **tokenizers,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def refuse_other_folder(path: Path) -> None:
    """Raise CheckpointError if `path` exists and is not a diffusers model: such a folder is never replaced."""
    if path.exists() and not (path / "model_index.json").is_file() and (path.is_file() or any(path.iterdir())):
        raise CheckpointError(f"{path}: exists and is not a diffusers model. Choose another name.")
