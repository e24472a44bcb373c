"""Measure images of a subject: encoders and real images first, then what any number of models drew."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.evaluation import measures
from library.evaluation.encoders import ClipEncoder, ImageEncoder
from library.evaluation.prompts import SubjectPrompt

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Scores:
    """The values of one model. `by_prompt`: for each measure one value per prompt, the mean over its images.
    `by_image`: one record per image, with the place of its prompt, its number, and its values; "nearest" is the cosine
    with the real image "nearest_image". `copies`: images as near to a real one as a copy."""

    by_prompt: Mapping[str, Sequence[float]]
    by_image: Sequence[Mapping[str, Any]] = field(default=(), repr=False)
    copies: Sequence[Mapping[str, Any]] = field(default=(), repr=False)

    @property
    def means(self) -> dict[str, float]:
        """Each measure over all prompts; of the nearest real images the maximum."""
        return {
            name: max(values) if name == "nearest" else measures.mean(values) for name, values in self.by_prompt.items()
        }


@dataclass
class Judge:
    """Measures images against the real ones of the subject. Without an encoder its measures are left out."""

    dino: ImageEncoder | None
    clip: ClipEncoder | None
    names: Sequence[str]  # of the real images
    real_dino: Tensor | None
    real_clip: Tensor | None

    def baseline(self) -> dict[str, float]:
        """DINO and CLIP-I of the real images among themselves, none with itself; empty for a single image."""
        pairs = (("dino", self.real_dino), ("clip_i", self.real_clip))
        values = {name: measures.real_baseline(real) for name, real in pairs if real is not None}
        return {name: value for name, value in values.items() if value is not None}

    def measure(
        self,
        prompts: Sequence[SubjectPrompt],
        images: Sequence[Sequence[Image]],
        of_class: Sequence[Sequence[Image]] = (),
    ) -> Scores:
        """The values of a model. `images`: those of each prompt; `of_class`: the same of the class, in the same order,
        or none."""
        counts = [len(own) for own in images]
        flat = [image for own in images for image in own]
        rows: list[dict[str, Any]] = [
            {"prompt": place, "copy": copy} for place, count in enumerate(counts) for copy in range(count)
        ]
        by_prompt: dict[str, Sequence[float]] = {}
        if self.dino is not None and self.real_dino is not None:
            found = self.dino.images(flat)
            _add(rows, "dino", measures.fidelity(found, self.real_dino).tolist())
            values, places = measures.nearest(found, self.real_dino)
            _add(rows, "nearest", values)
            _add(rows, "nearest_image", [self.names[place] for place in places])
            apart = [measures.diversity(own) for own in torch.split(found, counts)]
            by_prompt["div_dino"] = [value for value in apart if value is not None]
            by_prompt["pres"] = self._preservation(of_class, self.real_dino)
        if self.clip is not None and self.real_clip is not None:
            found = self.clip.images(flat)
            _add(rows, "clip_i", measures.fidelity(found, self.real_clip).tolist())
            neutral, whole = (
                self.clip.texts(_repeated(texts, counts))
                for texts in ([prompt.neutral_text for prompt in prompts], [p.request.prompt for p in prompts])
            )
            _add(rows, "clip_t", measures.prompt_fidelity(found, neutral).tolist())
            _add(rows, "clip_score", measures.clip_score(found, whole).tolist())
        by_prompt |= {name: _by_prompt(rows, name, len(prompts)) for name in OF_IMAGES if rows and name in rows[0]}
        ordered = {name: by_prompt[name] for name in MEASURES if by_prompt.get(name)}
        return Scores(ordered, rows, self._copies(rows))

    def _preservation(self, of_class: Sequence[Sequence[Image]], real: Tensor) -> list[float]:
        """PRES of each class prompt."""
        counts = [len(own) for own in of_class if own]
        if self.dino is None or not counts:
            return []
        values = measures.fidelity(self.dino.images([image for own in of_class for image in own]), real)
        return [float(own.mean()) for own in torch.split(values, counts)]

    def _copies(self, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        if self.real_dino is None:
            return []
        threshold = measures.copy_threshold(self.real_dino)
        return [row for row in rows if row["nearest"] > threshold]


@dataclass(frozen=True)
class Measure:
    """What a column is called, and which direction is better ("" for neither)."""

    title: str
    better: str


MEASURES: Mapping[str, Measure] = {
    "dino": Measure("DINO", "higher"),
    "clip_i": Measure("CLIP-I", "higher"),
    "clip_t": Measure("CLIP-T", "higher"),
    "pres": Measure("PRES", "lower"),
    "div_dino": Measure("DIV (1 - DINO)", "higher"),
    "nearest": Measure("nearest", ""),
    "clip_score": Measure("CLIP score", "higher"),
}
OF_IMAGES = ("dino", "clip_i", "clip_t", "clip_score", "nearest")


def prepare_judge(
    dino: ImageEncoder | None, clip: ClipEncoder | None, real: Sequence[Image], names: Iterable[object]
) -> Judge:
    """Embed the real images once. `names`: of their files."""
    return Judge(
        dino=dino,
        clip=clip,
        names=[str(name) for name in names],
        real_dino=None if dino is None else dino.images(real),
        real_clip=None if clip is None else clip.images(real),
    )


def _add(rows: Sequence[dict[str, Any]], name: str, values: Sequence[object]) -> None:
    for row, value in zip(rows, values, strict=True):
        row[name] = value


def _repeated(texts: Sequence[str], counts: Sequence[int]) -> list[str]:
    return [text for text, count in zip(texts, counts, strict=True) for _ in range(count)]


def _by_prompt(rows: Sequence[Mapping[str, Any]], name: str, prompts: int) -> list[float]:
    """The mean of each prompt's images; of the nearest real images the maximum."""
    own = [[row[name] for row in rows if row["prompt"] == place] for place in range(prompts)]
    return [max(values) if name == "nearest" else measures.mean(values) for values in own]
