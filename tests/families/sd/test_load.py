"""A loaded model is the file's model: diffusers, reading the same file, computes the same numbers to the last bit."""

from __future__ import annotations

import argparse
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from library.checkpoints.files import read_header
from library.checkpoints.header import CheckpointError, Header
from library.families.registry import detect, load_model
from library.families.sd.vae import decode_latents, encode_images
from tests import tiny

PARTS = {family: ("unet", "vae", *tiny.text_names(family)) for family in tiny.ALL}


def load(path, **options):
    return load_model(read_header(path), **options)


@cache
def made(family, seed=0):
    """What tiny makes the files of. Not to be changed."""
    return tiny.diffusers_modules(family, seed)


def same_weights(model, modules, parts=None) -> bool:
    """`modules`: tiny's or those of a pipeline of diffusers; of all parts of the model, or of these."""
    chosen = parts or PARTS[model.family.name]
    pairs = [(model.modules()[part].state_dict(), getattr(modules, part).state_dict()) for part in chosen]
    return all(ours.keys() == theirs.keys() for ours, theirs in pairs) and all(
        torch.equal(ours[name], theirs[name]) for ours, theirs in pairs for name in ours
    )


@pytest.mark.parametrize(("family", "part"), [(family, part) for family in ("sd1", "sdxl") for part in PARTS[family]])
def test_a_part_alone_is_the_same_and_the_others_are_not_there(files, family, part):
    header = read_header(files[family])
    model = detect(header).load(header, only=(part,))
    assert same_weights(model, made(family), (part,))
    assert list(model.modules()) == [part] and list(model.text_encoders) == list(tiny.text_names(family))


@pytest.mark.parametrize("family", tiny.ALL)
@pytest.mark.parametrize("layout", ["", " folder"])
def test_weights_and_configurations_are_those_of_the_source(files, family, layout):
    model, modules = load(files[family + layout]), made(family)
    assert same_weights(model, modules)
    for part in ("unet", "vae"):
        ours, theirs = model.modules()[part].config, getattr(modules, part).config
        different = {key for key in theirs if as_list(ours[key]) != as_list(theirs[key])}
        assert different <= {"_use_default_values", "sample_size", "upcast_attention"}
    for name, module in model.text_encoders.items():
        expected = tiny.text_config(family, name)
        if name == "text_encoder_2":  # its end is told by its id, and not by being the highest: see clip_text
            expected |= {"eos_token_id": 49407}
        assert {key: getattr(module.config, key) for key in expected} == expected
    assert model.prediction == "epsilon" and not model.zero_terminal_snr


def as_list(value):
    return list(value) if isinstance(value, tuple) else value


def aligned(module: torch.nn.Module) -> None:
    """Move weights from the mapped file to memory of their own.

    diffusers leaves them where they lie in the file, at any address; kernels then add up in another order (1e-6).
    """
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_diffusers_computes_the_same_from_the_same_file(files, family):
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel

    path, folder = str(files[family]), str(files[f"{family} folder"])
    model = load(files[family])
    unet = UNet2DConditionModel.from_single_file(path, config=folder, subfolder="unet", local_files_only=True)
    vae = AutoencoderKL.from_single_file(path, config=folder, subfolder="vae", local_files_only=True)
    pipeline = StableDiffusionPipeline.from_single_file(path, config=folder, local_files_only=True, safety_checker=None)
    for module in (unet, vae, pipeline.text_encoder):
        aligned(module)
    generator = torch.Generator().manual_seed(1)
    latents, pixels = (torch.randn(2, c, s, s, generator=generator) for c, s in ((4, 8), (3, 64)))
    times = torch.tensor([3, 700])
    text_inputs = model.tokenizer(["a photo of sks dog", "dog " * 90])
    with torch.no_grad():
        given = model.family.encode_text(model.text_encoders, text_inputs)
        assert torch.equal(given["states"], pipeline.text_encoder(text_inputs["text_encoder"].ids[:, 0])[0])
        ours = model.family.predict(model.backbone, latents, times, given)
        assert torch.equal(ours, unet(latents, times, given["states"]).sample)
        posterior = vae.encode(pixels).latent_dist
        assert torch.equal(model.vae.encode(pixels).latent_dist.parameters, posterior.parameters)
        assert torch.equal(decode_latents(model.vae, latents), vae.decode(latents).sample)


def test_the_states_of_sd2_are_the_penultimate_layers_of_the_whole_encoder(files):
    """Oracle: an encoder with the file's every layer, of which the last but one is taken."""
    from transformers import CLIPTextConfig, CLIPTextModel

    model = load(files["sd2"])
    config = tiny.text_config("sd2")
    whole = CLIPTextModel(CLIPTextConfig(**config | {"num_hidden_layers": config["num_hidden_layers"] + 1})).eval()
    whole.load_state_dict(model.text_encoders["text_encoder"].state_dict(), strict=False)
    text_inputs = model.tokenizer(["a photo of sks dog"])
    with torch.no_grad():
        penultimate = whole(text_inputs["text_encoder"].ids[:, 0], output_hidden_states=True).hidden_states[-2]
        given = model.family.encode_text(model.text_encoders, text_inputs)
        assert torch.equal(given["states"], whole.final_layer_norm(penultimate))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"text_model_level": False},
        {"position_ids": True},
        {"position_ids": True, "text_model_level": False},
        {"ema": True},
        {"state_dict_level": False},
        {"extra": {"epoch": 3, "global_step": 100, "callbacks": {"x": argparse.Namespace(monitor="loss")}}},
    ],
)
def test_variants_in_the_wild_load(tmp_path, kwargs):
    path = tiny.write_single_file(tmp_path / "model.ckpt", "sd1", **kwargs)
    assert same_weights(load(path), made("sd1"))


@pytest.mark.parametrize("family", [*tiny.FAMILIES, "sdxl"])
def test_half_files_load_into_float32(tmp_path, family):
    path = tiny.write_single_file(tmp_path / "half.safetensors", family, dtype=torch.float16)
    model = load(path)
    expected = made(family)
    for part, module in model.modules().items():
        theirs = getattr(expected, part).state_dict()
        for name, tensor in module.state_dict().items():
            assert tensor.dtype == torch.float32 and torch.equal(tensor, theirs[name].half().float())
    halved = load(path, dtype=torch.bfloat16)
    assert {module.dtype for module in halved.modules().values()} == {torch.bfloat16}


def test_the_file_is_never_written_through(tmp_path):
    """float32 into float32 must be a copy too: training changes weights in place."""
    path = tiny.write_single_file(tmp_path / "x.safetensors", "sd1")
    before = path.read_bytes()
    model = load(path)
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.add_(1.0)
    assert path.read_bytes() == before
    path.unlink()  # nothing holds on to it


def test_a_loaded_model_trains(files):
    model = load(files["sd1"])
    text_inputs = model.tokenizer(["a dog"])
    given = model.family.encode_text(model.text_encoders, text_inputs)
    model.family.predict(model.backbone, torch.randn(1, 4, 8, 8), torch.tensor([5]), given).sum().backward()
    assert all(parameter.grad is not None for parameter in model.backbone.parameters())
    assert model.text_encoders["text_encoder"].embeddings.token_embedding.weight.grad is not None


@pytest.mark.parametrize(
    "write",
    [
        lambda root: tiny.write_vae_file(root / "vae.safetensors"),
        lambda root: tiny.write_vae_file(root / "vae.pt"),
        lambda root: tiny.write_vae_file(root / "vae.safetensors", prefix="first_stage_model."),
        lambda root: tiny.write_single_file(root / "whole.ckpt", "sd1", 5),
        lambda root: tiny.write_diffusers(root / "whole", "sd1", 5),
        lambda root: tiny.write_diffusers(root / "whole", "sd1", 5) / "vae",
    ],
)
def test_a_vae_of_its_own_replaces_that_of_the_model(files, tmp_path, write):
    model = load(files["sd1"], vae=write(tmp_path))
    assert same_weights(model, made("sd1", 5), ("vae",))
    assert same_weights(model, made("sd1"), ("unet", "text_encoder"))
    assert "VAE from" in model.notes[0]


def test_a_file_without_a_vae_needs_one(files, tmp_path):
    whole = read_header(files["sd1"])
    tensors = {name: info for name, info in whole.tensors.items() if not name.startswith("first_stage_model.")}
    header = Header(whole.path, whole.kind, tensors, places=whole.places)
    with pytest.raises(CheckpointError, match="vae"):
        load_model(header)
    model = load_model(header, vae=tiny.write_vae_file(tmp_path / "vae.safetensors"))
    assert same_weights(model, made("sd1"), ("unet", "text_encoder"))


def test_a_folder_tells_its_prediction_and_the_caller_overrules_it(tmp_path):
    folder = tiny.write_diffusers(tmp_path / "v", "sd2", prediction="v_prediction")
    assert load(folder).prediction == "v"
    assert load(folder, prediction="epsilon").prediction == "epsilon"


def test_a_tensor_too_few_or_of_another_shape_is_named(files):
    whole = read_header(files["sd1"])
    name = "model.diffusion_model.middle_block.1.proj_out.bias"
    tensors = {key: info for key, info in whole.tensors.items() if key != name}
    with pytest.raises(CheckpointError, match=r"mid_block\.attentions\.0\.proj_out\.bias"):
        load_model(Header(whole.path, whole.kind, tensors, places=whole.places))


def test_a_posterior_sample_depends_on_its_own_generator_only(files):
    model = load(files["sd1"])
    pixels = torch.rand(3, 3, 64, 64) * 2 - 1

    def sample(indices):
        generators = [torch.Generator().manual_seed(100 + index) for index in indices]
        return encode_images(model.vae, pixels[list(indices)], generators)

    together, alone = sample((0, 1, 2)), sample((2,))
    assert together.shape == (3, 4, 8, 8) and together.dtype == torch.float32
    assert torch.allclose(together[2:], alone, atol=1e-5)
    with pytest.raises(ValueError, match="generators"):
        encode_images(model.vae, pixels, [])
    with torch.no_grad():
        posterior = model.vae.encode(pixels[:1]).latent_dist
    noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(100))
    assert torch.equal(sample((0,)), posterior.mean + posterior.std * noise)


def test_loading_brings_no_package_that_only_quantised_weights_need(files):
    """It costs every start a second; 8-bit optimisers can still import it."""
    program = (
        "import importlib.util, sys\n"
        "from library.checkpoints.files import read_header\n"
        "from library.families.registry import load_model\n"
        f"load_model(read_header({str(files['sd1'])!r}))\n"
        "assert 'bitsandbytes' not in sys.modules and 'torch._inductor.compile_fx' not in sys.modules\n"
        "assert importlib.util.find_spec('bitsandbytes') is not None\n"
    )
    root = Path(__file__).resolve().parents[3]
    assert subprocess.run([sys.executable, "-c", program], cwd=root, check=False).returncode == 0
