"""Command-line options of tools/evaluate_subject.py. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from library.evaluation.prompts import PAPER, PLACE
from library.options.flag import flag
from library.options.groups.dataset import DatasetOptions
from library.options.mistakes import Mistakes
from library.sampling.options import DrawingSettings, check_settings

TABLES = (".md", ".csv")


@dataclass(frozen=True)
class EvaluationOptions(DrawingSettings):
    """What is evaluated, with which encoders, images and prompts; how images are drawn is in DrawingSettings."""

    required: ClassVar[Mapping[str, str]] = {
        "ckpt": "give the base model, which is always evaluated too: --ckpt model.safetensors",
        "subject_images": "give the folder of the subject's own images: --subject_images train/dog",
        "evaluation_subject": 'give the words of the subject in prompts: --evaluation_subject "sks dog"',
        "evaluation_class": "give the words of its class: --evaluation_class dog",
        "outdir": "give a folder for images and values: --outdir evaluation",
    }

    checkpoints: tuple[Path, ...] = flag((), "whole models to evaluate, each by itself")
    adapters: tuple[Path, ...] = flag((), "adapter files to evaluate, each by itself on the model of --ckpt")
    subject_images: Path | None = flag(None, "folder of real images of the subject, with its sub-folders")
    evaluation_subject: str | None = flag(None, 'words of the subject in prompts, such as "sks dog"')
    evaluation_class: str | None = flag(None, 'words of its class, such as "dog"')
    evaluation_prompts: str = flag(
        "object",
        f"prompts: {' or '.join(PAPER)} (the 25 of DreamBooth's paper for objects, or for people and animals), or a "
        f"file (.txt, .toml or .json) with {PLACE} where the words belong",
    )
    evaluation_dino: Path | None = flag(None, "folder of a DINO or DINOv2 model in transformers' format")
    evaluation_clip: Path | None = flag(None, "folder of a CLIP model in transformers' format")
    images_per_prompt: int = flag(4, "images of the subject per prompt", at_least=1, at_most=1000)
    class_images_per_prompt: int = flag(
        1, "images of the class per prompt, for PRES; 0 = none", at_least=0, at_most=1000
    )
    subject_masks: Path | None = flag(
        None, "folder of masks of the real images, with the same names: each image is cropped to its subject"
    )
    drawn_masks: Path | None = flag(None, "folder of masks of the drawn images, arranged as in --outdir")
    outdir: Path | None = flag(None, "folder for images and values, created if missing; run again to go on")
    save_to: Path | None = flag(None, "file for the table, .md or .csv")
    max_image_memory: float = flag(
        DatasetOptions.max_image_memory, "memory in GiB that a decoded image may need, at 4 bytes per pixel", above=0
    )
    dry_run: bool = flag(False, "check everything and list what is missing, without loading a model")


def check(options: EvaluationOptions, mistakes: Mistakes) -> None:
    """Add mistakes for missing flags and for flags that exclude each other."""
    check_settings(options, mistakes)
    if options.evaluation_dino is None and options.evaluation_clip is None:
        remedy = "add one or both: the measures are computed by these models"
        mistakes.add("neither --evaluation_dino nor --evaluation_clip is given", remedy)
    if (options.subject_masks is None) != (options.drawn_masks is None):
        remedy = "give both, or none: cropping only one side would compare subjects with whole scenes"
        mistakes.add("--subject_masks and --drawn_masks belong together", remedy)
    if options.save_to is not None and options.save_to.suffix.lower() not in TABLES:
        mistakes.add(f"--save_to {options.save_to}: unknown extension", "use .md or .csv")
