"""torch's zip form, written tensor by tensor: torch and its readers take it for their own."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch

from library.checkpoints import pickles
from library.checkpoints.files import open_tensors
from library.checkpoints.header import CheckpointError, TensorInfo
from library.checkpoints.lazy import LazyTensor
from library.checkpoints.writer import write_bin, write_ckpt

KINDS = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool,
    torch.float8_e4m3fn, torch.uint16,
)  # fmt: skip


def tensors() -> dict[str, torch.Tensor]:
    found = {str(kind): torch.arange(12).reshape(3, 4).to(kind) for kind in KINDS}
    found |= {"scalar": torch.tensor(0.25), "empty": torch.empty(0), "rows": torch.arange(9.0).reshape(3, 3)[1:]}
    return found | {"across": torch.arange(6.0).reshape(2, 3).T, "no rows": torch.empty(0, 3), "имя": torch.ones(1)}


@pytest.mark.parametrize("mapped", [False, True])
def test_torch_reads_it(tmp_path: Path, mapped: bool) -> None:
    path = tmp_path / "модель.ckpt"
    write_ckpt(path, tensors(), {"epoch": 3, "global_step": 70})
    found = torch.load(path, weights_only=True, mmap=mapped)
    assert found.keys() == {"state_dict", "epoch", "global_step"} and found["global_step"] == 70
    for name, tensor in tensors().items():
        again = found["state_dict"][name]
        assert again.dtype == tensor.dtype and again.shape == tensor.shape and again.is_contiguous(), name
        assert torch.equal(again.view(torch.uint8) if again.ndim else again,
                           tensor.contiguous().view(torch.uint8) if again.ndim else tensor), name  # fmt: skip


def test_so_does_the_reader_that_runs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    write_bin(path, tensors())
    content = pickles.read_pickle(path)
    assert content.mappable
    assert content.header.tensors.keys() == tensors().keys()
    reader = open_tensors(path)
    assert all(torch.equal(reader.get(name).float(), tensor.float()) for name, tensor in tensors().items())


def test_it_is_a_whole_archive_with_data_where_torch_puts_them(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    write_bin(path, tensors())
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None  # every checksum
        assert len({entry.filename.partition("/")[0] for entry in archive.infolist()}) == 1
        for entry in archive.infolist():
            with path.open("rb") as stream:
                stream.seek(entry.header_offset + 26)  # APPNOTE.TXT 4.3.7: lengths of the name and of what follows it
                lengths = stream.read(4)
            start = entry.header_offset + 30 + int.from_bytes(lengths[:2], "little")
            assert (start + int.from_bytes(lengths[2:], "little")) % 64 == 0, entry.filename


def test_one_tensor_is_read_at_a_time_and_a_failure_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    read: list[int] = []

    def lazy(number: int) -> LazyTensor:
        def load() -> torch.Tensor:
            read.append(number)
            return torch.full((4,), torch.nan if number == 2 else 1.0)

        return LazyTensor(TensorInfo("F32", (4,)), load)

    with pytest.raises(CheckpointError, match="c contains NaN"):
        write_ckpt(path, {name: lazy(number) for number, name in enumerate("abcd")})
    assert read == [0, 1, 2] and list(tmp_path.iterdir()) == []

    def refuse() -> None:
        raise CheckpointError("not whole")

    with pytest.raises(CheckpointError, match="not whole"):
        write_ckpt(path, {"a": lazy(0)}, check=refuse)
    assert list(tmp_path.iterdir()) == []
