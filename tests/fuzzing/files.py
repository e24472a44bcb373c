"""Random files of each format: whole, damaged, and of any structure that the format has room for."""

from __future__ import annotations

import functools
import io
import pickle
import struct
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.fuzzing.values import CAPTIONS, JSONS, LEAVES, NUMBERS, TEXT, TOMLS, TREES, damaged, json_bytes, toml_bytes


@functools.cache
def _weights() -> bytes:
    import torch
    from safetensors.torch import save

    return save({"a.weight": torch.ones(2, 3), "a.alpha": torch.ones(())}, {"ss_network_dim": "3"})


@st.composite
def safetensors(draw: st.DrawFn) -> bytes:
    """Files of the format, whole and not."""
    if draw(st.booleans()):
        return _weights()
    shapes = st.lists(st.integers(0, 9) | NUMBERS, max_size=4)
    entry = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "F16", "BF16", "I64", "U8", "F4", ""]) | LEAVES,
            "shape": shapes | LEAVES,
            "data_offsets": st.lists(st.integers(0, 64) | NUMBERS, max_size=3) | LEAVES,
        }
    )
    table = draw(st.dictionaries(TEXT, entry | TREES, max_size=5))
    if draw(st.booleans()):
        table["__metadata__"] = draw(st.dictionaries(TEXT, TEXT | LEAVES, max_size=3) | LEAVES)
    head = draw(st.just(json_bytes(table)) | JSONS)
    length = draw(st.just(len(head)) | st.integers(0, 2**64 - 1))
    return struct.pack("<Q", length) + head + draw(st.binary(max_size=64))


_OPCODES = st.sampled_from(
    [code for name, code in vars(pickle).items() if name.isupper() and isinstance(code, bytes) and len(code) == 1]
    + [b"2\x86", b"K\x01", b"X\x01\x00\x00\x00a", b"q\x00", b"h\x00", b"r\xff\xff\xff\x7f", b"ctorch\nFloatStorage\n"]
    + [b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"(", b")", b"}", b"Q", b"R", b"b", b"s"]
)


@functools.cache
def _archives() -> list[bytes]:
    import torch

    found = []
    for content in (
        {"state_dict": {"a": torch.ones(2, 3), "b": torch.ones(1, dtype=torch.int64)}, "epoch": 3},
        {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]},
    ):
        stream = io.BytesIO()
        torch.save(content, stream)
        found.append(stream.getvalue())
    return found


def _structures() -> list[bytes]:
    found = []
    for content in _archives():
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            found.append(archive.read("archive/data.pkl"))
    return found


@st.composite
def pickles(draw: st.DrawFn) -> bytes:
    """Torch's archives, whole, damaged and with any structure, and pickles that torch did not write."""
    if draw(st.booleans()):
        return draw(damaged(st.sampled_from(_archives())))
    whole = damaged(st.deferred(lambda: st.sampled_from(_structures())))
    made = (
        st.lists(_OPCODES | st.binary(max_size=4), max_size=40)
        .map(b"".join)
        .map(lambda code: b"\x80\x02" + code + b".")
    )
    structure = draw(whole | made)
    if draw(st.booleans()):
        return structure
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))) as archive:
        archive.writestr("archive/data.pkl", structure)
        for number in range(draw(st.integers(0, 3))):
            archive.writestr(f"archive/data/{number}", bytes(draw(st.sampled_from([0, 24, 64, 100_000]))))
    return draw(damaged(st.just(stream.getvalue())))


@functools.cache
def _images() -> list[bytes]:
    from PIL import Image

    found = []
    for mode, kinds in {
        "RGB": ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"),
        "RGBA": ("PNG", "WEBP"),
        "L": ("PNG",),
        "I;16": ("PNG", "TIFF"),
        "P": ("PNG", "GIF"),
        "CMYK": ("JPEG", "TIFF"),
    }.items():
        for kind in kinds:
            stream = io.BytesIO()
            Image.new(mode, (9, 7)).save(stream, kind)
            found.append(stream.getvalue())
    return found


def _huge_png(width: int, height: int) -> bytes:
    import zlib

    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [head, b"IDAT" + zlib.compress(bytes(1000)), b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )


SIDES = st.integers(0, 2**31 - 1)
IMAGES = damaged(st.deferred(lambda: st.sampled_from(_images()))) | st.builds(_huge_png, SIDES, SIDES)


_LAYERS = st.sampled_from(
    ["lora_unet_mid_block_attentions_0_proj_in", "lora_te_text_model_encoder_layers_0_mlp_fc1", "a.b", ""]
)
_ROLES = st.sampled_from(
    "lora_down.weight lora_up.weight alpha dora_scale hada_w1_a hada_w1_b lokr_w1 lokr_w2_a oft_blocks lora_A.weight "
    "diff w_norm weight on_input a1.weight".split()
)
ADAPTERS = st.dictionaries(
    st.builds("{}.{}".format, _LAYERS, _ROLES) | TEXT.filter(bool),
    st.lists(st.integers(0, 5), max_size=5).map(tuple),
    max_size=6,
)

PROMPT_LINES = damaged(st.lists(CAPTIONS, max_size=4).map("\n".join).map(lambda text: text.encode("utf-8", "replace")))
_WISHES = st.dictionaries(
    st.sampled_from(["prompt", "negative_prompt", "width", "height", "sample_steps", "scale", "seed", "enum"]),
    st.integers(1, 9999) | LEAVES | CAPTIONS,
    max_size=5,
)
PROMPTS_IN_JSON = damaged(st.lists(_WISHES, max_size=4).map(json_bytes)) | JSONS
PROMPTS_IN_TOML = (
    damaged(
        st.builds(
            lambda shared, each: toml_bytes({"prompt": {**shared, "subset": each}}),
            _WISHES,
            st.lists(_WISHES, max_size=3),
        )
    )
    | TOMLS
)


@st.composite
def state_heads(draw: st.DrawFn) -> bytes:
    """train_state.json with some values replaced."""
    from dataclasses import asdict

    from library.training.saving.state import Progress

    head: dict[str, Any] = {"progress": asdict(Progress(step=3, epoch=1, window=3)), "identity": {"seed": "1"}}
    for tree in (head["progress"], head):
        names = st.sampled_from([*tree]) | st.sampled_from(["files", "head_crc32", "options", "output_name", "world"])
        tree.update(draw(st.dictionaries(names, TREES, max_size=2)))
    return json_bytes(head)


PATTERNS = st.lists(st.sampled_from(list("ab.*+?()|[]{}^$\\w\\d0,9-")) | TEXT, max_size=20).map("".join)
PEFT = damaged(
    st.fixed_dictionaries(
        {
            "lora_alpha": LEAVES,
            "alpha_pattern": st.dictionaries(PATTERNS, LEAVES, max_size=3) | LEAVES,
            "use_rslora": LEAVES,
        }
    ).map(json_bytes)
)
ARCHIVES = st.deferred(lambda: damaged(st.sampled_from(_latents("x.npz"))))
OWN = st.deferred(lambda: damaged(st.sampled_from(_latents("x.safetensors"))))


TARS = st.deferred(lambda: damaged(st.sampled_from(_tars())))
SHARD_PATTERNS = st.lists(
    st.sampled_from(["{", "}", "..", "000", "9" * 18, ",", "a", ".tar", "::", "/", "s3://b/", "{0..99}", "../"]),
    max_size=12,
).map("".join)
TABLES_OF_SHARDS = st.deferred(lambda: damaged(st.sampled_from(_tables())))


@functools.cache
def _tars() -> list[bytes]:
    import tarfile

    found = []
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        stream = io.BytesIO()
        with tarfile.TarFile(fileobj=stream, mode="w", format=kind) as tar:
            for name, data in (
                ("a.png", _images()[0]),
                ("a.txt", b"a dog"),
                ("ü" * 60 + "/b.json", b'{"caption": "b"}'),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        found.append(stream.getvalue())
    return found


@functools.cache
def _tables() -> list[bytes]:
    from library.data.scan.index import MaskValues
    from library.data.shards.table import Row, ShardEntry, write_table

    values = MaskValues(0.5, 0, 255)
    mask = ("m/a.png", 0, 9, 9, bytes(32), values)
    row = Row("a.png", 0, 0, 9, bytes(32), 64, 64, True, "", False, "a dog", 5.5, values, *mask)
    with tempfile.TemporaryDirectory() as folder:
        rows = [row, row._replace(name="b.png", caption=None, mask=None, mask_shard=None)]
        write_table(Path(folder, "t.sqlite"), "dog", [ShardEntry(0, "a.tar", 512)], rows)
        return [Path(folder, "t.sqlite").read_bytes()]


@functools.cache
def _latents(name: str) -> list[bytes]:
    import numpy as np

    from library.data.cache import latent_files

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        made = {"latents": np.ones((4, 2, 2), "f4"), "size": np.array([16, 16])} if name.endswith(".npz") else {
            "latents": np.ones((4, 2, 2), "f4")}  # fmt: skip
        latent_files.write(str(path), made, "s", latent_files.FileHash("a", (1, 2, 3)), None)
        return [path.read_bytes()]
