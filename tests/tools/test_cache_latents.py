"""tools/cache_latents.py as users call it: what the training then finds, several at once, stopped and called again."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from library.data.cache import latent_files
from tests import tiny
from tests.tools.filling import ROOT, finished, flags, kill_after, start
from tests.training.running import World, make_world, run
from tools import cache_latents

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

TOOL = "cache_latents.py"
IMAGES = 40


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images that no test writes beside."""
    folder = tmp_path_factory.mktemp("images")
    tiny.write_images(folder / "1_sks dög", IMAGES)
    return folder


@pytest.fixture
def folder(images: Path, tmp_path: Path) -> Path:
    """The images, to be cached here."""
    return Path(shutil.copytree(images, tmp_path / "tráin"))


@pytest.fixture(scope="module")
def alone(world: World, images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """What one process makes of them."""
    folder = Path(shutil.copytree(images, tmp_path_factory.mktemp("alone") / "train"))
    assert cache_latents.main(flags(world, folder)) == 0
    return cached(folder)


def counts(text: str) -> list[tuple[int, int]]:
    """(read, made) of each line that tells them."""
    return [(int(read), int(made)) for read, made in re.findall(r"latents: (\d+) read, (\d+) encoded", text)]


def cached(folder: Path) -> dict[str, np.ndarray]:
    """Latents by the name of the image's cache file."""
    found = {}
    for path in sorted(folder.rglob("*_sd*")):
        entry = latent_files.read(str(path), {"latents"})
        assert entry is not None, path
        found[path.name] = np.asarray(entry.arrays["latents"])
    return found


def assert_same(first: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert first.keys() == other.keys()
    assert [name for name in first if not np.array_equal(first[name], other[name])] == []


def test_the_training_finds_all_that_was_made_and_nothing_else_is_written(world, folder, capsys) -> None:
    before = {path.name for path in folder.parent.iterdir()}
    assert cache_latents.main(flags(world, folder)) == 0
    out = capsys.readouterr().out
    assert counts(out) == [(0, IMAGES)]
    assert f"{IMAGES} images x 1" in out and "read by a training with --cache_latents_to_disk" in out
    assert cache_latents.main(flags(world, folder, skip_existing=True)) == 0
    out = capsys.readouterr().out
    assert counts(out) == [(IMAGES, 0)] and "--skip_existing" in out
    assert len(cached(folder)) == IMAGES and {path.name for path in folder.parent.iterdir()} == before
    trained = flags(world, folder, cache_latents_to_disk=True, output_dir=folder.parent / "out", max_train_steps=1)
    trained += [f"--output_dir={folder.parent / 'out'}"]
    outcome = run(trained, capsys)
    assert outcome.code == 0 and counts(outcome.err) == [(IMAGES, 0)]


def test_a_changed_image_alone_is_made_anew(world, folder, capsys) -> None:
    words = flags(world, folder, flip_aug=True)
    assert cache_latents.main(words) == 0
    tiny.write_images(folder / "1_sks dög", 1, seed=99)
    capsys.readouterr()
    assert cache_latents.main(words) == 0
    assert counts(capsys.readouterr().out) == [(IMAGES - 1, 1)]


def test_several_processes_make_what_one_makes(world, folder, alone) -> None:
    out = finished(start(TOOL, flags(world, folder, processes=2)))
    made = [made for _, made in counts(out)]
    assert len(made) == 2 and IMAGES <= sum(made) < 2 * IMAGES, out
    assert_same(alone, cached(folder))


def test_killed_and_called_again_it_goes_on(world, folder, alone, capsys) -> None:
    words = flags(world, folder)
    kill_after(5, "_sd.safetensors", ROOT / "tools" / TOOL, words)
    there = len(list(folder.rglob("*_sd*")))
    assert there >= 5
    assert cache_latents.main(words) == 0
    ((read, made),) = counts(capsys.readouterr().out)
    assert there - 1 <= read < IMAGES and read + made == IMAGES
    assert_same(alone, cached(folder))
    assert not list(folder.rglob(".latents*"))


def test_all_mistakes_are_told_at_once_and_only_those_that_matter_here(world, folder, capsys) -> None:
    words = [
        *flags(world, folder, processes=0, random_crop=True, resume=folder / "none", learning_rate="fast"),
        "--proceses=2",
        "--pretrained_model_name_or_path=none.safetensors",
    ]
    assert cache_latents.main(words) == 2
    told = capsys.readouterr().err
    for word in ("--processes = ", "--random_crop", "did you mean --processes?", "none.safetensors", "--learning_rate"):
        assert word in told
    assert "--output_dir" not in told and "--resume" not in told and not list(folder.rglob("*_sd*"))


def test_a_image_that_cannot_be_read_is_named_and_the_others_are_made(world, folder, capsys) -> None:
    broken = next(folder.rglob("*.png"))
    content = bytearray(broken.read_bytes())
    content[len(content) // 2 : -20] = b"\xff" * (len(content) - len(content) // 2 - 20)  # its end is whole
    broken.write_bytes(content)
    assert cache_latents.main(flags(world, folder)) == 2
    assert broken.name in capsys.readouterr().err
    assert len(cached(folder)) == IMAGES - 1


def test_dry_run_and_help_encode_nothing(world, folder, capsys) -> None:
    assert cache_latents.main(flags(world, folder, dry_run=True)) == 0
    assert "nothing was encoded" in capsys.readouterr().out and not list(folder.rglob("*_sd*"))
    with pytest.raises(SystemExit) as end:
        cache_latents.main(["--help"])
    assert end.value.code == 0 and "--processes N" in capsys.readouterr().out
