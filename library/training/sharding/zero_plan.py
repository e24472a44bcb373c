"""Decide whether a run is shared out by DeepSpeed's ZeRO, how its engine is configured, and what has no meaning with
it. Imports no torch.

The flags are those of sd-scripts; without `--deepspeed`, accelerate's configuration says so, through the variables that
`accelerate launch --use_deepspeed` sets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from library.messages import counted, listed, pip_install, readable_bytes
from library.options.mistakes import Mistakes
from library.options.packages import installed_version
from library.training.optim.optimizer_table import OPTIMIZERS
from library.training.sharding.plan import SHARDED, computed_apart, is_on

if TYPE_CHECKING:
    from library.options.groups.deepspeed import DeepSpeedOptions
    from library.runtime.launch import Launch
    from library.training.adapter.plan import AdapterPlan
    from library.training.optim.learning_rates import Optimization
    from library.training.plan.costs import Costs
    from library.training.plan.facts import RunFacts

TRIED = "0.19"
"""The releases that zero.py was written for: it replaces a method inside the engine."""
_PACKAGE = "deepspeed==0.19.8"
_VARIABLES = "ACCELERATE_DEEPSPEED_"
_WITHOUT = f"start without DeepSpeed; {SHARDED} shares out the same"


@dataclass(frozen=True)
class Zero:
    """How a run of `world` processes is shared out: at `stage` 1 the optimizer state, at 2 gradients too, at 3 weights
    too. `optimizer_on_cpu`, `weights_on_cpu`: that they are in main memory while they do not compute."""

    world: int
    stage: int
    optimizer_on_cpu: bool = False
    weights_on_cpu: bool = False

    @property
    def title(self) -> str:
        """For messages, and for the identity of a run: a state is resumed with the same."""
        on_cpu = ", offloaded" if self.optimizer_on_cpu or self.weights_on_cpu else ""
        return f"DeepSpeed ZeRO {self.stage} over {counted(self.world, 'process', 'processes')}{on_cpu}"

    def describe(self, costs: Costs) -> Iterator[str]:
        """What it does to memory."""
        what = " and ".join(("optimizer state", "gradients", "weights")[: self.stage])
        yield f"{self.title}: {readable_bytes(costs.training)} each, with a part of {what}"

    def costs(self, costs: Costs) -> Costs:
        """Memory of one process on its device. The engine keeps its part of the weights twice."""
        trained = costs.gradients

        def part(size: int) -> int:
            return -(-size // self.world)

        weights = costs.weights - trained
        if self.stage < 3:
            weights += trained
        elif not self.weights_on_cpu:
            weights += part(trained)
        copy = 0 if self.optimizer_on_cpu else part(trained)
        gradients = part(trained) if self.stage > 1 else trained
        return replace(
            costs,
            weights=weights + copy,
            gradients=0 if self.optimizer_on_cpu and self.stage > 1 else gradients,
            optimizer=0 if self.optimizer_on_cpu else part(costs.optimizer),
            shards=part(2 * trained + costs.optimizer),
        )


def engine_config(zero: Zero, max_grad_norm: float) -> dict[str, Any]:
    """DeepSpeed's configuration. Batches, windows, schedule, autocast and finite checks are the loop's business: so one
    batch to it is one backward pass, and weights are float32."""
    shared: dict[str, Any] = {"stage": zero.stage}
    if zero.optimizer_on_cpu:
        shared["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    if zero.weights_on_cpu:
        shared["offload_param"] = {"device": "cpu", "pin_memory": False}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": float(max_grad_norm),
        "steps_per_print": 10**9,
        "zero_optimization": shared,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # the user's optimizer, wherever its state is
    }


@dataclass(frozen=True)
class _Wanted:
    """What the user asks for. `flags`: by flags, and not by accelerate's configuration."""

    stage: int
    optimizer_device: str | None
    param_device: str | None
    init: bool
    save_16bit: bool
    fp16_masters: bool
    flags: bool

    def name(self, flag: str) -> str:
        """A setting in messages."""
        return f"--{flag}" if self.flags else f"accelerate's {flag}"


def read_zero(
    options: DeepSpeedOptions, environment: Mapping[str, str], launch: Launch, mistakes: Mistakes, notes: list[str]
) -> Zero | None:
    """How DeepSpeed is to share out a run; None if it is not to, or shares out nothing. Adds mistakes for what cannot
    be."""
    if not (options.deepspeed or is_on(environment, "ACCELERATE_USE_DEEPSPEED")):
        return None
    if is_on(environment, "ACCELERATE_USE_FSDP"):
        mistakes.add("DeepSpeed and FSDP at once", f"choose one: {SHARDED}, or DeepSpeed without it")
    _check_package(mistakes)
    wanted = _from_flags(options) if options.deepspeed else _from_accelerate(environment, mistakes, notes)
    if wanted.fp16_masters:
        mistakes.add(
            f"{wanted.name('fp16_master_weights_and_gradients')}: fp16 cannot be trained with DeepSpeed here", _WITHOUT
        )
    for flag, device, path in (
        ("offload_optimizer", wanted.optimizer_device, options.offload_optimizer_nvme_path),
        ("offload_param", wanted.param_device, options.offload_param_nvme_path),
    ):
        if device == "nvme":
            name = wanted.name(f"{flag}_device")
            mistakes.add(
                f"{name} nvme: what is on NVMe does not come into a training state, so the run could not be resumed",
                f"use cpu for {name}, or remove it",
            )
        elif path is not None:
            notes.append(f"--{flag}_nvme_path {path} has no effect without --{flag}_device nvme, which is refused")
    if wanted.param_device and wanted.stage != 3:
        mistakes.add(
            f"{wanted.name('offload_param_device')} {wanted.param_device} with ZeRO {wanted.stage}: weights are shared "
            "out at stage 3 only",
            f"set {wanted.name('zero_stage')} 3, or remove {wanted.name('offload_param_device')}",
        )
    if wanted.optimizer_device and wanted.stage == 0:
        mistakes.add(
            f"{wanted.name('offload_optimizer_device')} with ZeRO 0, which has no optimizer of its own",
            f"set {wanted.name('zero_stage')} 1, 2 or 3",
        )
    if wanted.init:
        notes.append(
            f"{wanted.name('zero3_init_flag')} is not needed: the model is read tensor by tensor, and is whole in main "
            "memory before it is shared out"
        )
    if wanted.save_16bit:
        notes.append(
            f"{wanted.name('zero3_save_16bit_model')} is not needed: saved models are whole, in --save_precision"
        )
    if wanted.stage == 0:
        notes.append("DeepSpeed ZeRO 0 shares out nothing: the processes train as without DeepSpeed")
        return None
    return Zero(launch.world, wanted.stage, wanted.optimizer_device == "cpu", wanted.param_device == "cpu")


def _check_package(mistakes: Mistakes) -> None:
    version = installed_version("deepspeed")
    if version is None:
        mistakes.add("DeepSpeed is not installed", f"{pip_install(_PACKAGE)}; or {_WITHOUT}")
    elif not version.startswith(f"{TRIED}."):
        mistakes.add(
            f"deepspeed {version}: steps are taken inside its engine, in a way that differs between releases",
            f"{pip_install(_PACKAGE)}; or {_WITHOUT}",
        )


def _from_flags(options: DeepSpeedOptions) -> _Wanted:
    return _Wanted(
        options.zero_stage,
        options.offload_optimizer_device,
        options.offload_param_device,
        options.zero3_init_flag,
        options.zero3_save_16bit_model,
        options.fp16_master_weights_and_gradients,
        flags=True,
    )


def _from_accelerate(environment: Mapping[str, str], mistakes: Mistakes, notes: list[str]) -> _Wanted:
    def read(name: str) -> str | None:
        text = environment.get(_VARIABLES + name, "").strip().lower()
        return None if text in ("", "none") else text

    if read("CONFIG_FILE"):
        mistakes.add(
            "accelerate is configured with a configuration file for DeepSpeed, which is not read",
            "use its stages and offloading as flags: --zero_stage, --offload_optimizer_device, --offload_param_device",
        )
    if environment.get("ACCELERATE_GRADIENT_CLIPPING", "none").strip().lower() not in ("none", ""):
        notes.append("accelerate's gradient_clipping is not read: --max_grad_norm does it")
    stage = read("ZERO_STAGE") or "2"
    if stage not in ("0", "1", "2", "3"):
        mistakes.add(f"accelerate's zero_stage {stage} is no stage of ZeRO", "use 0, 1, 2 or 3")
        stage = "2"
    return _Wanted(
        int(stage),
        read("OFFLOAD_OPTIMIZER_DEVICE"),
        read("OFFLOAD_PARAM_DEVICE"),
        is_on(environment, f"{_VARIABLES}ZERO3_INIT"),
        is_on(environment, f"{_VARIABLES}ZERO3_SAVE_16BIT_MODEL"),
        fp16_masters=False,
        flags=False,
    )


def check_zero(
    facts: RunFacts,
    optimization: Optimization,
    adapter: AdapterPlan | None,
    averages: object | None,
    alone: Sequence[object],
    mistakes: Mistakes,
) -> None:
    """Refuse what cannot be trained with DeepSpeed, or would not mean the same. `averages`: the EMA, if there is one;
    `alone`: what the run has of ALONE."""
    if facts.zero is None:
        return
    rates, optimizer = optimization.learning_rates, optimization.optimizer
    if adapter is not None:
        mistakes.add("DeepSpeed with an adapter: what is trained is small, and there is nothing to share out", _WITHOUT)
    if not optimizer.row.sharded:
        able = ", ".join(row.name for row in OPTIMIZERS if row.sharded)
        mistakes.add(
            f"--optimizer_type {optimizer.name} with DeepSpeed: its engine lays all weights of a group end to end, "
            "and each process steps with a piece of that",
            f"use one of {able}, or {_WITHOUT}",
        )
    if facts.precision.mixed_precision == "fp16" or facts.precision.trained != "fp32":
        name = facts.precision.trained if facts.precision.trained != "fp32" else "fp16"
        mistakes.add(
            f"{name} weights or gradients with DeepSpeed: its engine would scale and round them by rules of its own",
            f"use --mixed_precision bf16 without --full_bf16, or {_WITHOUT}",
        )
    if any(name != facts.base_model.family.backbone for name in rates.modules):
        mistakes.add(
            "text encoders with DeepSpeed: layers that no caption reaches (--clip_skip) would decay, and encoders "
            "could not stop (--stop_text_encoder_training)",
            f"train the U-Net alone (--stop_text_encoder_training -1), or {_WITHOUT}",
        )
    if optimization.update.fuses or optimization.update.offloads:
        mistakes.add(
            "--fused_backward_pass, --fused_optimizer_groups or --offload_optimizer with DeepSpeed, whose engine takes "
            "the steps",
            f"remove them; --offload_optimizer_device cpu keeps the optimizer state in main memory; or {_WITHOUT}",
        )
    if found := [*(["--use_ema"] if averages else []), *computed_apart(facts, alone)]:
        mistakes.add(
            f"{listed(found, 9)} with DeepSpeed: its engine keeps the weights, and lets only a training step compute",
            f"remove it, and draw with the saved models (gen_img.py, tools/evaluate_subject.py), or {_WITHOUT}",
        )
