"""tools/convert_checkpoint.py as users call it: any kind of file into any other, and what a file is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests import tiny
from tests.small_disk import mounted
from tests.tools import loras
from tests.tools.models import UNET, read, same, with_averages
from tools import convert_checkpoint

SCRIPT = str(loras.ROOT / "tools" / "convert_checkpoint.py")
Output = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    half = torch.float16
    files = {family: folder / f"{family} модель.safetensors" for family in tiny.ALL}
    for family, path in files.items():
        tiny.write_single_file(path, family, dtype=half, position_ids=True)
    return files


def convert(*words: object) -> int:
    return loras.told(convert_checkpoint.main, words)


def scheduler(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "scheduler/scheduler_config.json").read_text(encoding="utf-8"))
    return found


# --- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_a_file_to_a_folder_and_back(files: dict[str, Path], tmp_path: Path, family: str, capsys: Output) -> None:
    folder, back = tmp_path / "folder", tmp_path / "back.safetensors"
    assert (
        convert(files[family], folder, "--save_model_as", "diffusers" if family == "sd1" else "diffusers_safetensors")
        == 0
    )
    told = capsys.readouterr().out
    assert convert(folder, back) == 0
    before, after = read(files[family]), read(back)
    # a folder has no place for these, which nothing that draws reads
    lost = {name for name in before if name.endswith(("position_ids", "logit_scale"))}
    if family == "sd2":
        lost |= {name for name in before if ".resblocks.2." in name or name.endswith("text_projection")}
        assert lost <= after.keys()
        after = {name: tensor for name, tensor in after.items() if name not in lost}
    assert same(after, {name: tensor for name, tensor in before.items() if name not in lost})
    assert "left out" in told or not lost


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_a_folder_to_a_file_and_back(tmp_path: Path, family: str) -> None:
    source = tiny.write_diffusers(tmp_path / "source", family, prediction="v_prediction")
    assert convert(source, tmp_path / "one.ckpt") == 0
    assert convert(tmp_path / "one.ckpt", tmp_path / "back") == 0
    assert same(read(tmp_path / "back"), read(source))
    configs = {path.relative_to(source) for path in source.rglob("*config.json")}
    assert configs <= {path.relative_to(tmp_path / "back") for path in (tmp_path / "back").rglob("*config.json")}
    assert scheduler(tmp_path / "back")["prediction_type"] == "v_prediction"


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_a_ckpt_holds_all_that_a_safetensors_holds(files: dict[str, Path], tmp_path: Path, family: str) -> None:
    assert convert(files[family], tmp_path / "one.ckpt") == 0
    assert convert(tmp_path / "one.ckpt", tmp_path / "back.safetensors") == 0
    assert same(read(tmp_path / "one.ckpt"), read(files[family]))
    assert same(read(tmp_path / "back.safetensors"), read(files[family]))


@pytest.mark.parametrize(
    ("family", "pipeline"), [("sdxl", "StableDiffusionXLPipeline"), ("refiner", "StableDiffusionXLImg2ImgPipeline")]
)
def test_diffusers_loads_what_is_written(files: dict[str, Path], tmp_path: Path, family: str, pipeline: str) -> None:
    import diffusers

    folder, single = tmp_path / "folder", tmp_path / "single.safetensors"
    assert convert(files[family], folder, "--save_precision", "float") == 0
    assert convert(folder, single) == 0
    kind = getattr(diffusers, pipeline)
    theirs = tiny.diffusers_modules(family)
    loaded = kind.from_pretrained(folder, local_files_only=True)
    assert type(loaded).__name__ == pipeline
    alone = diffusers.UNet2DConditionModel.from_single_file(
        single, config=str(folder), subfolder="unet", local_files_only=True
    )
    unets = (loaded.unet.state_dict(), alone.state_dict())
    for name, tensor in theirs.unet.state_dict().items():
        assert all(torch.equal(unet[name], tensor.half().float()) for unet in unets), name
    for part, module in theirs.text_encoders.items():
        found = getattr(loaded, part).state_dict()
        assert all(torch.equal(found[name], tensor.half().float()) for name, tensor in module.state_dict().items())


def test_variants_and_shards(tmp_path: Path, capsys: Output) -> None:
    source = tiny.write_diffusers(tmp_path / "source", "sd1", seed=1, variant="fp16", dtype=torch.float16)
    assert convert(source, tmp_path / "one.safetensors") == 0
    tiny.diffusers_modules("sd1", seed=2).unet.save_pretrained(source / "unet", max_shard_size="5MB")
    assert (source / "unet" / "diffusion_pytorch_model.safetensors.index.json").exists()
    assert convert(source, tmp_path / "two.safetensors") == 0
    assert convert(source, tmp_path / "three.safetensors", "--source_variant", "fp16") == 0
    one, two, three = (read(tmp_path / f"{name}.safetensors") for name in ("one", "two", "three"))
    assert same(one, three)
    key = UNET + "out.2.weight"
    assert two[key].dtype == torch.float32 and not torch.equal(two[key].half(), one[key])
    assert same({name: two[name] for name in two if not name.startswith(UNET)},
                {name: one[name] for name in one if not name.startswith(UNET)})  # fmt: skip
    assert (
        convert(tmp_path / "one.safetensors", tmp_path / "bins", "--variant", "fp16", "--save_model_as", "diffusers")
        == 0
    )
    names = {path.name for path in (tmp_path / "bins").rglob("*.bin")}
    assert names == {"diffusion_pytorch_model.fp16.bin", "pytorch_model.fp16.bin"}
    assert convert(tmp_path / "bins", tmp_path / "back.safetensors") == 0
    assert same(read(tmp_path / "back.safetensors"), one)


def test_precision_is_changed_only_where_it_is_asked_for(files: dict[str, Path], tmp_path: Path) -> None:
    before = read(files["sd1"])
    mixed = {
        name: tensor.float() if "first_stage" in name and tensor.ndim else tensor for name, tensor in before.items()
    }
    mixed["alphas_cumprod"] = torch.linspace(1, 0, 7)
    save_file(mixed, tmp_path / "mixed.safetensors")
    assert convert(tmp_path / "mixed.safetensors", tmp_path / "as it is.safetensors") == 0
    assert same(read(tmp_path / "as it is.safetensors"), mixed)
    assert convert(tmp_path / "mixed.safetensors", tmp_path / "bf16.safetensors", "--save_precision", "bf16") == 0
    after = read(tmp_path / "bf16.safetensors")
    kinds = {name: tensor.dtype for name, tensor in after.items()}
    assert kinds.pop("alphas_cumprod") == torch.float32 and torch.equal(
        after["alphas_cumprod"], mixed["alphas_cumprod"]
    )
    assert kinds.pop("cond_stage_model.transformer.text_model.embeddings.position_ids") == torch.int64
    assert set(kinds.values()) == {torch.bfloat16}


# --- EMA, VAE, marks -------------------------------------------------------------------------------------------------


def test_ema_copies_are_left_out_used_or_kept(files: dict[str, Path], tmp_path: Path, capsys: Output) -> None:
    source, averages = with_averages(files["sd1"], tmp_path / "ema.safetensors")
    plain, out = read(files["sd1"]), tmp_path / "out.safetensors"
    assert convert(source, out) == 0
    assert same(read(out), plain) and "688 tensors of EMA copies" in capsys.readouterr().out
    assert convert(source, out, "--ema", "use", "--overwrite") == 0
    assert same(read(out), plain | averages)
    assert convert(source, out, "--ema", "keep", "--overwrite", "--save_precision", "bf16") == 0
    kept = read(out)
    assert kept.keys() == read(source).keys() and kept["model_ema.decay"] == torch.tensor(0.9999)
    assert kept["model_ema.diffusion_modelout2bias"].dtype == torch.bfloat16
    assert convert(source, tmp_path / "folder", "--ema", "use") == 0
    weight = read(tmp_path / "folder")["unet/conv_in.weight"]
    assert torch.equal(weight, averages[UNET + "input_blocks.0.0.weight"])


def test_ema_that_cannot_be_used_is_refused(files: dict[str, Path], tmp_path: Path, capsys: Output) -> None:
    some = tiny.write_single_file(tmp_path / "some.safetensors", "sd1", ema=True)
    whole, _ = with_averages(files["sd1"], tmp_path / "ema.safetensors")
    out = tmp_path / "out.safetensors"
    for source, target, ema, words in (
        (some, out, "use", "copies of only 1 of its U-Net's 686 tensors"),
        (files["sd1"], out, "use", "contains no EMA copies"),
        (whole, tmp_path / "folder", "keep", "--ema use"),
    ):
        assert convert(source, target, "--ema", ema) == 2
        assert words in capsys.readouterr().err and not target.exists()


def test_another_vae(files: dict[str, Path], tmp_path: Path) -> None:
    vae = tiny.write_vae_file(tmp_path / "vae.ckpt", seed=9)
    expected = {f"first_stage_model.{name}": tensor for name, tensor in read(vae).items()}
    assert convert(files["sdxl"], tmp_path / "out.safetensors", "--vae", vae) == 0
    assert same(read(tmp_path / "out.safetensors"), read(files["sdxl"]) | expected)
    without = {
        name: tensor for name, tensor in read(files["sdxl"]).items() if not name.startswith("first_stage_model.")
    }
    save_file(without, tmp_path / "no vae.safetensors")
    assert convert(tmp_path / "no vae.safetensors", tmp_path / "out", "--vae", vae, "--save_precision", "fp16") == 0
    assert read(tmp_path / "out")["vae/quant_conv.weight"].dtype == torch.float16


def test_a_schedule_is_told_in_files_of_every_family(tmp_path: Path) -> None:
    source = tiny.write_diffusers(tmp_path / "source", "sd2", prediction="v_prediction", zero_terminal_snr=True)
    assert convert(source, tmp_path / "one.safetensors") == 0
    assert {"v_pred", "ztsnr"} < read(tmp_path / "one.safetensors").keys()
    assert convert(tmp_path / "one.safetensors", tmp_path / "back") == 0
    assert scheduler(tmp_path / "back")["rescale_betas_zero_snr"] is True


def test_marks_go_from_keys_to_schedulers_and_back(files: dict[str, Path], tmp_path: Path, capsys: Output) -> None:
    marked, folder, back = tmp_path / "marked.safetensors", tmp_path / "folder", tmp_path / "back.safetensors"
    assert convert(files["sdxl"], marked, "--prediction_type", "v", "--zero_terminal_snr") == 0
    found, metadata = loras.read(marked)
    assert found["v_pred"].numel() == found["ztsnr"].numel() == 0
    assert metadata["modelspec.prediction_type"] == "v"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert convert(marked, folder) == 0
    assert (
        scheduler(folder)["prediction_type"] == "v_prediction" and scheduler(folder)["rescale_betas_zero_snr"] is True
    )
    assert convert(folder, back) == 0
    assert {"v_pred", "ztsnr"} < read(back).keys()
    capsys.readouterr()
    given = ("--prediction_type", "epsilon", "--no-zero_terminal_snr", "--overwrite")
    assert convert(marked, back, *given) == 0
    assert "declares v" in capsys.readouterr().out and not {"v_pred", "ztsnr"} & read(back).keys()
    assert convert(folder, tmp_path / "plain", *given) == 0
    plain = scheduler(tmp_path / "plain")
    assert plain["prediction_type"] == "epsilon" and not plain.get("rescale_betas_zero_snr")


def test_what_a_file_does_not_say_is_told_and_not_made_up(
    files: dict[str, Path], tmp_path: Path, capsys: Output
) -> None:
    assert convert(files["sd2"], tmp_path / "one.safetensors") == 0
    assert "epsilon is assumed; --prediction_type v" in capsys.readouterr().out
    metadata = loras.read(tmp_path / "one.safetensors")[1]
    assert metadata["modelspec.title"] == "one" and metadata["modelspec.sai_model_spec"] == "1.0.1"
    assert not {"modelspec.prediction_type", "modelspec.architecture", "modelspec.resolution"} & metadata.keys()
    assert convert(tmp_path / "one.safetensors", tmp_path / "two.safetensors", "--prediction_type", "v") == 0
    metadata = loras.read(tmp_path / "two.safetensors")[1]
    assert metadata["modelspec.architecture"] == "stable-diffusion-v2-768-v" and metadata["modelspec.title"] == "one"
    assert "epsilon is assumed" not in capsys.readouterr().out


# --- what a file is --------------------------------------------------------------------------------------------------


def odd_file(path: Path) -> Path:
    """A file with much that is unusual."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in tiny.original_state_dict("sd1", text_model_level=False).items():
        if not name.startswith("first_stage_model."):
            tensors[f"state_dict.{name}"] = tensor if name.startswith(UNET) and tensor.ndim == 4 else tensor.half()
    tensors["state_dict.cond_stage_model.transformer.embeddings.position_ids"] = torch.arange(77.0)[None]
    tensors["state_dict.model_ema.diffusion_modelout2bias"] = torch.zeros(4)
    tensors["state_dict.somebody.else"] = torch.tensor(torch.nan)
    save_file(tensors, path, {"modelspec.title": "Odd", "modelspec.prediction_type": "v"})
    return path


def test_a_dry_run_says_what_a_file_is(tmp_path: Path, capsys: Output) -> None:
    path = odd_file(tmp_path / "odd.safetensors")
    assert convert(path, tmp_path / "out", "--dry_run") == 0
    told = capsys.readouterr().out
    for words in (
        "odd.safetensors: Stable Diffusion 1.x, one .safetensors file",
        "686 tensors", "F16 (", "F32 (", "prediction: v; zero terminal SNR: no (not declared)",
        "modelspec.prediction_type in its metadata", "an extra prefix: state_dict.", "no VAE",
        "lack the text_model. level",
        "position_ids is F32", "EMA copies of 1 of 686",
        "1 tensor of no part of the model, kept unchanged: somebody.else",
        "U-Net: stored as F16, F32", "values: not read", "Odd",
    ):  # fmt: skip
        assert words in told, words
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert convert(path, "--dry_run", "--check_values") == 0
    assert "NaN or infinite in 1 tensor: somebody.else" in capsys.readouterr().out


def test_a_usual_file_is_not_unusual_and_torch_is_not_needed(files: dict[str, Path]) -> None:
    program = f"""
import sys
sys.path.insert(0, {str(loras.ROOT)!r})
from tools.convert_checkpoint import main
for path in {[str(path) for path in files.values()]!r}:
    assert main([path, "--dry_run"]) == 0
assert not {{"torch", "diffusers", "numpy"}} & set(sys.modules)
"""
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, encoding="utf-8", env=environment, check=False
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.count("nothing unusual") == len(files) and "Stable Diffusion XL, one" in answer.stdout


def test_what_is_no_model_is_described_and_refused(tmp_path: Path, capsys: Output) -> None:
    path = loras.write(tmp_path / "lora.safetensors", {"lora_unet_x.lora_down.weight": torch.ones(2, 3)})
    assert convert(path, "--dry_run") == 2
    told = capsys.readouterr()
    assert "1 tensor, 0.0 M values, F32" in told.out and "LoRA" in told.err


# --- what cannot be done ---------------------------------------------------------------------------------------------


def test_mistakes_have_a_way_out(files: dict[str, Path], tmp_path: Path, capsys: Output) -> None:
    (tmp_path / "there.safetensors").write_bytes(b"x")
    there, out = tmp_path / "there.safetensors", tmp_path / "out.safetensors"
    for words, told in (
        ((files["sd1"],), "--dry_run"),
        ((files["sd1"], there), "--overwrite"),
        ((files["sd1"], files["sd1"], "--overwrite"), "choose another name"),
        ((files["sd1"], tmp_path / "model.v1"), "--save_model_as"),
        ((files["sd1"], out, "--variant", "fp16"), "only the files of a folder"),
        ((files["sd1"], out, "--vae", tmp_path / "none"), "--vae"),
        ((tmp_path / "none.safetensors", out), "no such file"),
        ((files["sd1"], out, "--ema", "maybe"), "--ema"),
    ):
        assert convert(*words) == 2
        assert told in capsys.readouterr().err
    assert there.read_bytes() == b"x" and list(tmp_path.iterdir()) == [there]


@pytest.mark.parametrize("target", ["out.safetensors", "out.ckpt", "out"])
def test_what_is_not_whole_leaves_nothing(files: dict[str, Path], tmp_path: Path, target: str, capsys: Output) -> None:
    tensors = read(files["sdxl"])
    del tensors[UNET + "middle_block.1.transformer_blocks.3.attn1.to_q.weight"]
    save_file(tensors, tmp_path / "part.safetensors")
    assert convert(tmp_path / "part.safetensors", tmp_path / target) == 2
    assert "lacks tensors: mid_block.attentions.0.transformer_blocks.3.attn1.to_q.weight" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["part.safetensors"]


def test_values_that_do_not_fit_leave_nothing(tmp_path: Path, capsys: Output) -> None:
    source = tiny.write_single_file(tmp_path / "model.safetensors", "sd1")
    tensors = read(source)
    tensors[UNET + "out.2.bias"][0] = 1e6
    save_file(tensors, source)
    assert convert(source, tmp_path / "half", "--save_precision", "fp16") == 2
    assert "fit fp16" in capsys.readouterr().err and list(tmp_path.iterdir()) == [source]
    assert convert(source, tmp_path / "whole", "--save_precision", "bf16") == 0


def test_a_full_disk_leaves_nothing_and_what_stood_there(
    files: dict[str, Path], tmp_path: Path, capsys: Output
) -> None:
    with mounted(tmp_path / "disk", "8m") as disk:
        (disk / "there.ckpt").write_bytes(b"x")
        for target in ("out.safetensors", "there.ckpt", "folder"):
            assert convert(files["sd1"], disk / target, "--overwrite") == 2
            assert "could not be written" in capsys.readouterr().err
        assert [entry.name for entry in disk.iterdir()] == ["there.ckpt"]
        assert (disk / "there.ckpt").read_bytes() == b"x"


def test_keys_of_others_go_along(files: dict[str, Path], tmp_path: Path, capsys: Output) -> None:
    more = {"somebody.else": torch.arange(3), "cond_stage_model.model.attn_mask": torch.full((2, 2), -torch.inf)}
    source = tiny.write_single_file(tmp_path / "model.safetensors", "sd2", more=more)
    assert convert(source, tmp_path / "out.ckpt", "--save_precision", "fp16") == 0
    found = read(tmp_path / "out.ckpt")
    assert all(torch.equal(found[name], tensor) for name, tensor in more.items())
    assert "of no part of the model: somebody.else" in capsys.readouterr().out
    assert convert(source, tmp_path / "out") == 0
    assert "cannot contain them: cond_stage_model.model.attn_mask" in capsys.readouterr().out


def test_started_by_its_path_from_another_folder(files: dict[str, Path], tmp_path: Path) -> None:
    answer = loras.run(SCRIPT, files["refiner"], tmp_path / "уточнитель", "--save_precision", "bf16")
    assert answer.returncode == 0, answer.stderr
    assert "the refiner of Stable Diffusion XL" in answer.stdout and answer.stderr == ""
    assert {tensor.dtype for tensor in read(tmp_path / "уточнитель").values()} == {torch.bfloat16}
