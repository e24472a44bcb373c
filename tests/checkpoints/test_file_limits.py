"""Model files that ask for more than they hold: refused with a sentence, before memory or time is spent on them."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from library.checkpoints.files import CheckpointError, read_header
from library.checkpoints.pickles import check_pickle

BIG = 1 << 44  # bytes: more than any machine has
STATE = {"state_dict": {"a": torch.ones(2, 3)}}


def saved(content: object, *, new: bool = True) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=new)
    return stream.getvalue()


def with_structure(structure: bytes, compression: int = zipfile.ZIP_STORED, weights: bytes = bytes(24)) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        archive.writestr("archive/data.pkl", structure)
        archive.writestr("archive/data/0", weights)
    return stream.getvalue()


def structure_of(content: object) -> bytes:
    with zipfile.ZipFile(io.BytesIO(saved(content))) as archive:
        return archive.read("archive/data.pkl")


def nested_tuples(depth: int) -> bytes:
    """A tuple of a tuple twice, and so on: it takes 2^depth steps to hash, to compare or to show."""
    return b")" + (b"2\x86") * depth


def a_key_that_takes_forever() -> bytes:
    return b"\x80\x02}" + nested_tuples(60) + b"K\x01s."


def an_index_of_the_memo() -> bytes:
    return b"\x80\x02}r\xff\xff\xff\x7f."


def a_dict_that_contains_itself() -> bytes:
    return b"\x80\x02}q\x00X\x0a\x00\x00\x00state_dicth\x00s."


def a_set_of_nested_tuples() -> bytes:
    return b"\x80\x02cbuiltins\nset\n]" + nested_tuples(60) + b"a\x85R."


def pairs_of_an_ordered_dict() -> bytes:
    return b"\x80\x02ccollections\nOrderedDict\n]" + nested_tuples(60) + b"K\x01\x86a\x85R."


def a_length_of_eight_bytes() -> bytes:
    return b"\x80\x05\x96" + struct.pack("<Q", BIG) + b"."


def a_text_longer_than_the_file() -> bytes:
    return b"\x80\x02X\xff\xff\xff\x7fabc."


def a_name_that_is_nested_tuples() -> bytes:
    return b"\x80\x02(U\x07storageU\x01x" + nested_tuples(60) + b"U\x03cpuK\x01tQ."


def text(content: str) -> bytes:
    return b"X" + struct.pack("<I", len(content)) + content.encode()


def number(value: int) -> bytes:
    encoded = pickle.encode_long(value)
    return b"\x8b" + struct.pack("<i", len(encoded)) + encoded


def tensor(count: bytes = b"K\x02", offset: bytes = b"K\x00", state_of_storage: bytes = b"") -> bytes:
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + count + b"tQ"
    shape = b"K\x02\x85K\x01\x85\x89N"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + state_of_storage + offset + shape + b"tR"


def a_model(first: bytes = b"", key: bytes = text("w"), value: bytes = tensor()) -> bytes:
    """A pickle of a dict of one tensor, with something before it that is dropped."""
    return b"\x80\x02" + first + b"}" + key + value + b"s."


def a_number_of_elements_of_thousands_of_digits() -> bytes:
    return a_model(value=tensor(count=number(10**5000)))


def a_key_of_thousands_of_digits() -> bytes:
    return a_model(key=number(10**5000))


def an_offset_that_is_no_number() -> bytes:
    return a_model(value=tensor(offset=b"G" + struct.pack(">d", float("nan"))))


def a_storage_that_is_described_anew() -> bytes:
    return a_model(value=tensor(state_of_storage=b"}" + text("count") + text("2") + b"sb"))


def a_name_in_another_meaning() -> bytes:
    """The state of a class is an attribute of it, also for the next file."""
    return a_model(b"ccollections\ndefaultdict\nN}" + text("__new__") + b"ctorch\nTensor\ns\x86b0")


def a_long_name_used_many_times() -> bytes:
    return a_model(text("a" * 2_000_000) + b"q\x00" + b"h\x00h\x00\x930" * 100)


def many_names() -> bytes:
    return a_model(b"".join(f"comegaconf\na{number}\n0".encode() for number in range(2000)))


def a_long_list_passed_many_times(name: bytes = b"ctorch\nSize\n") -> bytes:
    made = b"](" + b"N" * 50_000 + b"eq\x00" + name + b"q\x01"
    return a_model(made + b"(" + b"h\x01h\x00\x85R" * 300 + b"t0")


def a_long_list_of_arguments() -> bytes:
    made = b"(" + b"N" * 50_000 + b"tq\x00ctorch\nTensor\nq\x01"
    return a_model(made + b"h\x01h\x00R0h\x01h\x00\x810" * 200)


def a_long_list_passed_by_a_call_of_a_call() -> bytes:
    made = b"](" + b"N" * 50_000 + b"eq\x00"
    call = b"ctorch._tensor\n_rebuild_from_type_v2\n(h\x01N(ctorch\nSize\nNh\x00\x85ttR"
    return a_model(made + b"ctorch._tensor\n_rebuild_from_type_v2\nq\x010" + call)


def a_long_text_passed_many_times() -> bytes:
    return a_model(text("a" * 2_000_000) + b"q\x00c_codecs\nencode\nq\x01(" + b"h\x01h\x00\x85R" * 100 + b"t0")


def a_long_number_as_a_key() -> bytes:
    return a_model(number(1 << 800_000) + b"q\x00}" + b"h\x00Ns" * 1000 + b"0")


PICKLES = (
    a_key_that_takes_forever, an_index_of_the_memo, a_dict_that_contains_itself, a_set_of_nested_tuples,
    pairs_of_an_ordered_dict, a_length_of_eight_bytes, a_text_longer_than_the_file, a_name_that_is_nested_tuples,
    a_number_of_elements_of_thousands_of_digits, a_key_of_thousands_of_digits, an_offset_that_is_no_number,
    a_storage_that_is_described_anew, a_name_in_another_meaning, a_long_name_used_many_times, many_names,
    a_long_list_passed_many_times, a_long_list_of_arguments, a_long_list_passed_by_a_call_of_a_call,
    a_long_text_passed_many_times, a_long_number_as_a_key,
)  # fmt: skip


@pytest.mark.parametrize("make", PICKLES, ids=lambda make: make.__name__)
def test_a_pickle_cannot_take_forever(tmp_path: Path, make: Callable[[], bytes]) -> None:
    path = tmp_path / "x.ckpt"
    path.write_bytes(with_structure(make()))
    with pytest.raises(CheckpointError, match=r"x\.ckpt: (its pickle cannot be read|contains no tensors)"):
        read_header(path)


def test_the_pickle_without_what_is_wrong_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    path.write_bytes(with_structure(a_model()))
    assert read_header(path).tensors["w"].shape == (2,)


def test_a_pickle_within_an_archive_that_unpacks_to_much(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    path.write_bytes(with_structure(structure_of(STATE), zipfile.ZIP_DEFLATED, bytes(20_000_000)))
    assert path.stat().st_size < 100_000
    for check in (read_header, check_pickle):
        with pytest.raises(CheckpointError, match="would unpack to 20"):
            check(path)
    path.write_bytes(with_structure(b"\x80\x02]" + b"0]" * 40_000_000, zipfile.ZIP_DEFLATED))
    with pytest.raises(CheckpointError, match="its structure has too many parts|more than"):
        read_header(path)


def test_two_files_of_one_name_in_an_archive(tmp_path: Path) -> None:
    """Which of them a reader takes is up to it, so the one that was checked may not be the one that is loaded."""
    path = tmp_path / "x.ckpt"
    path.write_bytes(saved(STATE))
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning):
        archive.writestr("archive/data.pkl", a_key_that_takes_forever())
    with pytest.raises(CheckpointError, match="two files of one name"):
        read_header(path)


def test_storages_of_an_older_file_that_are_not_there(tmp_path: Path) -> None:
    """torch allocates each storage that is named, before it looks whether the file has it."""
    path = tmp_path / "x.ckpt"
    path.write_bytes(saved({"a": torch.ones(2, 3)}, new=False).replace(b"K\x06Ntq", b"J\xff\xff\xff\x7fNtq", 1))
    for check in (read_header, check_pickle):
        with pytest.raises(CheckpointError, match="incomplete"):
            check(path)


def test_a_tensor_that_repeats_its_few_bytes_without_end(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1).expand(1 << 40)}, tmp_path / "wide.ckpt")
    with pytest.raises(CheckpointError, match="tensor a exceeds its data"):
        read_header(tmp_path / "wide.ckpt")
    one = torch.ones(1000)
    torch.save({f"w{n}": one for n in range(1000)}, tmp_path / "many.ckpt")
    with pytest.raises(CheckpointError, match="far larger than its data"):
        read_header(tmp_path / "many.ckpt")
    torch.save({"w": one, "tied": one.view(10, 100)}, tmp_path / "tied.ckpt")
    assert len(read_header(tmp_path / "tied.ckpt").tensors) == 2


def test_a_state_is_checked_for_size_but_may_hold_any_name(tmp_path: Path) -> None:
    torch.save({"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]}, tmp_path / "optimizer.bin")
    check_pickle(tmp_path / "optimizer.bin")
    (tmp_path / "x.bin").write_bytes(with_structure(pickle.dumps(Path("a"), 2)))
    check_pickle(tmp_path / "x.bin")  # torch.load(weights_only=True) refuses the name


def test_numbers_of_thousands_of_digits_are_no_facts_of_a_file(tmp_path: Path) -> None:
    torch.save({**STATE, "epoch": 3, "global_step": 10**5000}, tmp_path / "x.ckpt")
    assert read_header(tmp_path / "x.ckpt").metadata == {"epoch": "3"}


def safetensors(table: object, data: bytes = b"") -> bytes:
    header = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(header)) + header + data


def entry(shape: object, start: object, end: object, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("table", "why"),
    [
        ({"a": entry([1 << 62, 1 << 62, 0], 0, 0)}, "its header is damaged .*impossible shape"),
        ({"a": entry([1 << 50], 0, 0)}, "impossible shape"),
        ({"a": entry([1] * 100, 0, 4)}, "impossible shape"),
        ({"a": entry([1.0], 0, 4)}, "no whole number"),
        ({"a": entry([True], 0, 4)}, "no whole number"),
        ({"a": entry([1], "0", "4")}, "no whole number"),
        ({"a": entry([1 << 40], 0, 1 << 42)}, "incomplete"),
        ({f"w{n}": entry([2], 0, 8) for n in range(100)}, "its tensors overlap"),
        (b"[" * 100_000, "its header is damaged|neither"),
        (b'{"a":' * 100_000, "its header is damaged"),
        (b'{"a": ' + b"9" * 5000 + b"}", "its header is damaged"),
        ({"a" * 10_000: entry([3], 0, 8)}, r"tensor a+\.\.\. has"),
        ({"a": entry([1], 0, 4, "F" * 10_000)}, "unknown dtype F+"),
    ],
)
def test_a_safetensors_header_that_promises_what_is_not_there(tmp_path: Path, table: object, why: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors(table, bytes(8)))
    with pytest.raises(CheckpointError, match=why) as raised:
        read_header(path)
    assert len(str(raised.value)) < 1000 + len(str(path))


def test_a_header_longer_than_its_limit_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "x.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", BIG) + b"{")
        stream.truncate(200_000_000)  # a sparse file
    with pytest.raises(CheckpointError, match="incomplete"):
        read_header(tmp_path / "x.safetensors")
