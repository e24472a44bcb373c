"""Loading converts exactly, into memory that does not depend on the file."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from library.checkpoints.files import open_tensors
from library.checkpoints.lazy import LazyTensor
from library.checkpoints.loading import load_tensors


def lazy(path: Path) -> dict[str, LazyTensor]:
    reader = open_tensors(path)
    return {name: LazyTensor(info, partial(reader.get, name)) for name, info in reader.header.tensors.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
def test_values_are_those_that_torch_converts_to(tmp_path: Path, dtype: torch.dtype | None) -> None:
    tensors = {
        "half": torch.randn(300, 301).half(),  # over 30000 elements, not a multiple of the piece
        "brain": torch.randn(7).bfloat16(),
        "odd": torch.tensor([0.0, -0.0, 65504.0, 6e-8, float("inf")]).half(),
        "scalar": torch.tensor(0.5).half(),
        "none": torch.zeros(0, 3).half(),
        "ids": torch.arange(9),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    loaded = load_tensors(lazy(tmp_path / "a.safetensors"), dtype)
    assert list(loaded) == list(lazy(tmp_path / "a.safetensors"))
    for name, tensor in tensors.items():
        wanted = tensor.to(dtype) if dtype is not None and name != "ids" else tensor
        assert loaded[name].dtype == wanted.dtype and loaded[name].equal(wanted), name


def test_transposed_tensors_of_a_pickle(tmp_path: Path) -> None:
    base = torch.randn(200, 200)
    torch.save({"turned": base.t()}, tmp_path / "a.ckpt")
    assert load_tensors(lazy(tmp_path / "a.ckpt"), torch.float64)["turned"].equal(base.t().double())


def test_the_file_may_change_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    loaded = load_tensors(lazy(path))
    with path.open("r+b") as stream:
        stream.seek(100)
        stream.write(bytes(3000))
    assert loaded["a"].equal(torch.ones(1000))


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not tell")
def test_what_was_copied_of_a_file_does_not_stay_in_memory(tmp_path: Path) -> None:
    """Half of a model's file would else count as memory beside the model."""
    tensors = {str(index): torch.full((2**22,), index, dtype=torch.float16) for index in range(48)}  # 8 MiB each
    save_file(tensors, tmp_path / "a.safetensors")
    reader = open_tensors(tmp_path / "a.safetensors")
    before, most = mapped_memory(), [0]

    def release() -> None:
        most.append(mapped_memory() - before)
        reader.release()

    lazily = {name: LazyTensor(info, partial(reader.get, name)) for name, info in reader.header.tensors.items()}
    loaded = load_tensors(lazily, torch.bfloat16, release=release)
    assert 100e6 < max(most) < 150e6 and mapped_memory() - before < 20e6
    assert all(loaded[name].equal(value.bfloat16()) for name, value in tensors.items())
    assert reader.get("47").equal(tensors["47"]), "it can be read again"


def mapped_memory() -> int:
    """Resident bytes of mapped files of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile"))


def test_a_failing_tensor_is_an_error_and_not_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(3)}, path)
    tensors = lazy(path)
    path.unlink()
    with pytest.raises(OSError, match=r"a\.safetensors"):
        load_tensors(tensors)
