"""tools/evaluate_subject.py as users call it: the same prompts and seeds for all models, also after an interruption."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from library.evaluation import command, model_images
from library.evaluation.subject_images import mask_of, open_image
from tests import tiny
from tests.evaluation import tiny_encoders
from tools import evaluate_subject

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, encoders, real images and prompts."""
    folder = tmp_path_factory.mktemp("a wörld")
    for seed, name in enumerate(("base.safetensors", "tuned.safetensors")):
        tiny.write_single_file(folder / name, "sd1", seed)
    tiny_encoders.write_dino(folder / "dino")
    tiny_encoders.write_clip(folder / "clip")
    tiny.write_images(folder / "train" / "10_sks dog", 3)
    (folder / "prompts.txt").write_text("a {subject} in snow\na red sks dog --h 128\n", encoding="utf-8")
    return folder


def words(world: Path, out: Path, *more: object) -> list[str]:
    given = [
        "--ckpt", world / "base.safetensors", "--subject_images", world / "train", "--evaluation_subject", "sks dog",
        "--evaluation_class", "dog", "--evaluation_prompts", world / "prompts.txt", "--evaluation_dino", world / "dino",
        "--outdir", out, "--steps", "1", "--W", "64", "--H", "64", "--scale", "1", "--images_per_prompt", "2", *more,
    ]  # fmt: skip
    return [str(word) for word in given]


def values_of(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "values.json").read_text(encoding="utf-8"))
    return loaded


def test_an_evaluation_goes_on_and_is_never_mixed(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, table = tmp_path / "eval", tmp_path / "table.csv"
    both = words(world, out, "--checkpoints", world / "tuned.safetensors", "--save_to", table)
    write, written = model_images.write_image, []

    def interrupted(path: Path, *rest: Any) -> None:
        if len(written) == 7:
            raise KeyboardInterrupt
        written.append(path)
        write(path, *rest)

    monkeypatch.setattr(model_images, "write_image", interrupted)
    assert evaluate_subject.main(both) == 130
    before = {path: path.stat().st_mtime_ns for path in written}
    monkeypatch.setattr(model_images, "write_image", write)
    assert evaluate_subject.main([*both, "--evaluation_clip", str(world / "clip")]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in written}

    # the same texts, sizes and seeds for both, in the size of the prompt
    names = ["00_0.png", "00_1.png", "01_0.png", "01_1.png", "class_00_0.png", "class_01_0.png"]
    told = []
    for model in ("base", "tuned"):
        assert sorted(path.name for path in (out / model).glob("*.png")) == names
        record = json.loads((out / model / "images.json").read_text(encoding="utf-8"))
        told.append([(entry["prompt"], entry["seed"], entry["height"]) for entry in record.values()])
    assert told[0] == told[1] == [
        ("a sks dog in snow", 0, 64), ("a sks dog in snow", 1, 64), ("a red sks dog", 1000, 128),
        ("a red sks dog", 1001, 128), ("a dog in snow", 0, 64), ("a red dog", 1000, 128),
    ]  # fmt: skip

    # one value per prompt, per image and in the table
    with table.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.reader(stream))
    assert len(set(rows[0])) == len(rows[0]), "readers tell columns apart by their names"
    measures = ["dino", "clip_i", "clip_t", "pres", "div_dino", "nearest", "clip_score"]
    assert [row[1] for row in rows if row[0] == "tuned"] == measures
    stored = values_of(out / "tuned")
    assert all(len(stored["by_prompt"][name]) == 2 for name in measures)
    assert [image["file"] for image in stored["images"]] == names[:4]
    mean = sum(image["clip_t"] for image in stored["images"]) / 4
    assert stored["means"]["clip_t"] == pytest.approx(mean)
    difference = mean - values_of(out / "base")["means"]["clip_t"]
    (row,) = (row for row in rows if row[:2] == ["tuned", "clip_t"])
    assert float(row[2]) == pytest.approx(mean, abs=1e-6) and float(row[6]) == pytest.approx(difference, abs=2e-6)

    # nothing to draw, nothing to measure
    monkeypatch.setattr(model_images, "load", None)
    monkeypatch.setattr(command, "_open_judge", None)
    assert evaluate_subject.main([*both, "--evaluation_clip", str(world / "clip")]) == 0
    capsys.readouterr()

    # other settings
    assert evaluate_subject.main([*both, "--seed", "3"]) == 2
    said = capsys.readouterr().err
    assert "images with other settings (00_0.png)" in said and "seed: 0 there, 3 now" in said and "tuned" in said


def test_all_mistakes_at_once_and_nothing_is_written(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "eval"
    more = [
        "--adapters",
        world / "gone.safetensors",
        world / "tuned.safetensors",
        "--subject_images",
        tmp_path / "none",
    ]
    assert evaluate_subject.main(words(world, out, *more, "--evaluation_clip", world / "dino")) == 2
    told = capsys.readouterr().err
    for part in ("gone.safetensors", "is a whole model", "none is not a folder", "give it to --evaluation_dino"):
        assert part in told
    assert not out.exists() and "Traceback" not in told
    assert evaluate_subject.main(words(world, out, "--dry_run")) == 0
    assert "6 to draw" in capsys.readouterr().out and not out.exists()


def test_what_is_needed() -> None:
    assert evaluate_subject.main([]) == 2


def test_an_image_is_cropped_to_the_box_of_its_mask(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, masks = tmp_path / "images", tmp_path / "masks"
    (path,) = tiny.write_images(images / "dog", 1, (60, 40))
    mask = Image.new("L", (60, 40))
    mask.paste(255, (10, 5, 30, 25))
    (masks / "dog").mkdir(parents=True)
    mask.save(masks / "dog" / path.name)
    found = mask_of(path, images, masks)
    assert found == masks / "dog" / path.name and mask_of(path, images, None) is None
    with Image.open(path) as whole:
        assert open_image(path, found).tobytes() == whole.crop((10, 5, 30, 25)).tobytes()
    assert evaluate_subject.main(words(world, tmp_path / "eval", "--subject_masks", masks)) == 2
    assert "belong together" in capsys.readouterr().err


def test_models_of_one_name_stay_apart() -> None:
    paths = [Path("a/dog.safetensors"), Path("b/dog.safetensors"), Path("c/base.safetensors"), Path("d/cat.ckpt")]
    assert command._names(paths) == ["a-dog", "b-dog", "c-base", "cat"]
    assert command._names([Path("a/x.safetensors"), Path("a/x.ckpt")]) == ["a-x-1", "a-x-2"]
