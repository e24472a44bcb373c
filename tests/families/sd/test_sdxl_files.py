"""Files of SDXL and its refiner as they are found: read whatever their spelling, written back as they were, and read by
diffusers' own loaders with the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from library.checkpoints.files import read_header
from library.checkpoints.header import CheckpointError
from library.families.family import Model
from library.families.registry import detect, load_model, save_model
from tests import tiny

MARKS = {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}
TE2 = "conditioner.embedders.1.model."


def load(path: Path, **options: Any) -> Model:
    return load_model(read_header(path), **options)


def same(ours: Model, modules: Any) -> bool:
    """All weights of a model are those of tiny's modules or of a pipeline of diffusers."""
    pairs = [(module.state_dict(), getattr(modules, part).state_dict()) for part, module in ours.modules().items()]
    return all(one.keys() == other.keys() for one, other in pairs) and all(
        torch.equal(one[name], other[name]) for one, other in pairs for name in one
    )


# --- spellings ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What fine-tunes, merges and ComfyUI leave in files, all in one."""
    tensors = tiny.original_state_dict("sdxl")
    more = {
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        f"{TE2}transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        f"{TE2}text_projection.weight": tensors.pop(f"{TE2}text_projection").T.contiguous(),
        "denoiser.sigmas": torch.rand(1000),
        "recipe_of_the_merge": torch.zeros(1, 4),
        "model_ema.decay": torch.tensor(0.9999),
    }
    path = tmp_path_factory.mktemp("spelled") / "merge.ckpt"
    torch.save({"state_dict": tensors | more | MARKS, "global_step": 5}, path)
    return path


def test_a_file_of_any_spelling_is_the_same_model(spelled: Path) -> None:
    model = load(spelled)
    assert model.family.name == "sdxl" and same(model, tiny.diffusers_modules("sdxl"))
    assert model.prediction == "v" and model.zero_terminal_snr
    assert any("recipe_of_the_merge" in note for note in model.notes) and any("EMA" in note for note in model.notes)


def test_and_is_written_back_in_its_spelling(spelled: Path, tmp_path: Path) -> None:
    source = torch.load(spelled, weights_only=True)["state_dict"]
    save_model(load(spelled), tmp_path / "back.ckpt", save_as="ckpt", steps=2)
    saved = torch.load(tmp_path / "back.ckpt", weights_only=True)
    back = saved["state_dict"]
    assert back.keys() == source.keys() - {"model_ema.decay"} and saved["global_step"] == 7
    assert all(torch.equal(back[name], source[name]) and back[name].dtype == source[name].dtype for name in back)


# --- what the U-Net predicts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "save_as"), [("sdxl", "safetensors"), ("sdxl", "diffusers"), ("refiner", "ckpt")])
def test_a_model_that_predicts_v_says_so_in_every_kind_of_file(
    files: Any, tmp_path: Path, family: str, save_as: Any
) -> None:
    """ComfyUI, Forge and others go by the keys; diffusers by the folder's scheduler."""
    model = load(files[family], prediction="v")
    model.zero_terminal_snr = True
    path = tmp_path / ("a" if save_as == "diffusers" else f"a.{save_as}")
    save_model(model, path, save_as=save_as)
    header = read_header(path)
    again = detect(header).load(header, only=())
    assert again.prediction == "v" and again.zero_terminal_snr
    if save_as == "diffusers":
        written = json.loads((path / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
        assert (written["prediction_type"], written["rescale_betas_zero_snr"]) == ("v_prediction", True)
    else:
        assert header.tensors.keys() >= MARKS.keys()


def test_marks_that_are_no_longer_true_are_not_written(spelled: Path, tmp_path: Path) -> None:
    model = load(spelled, prediction="epsilon")
    model.zero_terminal_snr = False
    save_model(model, tmp_path / "a.safetensors", save_as="safetensors")
    assert not read_header(tmp_path / "a.safetensors").tensors.keys() & MARKS.keys()


# --- what others read -----------------------------------------------------------------------------------------------


def pipelines() -> dict[str, Any]:
    from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline

    return {"sdxl": StableDiffusionXLPipeline, "refiner": StableDiffusionXLImg2ImgPipeline}


@pytest.mark.parametrize("family", tiny.SDXL_FAMILIES)
def test_diffusers_loads_our_folder_and_draws(files: Any, tmp_path: Path, family: str) -> None:
    model = load(files[family])
    save_model(model, tmp_path / "folder", save_as="diffusers_safetensors")
    pipeline = pipelines()[family].from_pretrained(tmp_path / "folder", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    assert same(model, pipeline)
    asks = {"num_inference_steps": 2, "output_type": "np"}
    size = {"width": 64, "height": 64}
    if family == "sdxl":
        assert pipeline.config.force_zeros_for_empty_prompt
        image = pipeline("a dog", **asks, **size).images
    else:
        assert pipeline.text_encoder is None and pipeline.tokenizer is None
        assert pipeline.config.requires_aesthetics_score and not pipeline.config.force_zeros_for_empty_prompt
        image = pipeline("a dog", image=torch.rand(1, 3, 64, 64), strength=0.9, **asks).images
    assert image.shape == (1, 64, 64, 3)
    theirs = [getattr(pipeline, name) for name in ("tokenizer", "tokenizer_2") if getattr(pipeline, name)]
    for ours, their in zip(model.tokenizer.by_encoder.values(), theirs, strict=True):
        assert ours.ids(["a dog!"]) == [[their("a dog!", padding="max_length", max_length=77).input_ids]]


@pytest.mark.parametrize("family", tiny.SDXL_FAMILIES)
def test_diffusers_reads_the_same_weights_from_our_file(files: Any, tmp_path: Path, family: str) -> None:
    """Its loader of single files turns the projection round, as we do."""
    model = load(files[f"{family} folder"])
    with torch.no_grad():
        model.text_encoders["text_encoder_2"].text_projection.weight[0] += 1  # no longer what the fixture's file has
    save_model(model, tmp_path / "one.safetensors", save_as="safetensors")
    pipeline = pipelines()[family].from_single_file(
        str(tmp_path / "one.safetensors"), config=str(files[f"{family} folder"]), local_files_only=True
    )
    assert same(model, pipeline)


# --- other ways of loading ------------------------------------------------------------------------------------------


def test_a_vae_of_its_own_has_the_familys_scale(files: Any, tmp_path: Path) -> None:
    """A VAE alone does not say its scale: it is that of the model that it is for."""
    model = load(files["sdxl"], vae=tiny.write_vae_file(tmp_path / "vae.safetensors"))
    expected = tiny.diffusers_modules("sd1", 5).vae.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.vae.state_dict().items())
    assert model.vae.config.scaling_factor == 0.13025 and "VAE from" in model.notes[0]


@pytest.mark.parametrize("family", ["sdxl", "refiner folder"])
def test_a_file_that_is_read_and_not_mapped_is_the_same(files: Any, family: str) -> None:
    """--disable_mmap_load_safetensors."""
    header = read_header(files[family])
    assert same(detect(header).load(header, mapped=False), tiny.diffusers_modules(family.partition(" ")[0]))


def test_matrices_may_have_a_dtype_of_their_own(files: Any) -> None:
    header = read_header(files["sdxl"])
    model = detect(header).load(header, matrix_dtype=torch.bfloat16)
    for name, module in model.modules().items():
        for parameter in module.parameters():
            assert parameter.dtype == (torch.bfloat16 if parameter.ndim > 1 and name != "vae" else torch.float32)


def test_a_nan_in_the_second_encoder_is_found_and_not_written(files: Any, tmp_path: Path) -> None:
    model = load(files["sdxl"])
    with torch.no_grad():
        model.text_encoders["text_encoder_2"].text_projection.weight[0, 0] = torch.nan
    for save_as, name in (("safetensors", "x.safetensors"), ("diffusers", "x")):
        with pytest.raises(CheckpointError, match="text_projection"):
            save_model(model, tmp_path / name, save_as=save_as)
    assert not list(tmp_path.iterdir())


def test_a_folder_in_half_precision_is_the_file_in_half_precision(files: Any, tmp_path: Path) -> None:
    model = load(files["refiner"])
    save_model(model, tmp_path / "folder", save_as="diffusers", dtype=torch.float16)
    save_model(model, tmp_path / "file.safetensors", save_as="safetensors", dtype=torch.float16)
    folder, file = load(tmp_path / "folder"), load(tmp_path / "file.safetensors")
    assert {info.dtype for info in read_header(tmp_path / "folder").tensors.values()} == {"F16"}
    for part, module in folder.modules().items():
        expected = file.modules()[part].state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in module.state_dict().items())


def test_a_file_of_the_refiner_holds_no_first_encoder(files: Any, tmp_path: Path) -> None:
    save_model(load(files["refiner folder"]), tmp_path / "a.safetensors", save_as="safetensors")
    names, real = load_file(tmp_path / "a.safetensors"), load_file(files["refiner"])
    assert names.keys() == real.keys() - {"conditioner.embedders.0.model.logit_scale"}
    assert all(torch.equal(tensor, real[name]) for name, tensor in names.items())
