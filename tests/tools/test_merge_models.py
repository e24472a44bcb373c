"""tools/merge_models.py as users call it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests import tiny
from tests.tools import loras
from tools import merge_models

UNET = "model.diffusion_model."
IN = UNET + "input_blocks.0.0.weight"
TOKENS = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models that differ in seed, spelling of the text encoder's names, precision and kind of file."""
    folder = tmp_path_factory.mktemp("models of two")
    spec = {"modelspec.title": "A", "modelspec.license": "mine", "modelspec.prediction_type": "epsilon"}
    one = tiny.write_single_file(folder / "one.safetensors", "sd1", 1, position_ids=True, metadata=spec)
    other = folder / "другая.ckpt"
    tiny.write_single_file(other, "sd1", 2, text_model_level=False, dtype=torch.float16)
    return one, other


def merge(*words: object) -> int:
    return loras.told(merge_models.main, words)


def common(tensors: Tensors) -> Tensors:
    """The tensors under the names that have a `text_model.` level."""
    level = "cond_stage_model.transformer."
    return {key.replace(level, f"{level}text_model.").replace("text_model." * 2, "text_model."): value
            for key, value in tensors.items()}  # fmt: skip


def read(path: Path) -> Tensors:
    if path.suffix == ".ckpt":
        return common(torch.load(path, weights_only=True)["state_dict"])
    return common(loras.read(path)[0])


def test_the_sum_is_the_sum_whatever_the_spelling(
    two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "сумма"
    assert merge("--models", *two, "--ratios", 0.7, 0.3, "--output", out, "--device", "cuda") == 0
    found, metadata = loras.read(out.with_name("сумма.safetensors"))
    one, other = map(read, two)
    assert found.keys() == loras.read(two[0])[0].keys()
    for name, tensor in found.items():
        if name.endswith("position_ids"):
            assert tensor.dtype == torch.int64 and torch.equal(tensor, torch.arange(77)[None])
        else:
            expected = (0.7 * one[name].double() + 0.3 * other[name].double()).float()
            torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-7)
    assert metadata["modelspec.merged_from"] == "A, другая" and metadata["modelspec.title"] == "сумма"
    assert metadata["modelspec.license"] == "mine" and metadata["modelspec.architecture"] == "stable-diffusion-v1"
    assert "epsilon assumed like the others" in capsys.readouterr().out


def test_equal_shares_of_one_model_with_itself_are_that_model(two: tuple[Path, Path], tmp_path: Path) -> None:
    again = tmp_path / "again.safetensors"
    again.write_bytes(two[0].read_bytes())
    out = tmp_path / "half.safetensors"
    assert merge("--models", two[0], again, "--output", out, "--saving_precision", "bf16") == 0
    one, found = read(two[0]), read(out)
    assert all(
        torch.equal(found[name], tensor.bfloat16() if tensor.is_floating_point() else tensor)
        for name, tensor in one.items()
    )


def test_unet_only_leaves_the_rest_as_the_first_has_it(two: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "sum.safetensors"
    given = ("--models", *two, "--ratios", 0.5, 0.5, "--output", out, "--unet_only", "--saving_precision", "fp16")
    assert merge(*given, "--precision", "bf16") == 0
    one, found = read(two[0]), read(out)
    for name, tensor in one.items():
        if not name.startswith(UNET) and tensor.is_floating_point():
            assert torch.equal(found[name], tensor.half()), name
    assert not torch.equal(found[IN], one[IN].half())


def test_what_a_model_lacks_is_the_firsts_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alphas = {"alphas_cumprod": torch.linspace(1, 0, 9), "cond_stage_model.model.attn_mask": torch.tensor(-torch.inf)}
    values = {"a": (1.0, 10.0), "b": (2.0, None), "c": (4.0, 30.0)}
    paths = []
    for name, (shared, lacking) in values.items():
        tensors = {f"{UNET}x.weight": torch.full((2, 2), shared)} | alphas
        tensors |= {f"{UNET}y.weight": torch.full((3,), lacking)} if lacking else {f"{UNET}mine.{name}": torch.ones(1)}
        paths.append(tmp_path / f"{name}.safetensors")
        save_file(tensors, paths[-1])
    out = tmp_path / "sum.safetensors"
    assert merge("--models", *paths, "--ratios", 0.5, 0.25, 0.5, "--output", out, "--show_skipped") == 0
    found = read(out)
    assert found[f"{UNET}x.weight"][0, 0] == 0.5 * 1 + 0.25 * 2 + 0.5 * 4
    assert found[f"{UNET}y.weight"][0] == (0.5 + 0.25) * 10 + 0.5 * 30  # b lacks it: a stands in
    assert torch.equal(found["alphas_cumprod"], alphas["alphas_cumprod"])
    assert found["cond_stage_model.model.attn_mask"] == -torch.inf
    told = capsys.readouterr().out
    for text in ("b.safetensors lacks 1 tensor,", f"{UNET}mine.b", "add up to 1.25", "by names and shapes only"):
        assert text in told


def test_ema_copies_stay_only_where_all_have_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tiny.write_single_file(tmp_path / f"{seed}.safetensors", "sd1", seed, ema=seed < 3) for seed in (1, 2, 3)]
    out = tmp_path / "sum.safetensors"
    copy = "model_ema.diffusion_modelinput_blocks00weight"
    assert merge("--models", *paths[:2], "--output", out) == 0
    found = read(out)
    assert torch.equal(found[copy], found[IN]) and found["model_ema.num_updates"] == 7
    assert merge("--models", paths[0], paths[2], "--output", out) == 0
    assert copy not in read(out) and "EMA copies are left out" in capsys.readouterr().out


def test_marks_of_prediction_and_schedule_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = []
    for name, marks in (("a", []), ("b", ["v_pred", "ztsnr"])):
        paths.append(tmp_path / f"{name}.safetensors")
        save_file({f"{UNET}x": torch.ones(2)} | {mark: torch.tensor([]) for mark in marks}, paths[-1])
    out = tmp_path / "sum.safetensors"
    assert merge("--models", *paths, "--output", out) == 0
    assert {"v_pred", "ztsnr"} < read(out).keys()
    assert "zero terminal SNR" in capsys.readouterr().out


def test_models_that_do_not_go_together_are_refused(
    two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sum.safetensors"
    other = tiny.write_single_file(tmp_path / "sd2.safetensors", "sd2")
    v = tiny.write_single_file(tmp_path / "v.safetensors", "sd1", metadata={"modelspec.prediction_type": "v"})
    tensors = loras.read(two[0])[0]
    wide = tmp_path / "wide.safetensors"
    save_file(tensors | {UNET + "out.2.bias": torch.zeros(5)}, wide)
    folder = tiny.write_diffusers(tmp_path / "folder", "sd1")
    adapter = loras.write(tmp_path / "lora.safetensors", {"lora_unet_x.lora_down.weight": torch.ones(1, 1)})
    for second, words in (
        (other, ("differ in kind", "Stable Diffusion 2.x")),
        (v, ("different prediction types", "--prediction_type")),
        (wide, ("differ in shape", "out.2.bias (4,) and (5,)")),
        (folder, ("convert_checkpoint.py",)),
        (adapter, ("LoRA",)),
        (tmp_path / "none.safetensors", ("no such file",)),
    ):
        assert merge("--models", two[0], second, "--output", out) == 2, second
        told = capsys.readouterr().err
        assert all(word in told for word in words), told
    assert not out.exists()


def test_mistakes_of_the_command_line_are_told_together(
    two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert merge("--models", *two, "--ratios", 1, "--output", tmp_path / "sum.ckpt", "--precision", "int8") == 2
    told = capsys.readouterr().err
    assert "1 value" in told and "written as .safetensors only" in told and "int8" in told
    assert merge("--models", *two, "--output", two[0]) == 2
    assert "one of the models" in capsys.readouterr().err
    assert merge("--models", two[0], "--output", tmp_path / "x") == 2
    assert "needs two models or more" in capsys.readouterr().err


def test_a_sum_that_does_not_fit_the_precision_is_not_written(
    two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sum.safetensors"
    given = ("--models", *two, "--ratios", 1e6, 1e6, "--output", out, "--saving_precision", "fp16")
    assert merge(*given) == 2
    assert "do not fit fp16" in capsys.readouterr().err and list(tmp_path.iterdir()) == []
