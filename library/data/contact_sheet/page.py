"""The whole page: one HTML file that needs only a browser, no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from library.checkpoints.writer import write_text
from library.data.contact_sheet.cards import card, shown_size
from library.data.contact_sheet.charts import bucket_rows, caption_chart, repeats_chart, shape
from library.data.contact_sheet.findings import Finding, by_bucket, classify, findings, sample
from library.data.contact_sheet.markup import count, escape, head, number
from library.data.contact_sheet.records import Page, SheetImage, Size
from library.data.contact_sheet.thumbnails import Thumbnail, longest_side, make_thumbnails

MOST_SHOWN = 2000
"""The most images with a card; of more, an evenly spaced selection. 2,000 make a file of about 15 MB."""

_MOST_NAMED = 200  # paths listed for a problem
_OPEN_PROBLEMS = 12  # shown at once; the rest unfold on a click
_HERE = Path(__file__).parent


def write_page(path: Path, page: Page, *, progress: bool = False, most: int = MOST_SHOWN) -> None:
    """Write the page atomically. Opens up to `most` images; an unreadable one gets a card that says so.

    `progress` shows a progress bar on stderr. Raises CheckpointError if the file cannot be written.
    """
    buckets = by_bucket(page.images)
    chosen = sample(buckets, most)
    write_text(path, render(page, buckets, chosen, _open(page.images, chosen, progress=progress)))


def _open(
    images: Sequence[SheetImage], chosen: Mapping[Size, Sequence[int]], *, progress: bool
) -> dict[int, Thumbnail]:
    indexes = [index for bucket in chosen.values() for index in bucket]
    reads = [(images[index].pixels, images[index].mask) for index in indexes]
    return dict(zip(indexes, make_thumbnails(reads, progress=progress), strict=True))


def render(
    page: Page,
    buckets: Mapping[Size, Sequence[int]],
    chosen: Mapping[Size, Sequence[int]],
    opened: Mapping[int, Thumbnail],
) -> str:
    """Return the HTML. `buckets` has the indexes of all images, `chosen` those of the images in `opened`."""
    kinds = classify(page, opened)
    found = findings(kinds)
    subsets = list(dict.fromkeys(image.subset for image in page.images))
    style, script = ((_HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    parts = [
        head(page.title, style, script),
        f'<body class="masks" style="--large:{min(512, 2 * longest_side(len(opened)))}px">\n',
        f"<header><h1>{escape(page.title)}</h1>{_tiles(page, buckets, subsets)}</header>",
        _problems(page, found, opened),
        _overview(page, buckets),
        _toolbar(buckets, subsets, page.images, found, masks=any(thumbnail.mask for thumbnail in opened.values())),
        '<main id="sheets" translate="no">',
    ]
    numbers = {subset: place for place, subset in enumerate(subsets)}
    for bucket, indexes in chosen.items():
        parts.append(_bucket_head(bucket, buckets[bucket], len(indexes), page.images))
        for index in indexes:
            image = page.images[index]
            parts.append(card(index, image, opened[index], kinds[index], numbers[image.subset], page.token_limit))
        parts.append("</div></section>\n")
    parts.append(_foot(script))
    return "".join(parts)


def _tiles(page: Page, buckets: Mapping[Size, Sequence[int]], subsets: Sequence[str]) -> str:
    reg = [image for image in page.images if image.is_reg]
    train = [image for image in page.images if not image.is_reg]
    values = [(len(train), "training image"), (sum(image.repeats for image in train), "training sample")]
    if reg:
        values += [(len(reg), "regularisation image")]
        values += [(sum(image.repeats for image in reg), "regularisation sample")]
    if page.held_out:
        values += [(page.held_out, "held-out image")]
    values += [(len(buckets), "bucket"), (len(subsets), "subset")]
    tiles = [
        f"<li><b>{number(value)}</b> {name if value == 1 else name + 's'}"
        f"{' per epoch' if name.endswith('sample') else ''}</li>"
        for value, name in values
    ]
    return f'<ul class="tiles">{"".join(tiles)}</ul>'


def _problems(page: Page, found: Sequence[Finding], opened: Mapping[int, Thumbnail]) -> str:
    items = [f'<li class="reported"><p>{escape(text)}</p></li>' for text in page.problems]
    items += [_problem(finding, page, opened) for finding in found]
    closed = len(page.images) - len(opened)
    note = ""
    if closed:
        note = (
            f'<p class="note">{count(len(opened), "image")} of {number(len(page.images))} were opened and are '
            f"shown below, evenly spaced in each bucket. All numbers and charts include the other {number(closed)}, "
            "which were not opened.</p>"
        )
    if not items:
        return f'<section class="problems none"><h2>No problems found</h2>{note}</section>'
    head, rest = items[:_OPEN_PROBLEMS], items[_OPEN_PROBLEMS:]
    more = f"<details><summary>{number(len(rest))} more</summary><ul>{''.join(rest)}</ul></details>" if rest else ""
    return (
        f'<section class="problems"><h2>{count(len(items), "possible problem")}</h2>'
        f"<ul>{''.join(head)}</ul>{more}{note}</section>"
    )


def _problem(finding: Finding, page: Page, opened: Mapping[int, Thumbnail]) -> str:
    kind, images = finding.kind, finding.images
    sentence = (kind.one if len(images) == 1 else kind.many).format(limit=number(page.token_limit))
    below = sum(index in opened for index in images)
    button = ""
    if below:
        label = "show" if below == len(images) else f"show the {number(below)} on this page"
        button = f'<button type="button" data-go="flag" data-value="{kind.name}">{label}</button>'
    names = "".join(
        f'<li><a href="#p{index}">{_name(page.images[index])}</a></li>'
        if index in opened
        else f"<li>{_name(page.images[index])}</li>"
        for index in images[:_MOST_NAMED]
    )
    if len(images) > _MOST_NAMED:
        names += f"<li>and {number(len(images) - _MOST_NAMED)} more</li>"
    return (
        f'<li class="{"bad" if kind.severe else "warn"}"><details><summary>{count(len(images), "image")} '
        f"{escape(sentence)}</summary><ol>{names}</ol></details>{button}</li>"
    )


def _name(image: SheetImage) -> str:
    return f"<bdi>{escape(image.path)}</bdi>"


def _overview(page: Page, buckets: Mapping[Size, Sequence[int]]) -> str:
    facts = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in page.facts if value
    )
    legend = '<p class="legend"><span class="train">training</span><span class="reg">regularisation</span></p>'
    legend = legend if any(image.is_reg for image in page.images) else ""
    columns = '<p class="columns">images<span>samples</span></p>'
    return (
        '<section class="overview">'
        + (f'<dl class="facts">{facts}</dl>' if facts else "")
        + f'<div class="charts"><figure class="buckets"><figcaption><h2>Buckets</h2>{legend}{columns}</figcaption>'
        f"{bucket_rows(buckets, page.images)}</figure>"
        f"<figure><figcaption><h2>Caption lengths</h2>{legend}</figcaption>"
        f"{caption_chart(page.images, page.token_limit)}</figure>"
        f"<figure><figcaption><h2>Repeats</h2>{legend}</figcaption>{repeats_chart(page.images)}</figure></div></section>\n"
    )


def _toolbar(
    buckets: Mapping[Size, Sequence[int]],
    subsets: Sequence[str],
    images: Sequence[SheetImage],
    found: Sequence[Finding],
    *,
    masks: bool,
) -> str:
    sizes = [(f"{width}x{height}", f"{width} × {height}") for width, height in buckets]
    what = [("train", "training"), ("reg", "regularisation")] if any(image.is_reg for image in images) else []
    flags = [(finding.kind.name, finding.kind.label) for finding in found]
    mask = (
        '<button type="button" id="masks" aria-pressed="true" title="hatched: masked out (key: m)">Masks</button>'
        if masks
        else ""
    )
    return (
        '<form class="bar" role="search"><label class="find"><span>Search</span>'
        '<input id="find" type="search" placeholder="in captions and paths" autocomplete="off" spellcheck="false">'
        "<kbd>/</kbd></label>"
        + _select("bucket", "Bucket", "all", sizes)
        + _select("subset", "Subset", "all", [(str(place), subset) for place, subset in enumerate(subsets)])
        + _select("flag", "Show", "all", what + flags)
        + f'<span class="buttons">{mask}'
        '<button type="button" id="dense" aria-pressed="false" title="key: v">Images only</button>'
        '<button type="button" id="clear" hidden>Clear</button></span>'
        '<output id="status" aria-live="polite"></output></form>\n'
    )


def _select(name: str, label: str, all_label: str, values: Sequence[tuple[str, str]]) -> str:
    if len(values) < 2 and name != "flag" or not values:
        return ""
    options = "".join(f'<option value="{escape(value)}">{escape(text)}</option>' for value, text in values)
    options = f'<option value="">{all_label}</option>{options}'
    return f'<label><span>{label}</span><select id="{name}">{options}</select></label>'


def _bucket_head(bucket: Size, indexes: Sequence[int], cards: int, images: Sequence[SheetImage]) -> str:
    width, height = bucket
    samples = sum(images[index].repeats for index in indexes)
    amount = count(len(indexes), "image")
    if cards < len(indexes):
        amount = f"{number(cards)} of {amount} shown, evenly spaced"
    wide, high = shown_size(bucket)
    return (
        f'<section class="bucket" data-bucket="{width}x{height}" style="--w:{wide}px;--h:{high}px">'
        f"<h2>{shape(bucket)}{width} × {height} <small>{amount}, {count(samples, 'sample')} per epoch"
        '<span class="matching"></span></small></h2><div class="grid">\n'
    )


def _foot(script: str) -> str:
    keys = (("/", "search"), ("m", "masks"), ("v", "images only"), ("← ↑ ↓ →", "move between images"),
            ("Enter", "enlarge"), ("Esc", "close"))  # fmt: skip
    items = "".join(f"<li><kbd>{key}</kbd> {what}</li>" for key, what in keys)
    return (
        '<p id="nothing" hidden>No image matches. <button type="button" data-go="clear">Show all</button></p>'
        "</main>\n"
        f'<footer><ul class="keys">{items}</ul></footer>\n'
        '<dialog id="large" aria-label="Enlarged image"><div class="holder"></div><form method="dialog">'
        '<button type="button" id="previous" aria-label="previous image">←</button>'
        '<output id="place"></output><button type="button" id="next" aria-label="next image">→</button>'
        '<button id="close">Close</button></form></dialog>\n'
        f"<script>{script}</script>\n</body></html>\n"
    )
