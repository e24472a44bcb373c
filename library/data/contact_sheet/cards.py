"""The card of an image: its crop, captions, repeats, sizes and problems."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from library.data.contact_sheet.findings import KINDS
from library.data.contact_sheet.markup import count, epochs, escape, number, percent
from library.data.contact_sheet.records import SheetCaption, SheetImage
from library.data.contact_sheet.thumbnails import Thumbnail

_KINDS = {kind.name: kind for kind in KINDS}
_SHOWN_SIDE = 168
"""Longer side of a thumbnail on a card, in CSS pixels."""


def shown_size(bucket: tuple[int, int]) -> tuple[int, int]:
    """Width and height of a bucket's thumbnails on their cards, in CSS pixels."""
    longer = max(bucket)
    return round(_SHOWN_SIDE * bucket[0] / longer), round(_SHOWN_SIDE * bucket[1] / longer)


def card(index: int, image: SheetImage, thumbnail: Thumbnail, kinds: Sequence[str], subset: int, limit: int) -> str:
    """Return an <article>. `subset` is the subset's number in the filter, `limit` the token limit of a caption."""
    folder, name = split_path(image.path)
    return (
        f'<article class="card" id="p{index}" data-subset="{subset}" data-kind="{"reg" if image.is_reg else "train"}" '
        f'data-flags="{" ".join(kinds)}">{_image(image, thumbnail, name)}<div class="text">'
        f'<h3 class="name"><bdi>{escape(name)}</bdi></h3>'
        f'<p class="folder" title="{escape(image.path)}"><bdi>{escape(folder)}</bdi></p>'
        f"{_tags(image, thumbnail, kinds)}{_captions(image.captions, limit)}"
        f'<p class="sizes">{_sizes(image)}</p></div></article>\n'
    )


def split_path(path: str) -> tuple[str, str]:
    """Split a path or URL into folder and name."""
    found = re.fullmatch(r"(.*)[/\\]([^/\\]+)", path, re.DOTALL)
    return (found[1], found[2]) if found else ("", path)


def _image(image: SheetImage, thumbnail: Thumbnail, name: str) -> str:
    label = f'aria-label="{escape(f"{name}: enlarge")}"'
    if thumbnail.error:
        return (
            f'<button type="button" class="image broken" {label}><span><b>Cannot be opened</b>'
            f"<small>{escape(thumbnail.error)}</small></span></button>"
        )
    mask = f'<i class="mask" style="--mask:url({thumbnail.mask})"></i>' if thumbnail.mask else ""
    return f'<button type="button" class="image" {label}><img src="{thumbnail.image}" alt="">{mask}</button>'


def _tags(image: SheetImage, thumbnail: Thumbnail, kinds: Sequence[str]) -> str:
    tags = ['<li class="reg">regularisation</li>'] if image.is_reg else ['<li class="train">training</li>']
    tags += [f"<li>{number(image.repeats)} ×</li>", f"<li>weight {image.weight:g}</li>"]
    if thumbnail.learnt is not None:
        tags.append(f'<li title="share of the crop inside the mask">mask {percent(thumbnail.learnt)}</li>')
    for name in kinds:
        kind = _KINDS[name]
        label = f"upscaled {image.enlarged:.2g} ×" if name == "enlarged" and image.enlarged >= 1.05 else kind.label
        reason = thumbnail.mask_error if name == "mask-damaged" else ""
        title = f' title="{escape(reason)}"' if reason else ""
        tags.append(f'<li class="{"bad" if kind.severe else "warn"}"{title}>{escape(label)}</li>')
    return f'<ul class="tags">{"".join(tags)}</ul>'


def _captions(captions: Sequence[SheetCaption], limit: int) -> str:
    groups: dict[SheetCaption, list[int]] = {}
    for epoch, caption in enumerate(captions, 1):
        groups.setdefault(caption, []).append(epoch)
    parts = "".join(_caption(caption, seen, limit) for caption, seen in groups.items())
    return f'<div class="captions n{min(3, len(groups))}">{parts}</div>'


def _caption(caption: SheetCaption, seen: Sequence[int], limit: int) -> str:
    over = caption.tokens > limit
    used = min(100.0, 100 * caption.tokens / limit)
    amount = f"{number(caption.tokens)} of {count(limit, 'token')}" + (", truncated" if over else "")
    return (
        f'<div class="caption{" over" if over else ""}"><p class="text-of-caption">{"".join(_words(caption))}</p>'
        f'<p class="tokens"><span class="meter"><i style="width:{used:.0f}%"></i></span>{amount}'
        f"<span>{epochs(seen)}</span></p></div>"
    )


def _words(caption: SheetCaption) -> Iterable[str]:
    if not caption.text.strip():
        yield "<em>empty caption</em>"
        return
    end = len(caption.text) if caption.fits is None else caption.fits
    yield f'<bdi class="words">{escape(caption.text[:end])}'
    if caption.text[end:]:
        yield f'<s title="truncated: the model does not see this">{escape(caption.text[end:])}</s>'
    yield "</bdi>"


def _sizes(image: SheetImage) -> str:
    text = "{}×{}".format(*image.size)
    if image.resized != image.size:
        text += " → {}×{}".format(*image.resized)
    if image.resized != image.bucket:
        text += f", {percent(image.cut_away)} cropped away (left {image.offset[0]}, top {image.offset[1]})"
    if image.score is not None:
        text += f", score {image.score:g}"
    return escape(text)
