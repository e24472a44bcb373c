"""Plan the evaluation of a run: which prompts, encoders and real images, and when. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from library.evaluation.encoder_folders import FLAGS, EncoderFolder, check_encoder
from library.evaluation.prompts import PLACE, SubjectPrompt, SubjectWords, read_subject_prompts, requests_of
from library.messages import counted, listed
from library.options.mistakes import Mistakes, UserError
from library.runtime.seeds import draw_seed
from library.sampling.prompts import DEFAULTS, ImageRequest
from library.sampling.samplers import check_sampler
from library.training.plan.duration import PASSES_OF_A_SAMPLE, Duration

if TYPE_CHECKING:
    from library.data.image_files import ImageSource
    from library.data.scan.image_record import ImageRecord
    from library.options.datasets import DatasetSpec
    from library.options.groups.evaluation import EvaluationOptions
    from library.options.train_options import TrainOptions
    from library.training.plan.facts import RunFacts

MOST_REAL = 500
"""Most training images that drawn ones are compared with."""

_SEED = 0  # the same in all runs, so that runs can be compared


@dataclass(frozen=True)
class Encoders:
    """The folders of the models that measure images; None: not given."""

    dino: EncoderFolder | None
    clip: EncoderFolder | None


@dataclass(frozen=True)
class EvaluationPlan:
    """`images` and `of_class`: what to draw, by prompt, with seeds; the latter are empty where a prompt has no class.
    `size`: that of training, in which images are drawn whose prompt names none. `real`: files of the subject's images.
    `every_n_steps` and `every_n_epochs` None: not by steps, not by epochs."""

    prompts: tuple[SubjectPrompt, ...]
    images: Sequence[Sequence[ImageRequest]]
    of_class: Sequence[Sequence[ImageRequest]]
    dino: EncoderFolder | None
    clip: EncoderFolder | None
    real: tuple[ImageSource, ...]
    every_n_steps: int | None
    every_n_epochs: int | None
    batch_size: int
    size: tuple[int, int]

    @property
    def requests(self) -> list[ImageRequest]:
        """All images, those of the class last."""
        return [request for own in (*self.images, *self.of_class) for request in own]

    @property
    def measures(self) -> list[str]:
        """The measures that it has values of."""
        of_dino = {"dino": True, "pres": any(self.of_class), "div_dino": any(len(own) > 1 for own in self.images)}
        by_dino = [name for name, has in of_dino.items() if has and self.dino is not None]
        return [*by_dino, *(("clip_i", "clip_t", "clip_score") if self.clip is not None else ())]

    def share_of_training(self, duration: Duration, samples_per_epoch: int, versions: int) -> float:
        """Estimated time of drawing divided by training time. `versions`: how many versions of the weights are
        evaluated; the base model is once."""
        trained = self.size[0] * self.size[1]
        passes = sum(
            request.steps * (2 if request.scale > 1 else 1) * request.width * request.height / trained
            for request in self.requests
        )
        epochs = self.every_n_epochs or float("inf")
        if self.every_n_steps is not None:
            epochs = min(epochs, self.every_n_steps / duration.steps_per_epoch)
        in_all = duration.steps / duration.steps_per_epoch
        return passes * (versions / epochs + 1 / in_all) / (PASSES_OF_A_SAMPLE * samples_per_epoch)

    def describe(self, share: float) -> Iterator[str]:
        """Lines of the plan. `share`: see share_of_training."""
        intervals = ((self.every_n_steps, "step"), (self.every_n_epochs, "epoch"))
        moments = [f"every {unit}" if every == 1 else f"every {every} {unit}s" for every, unit in intervals if every]
        encoders = [f"{name} ({folder.path})" for name, folder in (("DINO", self.dino), ("CLIP", self.clip)) if folder]
        drawn = sum(map(len, self.images))
        yield (
            f"{counted(len(self.prompts), 'prompt')}, {counted(drawn, 'image')} of the subject and "
            f"{len(self.requests) - drawn} of its class, against {counted(len(self.real), 'training image')} by "
            f"{listed(encoders, separator=' and ')}, before the first step and after {' and '.join(moments)}"
        )
        yield f"adds about {share:.0%} to the training time (lower it by fewer prompts, images or steps: --s in a file)"


def decide_encoders(chosen: EvaluationOptions, mistakes: Mistakes) -> Encoders | None:
    """The encoders of an evaluation, from the flags alone; None without --evaluation_prompts. Adds mistakes."""
    dino = check_encoder("dino", chosen.evaluation_dino, mistakes)
    clip = check_encoder("clip", chosen.evaluation_clip, mistakes)
    return Encoders(dino, clip) if _is_asked_for(chosen, mistakes) else None


def decide_evaluation(
    options: TrainOptions, encoders: Encoders | None, facts: RunFacts, mistakes: Mistakes
) -> EvaluationPlan | None:
    """The plan; None without encoders. Adds mistakes."""
    chosen = options.evaluation
    if encoders is None or chosen.evaluation_prompts is None:
        return None
    family = facts.base_model.family
    if family.refines:
        mistakes.add(f"--evaluation_prompts: {family.title} only refines images, and draws no subject", "remove it")
    records = [record for record in facts.images.records if not record.is_reg]
    words = _find_words(chosen, facts, records, mistakes)
    width, height = _size_of_training(facts.images.scan.datasets)
    given = replace(DEFAULTS, width=width, height=height, sampler=options.preview.sample_sampler)
    try:
        prompts = read_subject_prompts(chosen.evaluation_prompts, words, given, "--evaluation_prompts")
    except UserError as error:
        mistakes.extend(error.mistakes)
        return None
    mistakes.extend(filter(None, {check_sampler(prompt.request.sampler) for prompt in prompts}))
    every_steps, every_epochs = chosen.evaluate_every_n_steps, chosen.evaluate_every_n_epochs
    return EvaluationPlan(
        prompts=tuple(prompts),
        images=requests_of(prompts, chosen.evaluation_images_per_prompt, _SEED),
        of_class=requests_of(prompts, 1 if encoders.dino else 0, _SEED, of_class=True),
        dino=encoders.dino,
        clip=encoders.clip,
        real=_real_images(records),
        every_n_steps=every_steps,
        every_n_epochs=1 if every_steps is None and every_epochs is None else every_epochs,
        batch_size=options.preview.sample_batch_size or 1,
        size=(width, height),
    )


def _size_of_training(datasets: Sequence[DatasetSpec]) -> tuple[int, int]:
    """The largest resolution that is trained, in steps of 8 pixels."""
    sizes = [dataset.buckets.resolution for dataset in datasets]
    width, height = max(sizes, key=lambda size: size[0] * size[1], default=(512, 512))
    return width // 8 * 8, height // 8 * 8


def _is_asked_for(chosen: EvaluationOptions, mistakes: Mistakes) -> bool:
    """Whether there are prompts and an encoder; one without the other is a mistake."""
    encoders = [name for name in FLAGS.values() if getattr(chosen, name) is not None]
    if chosen.evaluation_prompts is None:
        others = ("evaluate_every_n_steps", "evaluate_every_n_epochs", "evaluation_subject", "evaluation_class")
        if given := [*encoders, *(name for name in others if getattr(chosen, name) is not None)]:
            what = f"--{given[0]}, but no --evaluation_prompts"
            mistakes.add(what, "add --evaluation_prompts live, object or a file, or remove it")
        return False
    if not encoders:
        remedy = "add one or both: the measures are computed by these models"
        mistakes.add("--evaluation_prompts, but neither --evaluation_dino nor --evaluation_clip", remedy)
    return bool(encoders)


def _find_words(
    chosen: EvaluationOptions, facts: RunFacts, records: Sequence[ImageRecord], mistakes: Mistakes
) -> SubjectWords:
    """The words of the subject and of its class, from flags or from folder names and class tokens."""
    subsets = facts.images.scan.subsets
    found = sorted({(subsets[record.subset].class_tokens or "").split("\n")[0].strip() for record in records})
    tokens = found[0].split() if len(found) == 1 else []
    subject = chosen.evaluation_subject or " ".join(tokens)
    if not subject:
        several = f": the images have several, {listed(filter(None, found))}" if len(found) > 1 else ""
        what = f"--evaluation_prompts: the words of the subject are not known{several}"
        mistakes.add(what, 'give them: --evaluation_subject "sks dog" --evaluation_class dog')
    return SubjectWords(subject or PLACE, chosen.evaluation_class or " ".join(tokens[1:]) or None)


def _real_images(records: Sequence[ImageRecord]) -> tuple[ImageSource, ...]:
    """The training images of the subject, each file once; of very many always the same ones."""
    names = {record.path: record.name for record in records}
    return tuple(sorted(names, key=lambda path: draw_seed("evaluation", names[path]))[:MOST_REAL])
