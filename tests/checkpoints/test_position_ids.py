"""Wrong position ids of a text encoder are named, and right in every file that is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.checkpoints.files import read_header
from library.checkpoints.position_ids import faults
from library.families.registry import load_model, save_model
from tests import tiny
from tools import convert_checkpoint, merge_models

NAME = "cond_stage_model.transformer.text_model.embeddings.position_ids"
RIGHT = torch.arange(77)[None]  # transformers' CLIPTextEmbeddings


def with_entry(index: int, value: int) -> torch.Tensor:
    ids = RIGHT.clone()
    ids[0, index] = value
    return ids


WRONG = [  # as merging tools left them: rounded in fp16, and one off after the weighted sum
    (RIGHT.half(), "position_ids is F16 instead of I64"),
    (RIGHT.int(), "position_ids is I32 instead of I64"),
    (with_entry(41, 40), "position_ids is wrong at 41"),
    (with_entry(0, -1), "position_ids is wrong at 0"),
]


def write(path: Path, ids: torch.Tensor) -> Path:
    tensors = tiny.original_state_dict("sd1") | {NAME: ids}
    if path.suffix == ".ckpt":
        torch.save({"state_dict": tensors}, path)
    else:
        save_file(tensors, path)
    return path


@pytest.mark.parametrize(("ids", "words"), WRONG)
def test_wrong_ids_are_named_and_mended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ids: torch.Tensor, words: str
) -> None:
    source = write(tmp_path / "wrong.safetensors", ids)
    assert convert_checkpoint.main([str(source), "--dry_run"]) == 0
    assert words in capsys.readouterr().out
    model = load_model(read_header(source))
    assert any(words in note for note in model.notes)
    save_model(model, tmp_path / "trained.safetensors", save_as="safetensors")
    assert convert_checkpoint.main([str(source), str(tmp_path / "converted.safetensors")]) == 0
    assert words in capsys.readouterr().out
    for path in ("trained", "converted"):
        written = load_file(tmp_path / f"{path}.safetensors")[NAME]
        assert written.dtype == torch.int64 and torch.equal(written, RIGHT)


def test_right_ids_are_no_fault(tmp_path: Path) -> None:
    assert not [*faults(read_header(write(tmp_path / "right.safetensors", RIGHT)))]


def test_a_ckpt_and_a_merged_model_are_mended(tmp_path: Path) -> None:
    one, two = (write(tmp_path / name, with_entry(5, 4)) for name in ("one.safetensors", "two.ckpt"))
    target = tmp_path / "sum.safetensors"
    assert merge_models.main(["--models", str(one), str(two), "--output", str(target)]) == 0
    assert torch.equal(load_file(target)[NAME], RIGHT)
    assert convert_checkpoint.main([str(two), str(tmp_path / "three.safetensors")]) == 0
    assert torch.equal(load_file(tmp_path / "three.safetensors")[NAME], RIGHT)
