"""Plan what keeps the model from forgetting: the anchors of a run, with their weights and steps. No torch.

With f the model in training, f_base the model as it was before the run, x_t, t and c the noisy latents, timestep and
caption of a sample, rho the element-wise loss and w(t) the timestep weight, an anchor adds lambda * w(t) times:

    reg_images        mean of rho(f(x_t, t, c) - target)                  of a regularisation image; masks apply
    base_prediction   mean of (f(x_t, t, c) - f_base(x_t, t, c))^2        of a regularisation image
    class_prompt      the same with the class for the identifier in c     of a training image
    blank_prompt      the same with an empty caption                      of a training image
    outside_mask      mean of (1 - m) (f(x_t, t, c) - f_base(x_t, t, c))^2    of an image with a mask m

reg_images is the prior loss of kohya's scripts (arXiv 2208.12242, eq. 2). The others are 0 until the model has moved.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, cast, get_args

from library.data.scan.mask_values import mask_source
from library.messages import listed
from library.training.plan.duration import PASSES_OF_A_SAMPLE
from library.training.preservation.class_prompts import ClassPrompts, find_class_prompts

if TYPE_CHECKING:
    from library.options.mistakes import Mistakes
    from library.options.train_options import TrainOptions
    from library.training.plan.images import Images
    from library.training.preservation.base_plan import BasePlan

AnchorName = Literal["reg_images", "base_prediction", "class_prompt", "blank_prompt", "outside_mask"]
NAMES: tuple[AnchorName, ...] = get_args(AnchorName)

_FORM = re.compile(r"(?P<name>[^=@]*)(=(?P<weight>[^@]*))?(@(?P<first>\d*)-(?P<last>\d*))?")
_WRITE = "write NAME, NAME=WEIGHT or NAME=WEIGHT@FIRST-LAST, such as class_prompt=0.5@100-800 or class_prompt@100-"


@dataclass(frozen=True)
class Anchor:
    """One anchor: its weight lambda, and its first and last optimizer step, from 1 (None: to the end)."""

    name: AnchorName
    weight: float = 1.0
    first: int = 1
    last: int | None = None

    def is_on(self, finished_steps: int) -> bool:
        """Whether the optimizer step after `finished_steps` finished steps has this anchor."""
        return self.first <= finished_steps + 1 and (self.last is None or finished_steps < self.last)

    @property
    def needs_base(self) -> bool:
        """Whether its target is the prediction of the base model."""
        return self.name != "reg_images"

    def __str__(self) -> str:
        last = "" if self.last is None else f" to {self.last}"
        steps = f" from step {self.first}{last}" if self.first > 1 or last else ""
        return f"{self.name}, weight {self.weight:g}{steps}"


@dataclass(frozen=True)
class PreservationPlan:
    """The anchors with a weight above 0. `samples` and `reg_samples`: of training and regularisation images in an
    epoch. `by_default`: the user chose no anchors. `fixed_draws` of each regularisation image, whose predictions by the
    base are made ahead; 0: the base predicts in each step."""

    anchors: tuple[Anchor, ...] = ()
    class_prompts: ClassPrompts = field(default_factory=ClassPrompts)
    samples: int = 0
    reg_samples: int = 0
    by_default: bool = True
    fixed_draws: int = 0

    @property
    def has_reg(self) -> bool:
        """Whether there are regularisation images."""
        return self.reg_samples > 0

    def at(self, finished_steps: int) -> tuple[Anchor, ...]:
        """The anchors of the optimizer step after `finished_steps` finished steps."""
        return tuple(anchor for anchor in self.anchors if anchor.is_on(finished_steps))

    @property
    def of_base(self) -> tuple[Anchor, ...]:
        """The anchors that need the base model."""
        return tuple(anchor for anchor in self.anchors if anchor.needs_base)

    def texts(self, captions: Sequence[str]) -> Iterator[str]:
        """The captions that the anchors need besides those of the samples."""
        if "class_prompt" in self._names:
            yield from (text for caption in captions if (text := self.class_prompts.of(caption)) is not None)
        if "blank_prompt" in self._names:
            yield ""

    @property
    def is_usual(self) -> bool:
        """Whether the run does what all runs of kohya's scripts do."""
        return self.by_default and not self.of_base

    @property
    def chosen(self) -> str:
        """The anchors, in a fixed order; "" for those that every run had before there was a choice."""
        if self.anchors == ((Anchor("reg_images"),) if self.has_reg else ()):
            return ""
        ordered = sorted(self.anchors, key=lambda anchor: NAMES.index(anchor.name))
        return "; ".join(map(str, ordered)) or "no anchor"

    def time(self) -> float:
        """The time that the anchors add to a step, as a share of it, while all of them are on."""
        base = {
            "base_prediction": float(self.reg_samples),
            "class_prompt": float(self.class_prompts.samples),
            "blank_prompt": float(self.samples),
            "outside_mask": float(self.samples),  # as if all images had masks
        }
        further = sum(base[name] for name in self._names & {"class_prompt", "blank_prompt"})
        compared = 0.0 if self.fixed_draws else sum(base[name] for name in self._names - {"reg_images"})
        return (further + compared / PASSES_OF_A_SAMPLE) / max(1, self.samples + self.reg_samples)

    @property
    def _names(self) -> set[str]:
        return {anchor.name for anchor in self.anchors}

    def describe(self, base: BasePlan | None) -> Iterator[str]:
        """Lines of the plan of a run; none for a usual one. `base`: the second set of weights, if there is one."""
        if self.is_usual:
            return
        yield f"preservation: {'; '.join(map(str, self.anchors)) or 'none'}"
        if "class_prompt" in self._names:
            yield from self.class_prompts.describe()
        if self.of_base:
            kept = "the model with its adapter off, which takes no memory" if base is None else str(base)
            yield f"compared with {kept}; adds about {self.time():.0%} to the time of a step"


def decide_preservation(
    options: TrainOptions, origin: str, images: Images | None, mistakes: Mistakes, notes: list[str]
) -> PreservationPlan:
    """The anchors of --preservation, which comes from `origin`, or those of a run that does not set it."""
    given = options.preservation.preservation
    anchors = read_anchors(given, origin, mistakes)
    if images is None:
        return PreservationPlan(anchors)
    scan = images.scan
    if not given:
        name: AnchorName = "reg_images" if options.dataset.data_backend_config is None else "base_prediction"
        by_default = (Anchor(name),) if scan.reg_samples else ()
        plan = PreservationPlan(by_default, samples=scan.train_samples, reg_samples=scan.reg_samples)
        return _with_fixed_draws(plan, options, mistakes)
    names = {anchor.name for anchor in anchors}
    for name in ("reg_images", "base_prediction"):
        if name in names and not scan.reg_samples:
            mistakes.add(
                f"--preservation {name} ({origin}): there are no regularisation images",
                "add them with --reg_data_dir or is_reg = true in the dataset file, or leave this anchor out; "
                "class_prompt and blank_prompt need none",
            )
    if scan.reg_samples and names.isdisjoint({"reg_images", "base_prediction"}):
        notes.append(
            f"--preservation ({origin}) has neither reg_images nor base_prediction: regularisation images are loaded, "
            "but nothing is learnt from them"
        )
    if "outside_mask" in names and not any(mask_source(each, scan.subsets[each.subset]) for each in scan.records):
        mistakes.add(
            f"--preservation outside_mask ({origin}): no image has a mask",
            "add masks with --masked_loss and --conditioning_data_dir, or transparent images with --alpha_mask, or "
            "leave this anchor out",
        )
    prompts = find_class_prompts(options.preservation, images) if "class_prompt" in names else ClassPrompts()
    if "class_prompt" in names:
        _check_class_prompts(prompts, origin, mistakes)
    plan = PreservationPlan(anchors, prompts, scan.train_samples, scan.reg_samples, by_default=False)
    return _with_fixed_draws(plan, options, mistakes)


def _with_fixed_draws(plan: PreservationPlan, options: TrainOptions, mistakes: Mistakes) -> PreservationPlan:
    """The plan of a run with --preservation_base cached has fixed draws."""
    if options.preservation.preservation_base != "cached" or not plan.of_base:
        return plan
    others = [anchor.name for anchor in plan.of_base if anchor.name != "base_prediction"]
    if others:
        mistakes.add(
            f"--preservation_base cached: predictions are made ahead for regularisation images, not for "
            f"{' and '.join(others)}, whose training images would have only a few noises",
            f"leave out {' and '.join(others)}, or use --preservation_base half or cpu",
        )
    if options.rollout.scheduled_sampling_max_step_offset:
        mistakes.add(
            "--preservation_base cached with --scheduled_sampling_max_step_offset: it is not known ahead where a "
            "rollout arrives",
            "use --preservation_base half or cpu, or leave out the rollout",
        )
    return replace(plan, fixed_draws=options.preservation.preservation_draws)


def read_anchors(given: Sequence[str], origin: str, mistakes: Mistakes) -> tuple[Anchor, ...]:
    """The anchors of --preservation with a weight above 0; what cannot be read is added to the mistakes."""
    anchors: dict[AnchorName, Anchor] = {}
    for text in given:
        what = f"--preservation {text} ({origin})"
        if "," in text:
            mistakes.add(f"{what} has a comma", "put spaces between anchors, and a point into a weight such as 0.5")
            continue
        form = _FORM.fullmatch(text)
        if form is None:
            mistakes.add(f"{what} cannot be read", _WRITE)
            continue
        if form["name"] not in NAMES:
            mistakes.add(f"{what}: there is no anchor {form['name']!r}", f"use {', '.join(NAMES)}")
            continue
        name = cast(AnchorName, form["name"])
        if name in anchors:
            mistakes.add(f"{what}: {name} is given twice", "give each anchor once")
        weight = _weight(form["weight"])
        if weight is None:
            mistakes.add(f"{what}: the weight is not a number of at least 0", _WRITE)
        first, last = int(form["first"] or 1), int(form["last"]) if form["last"] else None
        if first < 1 or (last is not None and last < first):
            mistakes.add(f"{what}: these are no steps", "count steps from 1, the first one not after the last")
        anchors[name] = Anchor(name, weight or 0.0, first, last)
    return tuple(anchor for anchor in anchors.values() if anchor.weight)


def _weight(text: str | None) -> float | None:
    try:
        weight = 1.0 if text is None else float(text)
    except ValueError:
        return None
    return weight if 0 <= weight < float("inf") else None


def _check_class_prompts(prompts: ClassPrompts, origin: str, mistakes: Mistakes) -> None:
    """Check that identifier and class are known, and that captions have the identifier."""
    what = f"--preservation class_prompt ({origin})"
    if not prompts.pairs:
        mistakes.add(
            f"{what}: identifier and class of the subject are not known, since no folder is named like 10_sks dog and "
            "there are no class_tokens",
            "set --preservation_identifier and --preservation_class",
        )
    elif same := [name for identifier, name in prompts.pairs if identifier.lower() == name.lower()]:
        mistakes.add(
            f'{what}: "{same[0]}" is the identifier and the class too, so captions would stay as they are',
            "set --preservation_identifier to what only the subject is called, and --preservation_class to what it is",
        )
    elif not prompts.found:
        identifiers = listed(f'"{identifier}"' for identifier, _ in prompts.pairs)
        mistakes.add(
            f"{what}: no caption has the identifier {identifiers}",
            "set --preservation_identifier to a word of the captions, or leave this anchor out",
        )
