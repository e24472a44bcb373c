"""The kinds of runs that are computed on the pretend device and on the CPU, in miniature."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from PIL import Image

import train_db
import train_network
from library.training.recipe import Recipe
from tests import tiny
from tests.training.running import World


@dataclass(frozen=True)
class Case:
    """A run. "@" in the value of a flag: the folder of the data. `resume_at`: a second run goes on from the state that
    was saved after this step. `tolerance`: of losses, relative. They are equal bit for bit but for the norm of the
    gradients, which clipping divides by: it is added up otherwise on a device. `waits`: files whose lines may wait for
    the device in a step, each with the reason. `copies_weights`: whether a step may copy trained weights to the CPU."""

    recipe: Recipe
    model: str
    flags: Mapping[str, Any]
    resume_at: int | None = None
    tolerance: float = 1e-5
    waits: Mapping[str, str] = field(default_factory=dict)
    copies_weights: bool = False


_FACTS = {each.name for each in fields(Case)}


def _whole(model: str, **flags: Any) -> Case:
    facts = {name: flags.pop(name) for name in _FACTS & flags.keys()}
    return Case(train_db.RECIPE, model, flags, **facts)


def _adapter(model: str, **flags: Any) -> Case:
    lora = {"network_module": "networks.lora", "network_dim": 2}
    facts = {name: flags.pop(name) for name in _FACTS & flags.keys()}
    return Case(train_network.RECIPE, model, {**lora, **flags}, **facts)


_AVERAGES = {"library/training/averaging/weight_average.py": "averages are on the CPU, unless --ema_device accelerator"}
_OPTIMIZER = {"library/training/steps.py": "this optimizer reads numbers of each weight in its step"}
_AT_ONCE = {"library/training/steps.py": "the loss is read before the update: library/training/plan/reading.py"}

# bfloat16 has 8 bits, and cards compute norms in float32 where CPUs do not
_HALF = 0.05

CASES: Mapping[str, Case] = {
    "all weights, resumed": _whole(
        "sd1", flip_aug=True, shuffle_caption=True, caption_dropout_rate=0.3, reg_data_dir="@/reg",
        prior_loss_weight=0.5, gradient_accumulation_steps=2, max_train_steps=3, save_every_n_steps=2, save_state=True,
        lr_scheduler="cosine", stop_text_encoder_training=2, gradient_checkpointing=True, use_ema=True, resume_at=2,
        waits={**_AVERAGES, **_AT_ONCE}, copies_weights=True,
    ),
    "masks, weights by timestep, EMA": _whole(
        "sd1", masked_loss=True, conditioning_data_dir="@/masks", mask_floor=0.1, min_snr_gamma=5, cache_latents=True,
        vae_batch_size=2, clip_skip=2, noise_offset=0.1, multires_noise_iterations=2, ip_noise_gamma=0.1,
        loss_type="huber", learning_rate_te=0, posthoc_ema_snapshots=2,
        waits=_AVERAGES, copies_weights=True,
    ),
    "v, latents on disk": _whole(
        "sd2", v_parameterization=True, zero_terminal_snr=True, scale_v_pred_loss_like_noise_pred=True,
        cache_latents_to_disk=True, optimizer_type="Adafactor", waits=_OPTIMIZER,
    ),
    "SDXL, both caches": _whole(
        "sdxl", cache_latents=True, cache_text_encoder_outputs=True, learning_rate_te=0, debiased_estimation_loss=True,
        optimizer_type="SGDNesterov", waits=_AT_ONCE,
    ),
    "SDXL with its encoders, bf16": _whole(
        "sdxl", mixed_precision="bf16", learning_rate_te1=1e-4, gradient_checkpointing=True, tolerance=_HALF,
    ),
    "refiner, full bf16": _whole("refiner", mixed_precision="bf16", full_bf16=True, tolerance=_HALF, waits=_AT_ONCE),
    "LoRA, resumed, dropouts": _adapter(
        "sd1", network_dropout=0.3, network_args=["conv_dim=2", "rank_dropout=0.2", "module_dropout=0.1"],
        optimizer_type="Prodigy", learning_rate=1, save_every_n_steps=2, save_state=True, max_train_steps=3,
        resume_at=2, waits=_OPTIMIZER,
    ),
    "LoRA, validation, previews": _adapter(
        "sd1", validation_split=0.34, validate_every_n_steps=2, sample_prompts="@/prompts.txt", sample_at_first=True,
        sample_every_n_steps=2, sample_sampler="euler_a", use_ema=True, ema_validation="comparison",
        ema_device="accelerator",
    ),
    "LoRA, rollout, schedule-free": _adapter(
        "sd1", scheduled_sampling_max_step_offset=4, scheduled_sampling_probability=1.0, cache_latents=True,
        optimizer_type="AdamWScheduleFree", network_train_unet_only=True,
        waits={"library/training/rollout.py": "diffusers' samplers copy numbers of their schedule", **_AT_ONCE},
    ),
    "LoRA, preservation": _adapter(
        "sd1", preservation=["base_prediction=0.5"], reg_data_dir="@/reg", scale_weight_norms=0.5, max_grad_norm=0.01,
        waits={"networks/network.py": "--scale_weight_norms counts the weights that it scaled", **_AT_ONCE},
        cache_text_encoder_outputs_to_disk=True,
    ),
    "whole, preservation of a copy": _whole(
        "sd1", preservation=["class_prompt=0.5"], preservation_base="accelerator", learning_rate_te=0,
    ),
    "LoKr, bf16": _adapter(
        "sdxl", network_module="networks.lokr", network_args=["factor=4", "conv_dim=2"], mixed_precision="bf16",
        cache_text_encoder_outputs=True, empty_caption="zeros", caption_dropout_rate=0.3, tolerance=_HALF,
    ),
    "LoRA, swapped blocks": _adapter(
        "sd1", blocks_to_swap=2, gradient_checkpointing=True, cpu_offload_checkpointing=True,
        network_train_unet_only=True, copies_weights=True,
    ),
    "fused backward pass": _whole(
        "sd1", fused_backward_pass=True, max_grad_norm=0, learning_rate_te=0,
        waits={"library/training/update/fused.py": "whether all gradients were finite", **_AT_ONCE},
    ),
    "optimizer state in main memory": _whole(
        "sd1", offload_optimizer=True, learning_rate_te=0, copies_weights=True, waits=_AT_ONCE,
    ),
    "DoRA": _adapter("refiner", network_args=["use_dora=True"]),
    "LoHa": _adapter("sd1", network_module="networks.loha", weighted_captions=True),
    "OFT": _adapter("sd1", network_module="networks.oft"),
    "DyLoRA": _adapter("sd1", network_module="networks.dylora", network_args=["unit=1"]),
}  # fmt: skip


def make_data(root: Path) -> World:
    """Write the models and the images."""
    for family in ("sd1", "sd2", "sdxl", "refiner"):
        tiny.write_single_file(root / f"{family}.safetensors", family)
    tiny.write_images(root / "train" / "2_sks dog", 3, size=(80, 64))
    tiny.write_images(root / "reg" / "1_dog", 2, seed=9)
    for image in sorted((root / "train" / "2_sks dog").glob("*.png")):
        (root / "masks").mkdir(exist_ok=True)
        Image.linear_gradient("L").resize((80, 64)).save(root / "masks" / image.name)
    (root / "prompts.txt").write_text("sks dog --n bad --w 64 --h 64 --s 2 --l 4 --d 5\n", encoding="utf-8")
    return World(root)


def flags_of(case: Case, world: World) -> dict[str, Any]:
    """The flags of a case's run."""
    chosen = {name: str(v).replace("@", str(world.root)) if "@" in str(v) else v for name, v in case.flags.items()}
    model = world.root / f"{case.model}.safetensors"
    return {"pretrained_model_name_or_path": model, "max_train_steps": 2, "train_batch_size": 2, **chosen}
