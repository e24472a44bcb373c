"""tools/posthoc_ema.py: the sum of snapshots, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.training.averaging.power_profiles import Profile, combine
from library.training.averaging.snapshot_files import file_name, snapshot_metadata
from tools import posthoc_ema

KEPT = [Profile(width, step) for step in (10, 20, 30, 40) for width in (0.05, 0.1)]


def values(number: int) -> torch.Tensor:
    return torch.randn(5, 7, generator=torch.Generator().manual_seed(number))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Snapshots with a weight, a constant weight, a schedule with an infinite value, and an integer."""
    folder = tmp_path / "собака-posthoc_ema"
    folder.mkdir()
    constant = {"frozen.weight": values(99), "x.position_ids": torch.arange(3), "sigmas": torch.tensor([1.0, 2.0])}
    for number, profile in enumerate(KEPT):
        save_file(
            {"a.weight": values(number), **constant},
            folder / file_name(profile.step, profile.width),
            {**snapshot_metadata(profile), "modelspec.title": "собака"},
        )
    return folder


def run(folder: Path, *words: str, to: str = "made.safetensors") -> int:
    return posthoc_ema.main([str(folder), "--save_to", str(folder.parent / to), *words])


@pytest.mark.parametrize(("precision", "dtype"), [(None, torch.float32), ("fp16", torch.float16)])
def test_the_file_is_the_sum(folder: Path, precision: str | None, dtype: torch.dtype) -> None:
    assert run(folder, "--sigma_rel", "0.13", *(["--save_precision", precision] if precision else [])) == 0
    made = load_file(folder.parent / "made.safetensors")
    shares = combine(KEPT, Profile(0.13, 40)).shares
    expected = sum(share * values(number).double() for number, share in enumerate(shares))
    torch.testing.assert_close(made["a.weight"], expected.to(dtype))  # type: ignore[union-attr]
    assert torch.equal(made["frozen.weight"], values(99).to(dtype))
    assert torch.equal(made["x.position_ids"], torch.arange(3))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--sigma_rel", "0.1", "--step", "41"), "--step 41: the last snapshot is of step 40"),
        (("--sigma_rel", "0.1", "--step", "9"), "--step 9: the first snapshot is of step 10"),
        (("--sigma_rel", "0.3"), "above 0.28"),
        (("--sigma_rel", "0"), "below 0.01"),
        ((), "no --sigma_rel"),
    ],
)
def test_what_cannot_be_made(
    folder: Path, words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, *words) == 2
    assert message in capsys.readouterr().err
    assert not (folder.parent / "made.safetensors").exists()


def test_a_folder_that_is_not_of_one_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder.parent / "none", "--sigma_rel", "0.1") == 2 and "no such folder" in capsys.readouterr().err
    assert run(folder.parent, "--sigma_rel", "0.1") == 2 and "no snapshots" in capsys.readouterr().err
    assert run(folder, "--sigma_rel", "0.1", to=f"{folder.name}/made.safetensors") == 2
    assert "is in the folder of the snapshots" in capsys.readouterr().err
    assert run(folder, "--sigma_rel", "0.1", to="made.ckpt") == 2 and ".safetensors" in capsys.readouterr().err
    save_file({"b.weight": values(1)}, folder / file_name(50, 0.1), snapshot_metadata(Profile(0.1, 50)))
    assert run(folder, "--sigma_rel", "0.1") == 2 and "they are of two runs" in capsys.readouterr().err
    save_file({"b.weight": values(1)}, folder / file_name(50, 0.1))
    assert run(folder, "--sigma_rel", "0.1") == 2 and "do not say which average" in capsys.readouterr().err
    (folder / file_name(50, 0.1)).write_bytes(b"cut")
    assert run(folder, "--sigma_rel", "0.1") == 2 and file_name(50, 0.1) in capsys.readouterr().err


def test_a_large_error_comes_with_a_hint(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "--sigma_rel", "0.25") == 0
    assert "more --posthoc_ema_snapshots" in capsys.readouterr().out
