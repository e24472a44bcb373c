"""Evaluate checkpoints and adapters on a subject: decide, draw what is missing, measure, report. No torch at module
level."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints.files import sha256
from library.checkpoints.header import CheckpointError
from library.checkpoints.writer import write_text
from library.evaluation.encoder_folders import EncoderFolder, check_encoder
from library.evaluation.model_images import ModelImages, check_record, draw_missing, image_files
from library.evaluation.model_values import ModelValues, read_values, write_values
from library.evaluation.options import EvaluationOptions
from library.evaluation.prompts import SubjectPrompt, SubjectWords, read_subject_prompts, requests_of
from library.evaluation.subject_images import list_images, mask_of, open_image
from library.messages import counted
from library.options.mistakes import Mistake, Mistakes, UserError
from library.runtime.device import describe_machine
from library.sampling.draw_command import Drawing, ReadPrompts, decide
from library.sampling.options import DrawingOptions, DrawingSettings
from library.sampling.prompts import ImageRequest

if TYPE_CHECKING:
    from library.evaluation.scores import Judge

BASE = "base"


@dataclass(frozen=True)
class Evaluation:
    """Everything decided before a weight is loaded. `models`: the base model first, then checkpoints and adapters, all
    with the same prompts and seeds. `subject_files` and `class_files`: image files of each prompt."""

    prompts: Sequence[SubjectPrompt]
    models: Sequence[ModelImages]
    records: Mapping[str, Mapping[str, Any]]
    subject_files: Sequence[Sequence[str]]
    class_files: Sequence[Sequence[str]]
    dino: EncoderFolder | None
    clip: EncoderFolder | None
    real: Sequence[Path]


def evaluate(options: EvaluationOptions) -> None:
    """Run an evaluation and print its table. Raises UserError."""
    evaluation = decide_evaluation(options)
    print("\n".join(describe(evaluation)), flush=True)
    if options.dry_run:
        print("dry run: no weights were loaded and nothing was written")
        return
    draw_missing(evaluation.models, evaluation.records)
    values = measure_models(options, evaluation)

    from library.evaluation.table import as_csv, as_markdown, copy_warnings

    print(f"\n{as_markdown(values, BASE)}")
    for warning in copy_warnings(values):
        print(warning)
    if options.save_to is not None:
        text = as_csv(values, BASE) if options.save_to.suffix.lower() == ".csv" else as_markdown(values, BASE) + "\n"
        try:
            write_text(options.save_to, text)
        except CheckpointError as error:
            raise UserError([Mistake(f"--save_to: {error}")]) from error
        print(f"saved to {options.save_to}")


def decide_evaluation(options: EvaluationOptions) -> Evaluation:
    """Check everything without loading weights. Raises UserError with all mistakes."""
    mistakes = Mistakes()
    dino = check_encoder("dino", options.evaluation_dino, mistakes)
    clip = check_encoder("clip", options.evaluation_clip, mistakes)
    real = list_images(options.subject_images or Path(), "--subject_images", mistakes)
    prompts: list[SubjectPrompt] = []

    def read(given: ImageRequest) -> list[ImageRequest]:
        if not prompts:  # the other models draw what the base model does, in its image size
            words = SubjectWords(options.evaluation_subject or "", options.evaluation_class)
            prompts.extend(read_subject_prompts(options.evaluation_prompts, words, given, "--evaluation_prompts"))
        return [request for own in _requests(options, prompts) for request in own]

    drawings = _decide_models(options, read, mistakes)
    if mistakes:
        raise UserError(mistakes)
    subject, of_class = (_files(options, prompts, of_class=of_class) for of_class in (False, True))
    files = [file for own in (*subject, *of_class) for file in own]
    outdir = options.outdir or Path()
    models = [ModelImages(name, own, drawing, outdir / name, files) for name, (own, drawing) in drawings.items()]
    records = {model.name: check_record(model, mistakes) for model in models}
    mistakes.raise_if_any()
    return Evaluation(prompts, models, records, subject, of_class, dino, clip, real)


def _requests(options: EvaluationOptions, prompts: Sequence[SubjectPrompt]) -> list[list[ImageRequest]]:
    """By prompt: first of the subject, then of the class."""
    seed = options.seed or 0
    of_class = requests_of(prompts, options.class_images_per_prompt, seed, of_class=True)
    return [*requests_of(prompts, options.images_per_prompt, seed), *of_class]


def _files(options: EvaluationOptions, prompts: Sequence[SubjectPrompt], *, of_class: bool) -> list[list[str]]:
    """The files of `_requests`, by prompt."""
    if not of_class:
        return image_files([options.images_per_prompt] * len(prompts))
    count = options.class_images_per_prompt
    return image_files([count if prompt.of_class else 0 for prompt in prompts], "class_")


def _decide_models(
    options: EvaluationOptions, read: ReadPrompts, mistakes: Mistakes
) -> dict[str, tuple[DrawingOptions, Drawing]]:
    """By name, how each model draws."""
    shared = {field.name: getattr(options, field.name) for field in fields(DrawingSettings)}
    base = DrawingOptions(**shared)
    paths = [*options.checkpoints, *options.adapters]
    choices = [
        *(replace(base, ckpt=str(path)) for path in options.checkpoints),
        *(replace(base, network_weights=(path,)) for path in options.adapters),
    ]
    # adapters first: they are drawn while the base model is loaded
    named = dict(zip(_names(paths), choices, strict=True))
    ordered = sorted(named, key=lambda name: named[name].ckpt != base.ckpt)
    decided: dict[str, tuple[DrawingOptions, Drawing]] = {}
    for name, own in [(BASE, base), *((name, named[name]) for name in ordered)]:
        try:
            decided[name] = own, decide(own, read=read)
        except UserError as error:
            mistakes.extend(error.mistakes)
            if name == BASE:
                break  # the others would repeat what is wrong with prompts and device
    return decided


def _names(paths: Sequence[Path]) -> list[str]:
    """A name for each model: its file's, with the folder where several have one, with a number where that is the same
    too."""
    names = [path.name if path.is_dir() else path.stem for path in paths]
    counts = Counter([BASE, *names])
    names = [
        f"{path.absolute().parent.name}-{name}" if counts[name] > 1 else name
        for path, name in zip(paths, names, strict=True)
    ]
    counts, seen = Counter([BASE, *names]), Counter[str]()
    for place, name in enumerate(names):
        seen[name] += 1
        if counts[name] > 1:
            names[place] = f"{name}-{seen[name]}"
    return names


def describe(evaluation: Evaluation) -> list[str]:
    """What exists, and what is drawn."""
    first = evaluation.prompts[0].request
    per_model = len(evaluation.models[0].files)
    subject = sum(map(len, evaluation.subject_files))
    settings = f"{first.width}x{first.height}, {first.sampler}, {counted(first.steps, 'step')}, scale {first.scale:g}"
    lines = [
        f"{counted(len(evaluation.prompts), 'prompt')}, {counted(per_model, 'image')} per model ({subject} of the "
        f"subject, {per_model - subject} of its class), {settings}; {counted(len(evaluation.real), 'real image')}"
    ]
    for model in evaluation.models:
        missing = len(model.missing)
        lines.append(f"  {model.name}: {per_model - missing} images exist, {missing} to draw, in {model.folder}")
        lines += [f"    {note}" for note in model.drawing.notes]
    return lines


def measure_models(options: EvaluationOptions, evaluation: Evaluation) -> dict[str, ModelValues]:
    """The values of every model; encoders are loaded only if some are missing. Raises UserError."""
    shared = _shared_inputs(options, evaluation)
    keys = {model.name: _inputs(options, model, shared) for model in evaluation.models}
    known = {model.name: read_values(model.folder, keys[model.name]) for model in evaluation.models}
    judge = _open_judge(options, evaluation) if None in known.values() else None
    values: dict[str, ModelValues] = {}
    for model in evaluation.models:
        own = known[model.name]
        if own is None and judge is not None:
            print(f"measuring {model.name}", flush=True)
            own = _measure(options, evaluation, model, judge)
            write_values(model.folder, keys[model.name], own)
        if own is not None:
            values[model.name] = own
    return values


def _shared_inputs(options: EvaluationOptions, evaluation: Evaluation) -> dict[str, Any]:
    """What the values of all models are computed from."""
    return {
        "encoders": [None if folder is None else folder.fingerprint() for folder in (evaluation.dino, evaluation.clip)],
        "texts": [prompt.neutral_text for prompt in evaluation.prompts],
        "real": _digest(map(sha256, evaluation.real)),
        "real_masks": _digest(map(_hash, _masks_of_real(options, evaluation))),
    }


def _inputs(options: EvaluationOptions, model: ModelImages, shared: Mapping[str, Any]) -> dict[str, Any]:
    paths = [model.folder / file for file in model.files]
    masks = [_hash(_drawn_mask(options, path)) for path in paths]
    return {**shared, "images": _digest(map(sha256, paths)), "masks": _digest(masks)}


def _digest(hashes: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(hashes).encode("utf-8")).hexdigest()


def _hash(mask: Path | None) -> str:
    return "" if mask is None else sha256(mask)


def _masks_of_real(options: EvaluationOptions, evaluation: Evaluation) -> list[Path | None]:
    return [mask_of(path, options.subject_images or Path(), options.subject_masks) for path in evaluation.real]


def _drawn_mask(options: EvaluationOptions, path: Path) -> Path | None:
    return mask_of(path, options.outdir or Path(), options.drawn_masks)


def _open_judge(options: EvaluationOptions, evaluation: Evaluation) -> Judge:
    """Load the encoders and embed the real images. Raises UserError."""
    import torch

    from library.evaluation.encoders import load_clip, load_dino
    from library.evaluation.scores import prepare_judge

    device = torch.device(options.device or describe_machine().kind)
    masks = _masks_of_real(options, evaluation)
    if options.subject_masks is not None and None in masks:
        print(f"{masks.count(None)} of {len(masks)} real images have no mask and are used whole")
    pairs = zip(evaluation.real, masks, strict=True)
    real = [open_image(path, mask, options.max_image_memory) for path, mask in pairs]
    clip = None if evaluation.clip is None else load_clip(evaluation.clip, device)
    if clip is not None:
        cut = [prompt for prompt in evaluation.prompts if clip.is_cut(prompt.request.prompt)]
        if cut:
            print(f"CLIP reads {clip.longest} tokens: the end of {counted(len(cut), 'prompt')} is not compared")
    dino = None if evaluation.dino is None else load_dino(evaluation.dino, device)
    return prepare_judge(dino, clip, real, evaluation.real)


def _measure(options: EvaluationOptions, evaluation: Evaluation, model: ModelImages, judge: Judge) -> ModelValues:
    def opened(files: Sequence[Sequence[str]]) -> list[list[Any]]:
        return [[open_image(path, _drawn_mask(options, path)) for path in (model.folder / file for file in own)] for own
                in files]  # fmt: skip

    subject = opened(evaluation.subject_files)
    scores = judge.measure(evaluation.prompts, subject, opened(evaluation.class_files))
    files = [file for own in evaluation.subject_files for file in own]
    images = [{"file": file, **row} for file, row in zip(files, scores.by_image, strict=True)]
    copied = {(row["prompt"], row["copy"]) for row in scores.copies}
    copies = [row for row in images if (row["prompt"], row["copy"]) in copied]
    return ModelValues(scores.by_prompt, scores.means, images, copies, judge.baseline())
