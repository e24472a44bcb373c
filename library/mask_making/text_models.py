"""Find what words name in an image, with a transformers model from a local folder.

What a model can do is read from its config.json, without torch. transformers' own pipelines prepare images and read the
outputs of all kinds but CLIPSeg, for which there is none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from library.bounded import read_json
from library.checkpoints.files import read_part_header, sha256
from library.checkpoints.header import CheckpointError
from library.families.registry import NotDownloaded, find_model
from library.mask_making.boxes import Box
from library.mask_making.options import CLIPSEG, THRESHOLD, MaskMakingOptions
from library.messages import listed
from library.options.mistakes import Mistake, Mistakes, UserError
from library.runtime.device import describe_machine
from library.runtime.imports import ONLY_LOCAL, quiet_libraries

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

Kind = Literal["clipseg", "detects words", "detects classes", "segments classes"]

_DETECT_WORDS = ("owlvit", "owlv2", "grounding-dino", "mm-grounding-dino")
_UNUSABLE = ("omdet-turbo",)  # the pipeline does not read its answers
_SEGMENTS = ("ForSemanticSegmentation", "ForUniversalSegmentation", "ForInstanceSegmentation", "DetrForSegmentation")
_TASKS = {
    "detects words": "zero-shot-object-detection",
    "detects classes": "object-detection",
    "segments classes": "image-segmentation",
}
_WEIGHTS = (".safetensors", ".bin")
_USABLE = "CLIPSeg, OWL-ViT, OWLv2, Grounding DINO, or a transformers model for object detection or image segmentation"
_WITHOUT_MODEL = "to do without a model, use --grabcut in place of --text_input"


@dataclass(frozen=True)
class TextModel:
    """A model and what is asked of it, known before its weights are loaded.

    `phrases` are words, or for a model with fixed classes the names of those to find. `threshold` None: the model takes
    the most probable class.
    """

    folder: Path
    kind: Kind
    phrases: tuple[str, ...]
    threshold: float | None
    device: str

    def identity(self) -> dict[str, Any]:
        """What decides the model's masks, for the record in each of them: hashes of all its files, and the question."""
        files = [path for path in sorted(self.folder.iterdir()) if path.suffix in (".json", ".txt", *_WEIGHTS)]
        if any(path.suffix == ".safetensors" for path in files):
            files = [path for path in files if path.suffix != ".bin"]
        content = "".join(f"{path.name} {sha256(path)}\n" for path in files if path.is_file())
        return {
            "model": hashlib.sha256(content.encode("utf-8", "surrogateescape")).hexdigest(),
            "text": self.phrases,
            "threshold": self.threshold,
        }


@dataclass(frozen=True)
class Found:
    """What a model found in an image: a mask, (H, W), 255 = found, or boxes."""

    mask: NDArray[np.uint8] | None = None
    boxes: tuple[Box, ...] = field(default=())


class Finder(Protocol):
    """A loaded model."""

    def __call__(self, image: Image) -> Found:
        """Find the phrases in an upright RGB image."""
        ...


def choose_model(options: MaskMakingOptions, mistakes: Mistakes) -> TextModel | None:
    """Find the model of --text_input, and what it can be asked. Adds mistakes."""
    if not options.phrases:
        return None
    found = describe_machine().kind
    device = options.device or found
    if device not in ("cpu", found):
        mistakes.add(f"--device {device} is not available", f"remove it to use {found}")
    try:
        folder = find_model(options.model or CLIPSEG)
        config = _read_config(folder)
    except NotDownloaded:
        name = options.model or CLIPSEG
        what = f"--model {name}" if options.model else f"--text_input needs a model, and {name}"
        folder = Path("models") / name.split("/")[1]
        get = f"get it once: hf download {name} --local-dir {folder.as_posix()}, and add --model {folder.as_posix()}"
        mistakes.add(f"{what} is neither a folder nor in the local Hugging Face cache", f"{get}; {_WITHOUT_MODEL}")
        return None
    except CheckpointError as error:
        mistakes.add(f"--model {error}", f"give the folder of a transformers model; {_WITHOUT_MODEL}")
        return None
    architecture = str((config.get("architectures") or [""])[0])
    kind = _kind(str(config.get("model_type", "")), architecture)
    if kind is None:
        what = f"--model {folder} is {architecture or 'a model of unknown kind'}, which cannot be used here"
        mistakes.add(what, f"use {_USABLE}; {_WITHOUT_MODEL}")
        return None
    names = {path.name for path in folder.iterdir()}
    for what, missing in (
        ("preprocessor_config.json", not names & {"preprocessor_config.json", "processor_config.json"}),
        ("weights", not any(name.endswith(_WEIGHTS) for name in names)),
    ):
        if missing:
            mistakes.add(f"--model {folder} has no {what}", "get the whole folder of the model")
    phrases = _classes(options, config, folder, mistakes) if kind.endswith("classes") else options.phrases
    threshold: float | None = THRESHOLD if options.threshold is None else options.threshold
    if architecture.endswith("ForSemanticSegmentation"):
        threshold = None
        if options.threshold is not None:
            what = f"--threshold has no effect: {folder} is {architecture}, which takes the most probable class"
            mistakes.add(what, "remove --threshold")
    return TextModel(folder, kind, phrases, threshold, device)


def _read_config(folder: Path) -> dict[str, Any]:
    """Raises CheckpointError, which continues "--model "."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file")
    try:
        config = read_json(folder / "config.json")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{folder}: its config.json cannot be read ({reason})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder}: its config.json is not an object")
    return config


def _kind(model_type: str, architecture: str) -> Kind | None:
    if architecture == "CLIPSegForImageSegmentation":
        return "clipseg"
    if architecture.endswith("ForObjectDetection") and model_type not in _UNUSABLE:
        return "detects words" if model_type in _DETECT_WORDS else "detects classes"
    return "segments classes" if architecture.endswith(_SEGMENTS) else None


def _classes(options: MaskMakingOptions, config: dict[str, Any], folder: Path, mistakes: Mistakes) -> tuple[str, ...]:
    """The model's names of the classes that --text_input asks for; a class may be named by one of its synonyms."""
    labels = [str(label) for label in (config.get("id2label") or {}).values()]
    by_name: dict[str, str] = {}
    for label in labels:
        for name in (*label.split(","), label):
            by_name.setdefault(name.strip().casefold(), label)
    unknown = [phrase for phrase in options.phrases if phrase.casefold() not in by_name]
    if unknown:
        what = f'--text_input "{", ".join(unknown)}" is no class of {folder}'
        mistakes.add(what, f"use its classes: {listed(labels, 200)}; or a model that knows all words, such as CLIPSeg")
    return tuple(dict.fromkeys(by_name[phrase.casefold()] for phrase in options.phrases if phrase not in unknown))


def load_finder(model: TextModel) -> Finder:
    """Load the weights, in fp32. Raises UserError if the folder does not hold such a model."""
    quiet_libraries()
    try:
        read_part_header(model.folder)  # whatever transformers reads next is then safe to read
        from transformers.utils import logging

        quiet: Any = logging
        quiet.disable_progress_bar()  # of the weights: they take a second
        return _ClipSeg(model) if model.kind == "clipseg" else _Pipeline(model)
    except Exception as error:  # damage raises errors of several libraries
        reason = str(error).strip().splitlines() or [type(error).__name__]
        what = f"--model {model.folder} cannot be loaded ({reason[0]})"
        raise UserError([Mistake(what, "get the whole folder of the model again")]) from error


class _ClipSeg:
    """CLIPSeg (Lüddecke and Ecker, 2022): the probability of each pixel to belong to a phrase."""

    def __init__(self, model: TextModel) -> None:
        from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor

        self._asked = model
        self._processor = CLIPSegProcessor.from_pretrained(model.folder, **ONLY_LOCAL)
        loaded: Any = CLIPSegForImageSegmentation.from_pretrained(model.folder, **ONLY_LOCAL)
        self._model = loaded.to(model.device).eval()

    def __call__(self, image: Image) -> Found:
        import numpy as np
        import torch

        phrases = list(self._asked.phrases)
        inputs = self._processor(
            text=phrases, images=[image] * len(phrases), padding=True, truncation=True, return_tensors="pt"
        )
        with torch.no_grad():
            logits = self._model(**inputs.to(self._asked.device)).logits
        logits = logits.float().reshape(len(phrases), 1, *logits.shape[-2:])  # of one phrase it is (h, w)
        wide = torch.nn.functional.interpolate(
            logits.sigmoid(), (image.height, image.width), mode="bilinear", align_corners=False
        )
        found = (wide[:, 0] >= (self._asked.threshold or 0.0)).any(dim=0)
        return Found(found.cpu().numpy().astype(np.uint8) * np.uint8(255))


class _Pipeline:
    """A pipeline of transformers, for one of _TASKS."""

    def __init__(self, model: TextModel) -> None:
        from transformers import pipeline

        self._asked = model
        task: Any = _TASKS[model.kind]
        self._run: Any = pipeline(task, model=str(model.folder), device=model.device, trust_remote_code=False)

    def __call__(self, image: Image) -> Found:
        more: dict[str, Any] = {} if self._asked.threshold is None else {"threshold": self._asked.threshold}
        if self._asked.kind == "detects words":
            more["candidate_labels"] = list(self._asked.phrases)
        answers = [answer for answer in self._run(image, **more) if answer["label"] in self._asked.phrases]
        if self._asked.kind == "segments classes":
            return Found(_together([answer["mask"] for answer in answers], image))
        return Found(boxes=tuple(_box(answer["box"]) for answer in answers))


def _together(masks: Sequence[Any], image: Image) -> NDArray[np.uint8]:
    import numpy as np

    found = np.zeros((image.height, image.width), dtype=np.uint8)
    for mask in masks:
        found = np.maximum(found, np.asarray(mask, dtype=np.uint8))
    return found


def _box(box: dict[str, int]) -> Box:
    return box["xmin"], box["ymin"], box["xmax"], box["ymax"]
