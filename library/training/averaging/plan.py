"""Plan the averages of the weights: the decay of the moving one at every step, where they are kept, and what they are
used for. No torch.

    shadow <- d_n shadow + (1 - d_n) weights                                        after step n of the average

    d_n = 0                                      for n <= w, the warm-up: the average is a copy of the weights
    d_n = min(d, (1 + m) / (10 + m)) ** k        for n > w, with m = n - w; k: the interval of updates

Without the rising term the weights of the first step would keep a share of d^n: with d = 0.9999 nine tenths after 1000
steps. With it the mean age is about a tenth of the steps so far, until d is reached.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from library.messages import counted
from library.options.groups.averaging import AveragingOptions, EmaOf
from library.options.mistakes import Mistakes
from library.training.adapter.plan import AdapterPlan
from library.training.averaging.posthoc_plan import PosthocPlan, decide_posthoc
from library.training.averaging.power_profiles import WIDTHS
from library.training.optim.optimizers import OptimizerChoice
from library.training.optim.schedules import count_steps

SUFFIX = "_ema"
"""Ends the names of everything that is made from the average."""

DEFAULT_HORIZON = 0.1
"""Mean age of the averaged weights as a share of the run."""

_PRODUCT = {"lora_down.weight", "lora_up.weight"}
_FACTORS = _PRODUCT | {"lora_mid.weight"}
_SAVED = {"both": ("", SUFFIX), "only": (SUFFIX,), "none": ("",)}
_SHOWN = {"comparison": ("", SUFFIX), "ema_only": (SUFFIX,), "none": ("",)}


@dataclass(frozen=True)
class EmaPlan:
    """`of`: what is averaged; `decay` is that of one step; `interval` and `warmup_steps` are optimizer steps; `on_cpu`:
    the average is kept in CPU memory. `saved` and `shown`: suffixes of the versions of the weights (see weights.py)
    that are saved, and that images are drawn with and the validation loss is computed of."""

    of: EmaOf
    decay: float
    interval: int
    warmup_steps: int
    on_cpu: bool
    saved: tuple[str, ...]
    shown: tuple[str, ...]

    @property
    def place(self) -> str:
        """Where the average is kept, for messages."""
        return "in CPU memory" if self.on_cpu else "on the accelerator"

    @property
    def title(self) -> str:
        """What is averaged, for messages."""
        return "ΔW, decomposed where it is used" if self.of == "delta" else "the trained weights"

    def decay_at(self, step: int) -> float:
        """The factor of the average in the update after `step` optimizer steps: d_n above."""
        since = step - self.warmup_steps
        return 0.0 if since <= 0 else float(min(self.decay, (1 + since) / (10 + since)) ** self.interval)

    def metadata(self) -> dict[str, str]:
        """What a file with the average says of it, in the style of kohya's keys."""
        return {
            "ss_ema_of": self.of,
            "ss_ema_decay": str(self.decay),
            "ss_ema_update_interval": str(self.interval),
            "ss_ema_warmup_steps": str(self.warmup_steps),
        }

    def describe(self, steps: int) -> str:
        """A line of the plan of a run of this many steps."""
        age = self.decay / (1 - self.decay)
        parts = [f"EMA of {self.title}: decay {self.decay:.6g}, mean age {age:.4g} steps"]
        # (1 + m) / (10 + m) >= d
        rise = self.warmup_steps + math.ceil((10 * self.decay - 1) / (1 - self.decay) - 1e-6)
        if rise > steps:
            last = steps - self.warmup_steps
            parts.append(f"which this run does not reach (at its end {(1 + last) / (10 + last):.4g})")
        elif rise > self.warmup_steps + 1:
            parts.append(f"reached after step {rise}")
        if self.warmup_steps:
            parts.append(f"a copy of the weights for {counted(self.warmup_steps, 'step')}")
        if self.interval > 1:
            parts.append(f"updated every {self.interval} steps")
        parts.append(f"kept {self.place}")
        saved = {"": "the weights in training", SUFFIX: "the average"}
        parts.append(f"saved: {' and '.join(saved[suffix] for suffix in self.saved)}")
        return ", ".join(parts)


@dataclass(frozen=True)
class AveragesPlan:
    """The averages that a run keeps besides the weights in training."""

    ema: EmaPlan | None = None
    posthoc: PosthocPlan | None = None

    @property
    def saved(self) -> tuple[str, ...]:
        """Suffixes of the versions of the weights that are saved."""
        return ("",) if self.ema is None else self.ema.saved

    @property
    def shown(self) -> tuple[str, ...]:
        """Suffixes of the versions that images are drawn with and the validation loss is computed of."""
        return ("",) if self.ema is None else self.ema.shown

    @property
    def of_weights(self) -> int:
        """How many averages of all trained weights are kept."""
        return int(self.ema is not None and self.ema.of == "weights") + (0 if self.posthoc is None else len(WIDTHS))

    @property
    def of_delta(self) -> bool:
        """Whether an average of ΔW is kept."""
        return self.ema is not None and self.ema.of == "delta"

    def describe(self, steps: int) -> Iterator[str]:
        """Lines of the plan of a run of this many steps."""
        if self.ema is not None:
            yield self.ema.describe(steps)
        if self.posthoc is not None:
            yield self.posthoc.describe()


def decide_averages(
    options: AveragingOptions, steps: int, optimizer: OptimizerChoice, adapter: AdapterPlan | None, mistakes: Mistakes
) -> AveragesPlan:
    """The averages of a run of this many optimizer steps."""
    ema = decide_ema(options, steps, optimizer, mistakes)
    if ema is not None and ema.of == "delta" and adapter is not None:
        _check_delta(adapter, mistakes)
    return AveragesPlan(ema, decide_posthoc(options, steps, optimizer, mistakes))


def _check_delta(adapter: AdapterPlan, mistakes: Mistakes) -> None:
    """Refuse an average of ΔW that cannot be saved as an adapter of its kind."""
    if adapter.settings is None:
        why = "only the module itself knows how its tensors make ΔW"
    else:
        why = adapter.settings.kind.no_delta_average
    if not why and any(set(one.tensors) & _FACTORS != _PRODUCT for one in adapter.layers or ()):
        why = f"some layers of {adapter.weights} are no product of two factors"
    if why:
        remedy = "remove --ema_of, for the average of the weights, or use networks.lora"
        mistakes.add(f"--ema_of delta with --network_module {adapter.module}: {why}", remedy)


def decide_ema(options: AveragingOptions, steps: int, optimizer: OptimizerChoice, mistakes: Mistakes) -> EmaPlan | None:
    """The plan of a run of this many optimizer steps, or None without --use_ema."""
    if not options.use_ema:
        return None
    if optimizer.row.schedule_free:
        mistakes.add(
            f"--use_ema with {optimizer.name}: this optimizer averages the weights itself, and saves that average",
            "remove --use_ema, or use another optimizer such as AdamW",
        )
    if options.ema_update_interval > steps:
        mistakes.add(
            f"--ema_update_interval {options.ema_update_interval}: the run has {counted(steps, 'step')}, so the "
            "average would never leave the weights that the run begins with",
            "use a smaller interval",
        )
    warmup = count_steps(options.ema_warmup_steps, steps)
    if warmup >= steps:
        mistakes.add(
            f"--ema_warmup_steps {options.ema_warmup_steps:g}: the run has {counted(steps, 'step')}, so nothing would "
            "be averaged",
            "use a smaller number, or a share of the run such as 0.1",
        )
    return EmaPlan(
        of=options.ema_of,
        decay=_decay_of(options, steps),
        interval=options.ema_update_interval,
        warmup_steps=warmup,
        on_cpu=options.ema_device == "cpu",
        saved=_SAVED[options.ema_save],
        shown=_SHOWN[options.ema_validation],
    )


def _decay_of(options: AveragingOptions, steps: int) -> float:
    """--ema_decay, or that of the horizon H: the mean age d / (1 - d) of a running average is H for d = H / (H + 1)."""
    if options.ema_decay is not None:
        return options.ema_decay
    asked = DEFAULT_HORIZON if options.ema_horizon is None else options.ema_horizon
    horizon = asked * steps if isinstance(asked, float) and asked <= 1 else asked
    return horizon / (horizon + 1)
