"""The optimizer of a run: chosen from the options without importing torch, then built over the parameters."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from library.messages import pip_install
from library.options.mistakes import Mistake, UserError
from library.training.optim.argument_types import Accepts
from library.training.optim.constructors import check_arguments, check_required, load, look_up, read_arguments
from library.training.optim.optimizer_table import OPTIMIZERS, OptimizerRow

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from library.options.groups.optimizer import OptimizerOptions

SMALLEST_FP16_EPS = 1e-4
"""Below it Adam's division overflows with fp16 state: eps and the second moment of small gradients round to 0."""


@dataclass(frozen=True)
class OptimizerChoice:
    """A row of the table (or a new row for a class given by its path), the arguments of the constructor without the
    learning rate, and the notes and mistakes about them. Must not be built if there are `mistakes`."""

    row: OptimizerRow
    arguments: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    mistakes: tuple[Mistake, ...] = ()

    @property
    def name(self) -> str:
        """The name in the plan and in messages."""
        return self.row.name

    @property
    def relative_step(self) -> bool:
        """Whether this is Adafactor with its own, relative learning rate."""
        return is_adafactor(self.row) and bool(self.arguments.get("relative_step", True))

    @property
    def full_name(self) -> str:
        """Class and arguments as in the metadata of a file: `torch.optim.adamw.AdamW(weight_decay=0.1)`."""
        listed = ",".join(f"{key}={value}" for key, value in self.arguments.items())
        return f"{self.row.path}({listed})" if listed else self.row.path

    def state_bytes_per_parameter(self, weight_bytes: int, shapes: Sequence[Sequence[int]] = ()) -> float:
        """Bytes of optimizer state for each trained parameter, which itself takes `weight_bytes` bytes. `shapes`: of
        the trained weights, which decide about Adafactor's; empty: as the table says."""
        own, extra = self.row.state_bytes, 0.0
        if is_adafactor(self.row):
            extra = 4.0 if self.arguments.get("beta1") is not None else 0.0
            own = _factored_bytes(shapes) if shapes else own
        return self.row.state_tensors * weight_bytes + own + extra


def _factored_bytes(shapes: Sequence[Sequence[int]]) -> float:
    """Bytes of Adafactor's second moments for each parameter (arXiv 1804.04235, algorithm 4): fp32 means over the last
    dimension and over the one before, of vectors all values."""
    values = sum(map(math.prod, shapes))
    kept = sum(
        math.prod(shape[:-1]) + math.prod((*shape[:-2], shape[-1])) if len(shape) > 1 else math.prod(shape)
        for shape in shapes
    )
    return 4 * kept / values


def is_adafactor(row: OptimizerRow) -> bool:
    """Whether a row is Adafactor of transformers, under any name."""
    return row.path.startswith("transformers.") and row.path.endswith(".Adafactor")


def choose_optimizer(options: OptimizerOptions, *, full_fp16: bool = False) -> OptimizerChoice:
    """Choose the optimizer by the options alone. User errors are returned as `mistakes`, not raised."""
    row, accepted, unknown = _find_row(_optimizer_name(options))
    mistakes = list(unknown)
    arguments = read_arguments(options.optimizer_args)
    if "lr" in arguments:
        mistakes.append(Mistake(f"--optimizer_args lr={arguments.pop('lr')}", "use --learning_rate"))
    mistakes += check_arguments("optimizer_args", row.name, arguments, accepted, ours=("lr",))
    mistakes += check_required("optimizer_args", row.name, {"lr": None, **row.defaults, **arguments}, accepted)
    choice = OptimizerChoice(row, {**row.defaults, **arguments})
    notes: list[str] = []
    if is_adafactor(row):
        choice = _apply_adafactor_rules(choice, options, notes)
    if row.learning_rate_free:
        _check_learning_rate_factors(row, options, notes, mistakes)
    if full_fp16 and not unknown:
        mistakes += _check_fp16_state(choice, has_eps=accepted is None or "eps" in accepted)
    return replace(choice, notes=tuple(notes), mistakes=tuple(mistakes))


def _optimizer_name(options: OptimizerOptions) -> str:
    """--optimizer_type, else the optimizer of the older --use_8bit_adam and --use_lion_optimizer, else AdamW."""
    older = "AdamW8bit" if options.use_8bit_adam else "Lion" if options.use_lion_optimizer else "AdamW"
    return options.optimizer_type or older


def _find_row(name: str) -> tuple[OptimizerRow, Mapping[str, Accepts] | None, list[Mistake]]:
    """The row for a short name in any case, a class of torch.optim or a dotted path; the arguments that the class
    accepts (None: unknown); mistakes in the name."""
    by_name = {row.name.lower(): row for row in OPTIMIZERS}
    row = by_name.get(name.lower())
    if row is None:
        path = name if "." in name else f"torch.optim.{name}"
        # a class given by its path has the memory facts of the table, but not the defaults of a short name
        known = (row for row in OPTIMIZERS if is_same_class(row.path, path))
        steps_tensors = path.startswith(("torch.optim.", "bitsandbytes.optim."))  # all of them, as of requirements.txt
        unknown = OptimizerRow(name, path, state_tensors=2, per_tensor=steps_tensors)
        row = replace(next(known, unknown), name=name, defaults={})
    found = look_up(row.path)
    mistakes = []
    if found.missing_package:
        provider = f"install the package that provides {found.missing_package}"
        remedy = pip_install(row.package) if row.package else provider
        mistakes.append(Mistake(f"--optimizer_type {name}: {found.problem}", remedy))
    elif row.path.endswith(".LBFGS"):
        mistakes.append(Mistake(f"--optimizer_type {name} needs several losses per step", "use another optimizer"))
    elif found.problem and "." not in name:
        near = difflib.get_close_matches(name.lower(), by_name, 1, 0.6)
        names = ", ".join(row.name for row in OPTIMIZERS)
        remedy = f"did you mean {by_name[near[0]].name}?" if near else f"use one of {names}, or package.module.Class"
        mistakes.append(Mistake(f"--optimizer_type {name}: there is no optimizer with this name", remedy))
    elif found.problem:
        mistakes.append(Mistake(f"--optimizer_type {name}: {found.problem}", "check the path of the class"))
    return row, found.arguments, mistakes


def is_same_class(path: str, other: str) -> bool:
    """Whether two paths have the same package and class name: `dadaptation.DAdaptAdam` is defined in a submodule."""
    return path.split(".")[0] == other.split(".")[0] and path.split(".")[-1] == other.split(".")[-1]


def _apply_adafactor_rules(choice: OptimizerChoice, options: OptimizerOptions, notes: list[str]) -> OptimizerChoice:
    """kohya's rules: relative_step is on by default, and always with warmup_init."""
    arguments = dict(choice.arguments)
    arguments.setdefault("relative_step", True)
    if arguments.get("warmup_init") and not arguments["relative_step"]:
        notes.append("Adafactor: warmup_init needs relative_step=True, which is switched on")
        arguments["relative_step"] = True
    if arguments["relative_step"]:
        notes.append(
            "Adafactor sets its own learning rate (relative_step): learning rates and --lr_scheduler have no effect; "
            "to apply them, use --optimizer_args relative_step=False scale_parameter=False"
        )
    else:
        if options.max_grad_norm:
            notes.append("Adafactor clips its updates itself; use --max_grad_norm 0 to avoid clipping twice")
        if options.lr_scheduler != "constant_with_warmup" and not options.lr_scheduler_type:
            notes.append("Adafactor without relative_step is usually used with --lr_scheduler constant_with_warmup")
        if arguments.get("clip_threshold", 1.0) != 1.0:
            notes.append("Adafactor without relative_step is usually used with clip_threshold=1.0")
    return replace(choice, arguments=arguments)


def _check_learning_rate_factors(
    row: OptimizerRow, options: OptimizerOptions, notes: list[str], mistakes: list[Mistake]
) -> None:
    """D-Adaptation and Prodigy multiply their own learning rate by --learning_rate: one factor for all, about 1."""
    default = {"learning_rate": options.learning_rate}
    rates = {f"block_lr {place}": rate for place, rate in enumerate(options.block_lr)} or default
    stop = options.stop_text_encoder_training
    if options.train_text_encoder and (stop is None or stop > 0):
        names = ("learning_rate_te", "learning_rate_te1", "learning_rate_te2")
        rates |= {name: rate for name in names if (rate := getattr(options, name)) is not None} or default
    factors = {name: rate for name, rate in rates.items() if rate > 0}
    if len(set(factors.values())) > 1:
        (first, factor), *others = factors.items()
        second, other_factor = next((name, other) for name, other in others if other != factor)
        what = f"{row.name} uses one learning rate for all weights, but --{first} is {factor:g} and --{second} is "
        what += f"{other_factor:g}"
        mistakes.append(Mistake(what, "set only one of them, set both to one value, or use --learning_rate_te 0"))
    elif factors and (factor := next(iter(factors.values()))) <= 0.1:
        notes.append(f"{row.name} multiplies its own learning rate by --learning_rate {factor:g}; about 1 is usual")


def _check_fp16_state(choice: OptimizerChoice, *, has_eps: bool) -> list[Mistake]:
    """With --full_fp16 most optimizers keep their state in fp16, where a small eps is 0 and the first step divides 0 by
    0."""
    eps = choice.arguments.get("eps", 0.0)
    if choice.row.fp32_state or (has_eps and isinstance(eps, int | float) and eps >= SMALLEST_FP16_EPS):
        return []
    precise = [row.name for row in OPTIMIZERS if row.fp32_state]
    alternative = f"{choice.name}8bit"
    remedy = f"use --optimizer_type {alternative if alternative in precise else 'AdamW8bit or Adafactor'}"
    what = f"--full_fp16 with {choice.name} keeps the optimizer state in fp16, which is not precise enough"
    if has_eps:
        what += f": eps {eps or 1e-8:g} becomes 0"
        remedy += ", --optimizer_args eps=1e-4"
    return [Mistake(what, f"{remedy}, or --mixed_precision bf16 --full_bf16")]


def has_fused_kernel(choice: OptimizerChoice, *, uses_scaler: bool = False) -> bool:
    """Whether torch's fused kernel of Adam or AdamW is to be used, which is several times faster than a kernel for each
    operation, and can leave a step out on the device.

    Not with a gradient scaler: it skips overflowed steps without reporting them, and the schedule would count them.
    """
    chosen_by_user = {"foreach", "fused", "capturable", "differentiable"} & set(choice.arguments)
    module, _, name = choice.row.path.rpartition(".")
    return not uses_scaler and not chosen_by_user and module.startswith("torch.optim") and name in {"Adam", "AdamW"}


def make_optimizer(
    choice: OptimizerChoice, groups: Sequence[Mapping[str, Any]], *, uses_scaler: bool = False
) -> Optimizer:
    """Build the optimizer over parameter groups ({"params": [...], "lr": rate}, one for each trained part), with a
    fused kernel if there is one. Raises UserError if the constructor refuses its arguments."""
    arguments = dict(choice.arguments)
    parts: list[dict[str, Any]] = [{"params": list(group["params"]), "lr": group["lr"]} for group in groups]
    arguments["lr"] = parts[0]["lr"]
    if choice.relative_step:
        arguments["lr"] = None
        for part in parts:
            del part["lr"]
    if has_fused_kernel(choice, uses_scaler=uses_scaler) and _can_be_fused(parts):
        arguments["fused"] = True
    try:
        optimizer: Optimizer = load(choice.row.path)(parts, **arguments)
    except (ImportError, AttributeError, TypeError, ValueError, AssertionError, RuntimeError) as error:
        what = f"--optimizer_type {choice.name}: cannot build {choice.full_name} with lr {arguments['lr']}: {error}"
        raise UserError((Mistake(what, "check --optimizer_args and the learning rate"),)) from error
    train_mode = getattr(optimizer, "train", None)  # of schedule-free optimizers
    if callable(train_mode):
        train_mode()
    return optimizer


def _can_be_fused(parts: Sequence[Mapping[str, Any]]) -> bool:
    """Whether torch has fused kernels for the format and the device of all parameters."""
    from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

    devices = _get_fused_kernels_supported_devices()
    return all(
        parameter.is_floating_point() and parameter.device.type in devices
        for part in parts
        for parameter in part["params"]
    )


def allocate_state(optimizer: Optimizer, *, as_fp32: bool = False) -> None:
    """Create the state of torch's AdamW that its first step would create; other optimizers are left alone. `as_fp32`:
    its weights are stepped as float32, whatever they are.

    Allocated before the first gradients, it lies beside the weights and not between tensors that are freed in each
    step, which needs less memory; and a lack of memory shows at once.
    """
    import torch

    if type(optimizer) is not torch.optim.AdamW:
        return
    state = optimizer.state_dict()
    parameters = list(chain.from_iterable(group["params"] for group in optimizer.param_groups))
    state["state"] = {number: {"step": torch.tensor(0.0)} for number in range(len(parameters))}
    optimizer.load_state_dict(state)  # which puts the counters where the kernel of the group wants them
    for group in optimizer.param_groups:
        moments = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg", "exp_avg_sq")
        for parameter in group["params"]:
            dtype = torch.float32 if as_fp32 else parameter.dtype
            for moment in moments:
                optimizer.state[parameter][moment] = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)


@dataclass(frozen=True)
class ExactState:
    """Saves and restores the state of an optimizer exactly.

    torch's load_state_dict casts floating-point state to the format of the weights, which would round the fp32 state
    that some optimizers keep for half-precision weights: those tensors are restored as they were saved.
    """

    optimizer: Optimizer

    def state_dict(self) -> dict[str, Any]:
        """The state dict of the optimizer."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved state_dict(), bit for bit."""
        self.optimizer.load_state_dict(dict(state))
        saved_ids = chain.from_iterable(group["params"] for group in state["param_groups"])
        parameters = chain.from_iterable(group["params"] for group in self.optimizer.param_groups)
        for saved_id, parameter in zip(saved_ids, parameters, strict=True):
            loaded = self.optimizer.state.get(parameter, {})
            for key, saved in state["state"].get(saved_id, {}).items():
                cast = loaded.get(key)
                if hasattr(saved, "dtype") and hasattr(cast, "dtype") and cast.dtype != saved.dtype:
                    loaded[key] = saved.to(device=cast.device, copy=True)
