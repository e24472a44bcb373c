"""tools/convert_diffusers20_original_sd.py with the flags of sd-scripts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.tools import loras
from tests.tools.models import read, same
from tools import convert_diffusers20_original_sd

Output = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models of sd2")
    return tiny.write_single_file(folder / "sd2.ckpt", "sd2", extra={"epoch": 2, "global_step": 100})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_diffusers(tmp_path_factory.mktemp("models of sd1") / "sd1", "sd1", prediction="v_prediction")


def convert(*words: object) -> int:
    return loras.told(convert_diffusers20_original_sd.main, words)


@pytest.mark.parametrize("safetensors", [False, True])
def test_a_checkpoint_becomes_a_folder(file: Path, tmp_path: Path, safetensors: bool) -> None:
    out = tmp_path / "folder"
    given = ["--v2", "--unet_use_linear_projection", *(["--use_safetensors"] if safetensors else [])]
    assert convert(*given, file, out) == 0
    endings = {path.suffix for path in out.rglob("*model*") if path.suffix in (".bin", ".safetensors")}
    assert endings == {".safetensors" if safetensors else ".bin"}
    found = read(out)
    for name, tensor in tiny.diffusers_modules("sd2").unet.state_dict().items():
        assert torch.equal(found[f"unet/{name}"], tensor), name


def test_a_folder_becomes_a_checkpoint_and_replaces_what_was_there(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    out.write_bytes(b"the earlier one")
    assert convert("--fp16", "--metadata", "{'name': 'mine', 'modelspec.author': 'me'}", folder, out, "--v1") == 0
    expected = {name: tensor.half() for name, tensor in tiny.original_state_dict("sd1").items()}
    assert same(read(out), expected)
    metadata = loras.read(out)[1]
    assert metadata["name"] == "mine" and metadata["modelspec.author"] == "me"
    assert metadata["modelspec.prediction_type"] == "v"


def test_counters_are_added_to_those_of_the_source(file: Path, tmp_path: Path) -> None:
    assert convert(file, tmp_path / "out.ckpt", "--epoch", 3, "--global_step", 50, "--save_precision_as", "bf16") == 0
    content = torch.load(tmp_path / "out.ckpt", weights_only=True)
    assert (content["epoch"], content["global_step"]) == (5, 150)
    assert content["state_dict"]["model.diffusion_model.out.2.bias"].dtype == torch.bfloat16


def test_scheduler_and_tokenizer_of_a_reference(file: Path, tmp_path: Path) -> None:
    reference = tiny.write_diffusers(tmp_path / "reference", "sd2", prediction="epsilon")
    scheduler = reference / "scheduler" / "scheduler_config.json"
    config = json.loads(scheduler.read_text(encoding="utf-8"))
    scheduler.write_text(
        json.dumps(config | {"_class_name": "PNDMScheduler", "skip_prk_steps": True}), encoding="utf-8"
    )
    assert convert(file, tmp_path / "out", "--reference_model", reference) == 0
    written = json.loads((tmp_path / "out/scheduler/scheduler_config.json").read_text(encoding="utf-8"))
    assert written["_class_name"] == "PNDMScheduler" and written["skip_prk_steps"] is True
    index = json.loads((tmp_path / "out/model_index.json").read_text(encoding="utf-8"))
    assert index["scheduler"] == ["diffusers", "PNDMScheduler"]


def test_a_reference_that_is_not_here_is_not_needed(
    file: Path, folder: Path, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kohya_ss always sends the name of a hub's model."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    name = "runwayml/stable-diffusion-v1-5"
    for source, out in ((file, tmp_path / "out"), (folder, tmp_path / "out.safetensors")):
        assert convert(source, out, "--reference_model", name) == 0
        assert f"--reference_model {name} is not on this machine and not needed" in capsys.readouterr().out
    assert convert(file, tmp_path / "plain") == 0
    for part in ("scheduler", "tokenizer"):
        made = {path.name: path.read_bytes() for path in (tmp_path / "out" / part).iterdir()}
        assert made == {path.name: path.read_bytes() for path in (tmp_path / "plain" / part).iterdir()}


def test_mistakes_have_a_way_out(file: Path, folder: Path, tmp_path: Path, capsys: Output) -> None:
    out = tmp_path / "out.safetensors"
    for words, told in (
        ((file, out, "--v1"), "--v1, but"),
        ((folder, out, "--v2"), "the file tells"),
        ((folder, out, "--v1", "--v2", "--fp16", "--bf16", "--metadata", "open('x')"), "not a dictionary"),
        ((folder, tmp_path / "out.v1"), "use .safetensors or .ckpt"),
        ((folder, out, "--reference_model", tmp_path / "none"), "no such file"),
    ):
        assert convert(*words) == 2
        message = capsys.readouterr().err
        assert told in message, message
    assert "--save_model_as" not in message
    assert list(tmp_path.iterdir()) == []
