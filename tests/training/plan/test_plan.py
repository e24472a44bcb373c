"""The plan: what is decided from options, files and machine before a weight is loaded."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from library.families.sd.sd import SD1
from library.families.sd.sdxl import SDXL
from library.options.mistakes import UserError
from library.options.parse import parse
from library.runtime.device import Machine
from library.runtime.precision import resolve
from library.training.plan.facts import avoid_fp16_vae
from library.training.plan.plan import Plan, decide
from library.training.plan.text import describe
from tests import tiny
from tests.training.running import World, make_world

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def plan_of(world: World, out: Path, **flags: object) -> Plan:
    return decide(parse(world.arguments(out, **flags)))


def mistakes_of(world: World, out: Path, **flags: object) -> list[str]:
    with pytest.raises(UserError) as raised:
        plan_of(world, out, **flags)
    return [mistake.what for mistake in raised.value.mistakes]


COUNT_ARENAS = """
import ctypes, sys
import train_db
from library.training.command import run_recipe

code = run_recipe(train_db.RECIPE, sys.argv[2:])
library = ctypes.CDLL(None)
library.fopen.restype, library.malloc_info.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
library.fclose.argtypes = (ctypes.c_void_p,)
stream = library.fopen(sys.argv[1].encode(), b"w")
library.malloc_info(0, stream)
library.fclose(stream)
raise SystemExit(code)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of the GNU C library")
def test_threads_that_read_images_leave_no_heap_of_their_own(world: World, tmp_path: Path) -> None:
    """Or the thread that loads the weights would use it, and not the preallocated heap."""
    if not hasattr(ctypes.CDLL(None), "malloc_info"):
        pytest.skip("another C library")
    counted, words = tmp_path / "heaps.xml", world.arguments(tmp_path, dry_run=True)
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    subprocess.run([sys.executable, "-c", COUNT_ARENAS, str(counted), *words], check=True, env=environment, cwd=ROOT)
    assert counted.read_text(encoding="utf-8").count("<heap nr=") == 1


# 3 images x 2 + 2 images x 1 = 8 samples; batches of 3 give 3 batches, windows of 2 give 2 steps
@pytest.mark.parametrize(
    ("flags", "steps", "epochs", "reason"),
    [
        ({"max_train_epochs": 5}, 10, 5, "--max_train_epochs"),
        ({"max_train_steps": 7}, 7, 4, "--max_train_steps"),
        ({"max_train_epochs": 5, "max_train_steps": 7}, 10, 5, "overrides --max_train_steps 7"),
        ({}, 1600, 800, "the default"),
        ({"max_train_epochs": 0}, 1600, 800, "the default"),
    ],
)
def test_length(flags: dict[str, object], steps: int, epochs: int, reason: str, world: World, tmp_path: Path) -> None:
    length = plan_of(world, tmp_path, train_batch_size=3, gradient_accumulation_steps=2, **flags).facts.duration
    assert (length.steps, length.epochs, length.steps_per_epoch, length.batches_per_epoch) == (steps, epochs, 2, 3)
    assert reason in length.reason


def test_regularisation_doubles_the_epoch(world: World, tmp_path: Path) -> None:
    plan = plan_of(world, tmp_path, reg_data_dir=world.root / "reg")
    assert plan.facts.duration.batches_per_epoch == 16
    text = describe(plan)
    assert "3 samples for 8 training samples; repeated to 8; ratio 1.00 : 1" in text


def test_the_text_of_a_plan(world: World, tmp_path: Path) -> None:
    flags = {"save_every_n_epochs": 1, "max_train_epochs": 3, "save_state": True, "stop_text_encoder_training": 9}
    text = describe(plan_of(world, tmp_path, **flags, learning_rate=2e-6, learning_rate_te=1e-6))
    for expected in (
        "Stable Diffusion 1.x",
        '2_sks dog: 3 images x 2 = 6 samples, training, 1 caption from files, 2 captioned "sks dog"',
        "of 75 tokens",
        "64x64: 8",
        "U-Net (3.5 M parameters), learning rate 2e-06",
        "learning rate 1e-06, until step 9",
        "24 optimizer steps in 3 epochs of 8 (--max_train_epochs)",
        "seed 1",
        str(tmp_path / "dog.safetensors"),
        "dog-000001.safetensors, dog-000002.safetensors",
        "dog-state",
        "disk: up to",
    ):
        assert expected in text, f"{expected}\n---\n{text}"


def test_a_truncated_caption_is_named(tmp_path: Path, world: World) -> None:
    tiny.write_images(tmp_path / "train" / "1_dog", 2)
    (tmp_path / "train" / "1_dog" / "image_01.txt").write_text("dog " * 100, encoding="utf-8")
    (tmp_path / "train" / "1_dog" / "image_00.txt").write_text("dog " * 75, encoding="utf-8")
    plan = plan_of(world, tmp_path / "out", train_data_dir=tmp_path / "train")
    assert plan.facts.images.captions.longest == 100
    assert [path.name for path in plan.facts.images.captions.cut] == ["image_01.png"]
    assert "1 caption truncated to 75 tokens" in describe(plan)
    longer = plan_of(world, tmp_path / "out", train_data_dir=tmp_path / "train", max_token_length=150)
    assert longer.facts.images.captions.limit == 150 and not longer.facts.images.captions.cut


def test_memory_and_disk_are_counted(world: World, tmp_path: Path) -> None:
    """AdamW: weights, gradients and two moments of 4 bytes each for what is trained; 4 bytes for the VAE."""
    plan = plan_of(world, tmp_path, max_train_epochs=3, save_every_n_epochs=1, save_precision="fp16", save_state=True)
    sizes, costs = plan.facts.base_model.sizes.parameters, plan.costs
    trained = sizes["unet"] + sizes["text_encoder"]
    assert costs.training == 16 * trained + 4 * sizes["vae"]
    assert costs.model_file == 2 * (trained + sizes["vae"])
    assert costs.disk == 3 * costs.model_file + 3 * 12 * trained


def test_workers(world: World, tmp_path: Path) -> None:
    assert plan_of(world, tmp_path, max_data_loader_n_workers=64).workers <= 8
    assert plan_of(world, tmp_path, max_data_loader_n_workers=4, cache_latents=True).workers == 0
    assert plan_of(world, tmp_path, max_data_loader_n_workers=4, cache_latents_to_disk=True).workers == 0


def test_a_resumed_run_must_be_the_same(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.training.running import run

    flags: dict[str, object] = {"max_train_steps": 2, "save_state_on_train_end": True, "seed": None}
    assert run(world.arguments(tmp_path, **flags), capsys).code == 0
    state = tmp_path / "dog-state"
    resumed = {**flags, "resume": state, "max_train_steps": 4}
    plan = plan_of(world, tmp_path, **resumed)
    assert plan.resume is not None and plan.resume.progress.step == 2
    assert str(plan.facts.seed) == plan.resume.identity["seed"]
    assert any(
        "it was saved after step 2, and this run has 2 steps" in what
        for what in mistakes_of(world, tmp_path, **{**resumed, "max_train_steps": 2})
    )
    found = mistakes_of(world, tmp_path, **{**resumed, "seed": 77, "train_batch_size": 2, "learning_rate": 5e-4})
    assert len(found) == 3 and all(str(state) in what for what in found)
    (data_mistake,) = mistakes_of(world, tmp_path, **{**resumed, "reg_data_dir": world.root / "reg"})
    assert "images, captions, repeats or scores" in data_mistake
    for changed in (
        {"enable_bucket": True, "min_bucket_reso": 64, "bucket_reso_steps": 8},
        {"flip_aug": True},
        {"prior_loss_weight": 0.3},
        {"optimizer_args": ["weight_decay=0.5"]},
        {"clip_skip": 2},
        {"mixed_precision": "bf16"},
        {"cache_latents": True},
    ):
        assert mistakes_of(world, tmp_path, **{**resumed, **changed}), changed
    for free in (
        {"cache_latents_to_disk": False},
        {"gradient_checkpointing": True},
        {"max_data_loader_n_workers": 2},
        {"save_every_n_steps": 1},
        {"mixed_precision": "fp16"},
    ):
        assert plan_of(world, tmp_path, **{**resumed, **free}).resume is not None, free
    (no_state,) = mistakes_of(world, tmp_path, **{**resumed, "resume": tmp_path})
    assert "not a training state" in no_state


def test_flags_that_the_family_does_not_support_are_refused(world: World, tmp_path: Path) -> None:
    assert mistakes_of(world, tmp_path, write_inference_yaml=True) == [
        "--write_inference_yaml has no meaning for Stable Diffusion 1.x"
    ]
    assert mistakes_of(world, tmp_path, v2=True) == ["--v2 has no meaning for Stable Diffusion 1.x"]


def test_sharding_that_accelerate_is_configured_for_is_refused(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    (mistake,) = mistakes_of(world, tmp_path)
    assert "FSDP" in mistake


@pytest.mark.parametrize(
    ("card", "flags", "vae"),
    [
        ((8, 6), "--mixed_precision fp16", "bf16"),
        ((7, 5), "--mixed_precision fp16", "fp32"),  # no bf16 in hardware
        ((8, 6), "--mixed_precision fp16 --no_half_vae", "fp32"),
        ((8, 6), "--mixed_precision bf16", "bf16"),
    ],
)
def test_the_vae_of_sdxl_never_computes_in_fp16(card: tuple[int, int], flags: str, vae: str) -> None:
    machine = Machine("cuda", "a card", compute_capability=card)
    asked = resolve(parse(flags.split()).options.memory, machine)
    notes: list[str] = []
    assert avoid_fp16_vae(asked, SDXL.latent, machine, notes).vae == vae
    assert bool(notes) == (asked.vae != vae)
    assert avoid_fp16_vae(asked, SD1.latent, machine, notes) == asked


def test_files_that_are_removed_again_are_not_counted(world: World, tmp_path: Path) -> None:
    """Saves after 2, 4 … 20 steps; those of the last 4 steps are kept: before the one at 10 - 4 - 2 = 4 is removed, the
    ones at 4, 6, 8 and 10 are there. At the end those at 16, 18 and 20 remain, and the final one comes."""
    flags = {"save_every_n_steps": 2, "save_last_n_steps": 4, "max_train_steps": 20, "save_state": True}
    plan = plan_of(world, tmp_path, **flags)
    model, state = (f"{size / 1e6:.1f} MB" for size in (plan.costs.model_file, plan.costs.state_folder))
    text = describe(plan)
    assert "10 during training: dog-step00000002.safetensors" in text
    assert "at most 4 models at once, with the final one" in text
    assert f": 4 models of {model} and 4 states of {state}" in text
    assert "at once" not in describe(plan_of(world, tmp_path, save_every_n_steps=2, max_train_steps=20))


def test_captions_of_file_names_are_called_so(world: World, tmp_path: Path) -> None:
    entry = {"id": "dog", "type": "local", "instance_data_dir": str(world.root / "train" / "2_sks dog"),
             "caption_strategy": "filename", "resolution": 64, "resolution_type": "pixel", "crop": True,
             "crop_style": "center"}  # fmt: skip
    file = tmp_path / "backend.json"
    file.write_text(json.dumps([entry]), encoding="utf-8")
    flags = {"data_backend_config": file, "train_data_dir": None, "resolution": None, "caption_extension": None}
    text = describe(plan_of(world, tmp_path / "out", **flags))
    assert "3 images x 1 = 3 samples, training, captions from file names" in text and "empty caption" not in text


def test_a_dataset_that_is_only_validated_on_has_no_empty_line_of_buckets(world: World, tmp_path: Path) -> None:
    file = tmp_path / "data.toml"
    file.write_text(
        f"""[general]
resolution = 64
caption_extension = ".txt"
[[datasets]]
[[datasets.subsets]]
image_dir = '{world.root / "train" / "2_sks dog"}'
class_tokens = "dog"
[[datasets]]
validation_split = 1.0
[[datasets.subsets]]
image_dir = '{world.root / "train" / "1_zwx cat"}'
class_tokens = "cat"
""",
        encoding="utf-8",
    )
    flags = {"dataset_config": file, "train_data_dir": None, "resolution": None, "caption_extension": None}
    text = describe(plan_of(world, tmp_path / "out", **flags))
    assert "data.toml, line 8: only held-out images\n" in text and ": , in batches" not in text
