"""Hashes of models: the two that WebUIs show, computed once for each file."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from library.checkpoints import model_hashes as module
from library.checkpoints.model_hashes import Hashes, ModelHashes, model_hashes

CONTENT = bytes(range(256)) * 5000
LONG_AGO = 1_600_000_000


def expected(content: bytes) -> Hashes:
    return Hashes(
        hashlib.sha256(content[0x100000 : 0x100000 + 65536]).hexdigest()[:8], hashlib.sha256(content).hexdigest()
    )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    write(path, CONTENT, LONG_AGO)
    return path


def write(path: Path, content: bytes, changed: int) -> None:
    path.write_bytes(content)
    os.utime(path, (changed, changed))


def test_what_they_are(model: Path) -> None:
    assert model_hashes(model) == expected(CONTENT)
    assert model_hashes(model.parent) == ("IsADirectory", "IsADirectory")
    assert model_hashes(model.parent / "gone.safetensors") == ("NOFILE", "NOFILE")
    assert ModelHashes(model.parent).value() == ("IsADirectory", "IsADirectory")


def test_a_file_is_read_once_as_long_as_it_stays_as_it_is(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = tmp_path / "memory"
    assert ModelHashes(model, memory).value() == expected(CONTENT)
    with monkeypatch.context() as patch:
        patch.setattr(module, "sha256", lambda path: pytest.fail("read again"))
        assert ModelHashes(model, memory).value() == expected(CONTENT)
        hashes = ModelHashes(model, memory)
        hashes.begin()
        assert hashes.value() == expected(CONTENT)
    other = CONTENT[::-1]
    write(model, other, LONG_AGO + 1)
    assert ModelHashes(model, memory).value() == expected(other)


def test_what_has_just_changed_may_change_again_within_the_grain_of_the_clock(model: Path, tmp_path: Path) -> None:
    memory = tmp_path / "memory"
    model.write_bytes(CONTENT)
    facts = model.stat()
    assert ModelHashes(model, memory).value() == expected(CONTENT)
    model.write_bytes(CONTENT[::-1])
    os.utime(model, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert ModelHashes(model, memory).value() == expected(CONTENT[::-1])


def test_of_a_model_that_was_replaced_meanwhile_there_are_none(model: Path, tmp_path: Path) -> None:
    hashes = ModelHashes(model, tmp_path / "memory")
    write(model, CONTENT[::-1], LONG_AGO + 1)
    assert hashes.value() is None
    hashes = ModelHashes(model)
    model.unlink()
    assert hashes.value() is None


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"stamp": 3}', '{"stamp": [1, 2]}'])
def test_a_damaged_memory_is_made_anew(damage: str, model: Path, tmp_path: Path) -> None:
    memory = tmp_path / "memory"
    ModelHashes(model, memory).value()
    (file,) = memory.iterdir()
    good = file.read_text(encoding="utf-8")
    file.write_text(damage, encoding="utf-8")
    assert ModelHashes(model, memory).value() == expected(CONTENT)
    assert file.read_text(encoding="utf-8") == good
    (tmp_path / "file").write_text("in the way of a folder", encoding="utf-8")
    assert ModelHashes(model, tmp_path / "file").value() == expected(CONTENT)
