"""Histograms as inline SVG; colours come from the page's style sheet."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from library.data.contact_sheet.markup import count, escape, number
from library.data.contact_sheet.records import SheetImage, Size

_WIDTH, _HEIGHT = 380, 225
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 8, 30, 42
_CHARACTER = 7.5  # width of a digit of a tick's label
_MOST_BARS = 24
_MOST_REPEAT_BARS = 12


@dataclass(frozen=True)
class Bar:
    """A bar of a histogram: training images, with regularisation images stacked on top."""

    label: str  # below the bar
    name: str  # in the tooltip: "71-75 tokens"
    train: int
    reg: int
    over: bool = False  # above the limit


def caption_chart(images: Sequence[SheetImage], limit: int) -> str:
    """Histogram of the tokens of each image's longest caption, with the limit marked."""
    lengths = [(max((caption.tokens for caption in image.captions), default=0), image.is_reg) for image in images]
    edges = token_edges(max((length for length, _ in lengths), default=0), limit)
    found = Counter((max(0, bisect_left(edges, length) - 1), is_reg) for length, is_reg in lengths)
    bars = []
    for place, (low, high) in enumerate(pairwise(edges)):
        name = f"{low + 1 if low else 0}–{high} tokens"
        bars.append(Bar(str(high), name, found[place, False], found[place, True], high > limit))
    mark = (edges.index(limit), f"limit {limit}")
    return histogram("Caption lengths", "tokens of the longest caption", bars, at_edge=True, mark=mark)


def token_edges(longest: int, limit: int) -> list[int]:
    """Bin edges 0, step, 2 step, ...: the limit is an edge, and the last edge is at least `longest`."""
    most = max(longest, limit)
    steps = [step for step in range(1, limit + 1) if limit % step == 0]
    step = next((step for step in steps if most / step <= _MOST_BARS), limit)
    edges = [*range(0, limit + 1, step)]
    if longest > limit:
        wide = step * -(-most // (step * 2 * _MOST_BARS))  # a very long caption must not add thousands of bars
        while edges[-1] < longest:
            edges.append(edges[-1] + wide)
    return edges


def repeats_chart(images: Sequence[SheetImage]) -> str:
    """Histogram of the images' repeats."""
    found = Counter((image.repeats, image.is_reg) for image in images)
    values = sorted({repeats for repeats, _ in found})
    ranges = [(value, value) for value in values]
    if len(values) > _MOST_REPEAT_BARS:
        step = -(-(values[-1] - values[0] + 1) // _MOST_REPEAT_BARS)
        ranges = [(low, low + step - 1) for low in range(values[0], values[-1] + 1, step)]
    bars = []
    for low, high in ranges:
        label = str(low) if low == high else f"{low}–{high}"
        inside: Counter[bool] = Counter()
        for (repeats, is_reg), count_of_images in found.items():
            inside[is_reg] += count_of_images if low <= repeats <= high else 0
        bars.append(Bar(label, f"repeats {label}", inside[False], inside[True]))
    return histogram("Repeats", "repeats per epoch", bars)


def histogram(
    name: str, across: str, bars: Sequence[Bar], *, at_edge: bool = False, mark: tuple[int, str] | None = None
) -> str:
    """Return an SVG of bars. Labels are centred below the bars, or with `at_edge` at their right edges; `mark` (bars
    before it, text) draws a vertical line."""
    wide, high = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    step = wide / max(1, len(bars))
    ticks = count_ticks(max((bar.train + bar.reg for bar in bars), default=0))
    scale = high / ticks[-1]
    base = _TOP + high
    parts = [
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(_spoken(name, bars))}">'
    ]
    for tick in ticks:
        y = base - tick * scale
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    parts.append(f'<text x="{_LEFT - 8}" y="12" text-anchor="end">images</text>')
    gap = min(step * 0.16, 10)
    thick = min(step - gap, 64)
    for place, bar in enumerate(bars):
        x = _LEFT + (place + 0.5) * step - thick / 2
        parts.append(_bar(bar, x, thick, base, scale))
    parts += _labels(bars, step, base, at_edge=at_edge)
    if mark is not None:
        x = _LEFT + mark[0] * step
        near_end = x > _WIDTH - 80
        anchor, shift = ("end", -5) if near_end else ("start", 5)
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{base}"/>')
        parts.append(f'<text class="mark" x="{x + shift:.1f}" y="12" text-anchor="{anchor}">{escape(mark[1])}</text>')
    parts.append(
        f'<text class="axis" x="{_LEFT + wide / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(across)}</text>'
    )
    return "".join([*parts, "</svg>"])


def _bar(bar: Bar, x: float, thick: float, base: float, scale: float) -> str:
    if not bar.train + bar.reg:
        return ""
    tooltip = f"{bar.name}: {count(bar.train + bar.reg, 'image')}"
    if bar.reg:
        tooltip += f", {number(bar.reg)} of them regularisation"
    parts = [f"<g><title>{escape(tooltip)}</title>"]
    bottom = base
    for kind, value in (("over" if bar.over else "train", bar.train), ("reg", bar.reg)):
        if value:
            tall = max(value * scale, 1.5)  # keep a single image visible
            bottom -= tall
            parts.append(f'<rect class="{kind}" x="{x:.1f}" y="{bottom:.1f}" width="{thick:.1f}" height="{tall:.1f}"/>')
    return "".join([*parts, "</g>"])


def _labels(bars: Sequence[Bar], step: float, base: float, *, at_edge: bool) -> Iterable[str]:
    widest = max((len(bar.label) for bar in bars), default=1) * _CHARACTER + 6
    every = max(1, -int(-widest // step))
    for place, bar in enumerate(bars):
        if (place + 1) % every == 0 or len(bars) <= every:
            x = _LEFT + (place + (1 if at_edge else 0.5)) * step
            anchor = "end" if x > _WIDTH - 16 and at_edge else "middle"
            x = min(x, _WIDTH - 2)
            yield f'<text x="{x:.1f}" y="{base + 16:.1f}" text-anchor="{anchor}">{escape(bar.label)}</text>'


def count_ticks(most: int) -> list[int]:
    """Round numbers from 0 to at least `most`, in at most five steps."""
    power = 1
    while True:
        for factor in (1, 2, 5):
            step = factor * power
            if step * 5 >= most:
                return list(range(0, max(most, 1) + step, step))[: -(-max(most, 1) // step) + 1]
        power *= 10


def _spoken(name: str, bars: Sequence[Bar]) -> str:
    return f"{name}. " + "; ".join(f"{bar.name}: {bar.train + bar.reg}" for bar in bars if bar.train + bar.reg)


def bucket_rows(buckets: Mapping[Size, Sequence[int]], images: Sequence[SheetImage]) -> str:
    """A row per bucket, which is also a filter button: its shape, its images as a bar, its samples."""
    most = max((len(indexes) for indexes in buckets.values()), default=1)
    rows = []
    for bucket, indexes in buckets.items():
        width, height = bucket
        reg = sum(images[index].is_reg for index in indexes)
        samples = sum(images[index].repeats for index in indexes)
        train_part, reg_part = 100 * (len(indexes) - reg) / most, 100 * reg / most
        bars = f'<rect class="train" width="{train_part:.2f}" height="8"/>'
        bars += f'<rect class="reg" x="{train_part:.2f}" width="{reg_part:.2f}" height="8"/>' if reg else ""
        tooltip = f"{width}×{height}: {count(len(indexes), 'image')}, {count(samples, 'sample')} per epoch"
        rows.append(
            f'<li><button type="button" data-go="bucket" data-value="{width}x{height}" title="{tooltip}">'
            f"{shape(bucket)}<b>{width} × {height}</b>"
            f'<svg class="bar" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">{bars}</svg>'
            f'<span>{number(len(indexes))}</span><span class="samples">{number(samples)}</span></button></li>'
        )
    return f'<ol class="rows">{"".join(rows)}</ol>'


def shape(bucket: Size) -> str:
    """A small outline with the bucket's aspect ratio."""
    longer = max(bucket)
    width, height = (max(2.0, 16 * side / longer) for side in bucket)
    place = f'x="{(20 - width) / 2:.2f}" y="{(20 - height) / 2:.2f}" width="{width:.2f}" height="{height:.2f}"'
    return f'<svg class="shape" viewBox="0 0 20 20" aria-hidden="true"><rect {place}/></svg>'
