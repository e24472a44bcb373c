"""Remote folders in dataset files and flags: copied once and read from the copy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from library.data.scan import remote
from library.data.scan.dataset_specs import describe
from library.options.datasets import ParsedDatasets
from library.options.parse import parse
from tests.data.image_files import save
from tests.training.running import make_world, run

DOGS, MASKS = "memory://bucket/dogs", "memory://bucket/masks"


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[None]:
    """Images and masks with equal names."""
    system = MemoryFileSystem()
    for folder in ("dogs", "masks", "by name/3_sks dog"):
        save(tmp_path / "a.png")
        system.pipe_file(f"/bucket/{folder}/a.png", (tmp_path / "a.png").read_bytes())
    yield
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The URLs that were copied."""
    urls: list[str] = []
    original = remote.local_copy

    def local_copy(url: str, *rest: Any, **options: Any) -> Path:
        urls.append(url)
        return original(url, *rest, **options)

    monkeypatch.setattr(remote, "local_copy", local_copy)
    return urls


def described(folder: Path, *words: object) -> ParsedDatasets:
    flags = ("--output_dir", folder, "--pretrained_model_name_or_path", "model", "--resolution", 64, "--masked_loss")
    parsed = parse(list(map(str, (*flags, "--data_cache_dir", folder / "cache", *words))))
    assert not parsed.mistakes
    return describe(parsed.options)


def kohya(folder: Path, *subsets: dict[str, object], **keys: object) -> tuple[str, Path]:
    file = folder / "data.json"
    file.write_text(json.dumps({"datasets": [{**keys, "subsets": subsets}]}), encoding="utf-8")
    return "--dataset_config", file


def simpletuner(folder: Path, images: str, masks: str) -> tuple[str, Path]:
    file = folder / "backend.json"
    entries = [
        {"id": "dogs", "type": "local", "instance_data_dir": images, "resolution": 64, "resolution_type": "pixel",
         "caption_strategy": "instanceprompt", "instance_prompt": "dog", "conditioning_data": "masks"},
        {"id": "masks", "type": "local", "dataset_type": "conditioning", "conditioning_type": "mask",
         "instance_data_dir": masks},
    ]  # fmt: skip
    file.write_text(json.dumps(entries), encoding="utf-8")
    return "--data_backend_config", file


@pytest.mark.parametrize("kind", ["kohya", "simpletuner"])
def test_a_url_is_copied_once_and_nothing_later_meets_it(
    kind: str, bucket: None, asked: list[str], tmp_path: Path
) -> None:
    if kind == "kohya":
        sizes = [64, 128]
        words = kohya(tmp_path, {"image_dir": DOGS, "conditioning_data_dir": MASKS}, resolutions=sizes)
    else:
        sizes = [64]
        words = simpletuner(tmp_path, DOGS, MASKS)
    found = described(tmp_path, *words)
    assert not found.mistakes and asked == [DOGS, MASKS] and len(found.datasets) == len(sizes)
    for dataset in found.datasets:
        (subset,) = dataset.subsets
        for place, name in ((subset.image_dir, "dogs"), (subset.mask_dir, "masks")):
            assert isinstance(place, Path) and place.name == name and tmp_path / "cache" in place.parents
            assert [file.name for file in place.iterdir()] == ["a.png"]


def test_masks_of_the_command_line(bucket: None, asked: list[str], tmp_path: Path) -> None:
    words = ("--train_data_dir", "memory://bucket/by name", "--conditioning_data_dir", MASKS)
    found = described(tmp_path, *words)
    ((subset,),) = (dataset.subsets for dataset in found.datasets)
    assert not found.mistakes and asked == ["memory://bucket/by name", MASKS]
    assert isinstance(subset.mask_dir, Path) and (subset.mask_dir / "a.png").is_file()
    (told,) = described(tmp_path, *words[:3], "memory://bucket/none").mistakes
    assert "memory://bucket/none: no such folder" in told.what


def test_every_url_that_cannot_be_copied_is_told_with_its_place(bucket: None, tmp_path: Path) -> None:
    missing = ({"image_dir": "memory://bucket/none"}, {"image_dir": DOGS, "conditioning_data_dir": "memory://b/no"})
    save(tmp_path / "here" / "b.png")
    found = described(tmp_path, *kohya(tmp_path, *missing, {"image_dir": str(tmp_path / "here")}))
    assert len(found.mistakes) == 2
    for told, url in zip(found.mistakes, ("memory://bucket/none", "memory://b/no"), strict=True):
        assert url in told.what and "(data.json, line 1)" in told.what and told.remedy
    ((subset,),) = (dataset.subsets for dataset in found.datasets)
    assert subset.image_dir == tmp_path / "here"  # what is left is judged all the same


def test_a_url_that_stands_twice_is_one_folder(bucket: None, asked: list[str], tmp_path: Path) -> None:
    found = described(tmp_path, *kohya(tmp_path, {"image_dir": DOGS}, {"image_dir": f"{DOGS}/"}))
    assert not found.mistakes and asked == [DOGS] and len(found.datasets[0].subsets) == 1
    assert any("is already a subset of this dataset" in note and f"{DOGS}/" in note for note in found.notes)


def test_a_dry_run_with_a_dataset_file_of_a_bucket(
    account: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = make_world(tmp_path)
    client = boto3.client("s3", endpoint_url=account)
    client.create_bucket(Bucket="images")
    for file in (tmp_path / "train" / "2_sks dog").iterdir():
        client.put_object(Bucket="images", Key=f"sks dog/{file.name}", Body=file.read_bytes())
    words = kohya(tmp_path, {"image_dir": "s3://images/sks dog", "class_tokens": "dog", "num_repeats": 4})
    flags = {"dataset_config": words[1], "train_data_dir": None, "data_cache_dir": tmp_path / "cache", "dry_run": True}
    outcome = run(world.arguments(tmp_path / "out", **flags), capsys)
    assert outcome.code == 0, outcome.err
    assert f"{tmp_path / 'cache' / 'remote'}" in outcome.out
    assert 'sks dog: 3 images x 4 = 12 samples, training, 1 caption from files, 2 captioned "dog"' in outcome.out
