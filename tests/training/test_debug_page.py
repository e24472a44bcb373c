"""--debug_dataset through the whole command: a page instead of a training."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import subprocess
import sys
import webbrowser
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.checkpoints import writer
from library.checkpoints.files import TensorReader
from tests.data.image_files import noise
from tests.training.running import Outcome, World, make_world, run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Addresses that a browser was sent to. No weight can be read meanwhile."""
    addresses: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda address, *rest: addresses.append(address))

    def no_weights(self: TensorReader, name: str) -> None:
        raise AssertionError("a weight is read")

    monkeypatch.setattr(TensorReader, "get", no_weights)
    return addresses


def show(world: World, out: Path, capsys: pytest.CaptureFixture[str], **flags: object) -> tuple[Outcome, str]:
    """The run and the page."""
    flags = {"data_cache_dir": out / "remembered", "debug_dataset": True, **flags}
    outcome = run(world.arguments(out, **flags), capsys)
    assert outcome.code == 0 and not outcome.losses, outcome.err
    return outcome, (out / "dataset.html").read_text(encoding="utf-8")


def test_a_page_is_written_and_nothing_is_trained(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], opened: list[str]
) -> None:
    flags: dict[str, object] = {"reg_data_dir": world.root / "reg", "prior_loss_weight": 0.25, "caption_prefix": "<by>"}
    outcome, page = show(world, tmp_path, capsys, **flags)
    assert f"dataset page: {tmp_path / 'dataset.html'}" in outcome.out
    assert "the plan of this run" in outcome.out and not opened
    assert [path.name for path in tmp_path.iterdir() if path.name != "remembered"] == ["dataset.html"]
    for path in world.root.glob("*/*/*.png"):
        assert str(path) in unescape(page)
    assert "&lt;by&gt; a photo of sks dog, grass, sky, sun" in page and "<by>" not in page
    assert "64x64" in page.replace(" ", "").replace("×", "x") and "0.25" in page


@pytest.mark.parametrize(("screen", "expected"), [("", 0), (":0", 1)])
def test_a_browser_is_opened_only_on_a_screen(
    screen: str,
    expected: int,
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    opened: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a terminal without a screen a browser would be one of text: the program would wait for it."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("DISPLAY", screen)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True)
    show(world, tmp_path, capsys)
    assert opened == [(tmp_path / "dataset.html").as_uri()] * expected


def test_images_that_cannot_be_decoded_are_shown_as_such(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], opened: list[str]
) -> None:
    """Nothing in its header tells of it: the plan takes it for an image."""
    folder = tmp_path / "train" / "1_dog"
    folder.mkdir(parents=True)
    for number in range(3):
        noise((64, 64), number).save(folder / f"{number}.png")
    data = bytearray((folder / "1.png").read_bytes())
    data[200:1500] = bytes(1300)
    (folder / "1.png").write_bytes(data)
    (folder / "bad.txt").write_text("", encoding="utf-8")
    _, page = show(world, tmp_path / "out", capsys, train_data_dir=tmp_path / "train")
    assert page.count("data:image/webp") == 2
    assert f"image {folder / '1.png'} cannot be decoded" in unescape(page)


def test_dataset_files_masks_and_wildcards_are_shown_as_trained(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], opened: list[str]
) -> None:
    """The left half of the mask is white. Inverted, with a floor of 0.2: right 1, left 0.2."""
    folder = tmp_path / "dogs"
    folder.mkdir()
    noise((64, 64)).save(folder / "one.png")
    (folder / "one.txt").write_text("{red|green|blue} dog\nanother line", encoding="utf-8")
    mask = np.zeros((64, 64), np.uint8)
    mask[:, :32] = 255
    (tmp_path / "masks").mkdir()
    Image.fromarray(mask).save(tmp_path / "masks" / "one.png")
    subset = {"image_dir": str(folder), "conditioning_data_dir": str(tmp_path / "masks"), "caption_extension": ".txt",
              "enable_wildcard": True, "num_repeats": 7}  # fmt: skip
    file = tmp_path / "data.json"
    file.write_text(json.dumps({"datasets": [{"resolution": 64, "subsets": [subset]}]}), encoding="utf-8")
    flags: dict[str, object] = {
        "train_data_dir": None, "resolution": None, "caption_extension": None, "dataset_config": file,
        "masked_loss": True, "mask_invert": True, "mask_floor": 0.2,
    }  # fmt: skip
    _, page = show(world, tmp_path / "out", capsys, **flags)
    assert "{red" not in page and ("another line" in page or re.search("(red|green|blue) dog", page))
    assert "60" in page  # per cent that count: half of it fully, half of it to a fifth
    images = [
        Image.open(io.BytesIO(base64.b64decode(data)))
        for data in re.findall(r"data:image/[a-z]+;base64,([^\"')]+)", page)
    ]
    (cover,) = (image for image in images if "A" in image.getbands())
    hidden = np.asarray(cover.getchannel("A"), dtype=float)
    middle = hidden.shape[1] // 2
    assert hidden[:, : middle - 4].mean() == pytest.approx(255 * 0.8, abs=3) and hidden[:, middle + 4 :].mean() < 3


def test_without_a_terminal_nothing_waits_and_nothing_large_is_loaded(world: World, tmp_path: Path) -> None:
    code = (
        "import sys, train_db; from library.training.command import run_recipe;"
        "code = run_recipe(train_db.RECIPE, sys.argv[1:]);"
        "print([name for name in ('diffusers', 'transformers', 'accelerate') if name in sys.modules]); sys.exit(code)"
    )
    words = world.arguments(tmp_path, debug_dataset=True, data_cache_dir=tmp_path / "remembered")
    done = subprocess.run(
        [sys.executable, "-c", code, *words], stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8",
        cwd=ROOT, timeout=60, env={**os.environ, "BROWSER": "false", "PYTHONUTF8": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("[]") and str(tmp_path / "dataset.html") in done.stdout


def test_a_full_disk_is_a_mistake(
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    opened: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer.os, "replace", full)
    outcome = run(world.arguments(tmp_path, debug_dataset=True, data_cache_dir=tmp_path / "remembered"), capsys)
    assert outcome.code == 2 and "dataset.html" in outcome.err and "No space left" in outcome.err
