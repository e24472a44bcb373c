"""tools/extract_lora_from_models.py and tools/extract_lora_from_dylora.py as users call them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.networks.random_loras import relative
from tests.tools import loras
from tools import extract_lora_from_dylora, extract_lora_from_models, merge_lora

RANK = 4


def extract(*words: object) -> int:
    return loras.told(extract_lora_from_models.main, words)


def split(*words: object) -> int:
    return loras.told(extract_lora_from_dylora.main, words)


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A model, a LoRA, and the model with the LoRA merged into it."""
    family = request.param
    folder = tmp_path_factory.mktemp(f"модели {family}")
    base = tiny.write_single_file(folder / "base.safetensors", family)
    lora = loras.write(folder / "lora.safetensors", loras.tensors(family, RANK, 2.0, 1), family)
    tuned = folder / "tuned.safetensors"
    given = ("--sd_model", base, "--models", lora, "--ratios", 1, "--save_to", tuned)
    assert loras.told(merge_lora.main, given) == 0
    return base, lora, tuned


def test_what_was_merged_comes_back_at_full_rank(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, lora, tuned = models
    out = tmp_path / "back.safetensors"
    given = ["--model_org", base, "--model_tuned", tuned, "--save_to", out, "--dim", RANK, "--conv_dim", RANK]
    given += ["--device", "cuda", "--load_precision", "float"] if "sd1" in str(base) else []
    assert extract(*given) == 0
    (found, metadata), expected = loras.read(out), loras.read(lora)[0]
    assert loras.names(found) == loras.names(expected), "layers that did not change are left out"
    for name, change in loras.deltas(expected).items():
        assert relative(loras.deltas(found)[name], change) < 1e-4, name
        assert found[f"{name}.lora_down.weight"].shape == expected[f"{name}.lora_down.weight"].shape, name
    family = "sd1" if metadata["ss_v2"] == "False" else "sd2"
    assert metadata["ss_base_model_version"] == loras.BASE[family]
    assert (
        metadata["modelspec.architecture"]
        == {"sd1": "stable-diffusion-v1/lora", "sd2": "stable-diffusion-v2-512/lora"}[family]
    )
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "4.0")
    assert metadata["ss_network_module"] == "networks.lora" and "sshs_model_hash" in metadata


def test_a_lower_rank_without_convolutions(
    models: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, lora, tuned = models
    out = tmp_path / "two.safetensors"
    given = ("--model_org", base, "--model_tuned", tuned, "--save_to", out, "--dim", 2, "--save_precision", "bf16")
    assert extract(*given, "--v_parameterization", "--no_metadata") == 0
    told = capsys.readouterr().out
    assert "left out: 2 convolutions; add --conv_dim" in told and "1 tensor (norms" in told
    found, metadata = loras.read(out)
    expected = loras.deltas(loras.read(lora)[0])
    assert len(loras.names(found)) == len(expected) - 3
    for name, change in loras.deltas(found).items():
        values = torch.linalg.svdvals(expected[name].flatten(1))
        lost = float((values[2:].square().sum() / values.square().sum()).sqrt())
        assert relative(change, expected[name]) == pytest.approx(lost, abs=0.02)  # bf16
    assert metadata["ss_base_model_version"].endswith("_v") and not [key for key in metadata if "modelspec" in key]


def test_a_text_encoder_that_hardly_differs_stays_unless_asked_otherwise(
    models: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, _, tuned = models
    before, after = load_file(base), load_file(tuned)
    slight = {
        key: before[key] + 0.01 * (after[key] - before[key]) if "cond_stage" in key else after[key] for key in after
    }
    save_file(slight, tmp_path / "slight.safetensors")
    given = (
        "--model_org",
        base,
        "--model_tuned",
        tmp_path / "slight.safetensors",
        "--save_to",
        tmp_path / "a.safetensors",
    )
    assert extract(*given) == 0
    assert any("_te_" in name for name in loras.names(loras.read(tmp_path / "a.safetensors")[0]))
    capsys.readouterr()
    assert extract(*given, "--min_diff", 0.01) == 0
    assert "text_encoder: left out, the largest difference is" in capsys.readouterr().out
    assert not any("_te_" in name for name in loras.names(loras.read(tmp_path / "a.safetensors")[0]))


def test_a_file_in_fp16_is_not_all_changed(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, lora, tuned = models
    save_file({key: tensor.half() for key, tensor in load_file(tuned).items()}, tmp_path / "half.safetensors")
    out = tmp_path / "a.safetensors"
    given = ("--model_org", base, "--model_tuned", tmp_path / "half.safetensors", "--save_to", out, "--conv_dim", 4)
    assert extract(*given) == 0
    assert loras.names(loras.read(out)[0]) == loras.names(loras.read(lora)[0])


def test_mistakes_of_extraction(
    models: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, _, tuned = models
    out = tmp_path / "out" / "a.safetensors"
    wrong = "--sdxl" if "sd2" in str(base) else "--v2"
    for words, said in (
        ([], ["no --model_org", "no --model_tuned", "no --save_to"]),
        (["--model_org", "a", "--model_tuned", "b", "--save_to", out], ["--model_org: a", "--model_tuned: b"]),
        (["--model_org", base, "--model_tuned", tuned, "--save_to", out, wrong], [f"{wrong}, but"]),
        (["--model_org", base, "--model_tuned", base, "--save_to", out], ["no layer of"]),
        (["--model_org", base, "--model_tuned", tuned, "--save_to", out, "--v2", "--sdxl", "--dim", "x"],
         ["exclude", "--dim", "not a number"]),
    ):  # fmt: skip
        assert extract(*words) == 2
        told = capsys.readouterr().err
        assert all(word in told for word in said) and "Traceback" not in told, told
    assert not out.parent.exists()


def test_a_dylora_is_split(tmp_path: Path) -> None:
    content = loras.tensors("sd1", 8, 4.0, 1)
    whole = loras.write(tmp_path / "whole.safetensors", content, ss_training_comment="mine")
    out = tmp_path / "teil.v1.safetensors"
    assert split("--model", whole, "--save_to", out, "--unit", 3) == 0
    assert sorted(path.name for path in tmp_path.iterdir() if path != whole) == [
        "teil.v1-0003.safetensors", "teil.v1-0006.safetensors",
    ]  # fmt: skip
    found, metadata = loras.read(tmp_path / "teil.v1-0006.safetensors")
    for name, change in loras.deltas(found).items():
        up, down = (content[f"{name}.lora_{word}.weight"].double().flatten(1) for word in ("up", "down"))
        expected = 4.0 / 8 * math.sqrt(8 / 6) * (up[:, :6] @ down[:6])
        assert relative(change.flatten(1), expected) < 1e-6
    assert metadata["ss_training_comment"] == "split from DyLoRA, rank 8 to 6; mine"
    assert metadata["ss_network_dim"] == "6"


def test_mistakes_of_splitting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = loras.write(tmp_path / "whole.safetensors", loras.tensors("sd1", 8, 4.0, 1))
    assert split() == 2
    told = capsys.readouterr().err
    assert all(f"no --{name}" in told for name in ("model", "save_to", "unit"))
    assert split("--model", whole, "--save_to", tmp_path / "x.safetensors", "--unit", 8) == 2
    assert "--unit 8 is not below the rank" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [whole]


def test_a_v_model_and_an_epsilon_model_have_no_lora_between_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Like merging them: the difference would be mostly that of the two predictions."""
    says = {"epsilon": {"modelspec.prediction_type": "epsilon"}, "v": {"modelspec.prediction_type": "v"}}
    eps, v = (
        tiny.write_single_file(tmp_path / f"{name}.safetensors", "sd1", seed, metadata=spec)
        for seed, (name, spec) in enumerate(says.items())
    )
    assert extract("--model_org", eps, "--model_tuned", v, "--save_to", tmp_path / "x.safetensors") == 2
    told = capsys.readouterr().err
    assert (
        "different prediction types" in told
        and "--prediction_type" in told
        and not (tmp_path / "x.safetensors").exists()
    )
