"""tools/check_lora_weights.py and tools/lora_interrogator.py as users call them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.networks.random_loras import delta
from tests.tools import loras
from tools import check_lora_weights, lora_interrogator

# diffusers' and numpy's remarks about their own future
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def test_the_numbers_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = loras.tensors("sd1", 4, 2.0, 1)
    path = loras.write(tmp_path / "собака.safetensors", content)
    assert loras.told(check_lora_weights.main, [path]) == 0
    told = capsys.readouterr().out
    key = "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight"
    line = next(line for line in told.splitlines() if line.startswith(key))
    name, shape, mean, least = line.split(",")
    assert (name, shape) == (key, "(4-64)")
    assert float(mean) == pytest.approx(float(content[key].abs().mean()))
    assert float(least) == pytest.approx(float(content[key].abs().min()))
    assert f"number of layers: {len(loras.names(content))}" in told and ".alpha," not in told


def test_all_keys_and_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = loras.tensors("sd1", 4, 2.0, 1)
    names = loras.names(content)
    content[f"{names[0]}.lora_up.weight"].zero_()
    content[f"{names[1]}.lora_down.weight"][0, 0] = float("nan")
    path = loras.write(tmp_path / "a.safetensors", content)
    assert loras.told(check_lora_weights.main, ["-s", path]) == 0
    told = capsys.readouterr().out
    assert f"{names[0]}.alpha,()" in told
    assert f"no effect, as lora_up is 0: 1 layer: {names[0]}" in told
    assert f"NaN or infinite values in 1 tensor: {names[1]}.lora_down.weight" in told


def test_mistakes_of_checking(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert loras.told(check_lora_weights.main, []) == 2
    assert "no --file" in capsys.readouterr().err
    assert loras.told(check_lora_weights.main, [tmp_path / "gone.pt", "--show_al"]) == 2
    assert "did you mean --show_all_keys?" in capsys.readouterr().err
    assert loras.told(check_lora_weights.main, [tmp_path / "gone.pt"]) == 2
    assert "no such file" in capsys.readouterr().err


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_diffusers(tmp_path_factory.mktemp("models") / "base", "sd1")


def test_the_words_that_move_most(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' text encoder with ΔW in its weights moves them as far."""
    few = {token: f"word{token}" for token in (320, 1929, 2368, 49407)}
    monkeypatch.setattr(lora_interrogator, "vocabulary", lambda _: few)
    content = loras.tensors("sd1", 4, 2.0, 1)
    path = loras.write(tmp_path / "a.safetensors", content)
    printed: list[str] = []
    monkeypatch.setattr("builtins.print", lambda *words: printed.append(" ".join(map(str, words))))
    assert loras.told(lora_interrogator.main, ["--sd_model", model, "--model", path, "--batch_size", 3]) == 0
    found = {int(m[1]): float(m[2]) for line in printed if (m := re.match(r"\[ *\d+\]: +(\d+) .*: ([\d.]+)$", line))}

    text_encoder = tiny.diffusers_modules("sd1").text_encoder
    ids = torch.tensor([[49406, token, 49407] for token in few])
    layers = {"0_self_attn_q_proj": "0.self_attn.q_proj", "1_mlp_fc2": "1.mlp.fc2"}
    with torch.no_grad():
        plain = text_encoder(ids).last_hidden_state
        for name, path_of in layers.items():
            change = delta(content, f"lora_te_text_model_encoder_layers_{name}")
            text_encoder.get_submodule(f"encoder.layers.{path_of}").weight += change.float()
        moved = text_encoder(ids).last_hidden_state
    expected = dict(zip(few, (moved - plain).abs().mean((1, 2)).tolist(), strict=True))
    assert found == pytest.approx(expected, abs=2e-5)
    assert list(found) == sorted(expected, key=lambda token: -expected[token])


def test_the_whole_vocabulary_is_there(model: Path) -> None:
    from library.families.registry import open_model

    header, family = open_model(str(model))

    class Loaded:
        tokenizer = family.tokenizer(header)

    found = lora_interrogator.vocabulary(Loaded())  # type: ignore[arg-type]
    assert len(found) == 49408 and sorted(found) == list(range(49408))
    encode = Loaded.tokenizer.by_encoder["text_encoder"].encode
    assert found[encode("dog")[0]] == "dog " and found[49407] == "<|endoftext|>"
    assert found[encode("собака")[-1]].strip() in "собака"


def test_a_lora_of_the_unet_alone_moves_no_word(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = {key: tensor for key, tensor in loras.tensors("sd1", 4, 2.0, 1).items() if "_unet_" in key}
    path = loras.write(tmp_path / "a.safetensors", content)
    assert loras.told(lora_interrogator.main, ["--sd_model", model, "--model", path]) == 2
    assert "no text encoder layers" in capsys.readouterr().err
    assert loras.told(lora_interrogator.main, ["--sd_model", "gone", "--clip_skip", "x"]) == 2
    told = capsys.readouterr().err
    assert "no --model" in told and "--clip_skip" in told
