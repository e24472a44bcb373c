"""tools/resize_lora.py as users call it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from tests.networks.random_loras import relative
from tests.tools import loras
from tools import resize_lora


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lora") / "собака 8.safetensors"
    return loras.write(path, loras.tensors("sd1", 8, 4.0, 1), ss_training_comment="mine", ss_seed="7")


def resize(*words: object) -> int:
    return loras.told(resize_lora.main, words)


def test_a_lower_rank_as_a_user_asks_for_it(lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "klein.safetensors"
    given = ("--model", lora, "--save_to", out, "--new_rank", 4, "--device", "cuda", "--save_precision", "fp16")
    assert resize(*given, "--svd_lowrank_niter", 2, "--verbose") == 0
    told = capsys.readouterr().out
    assert "--device cuda is not available: using the CPU" in told
    assert "sum(S) retained: " in told and "svd_lowrank_niter has no effect" in told
    before, after = loras.read(lora)[0], loras.read(out)[0]
    assert before.keys() == after.keys() and {tensor.dtype for tensor in after.values()} == {torch.float16}
    for name, whole in loras.deltas(before).items():
        u, values, vh = torch.linalg.svd(whole.flatten(1), full_matrices=False)
        assert after[f"{name}.lora_down.weight"].shape[0] == 4 and float(after[f"{name}.alpha"]) == 2.0
        best = u[:, :4] @ values[:4].diag() @ vh[:4]
        assert relative(loras.deltas(after)[name].flatten(1), best) < 2e-3  # fp16


def test_metadata_and_hashes(lora: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    assert resize("--model", lora, "--save_to", out, "--new_rank", 4, "--new_conv_rank", 2) == 0
    found = loras.read(out)[1]
    assert (
        found["ss_training_comment"] == "dimension is resized from 8 to 4 (conv: 2); mine" and found["ss_seed"] == "7"
    )
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("4", "2.0")
    content = out.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    assert found["sshs_model_hash"] == hashlib.sha256(content[start:]).hexdigest()


def test_the_same_rank_changes_nothing(lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "same.safetensors"
    assert resize("--model", lora, "--save_to", out, "--new_rank", 8) == 0
    before, after = loras.read(lora)[0], loras.read(out)[0]
    assert all(torch.equal(before[key], after[key]) for key in before) and before.keys() == after.keys()
    assert "no layer had a higher rank: the weights are unchanged" in capsys.readouterr().out


@pytest.mark.parametrize(("method", "target"), [("sv_ratio", 3), ("sv_fro", 0.8), ("sv_cumulative", 0.6)])
def test_dynamic_ranks(lora: Path, tmp_path: Path, method: str, target: float) -> None:
    out = tmp_path / "dynamic.safetensors"
    given = ("--model", lora, "--save_to", out, "--new_rank", 6, "--dynamic_method", method, "--dynamic_param", target)
    assert resize(*given) == 0
    after, metadata = loras.read(out)
    for name, whole in loras.deltas(loras.read(lora)[0]).items():
        values = torch.linalg.svdvals(whole.flatten(1))[:8]
        if method == "sv_ratio":
            rank = int((values > values[0] / target).sum())
        else:
            parts, share = (values, target) if method == "sv_cumulative" else (values**2, target**2)
            rank = next(k for k in range(1, 9) if parts[:k].sum() / parts.sum() >= share)
        assert after[f"{name}.lora_down.weight"].shape[0] == min(rank, 6), name
    assert metadata["ss_training_comment"] == f"Dynamic resize with {method}: {float(target)} from 8; mine"
    assert metadata["ss_network_dim"] == metadata["ss_network_alpha"] == "Dynamic"


@pytest.mark.parametrize("ending", [".pt", ".ckpt", ".pth"])
def test_other_endings(lora: Path, tmp_path: Path, ending: str) -> None:
    out = tmp_path / f"a{ending}"
    assert resize("--model", lora, "--save_to", out, "--new_rank", 2) == 0
    found = torch.load(out, weights_only=True)
    assert all(tensor.shape[0] == 2 for key, tensor in found.items() if ".lora_down." in key)
    assert resize("--model", out, "--save_to", tmp_path / "back.safetensors", "--new_rank", 2) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], ["no --model", "no --save_to"]),
        (["--new_rank", "0", "--new_rnk", "3", "--model", "x", "--save_to", "y.txt"],
         ["--new_rank", "did you mean --new_rank", "y.txt", ".safetensors"]),
        (["--model", "x", "--save_to", "y.pt", "--dynamic_method", "sv_fro"], ["--dynamic_param"]),
        (["--model", "x", "--save_to", "y.pt", "--dynamic_param", "2"], ["--dynamic_method"]),
        (["--model", "x", "--save_to", "y.pt", "--dynamic_method", "sv_fro", "--dynamic_param", "2"], ["above 1"]),
        (["--model", "x", "--save_to", "y.pt", "--dynamic_method", "sv_ratio", "--dynamic_param", ".9"], ["below 1"]),
        (["--model", "x", "--save_to", "y.pt", "--dynamic_method", "svd"], ["sv_ratio, sv_fro, sv_cumulative"]),
        (["--model", "gone.safetensors", "--save_to", "y.pt"], ["gone.safetensors", "no such file"]),
        (["--model", "x", "--save_to", "y.pt", "--device", "tpu"], ["--device tpu"]),
    ],
)  # fmt: skip
def test_mistakes_are_told_without_a_traceback(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    said: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resize(*words) == 2
    told = capsys.readouterr().err
    assert all(word in told for word in said), told
    assert "Traceback" not in told and not list(tmp_path.iterdir())


def test_other_adapters_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = loras.tensors("sd1", 4, 2.0, 1)
    content["lora_unet_x.lokr_w1"] = content["lora_unet_x.lokr_w2"] = torch.ones(2, 2)
    path = loras.write(tmp_path / "mixed.safetensors", {key: tensor.clone() for key, tensor in content.items()})
    assert resize("--model", path, "--save_to", tmp_path / "new.safetensors") == 2
    assert "lora_unet_x (LoKr" in capsys.readouterr().err and not (tmp_path / "new.safetensors").exists()
