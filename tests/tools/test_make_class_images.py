"""tools/make_class_images.py as users call it: what it leaves in the folder, stopped and called again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.data.scan.folders import folder_datasets
from library.data.scan.scan import scan
from library.sampling import class_images
from tests import tiny
from tests.data.image_files import template
from tests.tools.filling import kill_after
from tools import make_class_images

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "make_class_images.py"

# diffusers' and numpy's remarks about their own future
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.write_single_file(tmp_path_factory.mktemp("m") / "base modèl.safetensors", "sd1")


def words(model: Path, out: Path, *more: str) -> list[str]:
    given = ["--ckpt", model, "--outdir", out, "--steps", "2", "--W", "64", "--H", "64", "--sampler", "euler_a", *more]
    return [str(word) for word in given]


def make(model: Path, out: Path, *more: str) -> int:
    return make_class_images.main(words(model, out, *more))


def images(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as image:
            found[path.name] = np.asarray(image).astype(int)
    return found


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / class_images.RECORD).read_text(encoding="utf-8").splitlines()]


def test_a_folder_that_the_trainer_takes_without_a_word(model, tmp_path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a robot\nein Roboter, 机器人 --n fog --d 90\n", encoding="utf-8")
    out = tmp_path / "reg" / "1_robot"
    assert make(model, out, "--from_file", str(prompts), "--count", "3", "--seed", "5", "--write_captions") == 0

    names = [f"class_0000{number}.png" for number in (1, 2, 3)]
    assert list(images(out)) == names
    told = [(line["file"], line["prompt"], line["negative_prompt"], line["seed"]) for line in lines(out)]
    second = "ein Roboter, 机器人"
    assert told == [(names[0], "a robot", "", 5), (names[1], second, "fog", 90), (names[2], "a robot", "", 7)]
    settings = {"width": 64, "height": 64, "sampler": "euler_a", "steps": 2, "scale": 7.5, "model": model.name}
    assert all(line.items() >= settings.items() for line in lines(out))
    with Image.open(out / names[1]) as image:
        assert (image.text["prompt"], image.text["seed"], image.text["sampler"]) == (second, "90", "euler_a")

    tiny.write_images(tmp_path / "train" / "1_sks robot", 3)
    found = scan(
        folder_datasets(tmp_path / "train", tmp_path / "reg", template(caption_extensions=(".caption",))).datasets
    )
    captions = [(record.path.name, record.caption) for record in found.records if record.is_reg]
    assert captions == [(names[0], "a robot"), (names[1], second), (names[2], "a robot")]
    assert not found.mistakes and not found.bad_images
    assert found.notes == ("regularisation: 3 samples for 3 training samples; ratio 1.00 : 1",)


def test_a_call_that_was_killed_goes_on_to_what_one_call_draws(model, tmp_path) -> None:
    out, whole = tmp_path / "1_ein Roboter", tmp_path / "1_whole"
    given = ["--prompt", "a robot", "--count", "4", "--seed", "1"]
    kill_after(2, ".png", SCRIPT, words(model, out, *given))

    kept = images(out)  # all that is there can be read
    times = {name: (out / name).stat().st_mtime_ns for name in kept}
    assert 2 <= len(kept) < 4 and len(lines(out)) == 4
    left = out / ".class_00004.png.0123456789ab.dreamfolder-tmp"  # of an image that was being written
    left.write_bytes(b"\x89PNG")
    (out / "notes.tmp").write_bytes(b"of the user")

    assert make(model, out, *given) == 0 and make(model, whole, *given) == 0
    assert times == {name: (out / name).stat().st_mtime_ns for name in kept}, "what is there is not drawn again"
    assert sorted(path.name for path in out.iterdir() if path.suffix != ".png") == [class_images.RECORD, "notes.tmp"]
    one, other = images(out), images(whole)
    assert list(one) == list(other) and len(one) == 4
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_a_seed_is_the_same_image_whatever_it_is_drawn_with(model, tmp_path) -> None:
    given = ["--prompt", "a robot", "--seed", "3"]
    assert make(model, tmp_path / "alone", *given, "--count", "3") == 0
    assert make(model, tmp_path / "together", *given, "--count", "2", "--batch_size", "2") == 0
    (tmp_path / "together" / "class_00001.png").unlink()
    assert make(model, tmp_path / "together", *given, "--count", "3", "--batch_size", "2") == 0
    one, other = images(tmp_path / "alone"), images(tmp_path / "together")
    assert list(one) == list(other) and len(one) == 3
    assert all(np.abs(one[name] - other[name]).max() <= 1 for name in one)
    assert np.abs(one["class_00001.png"] - one["class_00002.png"]).max() > 10


def test_other_settings_are_refused_and_nothing_is_touched(model, tmp_path, capsys) -> None:
    given = ["--prompt", "a robot", "--count", "1", "--seed", "1"]
    assert make(model, tmp_path, *given) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    assert make(model, tmp_path, "--prompt", "a house", "--count", "2", "--steps", "3", "--write_captions") == 2
    told = capsys.readouterr().err
    assert "'a robot' there, 'a house' now" in told and "steps: 2 there, 3 now" in told and "seed" not in told
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--prompt", "x", "--images_per_prompt", "3"], ["--images_per_prompt", "not a flag"]),
        (["--prompt", "x", "--count", "0"], ["--count"]),
        (["--W", "100"], ["--W 100", "--prompt"]),
        (["--from_file", "gone.txt"], ["gone.txt"]),
        (["--prompt", "x --ss bla"], ["bla", "euler_a"]),
        (["--prompt", "x", "--fp16"], ["--fp16 does not work on a CPU"]),
        (["--prompt", "x", "--vae", "gone.pt"], ["gone.pt"]),
    ],
)
def test_mistakes_are_told_without_a_traceback(model, tmp_path, capsys, more, said) -> None:
    assert make(model, tmp_path / "out", *more) == 2
    told = capsys.readouterr().err
    assert all(word in told for word in said) and "Traceback" not in told
    assert not (tmp_path / "out").exists()


def test_model_and_folder_must_be_given(capsys) -> None:
    assert make_class_images.main(["--prompt", "x"]) == 2
    told = capsys.readouterr().err
    assert "no --ckpt" in told and "no --outdir" in told


def test_interrupted(model, tmp_path, monkeypatch, capsys) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(class_images, "load", interrupted)
    assert make(model, tmp_path, "--prompt", "x") == 130
    assert "Traceback" not in capsys.readouterr().err


def test_help_mistakes_the_dry_run_and_a_full_folder_need_no_torch(model, tmp_path) -> None:
    given = words(model, tmp_path / "1_robot", "--prompt", "a robot", "--count", "1")
    dry = [*words(model, tmp_path / "1_house", "--prompt", "a house", "--count", "3"), "--dry_run"]
    assert make_class_images.main(given) == 0
    code = (
        "import sys\nfrom tools.make_class_images import main\n"
        "assert main(['--help']) == 0 and main(['--foo']) == 2\n"
        f"assert main({given!r}) == 0 and main({dry!r}) == 0\n"
        "sys.exit(', '.join(m for m in ('torch', 'numpy', 'diffusers', 'transformers') if m in sys.modules) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert all(flag in done.stdout for flag in ("--ckpt", "--count", "--write_captions", "--batch_size"))
    assert "1 of 1 images exist, nothing to draw" in done.stdout
    assert "0 of 3 images exist, 3 to draw" in done.stdout and "3 x a house, 64x64, euler_a" in done.stdout
    assert not (tmp_path / "1_house").exists()


@pytest.mark.parametrize("by_path", [True, False])
def test_it_starts_by_path_from_anywhere_and_as_a_module(tmp_path, by_path) -> None:
    start, folder = ([str(SCRIPT)], tmp_path) if by_path else (["-m", "tools.make_class_images"], ROOT)
    done = subprocess.run(
        [sys.executable, *start, "--help"], cwd=folder, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0 and "--write_captions" in done.stdout, done.stderr


def test_a_bar_shows_the_steps_of_the_missing_images(model, tmp_path, capsys) -> None:
    out = tmp_path / "1_cat"
    for count, steps in ((1, 2), (3, 4)):
        assert make(model, out, "--prompt", "a cat", "--seed", "1", "--count", str(count)) == 0
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("drawing")]
        assert f" {steps}/{steps} [" in line
