"""Headers and lazy reading: what stands in a file comes out, a damaged file is refused by name with a way out."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from library.checkpoints.files import (
    CheckpointError,
    TensorInfo,
    TensorReader,
    legacy_hash,
    open_tensors,
    payload_sha256,
    read_header,
    sha256,
)
from tests import tiny

EVERY_DTYPE = {
    "half": torch.randn(3, 5).half(),
    "brain": torch.randn(4).bfloat16(),
    "single": torch.randn(2, 3, 1, 1),
    "double": torch.randn(2).double(),
    "whole": torch.arange(77)[None],
    "flag": torch.tensor([True, False, True]),
    "byte": torch.tensor([1, 2, 3], dtype=torch.uint8),
    "eight": torch.randn(3).to(torch.float8_e4m3fn),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
    "größe": torch.ones(2),
}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in dtype, shape and every bit."""
    return a.dtype == b.dtype and a.shape == b.shape and a.contiguous().view(-1).view(torch.uint8).equal(
        b.contiguous().view(-1).view(torch.uint8)
    )  # fmt: skip


def write(path: Path, form: str) -> Path:
    if form == "safetensors":
        save_file(EVERY_DTYPE, path, {"made": "today"})
    elif form == "zip":
        torch.save({"state_dict": EVERY_DTYPE, "epoch": 3, "global_step": 1234}, path)
    elif form == "bare":
        torch.save(EVERY_DTYPE, path)
    elif form == "doubled":
        torch.save({"state_dict": {"state_dict": EVERY_DTYPE}}, path)
    else:
        tensors = {name: tensor for name, tensor in EVERY_DTYPE.items() if name != "eight"}  # younger than the form
        torch.save({"state_dict": tensors, "epoch": 3}, path, _use_new_zipfile_serialization=False)
    return path


@pytest.mark.parametrize("form", ["safetensors", "zip", "bare", "doubled", "legacy"])
def test_header_and_tensors_are_those_written(tmp_path: Path, form: str) -> None:
    path = write(tmp_path / "model.bin", form)  # the form is known from the content, not from the name
    reader = open_tensors(path)
    expected = dict(EVERY_DTYPE)
    if form == "legacy":
        del expected["eight"]
    assert set(reader.names()) == set(expected)
    for name, tensor in expected.items():
        info = reader.header.tensors[name]
        assert (info.shape, info.nbytes) == (tuple(tensor.shape), tensor.nbytes)
        assert same(reader.get(name), tensor), name
    assert reader.header.tensors["brain"] == TensorInfo("BF16", (4,))
    assert reader.header.kind == ("safetensors" if form == "safetensors" else "ckpt")


@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
def test_without_mapping_the_same_is_read(tmp_path: Path, form: str) -> None:
    path = write(tmp_path / "model.bin", form)
    reader = TensorReader(read_header(path), mapped=False)
    tensors = {name: reader.get(name) for name in reader.names()}
    path.write_bytes(bytes(path.stat().st_size))  # what was read is no longer tied to the file
    assert tensors.keys() == EVERY_DTYPE.keys() - ({"eight"} if form == "legacy" else set())
    assert not [name for name, tensor in tensors.items() if not same(tensor, EVERY_DTYPE[name])]
    tensors["single"].zero_()
    assert not path.read_bytes().strip(b"\0")


def test_a_file_cut_short_after_its_header_was_read_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", "safetensors")
    reader = TensorReader(read_header(path), mapped=False)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"m\.safetensors.*incomplete"):
        {name: reader.get(name) for name in reader.names()}


@pytest.mark.parametrize("length", [0x280, 0x380, 0x480, 0x580])
def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path: Path, length: int) -> None:
    """A length of 640 bytes is written as 80 02 00 ..., and a pickle of protocol 2 begins with 80 02."""
    table = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode().ljust(length)
    path = tmp_path / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + table + bytes(4))
    assert load_file(path).keys() == read_header(path).tensors.keys() == {"a"}


def test_metadata_is_read(tmp_path: Path) -> None:
    assert read_header(write(tmp_path / "a", "safetensors")).metadata == {"made": "today"}
    assert read_header(write(tmp_path / "b", "zip")).metadata == {"epoch": "3", "global_step": "1234"}


def test_tensors_that_share_or_transpose_their_storage(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    torch.save({"turned": base.t(), "row": base[1], "whole": base}, tmp_path / "x.pt")
    reader = open_tensors(tmp_path / "x.pt")
    assert reader.header.tensors["turned"].shape == (4, 3)
    assert reader.get("turned").equal(base.t()) and reader.get("row").equal(base[1])


def test_writing_to_a_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", "safetensors")
    before = path.read_bytes()
    open_tensors(path).get("single").zero_()
    assert path.read_bytes() == before


def test_unaligned_data_is_read(tmp_path: Path) -> None:
    # the format does not demand a padded header; old files have data at odd addresses
    data = torch.arange(6.0).numpy().tobytes()
    table = {"a": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}}
    header = json.dumps(table).encode()
    header += b" " * (1 - len(header) % 2)  # an odd length
    (tmp_path / "odd").write_bytes(len(header).to_bytes(8, "little") + header + data)
    assert open_tensors(tmp_path / "odd").get("a").equal(torch.arange(6.0))


@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, "one byte"])
def test_a_truncated_file_is_refused(tmp_path: Path, form: str, share: float | str) -> None:
    whole = write(tmp_path / "whole", form).read_bytes()
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(whole[: -1 if share == "one byte" else int(len(whole) * float(share))])
    with pytest.raises(CheckpointError, match=r"cut\.ckpt.*([Gg]et it again|Get the file again|Give a model file)"):
        read_header(cut)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<html><body>Access denied</body></html>", "neither a .safetensors nor a torch file"),
        (b"\x10\0\0\0\0\0\0\0{not json        ", "header is damaged"),
        (b"\x02\0\0\0\0\0\0\0{}", "contains no tensors"),
    ],
)
def test_what_is_no_model_is_told_apart(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_header(path)


def test_a_header_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    table = {"a": {"dtype": "F32", "shape": [6], "data_offsets": [0, 20]}}
    header = json.dumps(table).encode()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + bytes(20))
    with pytest.raises(CheckpointError, match="tensor a has 20 of 24 bytes"):
        read_header(tmp_path / "x")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing\.safetensors: no such file"):
        read_header(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize("level", ["model.", "state_dict.", "state_dict.model.", "module."])
def test_a_level_around_the_whole_file_is_taken_off(tmp_path: Path, level: str) -> None:
    names = ["model.diffusion_model.out.2.bias", "first_stage_model.quant_conv.bias", "cond_stage_model.model.ln.bias"]
    save_file({level + name: torch.full((2,), float(n)) for n, name in enumerate(names)}, tmp_path / "a.safetensors")
    reader = open_tensors(tmp_path / "a.safetensors")
    assert set(reader.names()) == set(names)
    assert reader.get(names[2]).tolist() == [2.0, 2.0]


def test_a_usual_file_keeps_its_names(tmp_path: Path) -> None:
    names = {"model.diffusion_model.out.2.weight", "model_ema.decay", "betas"}
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "a.safetensors")
    assert set(read_header(tmp_path / "a.safetensors").tensors) == names


def test_header_reading_imports_no_torch(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", "safetensors")
    write(tmp_path / "b.ckpt", "zip")
    write(tmp_path / "c.pt", "legacy")
    script = (
        "import sys; from library.checkpoints.files import read_header\n"
        f"for name in ('a.safetensors', 'b.ckpt', 'c.pt'): assert read_header({str(tmp_path)!r} + '/' + name).tensors\n"
        "assert not {'torch', 'numpy', 'safetensors'} & set(sys.modules), sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])


def test_hashes(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {"a": torch.randn(400_000)}  # over 1 MiB, where the legacy hash begins
    save_file(tensors, path, {"k": "v"})
    raw = path.read_bytes()
    assert sha256(path) == hashlib.sha256(raw).hexdigest()
    assert legacy_hash(path) == hashlib.sha256(raw[0x100000:0x110000]).hexdigest()[:8]
    assert payload_sha256(path) == hashlib.sha256(tensors["a"].numpy().tobytes()).hexdigest()
    (tmp_path / "small").write_bytes(save({"a": torch.zeros(1)}))
    assert legacy_hash(tmp_path / "small") == "e3b0c442"  # SHA-256 of nothing


def test_a_diffusers_folder(tmp_path: Path) -> None:
    folder = tiny.write_diffusers(tmp_path / "model", "sd1")
    header = read_header(folder)
    assert header.kind == "diffusers"
    assert header.configs["unet"]["cross_attention_dim"] == 64
    assert header.configs["model_index"]["unet"] == ["diffusers", "UNet2DConditionModel"]
    expected = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    assert {name.removeprefix("vae/") for name in header.tensors if name.startswith("vae/")} == set(expected)
    assert TensorReader(header).get("vae/quant_conv.weight").equal(expected["quant_conv.weight"])


def test_a_folder_with_shards_and_bin(tmp_path: Path) -> None:
    folder = tiny.write_diffusers(tmp_path / "model", "sd1")
    whole = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    names = sorted(tensors)
    shards = {"s-00001-of-00002.safetensors": names[::2], "s-00002-of-00002.safetensors": names[1::2]}
    for shard, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / "unet" / shard)
    index = {"weight_map": {name: shard for shard, part in shards.items() for name in part}}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    text = folder / "text_encoder" / "model.safetensors"
    torch.save(load_file(text), folder / "text_encoder" / "pytorch_model.bin")
    text.unlink()

    reader = open_tensors(folder)
    assert {name.removeprefix("unet/") for name in reader.names() if name.startswith("unet/")} == set(names)
    assert all(reader.get(f"unet/{name}").equal(tensors[name]) for name in names[:20])
    assert reader.get("text_encoder/text_model.final_layer_norm.bias").shape == (64,)
    (folder / "unet" / "s-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="s-00002-of-00002"):
        read_header(folder)


def test_safetensors_are_preferred_and_a_plain_folder_is_refused(tmp_path: Path) -> None:
    folder = tiny.write_diffusers(tmp_path / "model", "sd1")
    torch.save({"wrong": torch.zeros(1)}, folder / "unet" / "diffusion_pytorch_model.bin")
    assert "unet/wrong" not in read_header(folder).tensors
    with pytest.raises(CheckpointError, match=r"model_index\.json"):
        read_header(tmp_path)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights in vae/"):
        read_header(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "parts"),
    [("sdxl", {"unet": 1680, "vae": 248, "text_encoder": 52, "text_encoder_2": 53}),
     ("refiner", {"unet": 1220, "vae": 248, "text_encoder_2": 53})],
)  # fmt: skip
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_folders_parts_are_those_of_its_model_index(
    tmp_path: Path, family: str, parts: dict[str, int], variant: str | None
) -> None:
    folder = tiny.write_diffusers(tmp_path / "model", family, prediction="v_prediction", variant=variant)
    header = read_header(folder)
    assert Counter(name.split("/")[0] for name in header.tensors) == parts
    assert header.configs.keys() == {"model_index", "scheduler", *parts}
    assert header.configs["scheduler"]["prediction_type"] == "v_prediction"
    assert open_tensors(folder).get("text_encoder_2/text_projection.weight").shape == (128, 128)
    ending = "safetensors" if variant is None else f"{variant}.safetensors"
    (folder / "text_encoder_2" / f"model.{ending}").unlink()
    with pytest.raises(CheckpointError, match=r"no weights in text_encoder_2/.*StableDiffusionXL.*get it again"):
        read_header(folder)
