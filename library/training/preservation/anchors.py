"""Which samples of a batch an anchor is about, and with which captions they go through the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.objective.masking import MaskSettings, mask_weights

if TYPE_CHECKING:
    from torch import Tensor

    from library.data.batch import Batch
    from library.training.preservation.class_prompts import ClassPrompts
    from library.training.preservation.plan import AnchorName


@dataclass(frozen=True)
class Share:
    """The n samples of a batch that an anchor is about, by their `places` in it. `captions`: those of further rows of
    the forward pass, one per sample; None: the samples' own rows. `where` (n, 1, h, w) float32: the weight of each
    position; None: 1 everywhere."""

    places: Sequence[int] = ()
    captions: Sequence[str] | None = None
    where: Tensor | None = None


def share_of(name: AnchorName, batch: Batch, prompts: ClassPrompts, masks: MaskSettings) -> Share:
    """What an anchor that compares with the base model is about in a batch."""
    return _SHARES[name](batch, prompts, masks)


def _base_prediction(batch: Batch, prompts: ClassPrompts, masks: MaskSettings) -> Share:
    return Share(batch.is_reg.nonzero().flatten().tolist())


def _class_prompt(batch: Batch, prompts: ClassPrompts, masks: MaskSettings) -> Share:
    texts = {place: prompts.of(batch.captions[place]) for place in _training_images(batch)}
    found = {place: text for place, text in texts.items() if text is not None}
    return Share([*found], [*found.values()])


def _blank_prompt(batch: Batch, prompts: ClassPrompts, masks: MaskSettings) -> Share:
    places = _training_images(batch)
    return Share(places, [""] * len(places))


def _outside_mask(batch: Batch, prompts: ClassPrompts, masks: MaskSettings) -> Share:
    if batch.mask is None:
        return Share()
    outside = 1.0 - mask_weights(batch.mask, masks)
    places = outside.flatten(1).any(1).nonzero().flatten()
    return Share(places.tolist(), where=outside[places])


def _training_images(batch: Batch) -> list[int]:
    places: list[int] = (~batch.is_reg).nonzero().flatten().tolist()
    return places


_SHARES: Mapping[str, Callable[[Batch, ClassPrompts, MaskSettings], Share]] = {
    "base_prediction": _base_prediction,
    "class_prompt": _class_prompt,
    "blank_prompt": _blank_prompt,
    "outside_mask": _outside_mask,
}
