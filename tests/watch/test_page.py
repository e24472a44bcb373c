"""The files of the page: what comes from a run is only ever text in it."""

from __future__ import annotations

import re

import pytest

from library.watch.server import PAGE, STATIC

SCRIPTS = ("page.js", "elements.js", "charts.js", "previews.js")


def text(name: str) -> str:
    return (PAGE / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_text_becomes_markup_or_code(name: str) -> None:
    makers = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|DOMParser|parseHTML|\beval\b"
    )
    makers += r"|new Function|setAttribute\(\"(on|style|href|src)|javascript:|srcdoc|setTimeout\([\"'`]"
    assert not re.findall(makers, text(name))


def test_the_chart_library_makes_no_markup_either() -> None:
    """Names of curves are its labels."""
    assert not re.findall(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text("uPlot.iife.min.js")
    )


def test_the_page_needs_nothing_from_elsewhere() -> None:
    """No file from another machine, and no script or style inside of the page: the policy would refuse them."""
    page = text("page.html")
    wanted = {f"/{path}" for path in re.findall(r'(?:src|href)="([^"]+)"', page) if path != "data:,"}
    assert wanted == {path for path in STATIC if path != "/"}
    assert not re.findall(r"<style|\sstyle=|\son\w+=|<script>", page)
    assert {path for path in wanted if path.endswith(".js")} == {f"/{name}" for name in (*SCRIPTS, "uPlot.js")}
    for name in (*SCRIPTS, "page.css"):
        assert not re.findall(r"https?://|@import|url\((?!data:)", text(name))


def test_every_element_that_the_script_asks_for_is_on_the_page() -> None:
    asked = {name for script in SCRIPTS for name in re.findall(r'one\("([\w-]+)"\)', text(script))}
    assert asked and asked <= set(re.findall(r'id="([\w-]+)"', text("page.html")))


def test_the_chart_library_has_its_version_and_licence() -> None:
    version = re.search(r"uPlot \((v[\d.]+)\)", text("uPlot.iife.min.js"))
    assert version and "MIT License" in text("uPlot.LICENSE.txt") and "Leon Sorokin" in text("uPlot.LICENSE.txt")


def test_the_page_is_readable_in_light_and_dark() -> None:
    """WCAG 2.1: 4.5 to 1 for text, 3 to 1 for lines of charts."""
    light, dark = (
        dict(re.findall(r"(--[\w]+): (#[0-9a-f]{3,6})", part))
        for part in re.split(r"@media \(prefers", text("page.css"))[:2]
    )
    for colours in (light, light | dark):
        for ink in ("--ink", "--soft", "--warn", "--bad", "--good"):
            assert contrast(colours[ink], colours["--sheet"]) >= 4.5, ink
        for number in range(8):
            assert contrast(colours[f"--c{number}"], colours["--sheet"]) >= 3, number


def contrast(one: str, other: str) -> float:
    """WCAG 2.1, contrast ratio."""
    brighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (brighter + 0.05) / (darker + 0.05)


def luminance(colour: str) -> float:
    """WCAG 2.1, relative luminance of #rgb or #rrggbb."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
    red, green, blue = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
