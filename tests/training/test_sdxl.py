"""SDXL and its refiner with the real recipes: exact resume, trained modules, and the loss by diffusers' modules."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import sdxl_train
import sdxl_train_network
import train_db
from library.checkpoints.files import read_header
from library.families.registry import load_model
from library.runtime.seeds import torch_generator
from library.training.recipe import Recipe
from tests import tiny
from tests.training.running import Outcome, World, assert_equal_files, run

MODELS = tiny.SDXL_FAMILIES


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    for family in MODELS:
        tiny.write_single_file(root / f"{family}.safetensors", family)
    tiny.write_images(root / "train" / "1_sks dog", 2, size=(80, 64))
    tiny.write_images(root / "train" / "1_zwx cat", 2, size=(64, 96), seed=3)
    return World(root)


def train(
    world: World,
    out: Path,
    capsys: pytest.CaptureFixture[str],
    recipe: Recipe = train_db.RECIPE,
    family: str = "sdxl",
    **flags: Any,
) -> Outcome:
    model = world.root / f"{family}.safetensors"
    outcome = run(world.arguments(out, pretrained_model_name_or_path=model, **flags), capsys, recipe)
    assert outcome.code == 0, outcome.err
    return outcome


CASES: dict[str, tuple[Recipe, str, dict[str, Any]]] = {
    "all weights, every augmentation": (
        train_db.RECIPE, "sdxl",
        {"flip_aug": True, "random_crop": True, "learning_rate_te1": 1e-4, "learning_rate_te2": 3e-4},
    ),
    "adapter, captions cached, dropped ones zero": (
        sdxl_train_network.RECIPE, "sdxl",
        {
            "network_module": "networks.lora", "cache_latents": True, "cache_text_encoder_outputs": True,
            "caption_dropout_rate": 0.5, "empty_caption": "zeros", "flip_aug": True,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_resumed_is_uninterrupted(case: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, family, own = CASES[case]
    flags = {**own, "train_batch_size": 2, "max_train_steps": 3}
    whole = train(world, tmp_path / "whole", capsys, recipe, family, **flags, save_every_n_steps=2, save_state=True)
    state = tmp_path / "whole" / "dog-step00000002-state"
    rest = train(world, tmp_path / "rest", capsys, recipe, family, **flags, resume=state)
    assert sorted(whole.losses) == [1, 2, 3] and rest.losses == {3: whole.losses[3]}
    assert_equal_files(tmp_path / "whole" / "dog.safetensors", tmp_path / "rest" / "dog.safetensors")


def changed(before: Path, after: Path) -> set[str]:
    """The names of tensors that differ."""
    one, other = load_file(before), load_file(after)
    assert one.keys() == other.keys()
    return {name for name in one if not torch.equal(one[name], other[name])}


def test_blocks_and_text_encoders_with_a_rate_of_0_stay(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # as kohya counts: 0 embeddings, 1 to 9 input, 10 to 12 middle, 13 to 21 output, 22 what comes out
    rates = ["0"] * 23
    rates[8] = rates[22] = "1e-3"
    flags = {"train_text_encoder": True, "learning_rate_te1": 1e-3, "learning_rate_te2": 0, "max_train_steps": 1,
             "save_state_on_train_end": True}  # fmt: skip
    outcome = train(world, tmp_path, capsys, sdxl_train.RECIPE, block_lr=",".join(rates), **flags)
    different = changed(world.root / "sdxl.safetensors", tmp_path / "dog.safetensors")
    unet = {name for name in different if name.startswith("model.diffusion_model.")}
    assert unet and all(
        name.removeprefix("model.diffusion_model.").startswith(("input_blocks.7.", "out.")) for name in unet
    )
    texts = {name for name in different if name.startswith("conditioner.")}
    assert texts and all(name.startswith("conditioner.embedders.0.") for name in texts)
    assert different == unet | texts

    # the plan counts what is stored of such a run: no frozen weights, and no moments of them
    (planned,) = re.findall(r" and 1 state of ([0-9.]+) MB", outcome.out + outcome.err)
    stored = sum(path.stat().st_size for path in (tmp_path / "dog-state").iterdir())
    assert float(planned) * 1e6 == pytest.approx(stored, rel=0.05)


def test_rates_of_0_for_all_blocks_leave_the_unet_as_it_is(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = ",".join(["0"] * 23)
    train(world, tmp_path, capsys, sdxl_train.RECIPE, block_lr=rates, train_text_encoder=True, max_train_steps=1)
    different = changed(world.root / "sdxl.safetensors", tmp_path / "dog.safetensors")
    assert different and all(name.startswith("conditioner.") for name in different)


def test_the_programs_of_sd_scripts_train_the_unet_alone_unless_asked(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(world, tmp_path, capsys, sdxl_train.RECIPE, max_train_steps=1)
    different = changed(world.root / "sdxl.safetensors", tmp_path / "dog.safetensors")
    assert different and all(name.startswith("model.diffusion_model.") for name in different)


def test_a_wrong_number_of_block_rates_is_refused(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = world.arguments(
        tmp_path, pretrained_model_name_or_path=world.root / "sdxl.safetensors", block_lr="1e-4,1e-4"
    )
    outcome = run(arguments, capsys)
    assert outcome.code == 2 and "has 23 blocks" in outcome.err


@pytest.mark.parametrize(("family", "save_as"), [("refiner", "diffusers_safetensors")])
def test_the_saved_file_is_the_model(
    family: str, save_as: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a learning rate near 0, the file equals the base model. Other formats: tests/families/sd/test_save.py."""
    flags = {"learning_rate": 1e-30, "max_train_steps": 1, "save_model_as": save_as, "use_safetensors": False}
    train(world, tmp_path, capsys, family=family, optimizer_type="SGDNesterov", **flags)
    (written,) = (path for path in tmp_path.glob("dog*") if path.suffix not in (".png", ".jsonl"))  # curve and record
    one, other = (load_model(read_header(path)).modules() for path in (world.root / f"{family}.safetensors", written))
    for name, module in one.items():
        theirs = other[name].state_dict()
        assert all(torch.allclose(tensor, theirs[key], 0, 1e-20) for key, tensor in module.state_dict().items()), name


def test_base_and_refiner_share_latents_and_keep_captions_apart(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The refiner is taken with the base's VAE, as it is published."""
    vae = world.root / "sdxl.safetensors"
    shared = {
        "vae": vae, "cache_latents_to_disk": True, "cache_text_encoder_outputs_to_disk": True, "max_train_steps": 1,
        "train_data_dir": world.root / "shared", "data_cache_dir": tmp_path / "cache", "train_text_encoder": None,
    }  # fmt: skip
    tiny.write_images(world.root / "shared" / "1_dog", 2)
    base = train(world, tmp_path / "base", capsys, sdxl_train.RECIPE, **shared)
    refined = train(world, tmp_path / "refiner", capsys, sdxl_train.RECIPE, "refiner", **shared)
    assert "latents: 0 read, 2 encoded" in base.err and "captions: 0 read, 1 encoded" in base.err
    assert "latents: 2 read, 0 encoded" in refined.err and "captions: 0 read, 1 encoded" in refined.err


# --- the loss of one sample, written out with diffusers -------------------------------------------------------------

IMAGE = (75, 91)  # odd sides; covered by 64 x 64: scaled to 64 x 78, cut at (top 7, left 0)
CAPTION = "a photo of sks dog"


@pytest.fixture(scope="module")
def odd(world: World) -> World:
    """A world of one image with odd sides."""
    tiny.write_images(world.root / "odd" / "1_dog", 1, size=IMAGE)
    (world.root / "odd" / "1_dog" / "image_00.txt").write_text(CAPTION, encoding="utf-8")
    return world


def pipeline_of(world: World, family: str) -> Any:
    """diffusers' own pipeline on the same weights."""
    import diffusers

    folder = world.root / f"{family} folder"
    if not folder.is_dir():
        tiny.write_diffusers(folder, family)
    kinds = {"sdxl": diffusers.StableDiffusionXLPipeline, "refiner": diffusers.StableDiffusionXLImg2ImgPipeline}
    return kinds[family].from_pretrained(folder, local_files_only=True, safety_checker=None)


def noise_level(t: int) -> float:
    """The cumulative product of DDPM with SD's scaled-linear betas."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return float(np.cumprod(1 - betas)[t])


def pixels_of(path: Path) -> torch.Tensor:
    """The image scaled to cover 64 x 64 and cut in the middle, in [-1, 1]."""
    import cv2

    image = cv2.resize(np.asarray(Image.open(path).convert("RGB")), (64, 78), interpolation=cv2.INTER_AREA)
    cut = image[7 : 7 + 64]
    return torch.from_numpy(cut.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1


@pytest.mark.parametrize(
    ("family", "numbers", "timesteps"),
    [("sdxl", (91, 75, 7, 0, 64, 64), (0, 1000)), ("refiner", (91, 75, 7, 0, 6.5), (0, 200))],
)
def test_the_loss_is_that_of_diffusers_modules(
    family: str,
    numbers: tuple[float, ...],
    timesteps: tuple[int, int],
    odd: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    score = {"data_aesthetic_score": 6.5} if family == "refiner" else {}
    flags = {"train_data_dir": odd.root / "odd", "max_train_steps": 1, "learning_rate_te": 0, **score}
    outcome = train(odd, tmp_path, capsys, family=family, **flags)

    pipeline = pipeline_of(odd, family)
    first = [CAPTION] if family == "sdxl" else None
    states, _, pooled, _ = pipeline.encode_prompt(
        first or CAPTION, prompt_2=CAPTION, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    draw = torch_generator(1, "noise", 0)
    low, high = timesteps
    t = int(torch.randint(low, high, (), generator=draw))
    noise = torch.randn((4, 8, 8), generator=draw)[None]
    with torch.no_grad():
        posterior = pipeline.vae.encode(pixels_of(odd.root / "odd" / "1_dog" / "image_00.png")).latent_dist
        own = torch.randn((4, 8, 8), generator=torch_generator(1, "posterior", 0))[None]
        latents = (posterior.mean + posterior.std * own) * 0.13025
        level = noise_level(t)
        output = pipeline.unet(
            level**0.5 * latents + (1 - level) ** 0.5 * noise,
            t,
            encoder_hidden_states=states,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": torch.tensor([numbers])},
        ).sample
    assert outcome.losses[1] == pytest.approx(float((output - noise).square().mean()), rel=1e-4)


def test_the_projection_of_sd_scripts_is_another_for_files_alone(
    odd: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It takes OpenCLIP's bare matrix for the weight of a Linear; of a folder it reads that weight itself."""
    pipeline_of(odd, "sdxl")  # writes the folder
    losses = {}
    for model, ways in (("sdxl.safetensors", ("published", "kohya")), ("sdxl folder", ("kohya",))):
        for way in ways:
            arguments = odd.arguments(
                tmp_path / way, pretrained_model_name_or_path=odd.root / model, train_data_dir=odd.root / "odd",
                max_train_steps=1, train_text_encoder=None, text_projection=way, save_model_as="safetensors",
            )  # fmt: skip
            outcome = run(arguments, capsys, sdxl_train.RECIPE)
            assert outcome.code == 0, outcome.err
            losses[model, way] = outcome.losses[1]
    published, other, folder = losses.values()
    assert published == folder != other
