"""A saved model is what was loaded, to the last bit, under the names that others expect; half a file never stands."""

from __future__ import annotations

import filecmp
import json

import pytest
import torch
from safetensors.torch import load_file

from library.checkpoints.files import read_header
from library.checkpoints.header import CheckpointError
from library.families.registry import load_model, save_model
from tests import tiny


def load(path, **options):
    return load_model(read_header(path), **options)


@pytest.mark.parametrize("family", tiny.ALL)
def test_there_and_back_is_the_same_file(files, tmp_path, family):
    save_model(load(files[family]), tmp_path / "back.safetensors", save_as="safetensors")
    ours, theirs = load_file(tmp_path / "back.safetensors"), load_file(files[family])
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in theirs)
    save_model(load(tmp_path / "back.safetensors"), tmp_path / "again.safetensors", save_as="safetensors")
    assert filecmp.cmp(tmp_path / "back.safetensors", tmp_path / "again.safetensors", shallow=False)


@pytest.mark.parametrize(
    ("family", "save_as"),
    [(family, kind) for family in tiny.FAMILIES for kind in ("diffusers", "diffusers_safetensors")]
    + [("sdxl", "diffusers_safetensors"), ("refiner", "diffusers")],
)
def test_folder_to_file_to_folder_is_the_same(files, tmp_path, family, save_as):
    save_model(load(files[f"{family} folder"]), tmp_path / "one.ckpt", save_as="ckpt")
    save_model(load(tmp_path / "one.ckpt"), tmp_path / "folder", save_as=save_as)
    ours, theirs = load(tmp_path / "folder"), tiny.diffusers_modules(family)
    for part, module in ours.modules().items():
        expected = getattr(theirs, part).state_dict()
        assert all(torch.equal(t, expected[name]) for name, t in module.state_dict().items())


@pytest.mark.parametrize(("family", "prediction"), [("sd1", "epsilon"), ("sd2", "v")])
def test_diffusers_loads_our_folder_offline(files, tmp_path, family, prediction):
    from diffusers import StableDiffusionPipeline

    model = load(files[family], prediction=prediction)
    save_model(model, tmp_path / "folder", save_as="diffusers_safetensors")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "folder", safety_checker=None, local_files_only=True)
    for part, module in model.modules().items():
        ours, theirs = module.state_dict(), getattr(pipeline, part).state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert pipeline.scheduler.config.prediction_type == {"epsilon": "epsilon", "v": "v_prediction"}[prediction]
    ids = pipeline.tokenizer("a dog!", padding="max_length", max_length=77, truncation=True).input_ids
    assert model.tokenizer(["a dog!"])["text_encoder"].ids.tolist() == [[ids]]
    image = pipeline("a dog", num_inference_steps=2, width=64, height=64, output_type="np").images
    assert image.shape == (1, 64, 64, 3)


def test_a_folder_tells_of_zero_terminal_snr(files, tmp_path):
    """arXiv 2305.08891, as diffusers' DDIM is told: the last of its schedule's timesteps is noise alone."""
    from diffusers import DDIMScheduler

    model = load(files["sd2"], prediction="v")
    model.zero_terminal_snr = True
    save_model(model, tmp_path / "folder", save_as="diffusers_safetensors")
    scheduler = DDIMScheduler.from_pretrained(tmp_path / "folder", subfolder="scheduler", local_files_only=True)
    scheduler.set_timesteps(4)
    assert float(scheduler.alphas_cumprod[-1]) == 0 and int(scheduler.timesteps[0]) == 999


def test_names_in_text_encoder_folders_are_those_of_older_readers(files, tmp_path):
    save_model(load(files["sd1"]), tmp_path / "folder", save_as="diffusers_safetensors")
    names = load_file(tmp_path / "folder" / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in names)
    index = json.loads((tmp_path / "folder" / "model_index.json").read_text(encoding="utf-8"))
    assert index["safety_checker"] == [None, None]


def test_sd2_keeps_all_text_keys_of_its_file_and_makes_those_a_folder_lacks(files, tmp_path):
    model = load(files["sd2"])
    assert len(model.kept) == 14
    assert not save_model(model, tmp_path / "a.safetensors", save_as="safetensors")
    (note,) = save_model(load(files["sd2 folder"]), tmp_path / "b.safetensors", save_as="safetensors")
    assert "14 tensors" in note
    made, real = load_file(tmp_path / "b.safetensors"), load_file(files["sd2"])
    assert made.keys() == real.keys()
    prefix = "cond_stage_model.model."
    last = f"{prefix}transformer.resblocks.2."
    for name in made:
        if name.startswith(last):
            assert torch.equal(made[name], made[name.replace("resblocks.2.", "resblocks.1.")])
    assert torch.equal(made[prefix + "text_projection"], torch.ones(128, 128)) and made[prefix + "logit_scale"] == 1


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_half_file_goes_through_float32_unchanged(tmp_path, family):
    source = tiny.write_single_file(tmp_path / "half.safetensors", family, dtype=torch.float16)
    save_model(load(source), tmp_path / "back.safetensors", save_as="safetensors", dtype=torch.float16)
    ours, theirs = load_file(tmp_path / "back.safetensors"), load_file(source)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_other_tensors_of_the_source_survive_in_their_own_dtype(tmp_path):
    source = tiny.write_single_file(tmp_path / "x.ckpt", "sd1", position_ids=True, text_model_level=False)
    save_model(load(source), tmp_path / "y.safetensors", save_as="safetensors", dtype=torch.float16)
    saved = load_file(tmp_path / "y.safetensors")
    ids = saved["cond_stage_model.transformer.embeddings.position_ids"]
    assert ids.dtype == torch.int64 and ids.shape == (1, 77)
    assert "cond_stage_model.transformer.embeddings.token_embedding.weight" in saved  # the file's own spelling


def test_a_ckpt_counts_on_from_its_source(tmp_path):
    source = tiny.write_single_file(tmp_path / "x.ckpt", "sd1", extra={"epoch": 2, "global_step": 100})
    save_model(load(source), tmp_path / "y.ckpt", save_as="ckpt", steps=10, epoch=1)
    saved = torch.load(tmp_path / "y.ckpt", weights_only=True)
    assert (saved["epoch"], saved["global_step"]) == (3, 110)


def test_metadata_is_written(files, tmp_path):
    save_model(load(files["sd1"]), tmp_path / "x.safetensors", save_as="safetensors", metadata={"modelspec.title": "t"})
    assert read_header(tmp_path / "x.safetensors").metadata == {"modelspec.title": "t"}


def test_the_source_may_be_written_over(tmp_path):
    source = tiny.write_single_file(tmp_path / "x.safetensors", "sd2")
    before = source.read_bytes()
    model = load(source)
    save_model(model, source, save_as="safetensors")
    assert len(source.read_bytes()) == len(before)
    assert all(torch.equal(tensor, load_file(source)[name]) for name, tensor in model.kept.items())


@pytest.mark.parametrize("save_as", ["safetensors", "ckpt", "diffusers", "diffusers_safetensors"])
def test_a_model_with_a_nan_is_not_written(files, tmp_path, save_as):
    model = load(files["sd1"])
    with torch.no_grad():
        model.text_encoders["text_encoder"].final_layer_norm.bias[3] = torch.nan
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"final_layer_norm\.bias"):
        save_model(model, tmp_path / "empty" / "x", save_as=save_as)
    assert not list((tmp_path / "empty").iterdir())


def test_an_earlier_folder_stands_until_the_new_one_is_whole(files, tmp_path):
    model, folder = load(files["sd1"]), tmp_path / "folder"
    save_model(model, folder, save_as="diffusers_safetensors")
    old = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    with torch.no_grad():
        model.vae.quant_conv.bias[0] = torch.inf
    with pytest.raises(CheckpointError, match="quant_conv"):
        save_model(model, folder, save_as="diffusers_safetensors")
    assert torch.equal(
        load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.weight"], old["conv_in.weight"]
    )
    with torch.no_grad():
        model.vae.quant_conv.bias[0] = 0.0
    save_model(model, folder, save_as="diffusers_safetensors")
    assert load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")["quant_conv.bias"][0] == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_a_folder_of_something_else_is_never_replaced(files, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="not a diffusers model"):
        save_model(load(files["sd1"]), tmp_path / "photos", save_as="diffusers")
    assert (tmp_path / "photos" / "a.png").read_bytes() == b"x"
