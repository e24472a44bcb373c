"""A file is written whole or not at all, one tensor at a time, and never with a value that is not finite."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.checkpoints.files import CheckpointError, TensorInfo, open_tensors
from library.checkpoints.lazy import LazyTensor
from library.checkpoints.writer import replacing, write_ckpt, write_json, write_safetensors, write_text
from tests.checkpoints.test_files import EVERY_DTYPE, same
from tests.small_disk import mounted


def test_the_file_is_byte_for_byte_the_librarys(tmp_path: Path) -> None:
    metadata = {"modelspec.title": "größe"}  # one key: the library's order of several changes from run to run
    save_file(EVERY_DTYPE, tmp_path / "theirs.safetensors", metadata)
    write_safetensors(tmp_path / "ours.safetensors", EVERY_DTYPE, metadata)
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_the_library_reads_our_file(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a.safetensors", EVERY_DTYPE, {"a": "1", "b": "two"})
    read = load_file(tmp_path / "a.safetensors")
    assert read.keys() == EVERY_DTYPE.keys()
    assert all(same(read[name], tensor) for name, tensor in EVERY_DTYPE.items())
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"a": "1", "b": "two"}


@pytest.mark.parametrize(("name", "dtype"), [("F16", torch.float16), ("BF16", torch.bfloat16), ("F32", torch.float32)])
def test_a_precision_casts_floats_only(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    tensors = {"a": torch.randn(5), "b": torch.randn(5).double(), "ids": torch.arange(3)}
    expected = {"a": tensors["a"].to(dtype), "b": tensors["b"].to(dtype), "ids": tensors["ids"]}
    write_safetensors(tmp_path / "a.safetensors", tensors, dtype=name)
    write_ckpt(tmp_path / "a.ckpt", tensors, dtype=name)
    for read in (
        load_file(tmp_path / "a.safetensors"),
        torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"],
    ):
        assert all(same(read[key], tensor) for key, tensor in expected.items())


def test_a_ckpt_holds_counters_and_only_its_own_tensors(tmp_path: Path) -> None:
    big = torch.randn(100, 1000)
    write_ckpt(tmp_path / "a.ckpt", {"row": big[3], "turned": big[:2].t()}, {"epoch": 2, "global_step": 77})
    read = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert (read["epoch"], read["global_step"]) == (2, 77)
    assert read["state_dict"]["row"].equal(big[3]) and read["state_dict"]["turned"].equal(big[:2].t())
    assert (tmp_path / "a.ckpt").stat().st_size < 20_000  # not the storage behind the view


def test_tensors_are_read_one_at_a_time(tmp_path: Path) -> None:
    class Memory(bytearray):
        """The memory of one tensor; unlike a plain bytearray it can be watched."""

    memories: weakref.WeakValueDictionary[int, Memory] = weakref.WeakValueDictionary()

    def load() -> torch.Tensor:
        assert len(memories) <= 1  # the one before may still be in the writer's hand
        memory = Memory(32)
        memories[id(memory)] = memory
        return torch.frombuffer(memory, dtype=torch.float32)

    tensors = {f"t{n}": LazyTensor(TensorInfo("F32", (8,)), load) for n in range(9)}
    write_safetensors(tmp_path / "a.safetensors", tensors)
    assert len(load_file(tmp_path / "a.safetensors")) == 9


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("write", [write_safetensors, write_ckpt])
def test_a_value_that_is_not_finite_is_refused(tmp_path: Path, bad: float, dtype: torch.dtype, write: object) -> None:
    path = tmp_path / "out" / "m.safetensors"
    path.parent.mkdir()
    path.write_text("earlier", encoding="utf-8")
    tensors = {"fine": torch.ones(3), "unet.sick.weight": torch.tensor([1.0, bad, 2.0], dtype=dtype)}
    with pytest.raises(CheckpointError, match=r"m\.safetensors: not written, because unet\.sick\.weight contains NaN"):
        write(path, tensors)  # type: ignore[operator]
    assert path.read_text(encoding="utf-8") == "earlier"
    assert os.listdir(path.parent) == ["m.safetensors"]


def test_what_does_not_fit_the_precision_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="do not fit fp16"):
        write_safetensors(tmp_path / "m.safetensors", {"big": torch.tensor([70_000.0])}, dtype="F16")
    write_safetensors(tmp_path / "m.safetensors", {"big": torch.tensor([70_000.0])}, dtype="BF16")


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_failure_in_the_middle_leaves_the_earlier_file(tmp_path: Path, failure: type[BaseException]) -> None:
    path = tmp_path / "m.safetensors"
    write_safetensors(path, {"a": torch.ones(2)})
    before = path.read_bytes()

    def fail() -> torch.Tensor:
        raise failure("stop")

    with pytest.raises(failure):
        write_safetensors(path, {"a": torch.zeros(2), "b": LazyTensor(TensorInfo("F32", (2,)), fail)})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"m\.safetensors: could not be written"):
        write_safetensors(tmp_path / "file" / "m.safetensors", {"a": torch.ones(1)})
    (tmp_path / "folder" / "m.safetensors").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="could not be written"):
        write_safetensors(tmp_path / "folder" / "m.safetensors", {"a": torch.ones(1)})
    assert os.listdir(tmp_path / "folder") == ["m.safetensors"]


def test_a_source_file_may_be_replaced_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write_safetensors(path, {"a": torch.arange(4.0)})
    reader = open_tensors(path)
    write_safetensors(path, {"b": LazyTensor(TensorInfo("F32", (4,)), lambda: reader.get("a"))})
    assert load_file(path)["b"].tolist() == [0, 1, 2, 3]


def test_text_and_json(tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "a.txt", "größe\n")
    write_json(tmp_path / "a.json", {"größe": [1]})
    assert (tmp_path / "new" / "a.txt").read_bytes() == "größe\n".encode()
    assert "größe" in (tmp_path / "a.json").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="no"), replacing(tmp_path / "a.json") as stream:
        stream.write(b"half")
        raise ValueError("no")
    assert "größe" in (tmp_path / "a.json").read_text(encoding="utf-8")


# --- a disk that is full --------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", "1m") as disk:
        yield disk


@pytest.mark.parametrize("write", [write_safetensors, write_ckpt])
def test_a_full_disk_leaves_the_earlier_file(small_disk: Path, write: object) -> None:
    path = small_disk / "m.safetensors"
    write(path, {"a": torch.arange(1000.0)})  # type: ignore[operator]
    before = path.read_bytes()
    tensors = {f"t{n}": torch.randn(50_000) for n in range(8)}  # 1.6 MB
    with pytest.raises(CheckpointError, match=r"m\.safetensors: could not be written \(No space.*Free some space"):
        write(path, tensors)  # type: ignore[operator]
    assert path.read_bytes() == before
    assert os.listdir(small_disk) == ["m.safetensors"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit of a file's size")
def test_a_file_that_may_not_grow_leaves_the_earlier_one(tmp_path: Path) -> None:
    # the same law where mounting is not allowed: the system refuses every byte beyond 100 kB
    script = f"""
import os, resource, signal, torch
from library.checkpoints.header import CheckpointError
from library.checkpoints.writer import write_ckpt, write_safetensors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
os.chdir({str(tmp_path)!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for write in (write_safetensors, write_ckpt):
    open("m", "w").write("earlier")
    try:
        write("m", {{"a": torch.randn(100_000)}})
    except CheckpointError as error:
        assert "could not be written" in str(error) and "Free some space" in str(error), error
    else:
        raise SystemExit("it was written")
    assert os.listdir(".") == ["m"] and open("m").read() == "earlier"
"""
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", script], check=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)})


def test_a_source_that_cannot_be_read_is_not_blamed_on_the_target(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "source", {"a": torch.ones(2)})
    reader = open_tensors(tmp_path / "source")
    (tmp_path / "source").unlink()
    with pytest.raises(FileNotFoundError, match="source"):
        write_safetensors(tmp_path / "m", {"a": LazyTensor(TensorInfo("F32", (2,)), lambda: reader.get("a"))})
    assert os.listdir(tmp_path) == []


def test_what_lies_in_a_file_is_copied_by_the_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes as safetensors' own writer lays them out, of tensors larger than a piece, of parts of one, and reshaped."""
    monkeypatch.setattr("library.checkpoints.writer.PIECE", 64)
    made = {
        "rows": torch.randn(12, 9), "half": torch.randn(50, 2).half(), "none": torch.empty(0), "ids": torch.arange(77)
    }  # fmt: skip
    save_file(made, tmp_path / "a.safetensors")
    reader = open_tensors(tmp_path / "a.safetensors")
    monkeypatch.setattr(reader, "get", lambda name: pytest.fail("a tensor was made"))
    lazy = {name: reader.lazy(name) for name in made}
    wanted = lazy | {"part": lazy["rows"].rows(4, 8), "flat": lazy["rows"].reshape((108,))}
    write_safetensors(tmp_path / "b.safetensors", wanted)
    expected = {**made, "part": made["rows"][4:8], "flat": made["rows"].reshape(108)}
    found = load_file(tmp_path / "b.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    bad = made["rows"].clone()
    bad[11, 8] = torch.nan
    save_file({"rows": bad}, tmp_path / "nan.safetensors")
    with pytest.raises(CheckpointError, match="rows contains NaN"):
        write_safetensors(tmp_path / "c.safetensors", {"rows": open_tensors(tmp_path / "nan.safetensors").lazy("rows")})
    assert not (tmp_path / "c.safetensors").exists()
