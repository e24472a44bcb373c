"""The page of --debug_dataset shows all images or says how many, and no text of a dataset becomes markup."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.checkpoints.header import CheckpointError
from library.data.contact_sheet import Page, SheetCaption, SheetImage, write_page
from library.data.contact_sheet.charts import count_ticks, token_edges
from library.data.contact_sheet.findings import sample
from library.data.contact_sheet.markup import count, epochs, escape, percent
from library.data.contact_sheet.thumbnails import longest_side
from library.options.mistakes import Mistake, UserError

NASTY = """</script><script>alert("1")</script> <b>'quoted' & "double"</b> ÄÖ 日本語 العربية 🙂 {x} \x07"""
VOID = {"meta", "img", "input", "rect", "line", "br"}


@dataclass
class Element:
    """A node of the page as a browser sees it."""

    tag: str
    attributes: dict[str, str]
    inside: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All text inside."""
        return "".join(part if isinstance(part, str) else part.text for part in self.inside)

    def all(self, tag: str, **attributes: str) -> list[Element]:
        """The elements inside with this tag that have these words in these attributes ("class" as "class_")."""
        found = []
        for part in self.inside:
            if isinstance(part, Element):
                wanted = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
                words = {name: part.attributes.get(name, "").split() for name in wanted}
                if part.tag == tag and all(value in words[name] for name, value in wanted.items()):
                    found.append(part)
                found += part.all(tag, **attributes)
        return found

    def one(self, tag: str, **attributes: str) -> Element:
        """The only such element."""
        (found,) = self.all(tag, **attributes)
        return found


class Reader(HTMLParser):
    """Builds the tree and insists that every element is closed where it was opened."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open = [Element("", {})]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        assert len(element.attributes) == len(attrs), f"an attribute twice in <{tag}>"
        self.open[-1].inside.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        self.open[-1].inside.append(data)


def parse(text: str) -> Element:
    reader = Reader()
    reader.feed(text)
    reader.close()
    (root,) = reader.open
    return root


def colour(size: tuple[int, int], value: tuple[int, int, int] = (200, 30, 60)) -> Callable[[], np.ndarray]:
    return lambda: np.full((size[1], size[0], 3), value, np.uint8)


def sheet_image(path: str = "/data/10_dog/a.png", bucket: tuple[int, int] = (64, 96), **changes: object) -> SheetImage:
    plain = SheetImage(
        path, "10_dog", False, bucket, bucket, bucket, colour(bucket), captions=(SheetCaption("a dog", 2),) * 3
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def written(path: Path, *images: SheetImage, most: int = 2000, **changes: object) -> Element:
    page = replace(Page("Dogs", 75, images), **changes)  # type: ignore[arg-type]
    write_page(path / "sheet.html", page, most=most)
    return parse((path / "sheet.html").read_text(encoding="utf-8"))


def decoded(uri: str) -> np.ndarray:
    head, _, data = uri.partition(",")
    assert head == "data:image/webp;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_no_text_becomes_markup(tmp_path: Path) -> None:
    one = sheet_image(
        "/data/" + NASTY + "/b" + NASTY.replace("/", "") + ".png", subset=NASTY, captions=(SheetCaption(NASTY, 80, 9),)
    )
    root = written(tmp_path, one, sheet_image(), title=NASTY, problems=[NASTY], facts=[(NASTY, NASTY)])
    assert len(root.all("script")) == 1
    assert "alert(" not in root.one("script").text
    visible = NASTY.replace("\x07", "\u2407")
    assert root.one("h1").text == root.one("head").one("title").text == visible
    assert root.all("bdi", class_="words")[0].text == visible
    assert root.one("dd").text == root.one("dt").text == root.one("li", class_="reported").text == visible
    assert visible in [option.text for option in root.one("select", id="subset").all("option")]
    assert visible in root.all("p", class_="folder")[0].attributes["title"]


def test_names_that_are_no_unicode_can_be_written(tmp_path: Path) -> None:
    root = written(tmp_path, sheet_image(b"/data/\xe4.png".decode("utf-8", "surrogateescape")))
    assert root.one("h3").text == "\\udce4.png"


def test_nothing_is_fetched_and_no_other_script_may_run(tmp_path: Path) -> None:
    root = written(
        tmp_path,
        sheet_image(mask=lambda: np.zeros((96, 64), np.uint8)),
        sheet_image(captions=(SheetCaption("http://x.y/", 3),)),
    )
    (policy,) = (meta for meta in root.all("meta") if meta.attributes.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(root.one("script").text.encode()).digest()).decode()
    rules = policy.attributes["content"].split("; ")
    assert "default-src 'none'" in rules and f"script-src 'sha256-{digest}'" in rules
    assert not root.all("link") and not root.all("iframe") and not root.all("a", href="http://x.y/")
    for tag in ("img", "script", "i"):
        for element in root.all(tag):
            assert all(
                url.startswith("data:") for url in re.findall(r"url\((.*?)\)", element.attributes.get("style", ""))
            )
            assert element.attributes.get("src", "data:").startswith("data:")
    here = Path(__file__).resolve().parents[2] / "library/data/contact_sheet"
    for name in ("page.css", "page.js"):
        assert not re.search(
            r"https?:|//[a-z]|@import|url\(|fetch\(|innerHTML", (here / name).read_text(encoding="utf-8")
        ), name


def test_the_crop_and_its_mask_are_shown(tmp_path: Path) -> None:
    mask = np.zeros((96, 64), np.uint8)
    mask[:48] = 255
    card = written(tmp_path, sheet_image(mask=lambda: mask)).one("article")
    pixels = decoded(card.one("img").attributes["src"])
    assert pixels.shape == (96, 64, 3) and np.abs(pixels.astype(int) - (200, 30, 60)).max() < 16  # lossy
    overlay = decoded(re.findall(r"url\((.*?)\)", card.one("i", class_="mask").attributes["style"])[0])
    assert overlay.shape == (96, 64, 4)
    assert overlay[:40, :, 3].max() == 0 and overlay[56:, :, 3].min() == 255  # opaque where the loss is masked out
    assert "mask 50 %" in card.text


def test_the_more_images_the_smaller_they_are_shown(tmp_path: Path) -> None:
    sides = [longest_side(images) for images in (1, 100, 101, 400, 401, 2000)]
    assert sides == sorted(sides, reverse=True) and sides[0] > sides[-1] and sides[-1] <= 160
    root = written(tmp_path, sheet_image(bucket=(512, 1024)), sheet_image(bucket=(64, 96)))
    assert [decoded(image.attributes["src"]).shape for image in root.all("img")] == [
        (96, 64, 3),
        (sides[0], sides[0] // 2, 3),
    ]


def test_what_cannot_be_opened_is_shown_as_such(tmp_path: Path) -> None:
    def broken() -> np.ndarray:
        raise UserError([Mistake("image a.png <cannot> be decoded", "repair it")])

    def odd() -> np.ndarray:
        raise RuntimeError

    root = written(
        tmp_path,
        sheet_image(pixels=broken),
        sheet_image(pixels=odd),
        sheet_image(),
        sheet_image(mask=lambda: np.zeros((9, 8), np.uint8)),
    )
    texts = [card.text for card in root.all("article")]
    assert (
        "Cannot be opened" in texts[0] and "image a.png <cannot> be decoded" in texts[0] and "repair it" not in texts[0]
    )
    assert "Cannot be opened" in texts[1] and "RuntimeError" in texts[1]
    assert "annot be opened" not in texts[2]
    assert "mask cannot be used" in texts[3]
    assert [len(card.all("img")) for card in root.all("article")] == [0, 0, 1, 1]
    assert "2 images cannot be opened" in root.one("section", class_="problems").text


def test_equal_captions_of_epochs_are_shown_once(tmp_path: Path) -> None:
    one, other = SheetCaption("one", 1), SheetCaption("other", 30)
    cards = written(
        tmp_path,
        sheet_image(captions=(one,) * 3),
        sheet_image(captions=(one, other, one)),
        sheet_image(captions=(other, one, replace(one, text=""))),
    ).all("article")
    seen = [[(part.one("p", class_="text-of-caption").text, part.one("p", class_="tokens").all("span")[-1].text)
             for part in card.all("div", class_="caption")] for card in cards]  # fmt: skip
    assert seen == [
        [("one", "epochs 1–3")],
        [("one", "epochs 1, 3"), ("other", "epoch 2")],
        [("other", "epoch 1"), ("one", "epoch 2"), ("empty caption", "epoch 3")],
    ]
    assert "30 of 75 tokens" in cards[1].text and "1 of 75 tokens" in cards[0].text


def test_what_a_cut_caption_loses_is_marked(tmp_path: Path) -> None:
    root = written(
        tmp_path,
        sheet_image(captions=(SheetCaption("seen and unseen", 76, 9),)),
        sheet_image(captions=(SheetCaption("a", 75),)),
    )
    cut, whole = root.all("article")
    assert cut.one("s").text == "unseen" or cut.one("s").text == " unseen"
    assert cut.one("bdi", class_="words").text == "seen and unseen"
    assert "76 of 75 tokens, truncated" in cut.text and "cut" in cut.attributes["data-flags"]
    assert whole.attributes["data-flags"] == "" and not whole.all("s")
    assert "1 image has a caption of more than 75 tokens" in root.one("section", class_="problems").text


def test_every_kind_of_problem_is_told(tmp_path: Path) -> None:
    white = lambda: np.full((96, 64), 255, np.uint8)  # noqa: E731
    root = written(
        tmp_path,
        sheet_image(size=(32, 48)),
        sheet_image(resized=(128, 96), size=(1280, 960), offset=(32, 0), score=6.5),
        sheet_image(captions=(SheetCaption(" ", 0),) * 3),
        sheet_image(subset="masked", mask=white),
        sheet_image(subset="masked"),
        sheet_image(subset="masked", mask=lambda: 255 - white()),
        problems=["the folder holds a film"],
    )
    flags = [card.attributes["data-flags"] for card in root.all("article")]
    assert flags == ["enlarged", "cropped", "empty", "", "unmasked", "black"]
    assert "32×48 → 64×96" in root.all("article")[0].text and "upscaled 2 ×" in root.all("article")[0].text
    assert "50 % cropped away (left 32, top 0), score 6.5" in root.all("article")[1].text
    problems = root.one("section", class_="problems")
    assert problems.one("h2").text == "6 possible problems"
    assert "the folder holds a film" in problems.text and "1 image has no mask" in problems.text
    offered = {option.attributes["value"] for option in root.one("select", id="flag").all("option")}
    assert offered == {"", *flags} and {button.attributes["data-value"] for button in problems.all("button")} == {
        *flags
    } - {""}


def test_a_page_without_problems_says_so(tmp_path: Path) -> None:
    root = written(tmp_path, sheet_image())
    assert root.one("section", class_="problems").text == "No problems found"


def test_totals_count_every_image_and_repeat(tmp_path: Path) -> None:
    images = [
        sheet_image(repeats=10),
        sheet_image(repeats=2, bucket=(96, 64)),
        sheet_image(repeats=7, is_reg=True, weight=0.5, subset="reg"),
    ]
    root = written(tmp_path, *images)
    tiles = [tile.text for tile in root.one("ul", class_="tiles").all("li")]
    assert tiles == [
        "2 training images", "12 training samples per epoch", "1 regularisation image",
        "7 regularisation samples per epoch", "2 buckets", "2 subsets",
    ]  # fmt: skip
    rows = [row.attributes["title"] for row in root.one("ol", class_="rows").all("button")]
    assert rows == ["64×96: 2 images, 17 samples per epoch", "96×64: 1 image, 2 samples per epoch"]
    reg = root.one("article", data_kind="reg")
    assert "regularisation" in reg.text and "weight 0.5" in reg.text and "7 ×" in reg.text
    bars = [title.text for title in root.all("title") if title.text.startswith("repeats")]
    assert bars == ["repeats 2: 1 image", "repeats 7: 1 image, 1 of them regularisation", "repeats 10: 1 image"]


@pytest.mark.parametrize("lengths", [[0, 1, 75], [5, 5, 6, 76], [75, 76, 100_000], [], [300, 2]])
def test_charts_count_every_image_once(tmp_path: Path, lengths: list[int]) -> None:
    images = [
        sheet_image(captions=(SheetCaption("x", length),), repeats=place + 1)
        for place, length in enumerate(lengths * 7)
    ]
    root = written(tmp_path, *images, most=1)
    for word in ("tokens:", "repeats"):
        bars = [title.text for title in root.all("title") if word in title.text]
        assert sum(int(re.findall(r": (\d+) image", bar)[0]) for bar in bars) == len(images)
    over = sum(length > 75 for length in lengths * 7)
    bars = [group.one("title").text for group in root.all("g") if group.all("rect", class_="over")]
    assert sum(int(re.findall(r": (\d+) image", bar)[0]) for bar in bars) == over


def test_too_many_images_are_sampled_and_that_is_told(tmp_path: Path) -> None:
    opened = []

    def read() -> np.ndarray:
        opened.append(1)
        return colour((64, 96))()

    images = [sheet_image(f"/d/{place}.png", pixels=read, captions=(SheetCaption("x", 99),)) for place in range(60)]
    images += [sheet_image(f"/d/wide{place}.png", bucket=(96, 64), pixels=read) for place in range(40)]
    root = written(tmp_path, *images, sheet_image("/d/rare.png", bucket=(32, 32), pixels=read), most=10)
    names = [card.one("h3").text for card in root.all("article")]
    assert names[0] == "rare.png" and len(names) == len(opened) == 1 + 5 + 3
    assert names[1:6] == ["6.png", "18.png", "30.png", "42.png", "54.png"]  # the middles of five equal parts
    heads = [section.one("h2").text for section in root.all("section", class_="bucket")]
    assert heads[1:] == [
        "64 × 96 5 of 60 images shown, evenly spaced, 60 samples per epoch",
        "96 × 64 3 of 40 images shown, evenly spaced, 40 samples per epoch",
    ]
    problems = root.one("section", class_="problems")
    assert "9 images of 101 were opened" in problems.text and "the other 92, which were not opened" in problems.text
    assert "60 images have captions of more" in problems.text and "show the 5 on this page" in problems.text
    assert len(problems.all("li", class_="warn")[0].all("a")) == 5 and "/d/59.png" in problems.text
    assert "101 training images" in root.one("ul", class_="tiles").text


def test_every_image_with_a_problem_is_named_or_counted(tmp_path: Path) -> None:
    root = written(tmp_path, *[sheet_image(f"{place}.png", captions=()) for place in range(1234)], most=1)
    names = root.one("section", class_="problems").one("ol").all("li")
    assert names[-1].text == f"and {1234 - (len(names) - 1):,} more"


@pytest.mark.parametrize("most", [1, 7, 50, 999])
def test_samples_are_even_and_stay_near_the_limit(most: int) -> None:
    sizes = [1, 2, 30, 400, 567]
    buckets = {(64, 64 + place): list(range(size)) for place, size in enumerate(sizes)}
    found = sample(buckets, most)
    assert all(chosen for chosen in found.values()) and sum(map(len, found.values())) <= most + len(sizes)
    for size, chosen in zip(sizes, found.values(), strict=True):
        gaps = np.diff([-1, *chosen, size])
        assert chosen == sorted(set(chosen)) and gaps[1:-1].max(initial=0) - gaps[1:-1].min(initial=size) <= 1
        assert len(chosen) == max(1, size * most // 1000)
    assert sample(buckets, 1000) == buckets


def test_a_page_without_images_can_be_written(tmp_path: Path) -> None:
    root = written(tmp_path, problems=["nothing was found"])
    assert not root.all("article") and "nothing was found" in root.text


def test_a_section_of_the_plan_without_a_line_has_no_heading(tmp_path: Path) -> None:
    root = written(tmp_path, sheet_image(), facts=[("model", "a"), ("validation", "")])
    assert [element.text for element in root.all("dt")] == ["model"]


def test_a_page_that_cannot_be_written_leaves_the_earlier_one(tmp_path: Path) -> None:
    (tmp_path / "sheet.html").mkdir()
    with pytest.raises(CheckpointError, match="sheet.html"):
        write_page(tmp_path / "sheet.html", Page("Dogs", 75, [sheet_image()]))
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.html"]


def test_token_bins_have_an_edge_at_the_limit() -> None:
    for limit in (75, 150, 225, 77, 1):
        for longest in (0, 1, limit, limit + 1, 3 * limit, 100_000):
            edges = token_edges(longest, limit)
            assert limit in edges and edges[0] == 0 and edges[-1] >= max(longest, limit)
            assert edges == sorted(set(edges)) and len(edges) <= 75


@pytest.mark.parametrize(
    ("most", "ticks"), [(0, [0, 1]), (3, [0, 1, 2, 3]), (10, [0, 2, 4, 6, 8, 10]), (501, [0, 200, 400, 600])]
)
def test_ticks_are_round(most: int, ticks: list[int]) -> None:
    assert count_ticks(most) == ticks


def test_words_for_numbers() -> None:
    assert (count(1, "image"), count(0, "image"), count(1234, "image")) == (
        "1 image",
        "0 images",
        "1,234 images",
    )
    assert (epochs([2]), epochs([1, 2]), epochs([1, 2, 3]), epochs([1, 3, 4])) == (
        "epoch 2",
        "epochs 1, 2",
        "epochs 1–3",
        "epochs 1, 3, 4",
    )
    assert (percent(0), percent(0.001), percent(0.5), percent(1)) == ("0 %", "under 1 %", "50 %", "100 %")
    assert escape("a\tb\nc\x00") == "a\tb\nc\u2400"


def test_held_out_images_are_counted(tmp_path: Path) -> None:
    assert "3 held-out images" in written(tmp_path / "a.html", sheet_image(), held_out=3).one("header").text
    assert "held-out" not in written(tmp_path / "b.html", sheet_image()).one("header").text
