"""Which optimiser a run uses: decided from the options without importing torch, then built over the parameters."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from library.options.mistakes import Mistake, UserError
from library.training.optim.constructors import Found, load, look_up, read_arguments, refuse_unknown
from library.training.optim.optimizer_table import OPTIMIZERS, OptimizerRow

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from library.options.groups.optimizer import OptimizerOptions

SMALLEST_FP16_EPS = 1e-4
"""Below it Adam's division overflows with fp16 state: eps rounds to 0 and the second moment of small gradients is 0."""


@dataclass(frozen=True)
class OptimizerChoice:
    """The decision: a row of the table (or one made for a class named by its path), the constructor's arguments without
    the learning rate, and what is to be said about them. Not to be built while there are `mistakes`."""

    row: OptimizerRow
    arguments: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    mistakes: tuple[Mistake, ...] = ()

    @property
    def name(self) -> str:
        """The name for plan and messages."""
        return self.row.name

    @property
    def relative_step(self) -> bool:
        """Whether it is Adafactor with its own, relative learning rate."""
        return is_adafactor(self.row) and bool(self.arguments.get("relative_step", True))

    @property
    def full_name(self) -> str:
        """Class and arguments as they stand in a file's metadata: `torch.optim.adamw.AdamW(weight_decay=0.1)`."""
        listed = ",".join(f"{key}={value}" for key, value in self.arguments.items())
        return f"{self.row.path}({listed})" if listed else self.row.path

    def state_bytes_per_parameter(self, weight_bytes: int) -> float:
        """Memory of the optimiser's state for each trained parameter kept in `weight_bytes` bytes."""
        extra = 4.0 if is_adafactor(self.row) and self.arguments.get("beta1") is not None else 0.0
        return self.row.state_tensors * weight_bytes + self.row.state_bytes + extra


def is_adafactor(row: OptimizerRow) -> bool:
    """Whether a row is transformers' Adafactor, under whichever name."""
    return row.path.startswith("transformers.") and row.path.endswith(".Adafactor")


def choose_optimizer(options: OptimizerOptions, full_fp16: bool = False) -> OptimizerChoice:
    """Decide by options alone. Never raises for what the user wrote: see `mistakes` of the result."""
    row, found, unknown = _find_row(_asked_name(options))
    mistakes = list(unknown)
    given, malformed = read_arguments("optimizer_args", options.optimizer_args)
    mistakes += malformed
    if "lr" in given:
        mistakes.append(Mistake(f"--optimizer_args lr={given.pop('lr')}", "use --learning_rate"))
    mistakes += refuse_unknown("optimizer_args", row.name, given, found.arguments)
    choice = OptimizerChoice(row, {**row.defaults, **given})
    notes: list[str] = []
    if is_adafactor(row):
        choice = _settle_adafactor(choice, options, notes)
    if row.learning_rate_free:
        _judge_factors(row, options, notes, mistakes)
    if full_fp16 and not unknown:
        mistakes += _judge_fp16_state(choice, found.arguments is None or "eps" in found.arguments)
    return replace(choice, notes=tuple(notes), mistakes=tuple(mistakes))


def _asked_name(options: OptimizerOptions) -> str:
    """optimizer_type, or what the two older flags stand for; AdamW when nothing is said."""
    older = "AdamW8bit" if options.use_8bit_adam else "Lion" if options.use_lion_optimizer else "AdamW"
    return options.optimizer_type or older


def _find_row(name: str) -> tuple[OptimizerRow, Found, list[Mistake]]:
    """The row for a name of the table in any case, a class of torch.optim, or a dotted path; what its source says."""
    by_name = {row.name.lower(): row for row in OPTIMIZERS}
    row = by_name.get(name.lower())
    if row is None:
        path = name if "." in name else f"torch.optim.{name}"
        # of a class under its own name the table's facts hold, not the defaults of a short name
        known = (each for each in OPTIMIZERS if _same_class(each.path, path))
        row = replace(next(known, OptimizerRow(name, path, state_tensors=2)), name=name, defaults={})
    found = look_up(row.path)
    if found.missing_package:
        remedy = row.install or f"install the package that brings {found.missing_package}"
        return row, found, [Mistake(f"--optimizer_type {name}: {found.problem}", remedy)]
    if row.path.endswith(".LBFGS"):
        return row, found, [Mistake(f"--optimizer_type {name} needs several losses for a step", "choose another one")]
    if found.problem and "." not in name:
        near = difflib.get_close_matches(name.lower(), by_name, 1, 0.6)
        listed = ", ".join(row.name for row in OPTIMIZERS)
        remedy = f"did you mean {by_name[near[0]].name}?" if near else f"one of {listed}, or package.module.Class"
        return row, found, [Mistake(f"--optimizer_type {name}: there is no optimiser of this name", remedy)]
    if found.problem:
        return row, found, [Mistake(f"--optimizer_type {name}: {found.problem}", "check the path of the class")]
    return row, found, []


def _same_class(path: str, other: str) -> bool:
    """Whether two paths of one package end in one class name: `dadaptation.DAdaptAdam` is also defined deeper."""
    return path.split(".")[0] == other.split(".")[0] and path.split(".")[-1] == other.split(".")[-1]


def _settle_adafactor(choice: OptimizerChoice, options: OptimizerOptions, notes: list[str]) -> OptimizerChoice:
    """kohya's rules: relative step unless told otherwise, and always with warmup_init."""
    arguments = dict(choice.arguments)
    arguments.setdefault("relative_step", True)
    if arguments.get("warmup_init") and not arguments["relative_step"]:
        notes.append("Adafactor: warmup_init needs relative_step, which is switched on")
        arguments["relative_step"] = True
    if arguments["relative_step"]:
        notes.append(
            "Adafactor finds its own rate (relative_step): learning rates and lr_scheduler have no effect; "
            "--optimizer_args relative_step=False scale_parameter=False uses them"
        )
    else:
        if options.max_grad_norm:
            notes.append("Adafactor clips its own updates; --max_grad_norm 0 leaves it at that")
        if options.lr_scheduler != "constant_with_warmup" and not options.lr_scheduler_type:
            notes.append("Adafactor without relative_step usually goes with --lr_scheduler constant_with_warmup")
        if arguments.get("clip_threshold", 1.0) != 1.0:
            notes.append("Adafactor without relative_step usually goes with clip_threshold=1.0")
    return replace(choice, arguments=arguments)


def _judge_factors(row: OptimizerRow, options: OptimizerOptions, notes: list[str], mistakes: list[Mistake]) -> None:
    """D-Adaptation and Prodigy multiply the rate that they find by learning_rate: one factor, about 1."""
    usual = {"learning_rate": options.learning_rate}
    given = {f"block_lr {place}": rate for place, rate in enumerate(options.block_lr)} or usual
    trains_text_encoder = options.stop_text_encoder_training is None or options.stop_text_encoder_training > 0
    if trains_text_encoder and options.train_text_encoder:
        names = ("learning_rate_te", "learning_rate_te1", "learning_rate_te2")
        given |= {name: rate for name in names if (rate := getattr(options, name)) is not None} or usual
    factors = {name: rate for name, rate in given.items() if rate > 0}
    if len(set(factors.values())) > 1:
        first, rate = next(iter(factors.items()))
        other = next(name for name, another in factors.items() if another != rate)
        rates = f"--{first} {rate:g} and --{other} {factors[other]:g}"
        what = f"{row.name} finds one rate for all weights and cannot use two: {rates}"
        mistakes.append(Mistake(what, "give one of them, the same twice, or --learning_rate_te 0 (not trained)"))
    elif factors and (factor := next(iter(factors.values()))) <= 0.1:
        notes.append(f"{row.name} multiplies the rate it finds by learning_rate {factor:g}; about 1 is usual")


def _judge_fp16_state(choice: OptimizerChoice, has_eps: bool) -> list[Mistake]:
    """full_fp16 keeps torch-style state in fp16, where a small eps is 0 and the first step divides 0 by 0."""
    eps = choice.arguments.get("eps", 0.0)
    if choice.row.fp32_state or (has_eps and isinstance(eps, int | float) and eps >= SMALLEST_FP16_EPS):
        return []
    exact = [row.name for row in OPTIMIZERS if row.fp32_state]
    twin = f"{choice.name}8bit"
    remedy = f"--optimizer_type {twin if twin in exact else 'AdamW8bit or Adafactor'}, which keep better state"
    what = f"--full_fp16 with {choice.name} keeps the optimiser's state in fp16, which is too coarse"
    if has_eps:
        what += f": eps {eps or 1e-8:g} is 0 there"
        remedy += "; or --optimizer_args eps=1e-4"
    return [Mistake(what, f"{remedy}; or --mixed_precision bf16 --full_bf16")]


def make_optimizer(
    choice: OptimizerChoice, groups: Sequence[Mapping[str, Any]], uses_scaler: bool = False
) -> Optimizer:
    """The optimiser over parameter groups ({"params": [...], "lr": rate}, one for each trained part), ready to step.

    With a gradient scaler AdamW's fused kernel is not used: it skips overflowed steps unseen, and the schedule would
    count them. Raises UserError when the constructor refuses its arguments.
    """
    arguments = dict(choice.arguments)
    parts: list[dict[str, Any]] = [{"params": list(group["params"]), "lr": group["lr"]} for group in groups]
    arguments["lr"] = parts[0]["lr"]
    if choice.relative_step:
        arguments["lr"] = None
        for part in parts:
            del part["lr"]
    if not uses_scaler and _can_be_fused(choice, parts):
        arguments["fused"] = True
    try:
        optimizer: Optimizer = load(choice.row.path)(parts, **arguments)
    except (ImportError, AttributeError, TypeError, ValueError, AssertionError, RuntimeError) as error:
        what = f"--optimizer_type {choice.name} with {choice.full_name} and lr {arguments['lr']}: {error}"
        raise UserError((Mistake(what, "check --optimizer_args and the learning rate"),)) from error
    switch = getattr(optimizer, "train", None)
    if callable(switch):
        switch()
    return optimizer


def _can_be_fused(choice: OptimizerChoice, parts: Sequence[Mapping[str, Any]]) -> bool:
    """Whether torch's one-kernel AdamW applies: several times faster than a kernel for each operation."""
    said_otherwise = {"foreach", "fused", "capturable", "differentiable"} & set(choice.arguments)
    if choice.row.path != "torch.optim.adamw.AdamW" or said_otherwise:
        return False
    parameters = [parameter for part in parts for parameter in part["params"]]
    return all(each.is_floating_point() and each.device.type in {"cpu", "cuda", "mps"} for each in parameters)


def allocate_state(optimizer: Optimizer) -> None:
    """Give torch's AdamW the state that its first step would begin with.

    Made before the first gradients it lies beside the weights and not between what comes and goes in each step, which
    takes less memory; and a memory that is too small is known at once. Other optimisers are left alone.
    """
    import torch

    if type(optimizer) is not torch.optim.AdamW:
        return
    begun = optimizer.state_dict()
    for group in optimizer.param_groups:
        moments = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg", "exp_avg_sq")
        for parameter in group["params"]:
            zeros = {moment: torch.zeros_like(parameter) for moment in moments}
            begun["state"][len(begun["state"])] = {"step": torch.tensor(0.0), **zeros}
    optimizer.load_state_dict(begun)


@dataclass(frozen=True)
class ExactState:
    """An optimizer's state as a training state keeps it.

    torch's own load_state_dict turns floating-point state into the format of the weights, which would round the fp32
    state that some optimizers keep for half-precision weights: here those tensors are put back as they were saved.
    """

    optimizer: Optimizer

    def state_dict(self) -> dict[str, Any]:
        """What the optimizer itself gives."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put a saved state_dict() back, bit for bit."""
        self.optimizer.load_state_dict(dict(state))
        saved_ids = chain.from_iterable(group["params"] for group in state["param_groups"])
        parameters = chain.from_iterable(group["params"] for group in self.optimizer.param_groups)
        for saved_id, parameter in zip(saved_ids, parameters, strict=True):
            live = self.optimizer.state.get(parameter, {})
            for key, saved in state["state"].get(saved_id, {}).items():
                here = live.get(key)
                if hasattr(saved, "dtype") and hasattr(here, "dtype") and here.dtype != saved.dtype:
                    live[key] = saved.to(device=here.device, copy=True)
