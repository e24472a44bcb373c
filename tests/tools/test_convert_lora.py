"""tools/convert_lora.py as users call it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.checkpoints.files import read_header
from tools import convert_lora

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "convert_lora.py"
NAME = "lora_unet_mid_block_attentions_0_proj_in"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "собака.safetensors"
    tensors = {"lora_down.weight": torch.ones(2, 8, 1, 1), "lora_up.weight": torch.ones(8, 2, 1, 1)}
    save_file({f"{NAME}.{key}": value for key, value in tensors.items()} | {f"{NAME}.alpha": torch.tensor(1.0)}, path)
    return path


def run(*words: str | Path) -> int:
    return convert_lora.main([str(word) for word in words])


def test_there_and_back(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not told otherwise, kohya's becomes diffusers' and all else becomes kohya's."""
    assert run(source, tmp_path / "diffusers") == 0
    assert "(kohya) -> " in (told := capsys.readouterr().out) and "(diffusers): layers of unet 1" in told
    assert run(tmp_path / "diffusers", tmp_path / "peft", "--to", "peft") == 0
    assert run(tmp_path / "peft", tmp_path / "back.safetensors") == 0
    first, back = load_file(source), load_file(tmp_path / "back.safetensors")
    assert first.keys() == back.keys() and all(torch.equal(first[key], back[key]) for key in first)


def test_mistakes_are_told_without_a_traceback(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(
        {"lora_unet_nowhere.alpha": torch.ones(()), f"{NAME}.hada_w1_a": torch.ones(1)}, tmp_path / "b.safetensors"
    )
    for words, said in (
        ((tmp_path / "gone.safetensors", tmp_path / "x"), "gone.safetensors"),
        ((tmp_path / "b.safetensors", tmp_path / "x"), f"{NAME}.hada_w1_a, lora_unet_nowhere.alpha"),
        ((source, source, "--to", "kohya"), "exists already"),
        ((tmp_path, tmp_path / "x"), "adapter_config.json"),
    ):
        assert run(*words) == 2
        told = capsys.readouterr()
        assert said in told.err and "Traceback" not in told.err and told.out == ""
    assert not (tmp_path / "x").exists()


def test_wrong_words(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 2 and run(source) == 2 and run(source, "x", "--to", "onetrainer") == 2
    assert "Traceback" not in capsys.readouterr().err
    assert run("--help") == 0 and "--to" in capsys.readouterr().out


def test_it_starts_by_path_from_anywhere(source: Path, tmp_path: Path) -> None:
    words = [sys.executable, str(SCRIPT), source.name, "diffusers"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0 and "собака" in done.stdout, done.stderr
    assert (tmp_path / "diffusers" / "pytorch_lora_weights.safetensors").is_file()


def test_help_needs_no_torch() -> None:
    program = (
        f"import sys; sys.argv = ['x', '--help']; sys.path.insert(0, {str(ROOT)!r}); import tools.convert_lora as t"
    )
    program += "; assert t.main(['--help']) == 0 and not {'torch', 'diffusers', 'safetensors'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr


def test_other_kinds_get_kohyas_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An OFT of sd-scripts, whose constraint is 1e-3 · 8 = 0.008, is written as WebUIs read it; a LoHa is renamed."""
    torch.manual_seed(0)
    blocks = torch.randn(2, 4, 4)
    skew = blocks - blocks.mT
    save_file(
        {"oft_unet_mid_block_attentions_0_proj_in.oft_blocks": blocks,
         "oft_unet_mid_block_attentions_0_proj_in.alpha": torch.tensor(1e-3)},
        tmp_path / "oft.safetensors",
    )  # fmt: skip
    assert run(tmp_path / "oft.safetensors", tmp_path / "a.safetensors") == 0
    assert "(kohya): 1 layer" in capsys.readouterr().out
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == {f"{NAME}.oft_blocks", f"{NAME}.alpha"} and float(found[f"{NAME}.alpha"]) == 0
    turned = found[f"{NAME}.oft_blocks"] - found[f"{NAME}.oft_blocks"].mT
    assert torch.allclose(turned, skew * 0.008 / skew.norm(), rtol=1e-5)

    loha = {f"hada_w{half}_{side}": torch.ones(2, 2) for half in "12" for side in "ab"}
    save_file(
        {f"diffusion_model.middle_block.1.proj_in.{key}": value for key, value in loha.items()},
        tmp_path / "loha.safetensors",
    )
    assert run(tmp_path / "loha.safetensors", tmp_path / "b.safetensors") == 0
    assert load_file(tmp_path / "b.safetensors").keys() == {f"{NAME}.{key}" for key in loha}


def test_remedies_do_not_go_in_a_circle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is in kohya's names already is not to be converted, and nobody sends such a file here."""
    loha = {f"hada_w{half}_{side}": torch.ones(2, 2) for half in "12" for side in "ab"}
    save_file({f"{NAME}.{key}": value for key, value in loha.items()}, tmp_path / "loha.safetensors")
    for words in ((), ("--to", "kohya")):
        assert run(tmp_path / "loha.safetensors", tmp_path / "x", *words) == 2
        assert "it has kohya's names already (LoHa" in capsys.readouterr().err
    assert run(tmp_path / "loha.safetensors", tmp_path / "x", "--to", "diffusers") == 2
    assert "convert only LoRA and DoRA" in capsys.readouterr().err


SDXL = "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q"


@pytest.mark.parametrize(
    ("name", "down", "facts"),
    [
        # sd-scripts' library/train_util.py: get_sai_model_spec's and the trainers' names of base models
        (SDXL, (2, 640), {"ss_v2": "False", "ss_base_model_version": "sdxl_base_v1-0"}),
        (NAME, (2, 1280, 1, 1), {"ss_v2": "False", "ss_base_model_version": "sd_v1"}),
        (NAME, (2, 1280), {"ss_v2": "True"}),
        ("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k", (2, 768),
         {"ss_v2": "False", "ss_base_model_version": "sd_v1"}),
        ("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k", (2, 1024), {"ss_v2": "True"}),
        ("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_k", (2, 1280), {}),
    ],
)  # fmt: skip
def test_a_file_from_diffusers_says_what_model_it_is_for(
    tmp_path: Path, name: str, down: tuple[int, ...], facts: dict[str, str]
) -> None:
    """A1111 asks ss_base_model_version for SDXL and ss_v2 for SD2, and takes any other file for SD1's."""
    up = (320, 2, *([1, 1] if len(down) == 4 else []))
    tensors = {f"{name}.lora_down.weight": torch.ones(down), f"{name}.lora_up.weight": torch.ones(up)}
    save_file(tensors | {f"{name}.alpha": torch.tensor(1.0)}, tmp_path / "kohya.safetensors")
    assert run(tmp_path / "kohya.safetensors", tmp_path / "diffusers.safetensors", "--to", "diffusers") == 0
    assert run(tmp_path / "diffusers.safetensors", tmp_path / "back.safetensors") == 0
    written = read_header(tmp_path / "back.safetensors").metadata
    assert {key: value for key, value in written.items() if key in ("ss_v2", "ss_base_model_version")} == facts


def test_what_a_file_says_of_its_model_is_kept(tmp_path: Path) -> None:
    tensors = {f"{NAME}.lora_down.weight": torch.ones(2, 8), f"{NAME}.lora_up.weight": torch.ones(8, 2)}
    said = {"ss_base_model_version": "sd_v2_v", "ss_v2": "True"}
    save_file(tensors | {f"{NAME}.alpha": torch.tensor(1.0)}, tmp_path / "kohya.safetensors", said)
    assert run(tmp_path / "kohya.safetensors", tmp_path / "again.safetensors", "--to", "kohya") == 0
    assert read_header(tmp_path / "again.safetensors").metadata.items() >= said.items()
