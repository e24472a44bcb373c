"""The contact sheet: one HTML file with all images under their masks, those without a find first."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from library.checkpoints.header import CheckpointError
from library.checkpoints.writer import write_text
from library.data import images
from library.data.contact_sheet import page
from library.data.contact_sheet.markup import count, escape, head, number, percent
from library.data.contact_sheet.thumbnails import Thumbnail, make_thumbnails
from library.data.decoding import decode, luminance
from library.data.scan.listing import absolute
from library.mask_making.plan import MaskJob
from library.options.mistakes import Mistake, UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

Entry = tuple[MaskJob, tuple[str, ...], str]
"""A mask, remarks about it, and why it could not be made (or "")."""

_STYLE = """
.grid { grid-template-columns: repeat(auto-fill, minmax(min(100%, 240px), 1fr)); padding-block: 14px 26px; }
.card { flex-direction: column; contain-intrinsic-size: auto 240px auto 300px; }
main .image { width: 100%; height: auto; cursor: default; }
.image img { height: auto; }
.mask { display: block; }
.text { min-height: 0; }
body:has(#masks:not(:checked)) .mask { display: none; }
.switch { display: inline-block; margin-top: 14px; }
"""


def write_sheet(path: Path, folder: Path, entries: Sequence[Entry]) -> None:
    """Write the page atomically; of many masks, those with remarks and an evenly spaced selection of the others. An
    image that cannot be read gets a card that says so. Raises UserError if it cannot be written."""
    marked = [entry for entry in entries if entry[1] or entry[2]]
    others = [entry for entry in entries if not (entry[1] or entry[2])]
    room = max(1, page.MOST_SHOWN - len(marked))
    shown = [*marked[: page.MOST_SHOWN], *others[:: max(1, -(-len(others) // room))]]
    reads = [(partial(images.load, job.image), partial(_mask, job)) for job, _, _ in shown]
    thumbnails = make_thumbnails(reads, progress=True)
    try:
        write_text(path, _render(folder, len(entries), shown, thumbnails))
    except CheckpointError as error:
        raise UserError([Mistake(str(error))]) from error


def _mask(job: MaskJob) -> NDArray[np.uint8]:
    """The mask in the size of its image, which one made by hand may not have."""
    return images.resize(np.asarray(decode(job.mask, luminance, "mask")), job.size, "linear")


def _render(folder: Path, total: int, shown: Sequence[Entry], thumbnails: Sequence[Thumbnail]) -> str:
    title = f"Masks of {Path(absolute(folder)).name or folder}"
    style = Path(page.__file__).with_name("page.css").read_text(encoding="utf-8") + _STYLE
    cards = "".join(_card(entry, thumbnail) for entry, thumbnail in zip(shown, thumbnails, strict=True))
    selection = "" if len(shown) == total else f", {number(len(shown))} of them shown"
    return (
        head(title, style) + f"<body>\n<header><h1>{escape(title)}</h1>"
        f'<ul class="tiles"><li>{count(total, "image")}{selection}. Hatched: masked out.</li></ul>'
        '<label class="switch"><input type="checkbox" id="masks" checked> masks</label></header>\n'
        f'<main translate="no"><div class="grid">\n{cards}</div></main>\n</body></html>\n'
    )


def _card(entry: Entry, thumbnail: Thumbnail) -> str:
    job, remarks, failure = entry
    error = failure or thumbnail.error
    if error:
        picture = f'<div class="image broken"><span><b>Cannot be opened</b><small>{escape(error)}</small></span></div>'
    else:
        overlay = f'<i class="mask" style="--mask:url({thumbnail.mask})"></i>' if thumbnail.mask else ""
        picture = f'<div class="image"><img src="{thumbnail.image}" alt="" loading="lazy">{overlay}</div>'
    tags = [f'<li class="warn">{escape(remark)}</li>' for remark in remarks]
    if thumbnail.mask_error:
        tags.append(f'<li class="bad" title="{escape(thumbnail.mask_error)}">mask cannot be used</li>')
    if thumbnail.learnt is not None:
        tags.insert(0, f"<li>mask {percent(thumbnail.learnt)}</li>")
    return (
        f'<article class="card">{picture}<div class="text"><h3 class="name" title="{escape(job.name)}">'
        f'<bdi>{escape(job.name)}</bdi></h3><ul class="tags">{"".join(tags)}</ul></div></article>\n'
    )
