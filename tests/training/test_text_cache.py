"""Captions encoded before the training: the same run as with a text encoder that is not trained."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import tiny
from tests.training.running import Outcome, World, assert_equal_files, make_world, run
from tools import cache_text_encoder_outputs

VARIED = {
    "shuffle_caption": True,
    "caption_dropout_rate": 0.3,
    "caption_tag_dropout_rate": 0.2,
    "weighted_captions": True,
    "train_batch_size": 4,
    "max_train_steps": 4,
}
FROZEN = {"stop_text_encoder_training": -1}
MEMORY = {"cache_text_encoder_outputs": True}
DISK = {"cache_text_encoder_outputs_to_disk": True}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("world"))
    for path, caption in zip(
        sorted(world.root.glob("train/*/*.png")),
        (
            "zwx cat, (red:1.2), sofa",
            "zwx cat",
            "(sks dog:1.3), grass, [sky], sun",
            "sks dog, ((snow)), ice",
            "sks dog",
        ),
        strict=True,
    ):
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return world


def train(world: World, capsys: pytest.CaptureFixture[str], out: Path, **flags: object) -> Outcome:
    outcome = run(world.arguments(out, **{"data_cache_dir": out.parent / "cache", **flags}), capsys)
    assert outcome.code == 0, outcome.err
    return outcome


def fill(world: World, capsys: pytest.CaptureFixture[str], out: Path, **flags: object) -> Outcome:
    """What a training with these flags does to the cache before its first step, by the tool that does only this."""
    words = {"data_cache_dir": out.parent / "cache", "output_name": None, **flags}
    arguments = [word for word in world.arguments(out, **words) if not word.startswith("--output_dir")]
    capsys.readouterr()
    code = cache_text_encoder_outputs.main(arguments)
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return Outcome(code, captured.out, captured.err)


def counts(outcome: Outcome) -> tuple[int, int]:
    """Captions read and encoded, as the log says."""
    found = re.findall(r"captions: (\d+) read, (\d+) encoded", outcome.out + outcome.err)
    assert len(found) == 1, outcome.err
    return int(found[0][0]), int(found[0][1])


def test_cached_captions_change_nothing(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # at a rate at which Adam's first steps do not magnify the last bits of captions encoded in other batches
    flags = {**VARIED, "learning_rate": 1e-6}
    frozen = train(world, capsys, tmp_path / "frozen", **flags, **FROZEN)
    memory = train(world, capsys, tmp_path / "memory", **flags, **MEMORY)
    disk = train(world, capsys, tmp_path / "disk", **flags, **DISK)
    again = train(world, capsys, tmp_path / "again", **flags, **DISK)
    assert sorted(frozen.losses) == [1, 2, 3, 4]
    assert memory.losses == pytest.approx(frozen.losses, rel=1e-5)
    assert memory.losses == disk.losses == again.losses
    for name in ("disk", "again"):
        assert_equal_files(tmp_path / "memory" / "dog.safetensors", tmp_path / name / "dog.safetensors")
    number = sum(counts(memory))
    assert counts(memory) == counts(disk) == (0, number) and counts(again) == (number, 0)
    assert number > 5, "shuffling makes more texts than there are captions"
    assert "text encoder not trained" in memory.out


def test_long_captions_and_another_layer(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = {**VARIED, "max_train_steps": 2, "learning_rate": 1e-6, "max_token_length": 150, "clip_skip": 2}
    frozen = train(world, capsys, tmp_path / "frozen", **flags, **FROZEN)
    assert train(world, capsys, tmp_path / "memory", **flags, **MEMORY).losses == pytest.approx(frozen.losses, rel=1e-5)


@pytest.mark.parametrize("cache", [MEMORY, DISK], ids=["memory", "disk"])
def test_resumed_with_cached_captions(
    cache: dict[str, object], world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """2 steps an epoch: step 3 is the first of the second."""
    flags = {**VARIED, **cache}
    whole = train(world, capsys, tmp_path / "whole", **flags, save_every_n_steps=3, save_state=True)
    state = tmp_path / "whole" / "dog-step00000003-state"
    rest = train(world, capsys, tmp_path / "rest", **flags, resume=state)
    assert rest.losses == {4: whole.losses[4]}
    assert_equal_files(tmp_path / "whole" / "dog.safetensors", tmp_path / "rest" / "dog.safetensors")


def test_only_new_captions_are_encoded(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An edited caption is another text; another encoder has other outputs of all of them."""
    flags = {**DISK, "max_train_epochs": 1, "train_batch_size": 8}
    edited = world.root / "train" / "1_zwx cat" / "image_00.txt"
    before = edited.read_bytes()
    assert counts(train(world, capsys, tmp_path / "1", **flags)) == (0, 5)
    edited.write_text("another caption", encoding="utf-8")
    try:
        assert counts(train(world, capsys, tmp_path / "2", **flags)) == (4, 1)
        assert counts(fill(world, capsys, tmp_path / "3", **flags)) == (5, 0)
        assert counts(fill(world, capsys, tmp_path / "4", **flags, clip_skip=2)) == (0, 5)
        assert counts(fill(world, capsys, tmp_path / "5", **flags, weighted_captions=True)) == (0, 5)
        other = tiny.write_single_file(tmp_path / "other.safetensors", "sd1", seed=4)
        changed = fill(world, capsys, tmp_path / "6", **flags, pretrained_model_name_or_path=other)
        assert counts(changed) == (0, 5)
        for shard in (tmp_path / "cache" / "captions").glob("*/*.safetensors"):
            shard.write_bytes(shard.read_bytes()[:-100])
        mended = train(world, capsys, tmp_path / "7", **flags)
        assert counts(mended) == (0, 5) and "damaged cache file" in mended.err
    finally:
        edited.write_bytes(before)


def test_captions_beyond_the_limit_are_encoded_during_training(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from library.training import inputs

    flags = {**VARIED, "learning_rate": 1e-6}
    frozen = train(world, capsys, tmp_path / "frozen", **flags, **FROZEN)
    monkeypatch.setattr(inputs, "MOST_IN_MEMORY", 3)
    some = train(world, capsys, tmp_path / "some", **flags, **MEMORY)
    assert counts(some) == (0, 3) and "more than 3 different captions occur" in some.err
    assert some.losses == pytest.approx(frozen.losses, rel=1e-5)
