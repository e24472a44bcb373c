"""Latent caches that ask for more than they hold are damaged: made again, and nothing is allocated for them."""

from __future__ import annotations

import io
import json
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from library.data.cache import latent_files
from library.data.cache.latent_files import FINGERPRINT, FileHash

IMAGE = FileHash("a" * 64, (1, 2, 3))


def npy(shape: tuple[int, ...], data: bytes, dtype: str = "<f4", order: bool = False) -> bytes:
    header = repr({"descr": dtype, "fortran_order": order, "shape": shape}).encode()
    header += b" " * (63 - (len(header) + 10) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def archive(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as made:
        for name, content in members.items():
            made.writestr(name, content)
    return stream.getvalue()


PICKLED = npy((1,), b"cos\nsystem\n(S'true'\ntR.", "|O")


@pytest.mark.parametrize(
    "content",
    [
        archive({"latents.npy": npy((1 << 20, 1 << 20), bytes(64))}),
        archive({"latents.npy": npy((-1,), bytes(64))}),
        archive({"latents.npy": npy((16,), bytes(2_000_000_000))}, zipfile.ZIP_DEFLATED),
        archive({"latents.npy": PICKLED}),
        archive({"latents.npy": b"\x93NUMPY\x09\x00"}),
        archive({"latents.npy": npy((1,), bytes(4), "<f4,(1000000,1000000)f4")}),
        archive({f"{FINGERPRINT}.npy": npy((), b"[" * 100_000, "|S100000"), "latents.npy": npy((1,), bytes(4))}),
    ],
    ids=["shape", "negative", "bomb", "pickle", "version", "type", "fingerprint"],
)
def test_an_npz_that_promises_what_is_not_there(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "cat_0064x0064_sd.npz"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        assert latent_files.read(str(path)) is None and latent_files.shapes(str(path)) is None
        assert tracemalloc.get_traced_memory()[1] < 100_000_000
    finally:
        tracemalloc.stop()


def test_offsets_of_our_own_format_beyond_the_file(tmp_path: Path) -> None:
    path = tmp_path / "cat.png_64x64_00000000_sd.safetensors"
    latent_files.write(str(path), {"latents": np.ones((4, 2, 2), "f4")}, "settings", IMAGE, None)
    head = path.read_bytes()
    length = int.from_bytes(head[:8], "little")
    table = json.loads(head[8 : 8 + length])
    table["latents"]["data_offsets"] = [0, 1 << 44]
    new = json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + head[8 + length :])
    assert latent_files.read(str(path)) is None and latent_files.shapes(str(path)) is None


def test_what_numpy_writes_is_read_as_numpy_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "cat_0064x0064_sd.npz"
    written = {
        "latents": np.arange(24, dtype="f4").reshape(2, 3, 4),
        "columns": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "original_size": np.array([64, 64]),
        "empty": np.zeros((0, 3), "f2"),
        "flag": np.bool_(1),
    }
    np.savez(path, **written)
    entry = latent_files.read(str(path))
    assert entry is not None and entry.arrays.keys() == written.keys()
    for name, array in np.load(path, allow_pickle=False).items():
        found = entry.arrays[name]
        assert found.dtype == array.dtype and found.shape == array.shape and (found == array).all()
        assert found.flags.writeable and found.flags.c_contiguous == array.flags.c_contiguous
