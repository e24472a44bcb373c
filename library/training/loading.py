"""Load the base model of a run and check its weights."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

import torch

from library.families.family import Model, TextSettings
from library.runtime.precision import FloatName, torch_dtype
from library.runtime.stored_weights import compute_in_fp32
from library.training.memory import loading_device, tile_vae
from library.training.quantised.packer import Packer
from library.training.saving.model_file import check_finite_weights, clip_skip_of

if TYPE_CHECKING:
    from library.checkpoints.header import Header
    from library.options.train_options import TrainOptions
    from library.training.plan.base_model import BaseModel
    from library.training.quantised.plan import Quantisation


def load_model(
    options: TrainOptions,
    base_model: BaseModel,
    device: torch.device,
    say: Callable[[str], None],
    *,
    only: Collection[str] | None = None,
    base: FloatName = "fp32",
    quantisation: Quantisation | None = None,
) -> Model:
    """The base model in float32, on `device` or in main memory; with `only`, just those of its modules. Notes about
    unused content of the checkpoint are passed to `say`.

    `base` in half precision: the weight matrices of backbone and text encoders are stored in that format and computed
    with in float32. With a `quantisation` those that it names are quantised, unless adapters are to be merged into them
    first (--base_weights). Raises UserError for weights that are not finite.
    """
    pack = None if quantisation is None or options.adapter.base_weights else Packer(quantisation)
    model = base_model.family.load(
        base_model.header,
        vae=base_model.vae,
        dtype=torch.float32,
        matrix_dtype=None if base == "fp32" else torch_dtype(base),
        device=loading_device(options.memory, device),
        prediction=base_model.prediction,
        tokenizer_cache_dir=options.model.tokenizer_cache_dir,
        only=only,
        mapped=not options.model.disable_mmap_load_safetensors,
        pack=pack,
    )
    model.zero_terminal_snr = base_model.objective.zero_terminal_snr
    for note in model.notes:
        say(note)
    for name, module in model.modules().items():
        if name != "vae" and (base != "fp32" or pack is not None):
            compute_in_fp32(module)
    if options.memory.vae_tiling and model.vae is not None:
        tile_vae(model.vae, model.family.latent.stride)
    check_finite_weights(model)
    return model


def text_settings(options: TrainOptions, base_model: BaseModel) -> TextSettings:
    """How captions are encoded. --clip_skip is None where it has no effect on the family."""
    return TextSettings(
        clip_skip=clip_skip_of(options, base_model),
        kohya_projection=options.model.text_projection == "kohya" and has_bare_text_projection(base_model.header),
        empty_is_zero=options.caption.empty_caption == "zeros",
    )


def has_bare_text_projection(header: Header) -> bool:
    """Whether a checkpoint stores the text projection as OpenCLIP's plain matrix. sd-scripts loads that matrix as the
    weight of a Linear, so transposed. Diffusers folders and some files store the Linear's weight itself."""
    return any(name.endswith(".text_projection") for name in header.tensors)
