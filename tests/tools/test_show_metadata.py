"""tools/show_metadata.py: what stands in a file, for people and for programs, without torch and without a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests import tiny
from tools.show_metadata import main

ROOT = Path(__file__).parents[2]

# As sd-scripts writes it, formats and all.
METADATA = {
    "modelspec.title": "Sks",
    "modelspec.thumbnail": "data:image/png;base64," + "A" * 3000,
    "ss_training_comment": "first line\nsecond line",
    "ss_training_started_at": "1700000000.5",
    "ss_seed": "42",
    "ss_clip_skip": "None",
    "ss_network_dim": "8",
    "ss_network_args": '{"conv_dim": "4", "dropout": null}',
    "ss_dataset_dirs": '{"10_sks dog": {"n_repeats": 10, "img_count": 12}}',
    "ss_reg_dataset_dirs": '{"1_dog": {"n_repeats": 1, "img_count": 200}}',
    "ss_bucket_info": '{"buckets": {"0": {"resolution": [448, 576], "count": 120}}, "mean_img_ar_error": 0.0123}',
    "ss_tag_frequency": '{"10_sks dog": {"grass": 3, "sks dog": 12, "\\u72ac": 5}}',
    "ss_datasets": json.dumps(
        [
            {
                "resolution": [768, 512],
                "batch_size_per_device": 4,
                "bucket_info": {"buckets": {"0": {"resolution": [640, 512], "count": 7}}, "mean_img_ar_error": 0.5},
                "subsets": [{"img_count": 7, "num_repeats": 1, "image_dir": "cats", "shuffle_caption": True}],
            }
        ]
    ),
    "sshs_model_hash": "ab" * 32,
    "my own": "value",
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "ein Hünd.safetensors", METADATA)


def write(path: Path, metadata: dict[str, str] | None) -> Path:
    save_file({"lora_unet_x.alpha": torch.tensor(1.0).half()}, path, metadata)
    return path


def shown(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main([str(word) for word in words]) == 0
    return capsys.readouterr().out


def section(text: str, heading: str) -> list[list[str]]:
    """The words of the lines below a heading."""
    block = text.partition(f"\n\n{heading}\n")[2].partition("\n\n")[0]
    assert block, f"{heading}\n---\n{text}"
    return [line.split() for line in block.rstrip().split("\n")]


def test_a_file_as_people_read_it(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, file)
    assert text == shown(capsys, "--model", file)
    assert text.startswith(f"{file}\n1 tensor, F16\n")
    assert section(text, "Title and kind")[0] == ["title", "Sks"]
    training = section(text, "Training")
    assert training[:2] == [["training_comment", "first", "line"], ["second", "line"]]
    assert training[2][0] == "training_started_at" and training[2][1].startswith("2023-11-1")
    assert section(text, "Network") == [["network_dim", "8"], ["network_args", "conv_dim=4,", "dropout=None"]]
    assert section(text, "Folders") == [["10_sks", "dog:", "12", "images", "x", "10"]]
    assert section(text, "Folders of regularisation images") == [["1_dog:", "200", "images", "x", "1"]]
    assert section(text, "Buckets")[0] == ["448x576:", "120"]
    assert section(text, "Datasets") == [
        ["768x512,", "batches", "of", "4"],
        ["640x512:", "7"],
        ["mean", "error", "of", "the", "aspect", "ratio:", "0.5000"],
        ["cats:", "7", "images", "x", "1"],
        ["shuffle_caption", "True"],
    ]
    tags = [["10_sks", "dog:", "3", "different"], ["12", "sks", "dog"], ["5", "犬"], ["3", "grass"]]
    assert section(text, "Tags") == tags
    assert section(text, "Hashes") == [["sshs_model_hash", "ab" * 32]]
    assert section(text, "Other") == [["my", "own", "value"]]
    assert "clip_skip" not in text and len(text) < 3000


def test_the_number_of_tags(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert section(shown(capsys, file, "--tags", 1), "Tags")[-1] == ["and", "2", "more"]
    assert section(shown(capsys, file, "--tags", 0), "Tags")[-1] == ["3", "grass"]
    assert main([str(file), "--tags", "-1"]) == 2


def test_json_is_what_stands_in_the_file(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads(shown(capsys, file, "--json")) == METADATA


def test_a_file_without_metadata_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "a.safetensors", None)
    assert shown(capsys, file).endswith("\nno metadata\n")
    assert json.loads(shown(capsys, file, "--json")) == {}


def test_models_of_every_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = tiny.write_single_file(tmp_path / "sd1.safetensors", "sd1", metadata={"modelspec.title": "whole"})
    assert section(shown(capsys, whole), "Title and kind") == [["title", "whole"]]
    pickled = tmp_path / "sd1.ckpt"
    torch.save({"state_dict": {"model.diffusion_model.x": torch.zeros(1)}, "epoch": 3}, pickled)
    assert section(shown(capsys, pickled), "Other") == [["epoch", "3"]]
    assert shown(capsys, tiny.write_diffusers(tmp_path / "folder", "sd1")).endswith("no metadata\n")


EMPTY = ("{}", "null", '{"a": {}}')  # tables of nothing


@pytest.mark.parametrize(
    "changed",
    [
        {"ss_dataset_dirs": "[1]", "ss_bucket_info": '{"buckets": 3}', "ss_tag_frequency": '{"a": {"b": "c"}}'},
        {"ss_dataset_dirs": "{", "ss_bucket_info": "null", "ss_tag_frequency": '{"a": 1}', "ss_datasets": '[{"x": 1}]'},
        {"ss_training_started_at": "1e300", "ss_tag_frequency": "{}", "ss_network_args": "[" * 100_000},
        {"ss_training_started_at": "yesterday", "ss_datasets": "[3]", "ss_dataset_dirs": '{"a": {}}'},
        {"ss_bucket_info": '{"buckets": {"0": {"resolution": [], "count": 1}}}', "ss_tag_frequency": '{"a": {}}'},
    ],
)
def test_values_of_another_shape_are_shown_as_they_stand(
    changed: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(capsys, write(tmp_path / "a.safetensors", METADATA | changed))
    for key, value in changed.items():
        assert key.removeprefix("ss_") in text or value in EMPTY, f"{key}\n---\n{text}"


def test_a_file_from_anyone_does_not_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = "\x1b[31m\u202e\u2028\r犬\u3000👩\u200d🎨"
    metadata = {"ss_training_comment": odd, odd: "x", "ss_tag_frequency": json.dumps({odd: {odd: 1}})}
    metadata["ss_datasets"] = json.dumps([{"resolution": [1, 1], "batch_size_per_device": odd, "subsets": []}])
    text = shown(capsys, write(tmp_path / "a.safetensors", metadata))
    assert not {"\x1b", "\u202e", "\u2028", "\r"} & set(text)
    assert "\\x1b[31m\\u202e\\u2028\\r犬\u3000👩\u200d🎨" in text


def damaged(folder: Path) -> dict[str, bytes]:
    whole = write(folder / "whole.safetensors", METADATA).read_bytes()
    nested = b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    return {
        "empty": b"",
        "cut off in the header": whole[:200],
        "cut off in the data": whole[:-1],
        "no model": b"hello " * 100,
        "no JSON": (8).to_bytes(8, "little") + b"{not it}",
        "metadata of another shape": (23).to_bytes(8, "little") + b'{"__metadata__":[1, 2]}',
        "deep": len(nested).to_bytes(8, "little") + nested,
        "half a zip": b"PK\x03\x04" + bytes(100),
    }


def test_damaged_files_are_told_without_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in damaged(tmp_path).items():
        file = tmp_path / f"{name}.safetensors"
        file.write_bytes(content)
        assert main(["--model", str(file)]) == 2, name
        error = capsys.readouterr().err
        assert error.startswith(f"\n- {file}: "), error
    assert main([str(tmp_path / "gone.safetensors")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_one_file_is_needed(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2 and "show_metadata.py dog.safetensors" in capsys.readouterr().err
    assert main([str(file), "--model", str(file)]) == 2
    assert main(["--help"]) == 0


def test_the_program_needs_no_torch(file: Path) -> None:
    program = f"""
import sys
from tools.show_metadata import main
code = main([{str(file)!r}])
sys.exit(code or sorted({{"torch", "numpy", "safetensors"}} & set(sys.modules)) or 0)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    script = [sys.executable, str(ROOT / "tools" / "show_metadata.py"), "--model", str(file)]
    assert subprocess.run(script, capture_output=True, encoding="utf-8").stdout == done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of Windows do not break")
def test_a_reader_may_stop_reading(tmp_path: Path) -> None:
    long = {f"key {number}": "value " * 300 for number in range(200)}  # more than a pipe holds
    file = write(tmp_path / "a.safetensors", long)
    script = [sys.executable, str(ROOT / "tools" / "show_metadata.py"), str(file)]
    with subprocess.Popen(script, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as program:
        assert program.stdout is not None and program.stderr is not None
        assert program.stdout.readline().strip() == str(file).encode()
        program.stdout.close()
        assert (program.stderr.read(), program.wait()) == (b"", 1)
