"""The command as users and front-ends call it: imports, the files of front-ends, output files, log and console."""

from __future__ import annotations

import codecs
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import sdxl_train
import sdxl_train_network
import train_db
import train_network
from library.options.parse import parse
from library.options.train_options import FLAGS
from library.training.command import run_recipe
from library.training.recipe import Recipe
from tests import tiny
from tests.training.running import Outcome, World, make_world, run

ROOT = Path(__file__).resolve().parent.parent
# tests/options/test_frontend_keys.py reads the others too; lets_full_config wants a package that is not here.
NO_PLAN = ("_dataset", "_project", "lets_full_config")
FRONTEND_FILES = sorted(
    file for file in (ROOT / "tests" / "frontend_files").glob("*.toml") if not file.stem.endswith(NO_PLAN)
)
SHAPES = ("--min_bucket_reso=64", "--resolution=64")  # for images of a miniature


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("command"))


def python(*words: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """A process of its own, in UTF-8."""
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, encoding="utf-8", timeout=300)


def tensor_shapes(file: Path) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in load_file(file).items()}


# --- processes of their own ---

HEAVY = ("torch", "diffusers", "transformers", "accelerate", "tensorboard", "bitsandbytes", "safetensors")
WATCH = f"""
import runpy, sys
sys.argv = ["train_db.py", *sys.argv[1:]]
try:
    runpy.run_path("train_db.py", run_name="__main__")
except SystemExit as end:
    print("exit", end.code, [name for name in {HEAVY!r} if name in sys.modules], "numpy" in sys.modules)
"""


@pytest.mark.parametrize("words", [("--help",), ("--lerning_rate", "1"), ("--config_file", "nowhere.toml")])
def test_help_and_mistakes_load_no_heavy_package(words: tuple[str, ...]) -> None:
    done = python("-c", WATCH, *words)
    code = 0 if words == ("--help",) else 2
    assert done.stdout.splitlines()[-1] == f"exit {code} [] False", done.stderr


def test_a_dry_run_decides_everything_without_a_heavy_package(world: World, tmp_path: Path) -> None:
    flags = {"dry_run": True, "reg_data_dir": world.root / "reg", "enable_bucket": True, "min_bucket_reso": 64}
    done = python("-c", WATCH, *world.arguments(tmp_path / "out", logging_dir=tmp_path / "log", **flags))
    assert done.stdout.splitlines()[-1] == "exit 0 [] False", done.stderr
    assert not list(tmp_path.iterdir()), "a dry run writes nothing"
    for said in (
        '2_sks dog: 3 images x 2 = 6 samples, training, 1 caption from files, 2 captioned "sks dog"',
        "1_dog: 3 images, 8 samples after balancing, regularisation",
        "repeated to 8; ratio 1.00 : 1",
        "longest: 11 of 75 tokens",
        "1600 optimizer steps in 100 epochs of 16 (the default; set --max_train_steps or --max_train_epochs)",
        "U-Net (3.5 M parameters), learning rate 0.001",
        "optimizer state 54.",
        "dog.safetensors",
    ):
        assert said in done.stdout


def test_plain_python_with_a_config_file(world: World, tmp_path: Path) -> None:
    config = tmp_path / "my run.toml"
    values = {"pretrained_model_name_or_path": world.model, "train_data_dir": world.root / "train", "output_dir": "out"}
    lines = [f"{name} = {json.dumps(str(value))}" for name, value in values.items()]
    lines += ["resolution = 64", "max_train_steps = 1", 'caption_extension = ".txt"', 'save_model_as = "safetensors"']
    config.write_bytes(codecs.BOM_UTF8 + "\r\n".join(lines).encode("utf-8"))  # as an editor on Windows leaves it
    done = python(str(ROOT / "train_db.py"), "--config_file", "my run", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert left(tmp_path / "out") == ["last-loss.png", "last-run.jsonl", "last.safetensors"]
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr


def test_accelerate_launch(world: World, tmp_path: Path) -> None:
    words = world.arguments(tmp_path / "out", max_train_steps=1, logging_dir=tmp_path / "log", log_config=True)
    launch = ("-m", "accelerate.commands.launch", "--num_processes=1", "--num_machines=1", "--mixed_precision=no")
    done = python(*launch, "--dynamo_backend=no", "--num_cpu_threads_per_process=2", "train_db.py", *words)
    assert done.returncode == 0, done.stderr
    assert tensor_shapes(tmp_path / "out" / "dog.safetensors") == tensor_shapes(world.model)
    assert "model saved." in done.stderr and "Traceback" not in done.stderr
    assert list((tmp_path / "log").glob("2*/dreambooth/events*"))


# --- front-ends ---


def frontend_file(file: Path, world: World, folder: Path) -> Path:
    """The file as its front-end would have written it here."""
    written = folder / file.name
    written.write_text(file.read_text(encoding="utf-8").replace("@WORK@", world.root.as_posix()), encoding="utf-8")
    return written


def on_this_world(world: World, file: Path, folder: Path, *more: str) -> list[str]:
    """The command line for a front-end's file, with model and folders of this test."""
    words = ["--config_file", str(frontend_file(file, world, folder))]
    if "many_options" in file.stem:
        words.append("--max_train_epochs=20")  # longer than its warm-up
    if file.stem.startswith("lets_"):
        words.append(f"--dataset_config={dataset_file(file, folder)}")
    prompts = folder / "prompt.txt"  # front-ends make this file too
    prompts.write_text("a dog --w 64 --h 64 --s 2 --d 1", encoding="utf-8")
    places = {"pretrained_model_name_or_path": model_for(file, world), "sample_prompts": prompts}
    if not file.stem.startswith("lets_"):
        places["train_data_dir"] = world.root / "train"
    places |= {"output_dir": folder / "out", "logging_dir": folder / "log"}
    return [*words, *(f"--{name}={value}" for name, value in places.items()), *more]


def model_for(file: Path, world: World) -> Path:
    """A miniature of the family that the file is for."""
    family = next((family for word, family in (("sdxl", "sdxl"), ("sd21", "sd2")) if word in file.stem), "sd1")
    model = world.root / f"{family}.safetensors"
    if not model.exists():
        tiny.write_single_file(model, family)
    return model


def dataset_file(file: Path, folder: Path) -> Path:
    """The dataset file of LoRA_Easy_Training_Scripts, and the captioned images that it names."""
    for image in tiny.write_images(folder / "train" / "20_sks dog", 2):
        image.with_suffix(".txt").write_text("sks dog", encoding="utf-8")
    half = file.with_name(file.name.replace("_config", "_dataset"))
    written = folder / half.name
    written.write_text(half.read_text(encoding="utf-8").replace("@WORK@", folder.as_posix()), encoding="utf-8")
    return written


def recipe_of(file: Path) -> Recipe:
    """The program that a front-end starts with this file."""
    adapter, sdxl = "network_module" in file.read_text(encoding="utf-8"), "sdxl" in file.stem
    if adapter:
        return sdxl_train_network.RECIPE if sdxl else train_network.RECIPE
    return sdxl_train.RECIPE if sdxl else train_db.RECIPE


@pytest.mark.parametrize("file", FRONTEND_FILES, ids=lambda file: file.stem)
def test_a_front_ends_file_gives_a_plan(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: Path
) -> None:
    outcome = run(on_this_world(world, file, tmp_path, "--dry_run"), capsys, recipe_of(file))
    if "dylora" in file.stem:  # its form always writes conv_dim=1, which sd-scripts refuses too
        assert outcome.code == 2 and "conv_dim=1 differs from network_dim 16" in outcome.err
        return
    assert outcome.code == 0, outcome.err
    plan, text = outcome.out, file.read_text(encoding="utf-8").replace(" ", "")
    asked_for_xformers, asked_for_fp16 = "xformers=true" in text, 'mixed_precision="fp16"' in text
    assert plan.count("fp16 training is not supported on a CPU") == asked_for_fp16
    assert plan.count("it needs a CUDA GPU") == asked_for_xformers
    assert ("mixed precision no" in plan) == asked_for_fp16 and "attention sdpa" in plan
    assert any(name in plan for name in ("AdamW", "Lion", "Prodigy", "Adafactor"))
    strict = run(on_this_world(world, file, tmp_path, "--dry_run", "--strict"), capsys, recipe_of(file))
    assert strict.err.count("\n- ") == asked_for_fp16 + asked_for_xformers
    assert strict.code == (2 if asked_for_fp16 or asked_for_xformers else 0)
    assert ("--mixed_precision" in strict.err) == asked_for_fp16 and ("--xformers" in strict.err) == asked_for_xformers
    assert not (tmp_path / "out").exists() and not (tmp_path / "log").exists()


def test_kohya_ss_defaults_train_and_leave_what_it_expects(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.state import AcceleratorState

    (file,) = (file for file in FRONTEND_FILES if file.stem == "kohya_ss_dreambooth_sd15")
    AcceleratorState._reset_state(True)
    words = on_this_world(world, file, tmp_path, "--max_train_steps=9", "--save_state", "--log_prefix=db_")
    capsys.readouterr()
    assert run_recipe(train_db.RECIPE, words) == 0
    AcceleratorState._reset_state(True)
    said = capsys.readouterr()

    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "db_sd15-000001-state", "db_sd15-000001.safetensors", "db_sd15-loss.png", "db_sd15-run.jsonl",
        "db_sd15-state", "db_sd15.safetensors", "sample",
    ]  # fmt: skip
    assert [re.sub(r"\d{14}", "TIME", path.name) for path in sorted((out / "sample").iterdir())] == [
        "db_sd15_e000001_00_TIME_1.png", "db_sd15_e000002_00_TIME_1.png",
    ]  # fmt: skip
    assert set(tensor_shapes(out / "db_sd15.safetensors").values()) == {torch.float16}
    (log,) = (tmp_path / "log").iterdir()
    assert re.fullmatch(r"db_\d{14}", log.name)
    assert log_of(log / "dreambooth").keys() == {"loss", "loss/epoch", "lr/unet", "lr/text_encoder1"}
    scalars = log_of(log / "dreambooth")
    assert sorted(scalars["loss"]) == list(range(1, 10)) and sorted(scalars["loss/epoch"]) == [1, 2]
    assert scalars["loss/epoch"][1] == pytest.approx(sum(scalars["loss"][step] for step in range(1, 9)) / 8, rel=1e-5)
    for text in (
        "running training", "epoch 1/2", "epoch 2/2", f"saving checkpoint: {out / 'db_sd15-000001.safetensors'}",
        f"saving checkpoint: {out / 'db_sd15.safetensors'}", "model saved.", "avr_loss=", "steps:",
    ):  # fmt: skip
        assert text in said.err
    assert "Dreamfolder: the plan of this run" in said.out


def log_of(folder: Path) -> dict[str, dict[int, float]]:
    """Scalars of a TensorBoard log: tag -> step -> value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


# --- flags ---

READ_AS_A_GROUP = "metadata_"  # training/model_file.py takes all fields with this beginning
ANOTHER_NAME = "diffusers_xformers"  # a rule between flags turns it into xformers
WHILE_PARSING = "allow_unknown_keys"  # tests/options/test_unknown_names.py


@cache
def sources() -> str:
    """The program's modules that may read flags, as one text."""
    files = [file for file in (ROOT / "library").rglob("*.py") if file.parent.name != "options"]
    files.append(ROOT / "library" / "options" / "render.py")  # writes the file that config_file names
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


@pytest.mark.parametrize(
    "name", [name for name in FLAGS if not name.startswith((READ_AS_A_GROUP, ANOTHER_NAME, WHILE_PARSING))]
)
def test_every_flag_is_read_by_the_program(name: str) -> None:
    """A flag that is accepted and never read would be ignored silently."""
    assert re.search(rf"\.{name}\b", sources()), f"--{name} is read nowhere"


def test_metadata_flags_are_written(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {name: f"my {name}" for name in FLAGS if name.startswith("metadata_") and name != "metadata_thumbnail"}
    given["training_comment"] = "made with care"
    outcome = run(world.arguments(tmp_path / "out", max_train_steps=1, **given), capsys)
    assert outcome.code == 0, outcome.err
    with safe_open(tmp_path / "out" / "dog.safetensors", "pt") as file:
        found = file.metadata()
    assert found.pop("ss_training_comment") == "made with care"
    for name in given:
        if name.startswith("metadata_"):
            assert found[f"modelspec.{name.removeprefix('metadata_')}"] == f"my {name}"


def test_the_console_can_go_to_a_file(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = {"console_log_file": tmp_path / "logs" / "run.log", "console_log_simple": True}
    outcome = run(world.arguments(tmp_path / "out", max_train_steps=1, **flags), capsys)
    assert outcome.code == 0 and "model saved." not in outcome.err
    lines = (tmp_path / "logs" / "run.log").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "running training / 学習開始" and "model saved." in lines
    assert lines[-1].startswith("next: ")
    flags = {"console_log_level": "WARNING"}
    assert "model saved." not in run(world.arguments(tmp_path / "out", max_train_steps=1, **flags), capsys).err


def test_log_config_logs_options_but_no_paths(world: World, tmp_path: Path) -> None:
    from library.training.trackers import logged_options

    words = world.arguments(tmp_path / "out", optimizer_args=["weight_decay=0.1", "eps=1e-6"])
    logged = logged_options(parse(words).options)
    assert logged["learning_rate"] == 1e-3 and "weight_decay=0.1" in str(logged["optimizer_args"])
    assert not [value for value in logged.values() if str(tmp_path) in str(value) or str(world.root) in str(value)]


def test_an_option_without_effect_is_noted(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = {"log_prefix": "x", "keep_tokens": 2, "save_last_n_epochs": 3, "dry_run": True}
    plan = run(world.arguments(tmp_path / "out", **flags), capsys).out
    for name in ("log_prefix", "keep_tokens", "save_last_n_epochs"):
        assert len([line for line in plan.splitlines() if f"--{name} = " in line]) == 1


# --- names ---


def test_names_in_any_script(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / 'it\'s "my" мир 世界 🐕'
    model, data = root / "модель v1.5.safetensors", root / "data"
    folder = data / "1_狗 dog's ☂"
    folder.mkdir(parents=True)
    model.write_bytes(world.model.read_bytes())
    image = next((world.root / "train" / "1_zwx cat").glob("*.png"))
    (folder / "кот é.png").write_bytes(image.read_bytes())
    (folder / "кот é.txt").write_text("une photo d'été, 犬 🐶", encoding="utf-8")
    flags = {"pretrained_model_name_or_path": model, "train_data_dir": data, "output_name": 'собака v1.5 "a" 🐕'}
    outcome = run(world.arguments(root / "out", max_train_steps=1, save_every_n_steps=1, **flags), capsys)
    assert outcome.code == 0, outcome.err
    name = flags["output_name"]
    expected = sorted(
        [f"{name}-step00000001.safetensors", f"{name}.safetensors", f"{name}-loss.png", f"{name}-run.jsonl"]
    )
    assert sorted(file.name for file in (root / "out").iterdir()) == expected
    assert "une photo d'été, 犬 🐶" in outcome.out


def test_relative_paths(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world.root)
    flags = {"pretrained_model_name_or_path": "./sd1.safetensors", "train_data_dir": "train", "max_train_steps": 1}
    target = os.path.relpath(tmp_path / "out", world.root)
    outcome = run(world.arguments(Path(target), **flags), capsys)
    assert outcome.code == 0 and (tmp_path / "out" / "dog.safetensors").is_file()


# --- length and saves ---


def test_length_and_where_it_comes_from(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def length(**flags: object) -> str:
        plan = run(world.arguments(tmp_path / "out", dry_run=True, **flags), capsys).out
        return next(line.strip() for line in plan.splitlines() if "optimizer steps" in line)

    assert length().endswith(
        "1600 optimizer steps in 200 epochs of 8 (the default; set --max_train_steps or --max_train_epochs)"
    )
    assert length(max_train_steps=9).endswith(
        "9 optimizer steps in 2 epochs of 8, the last one incomplete (--max_train_steps)"
    )
    both = length(max_train_epochs=1, max_train_steps=9)
    assert both.endswith("8 optimizer steps in 1 epoch of 8 (--max_train_epochs, which overrides --max_train_steps 9)")


def test_constant_with_a_warm_up_means_constant_with_warmup(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"lr_scheduler": "constant", "lr_warmup_steps": "10%", "max_train_steps": 40, "dry_run": True}
    plan = run(world.arguments(tmp_path / "out", **flags), capsys).out
    assert "schedule constant_with_warmup, warm-up of 4 steps" in plan
    assert plan.count("constant with a warm-up means constant_with_warmup") == 1


def test_old_models_and_states_are_removed_when_the_new_ones_are_whole(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"save_every_n_epochs": 1, "save_last_n_epochs": 2, "save_last_n_epochs_state": 1, "save_state": True}
    small = {"train_batch_size": 8, "max_train_epochs": 4}  # one optimiser step an epoch
    outcome = run(world.arguments(tmp_path / "out", **flags, **small), capsys)
    assert outcome.code == 0
    assert left(tmp_path / "out") == [
        "dog-000002.safetensors", "dog-000003-state", "dog-000003.safetensors", "dog-loss.png", "dog-run.jsonl",
        "dog-state", "dog.safetensors",
    ]  # fmt: skip


def test_steps_are_kept_by_a_range_of_steps(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = {"save_every_n_steps": 1, "save_last_n_steps": 2, "save_state_on_train_end": True}
    outcome = run(world.arguments(tmp_path / "out", max_train_steps=5, **flags), capsys)
    assert outcome.code == 0
    assert left(tmp_path / "out") == [
        "dog-loss.png", "dog-run.jsonl", "dog-state", "dog-step00000003.safetensors", "dog-step00000004.safetensors",
        "dog-step00000005.safetensors", "dog.safetensors",
    ]  # fmt: skip


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- instead of training ---


def test_a_written_config_gives_the_same_plan(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.toml"
    flags = {
        "optimizer_args": ["weight_decay=0.1"],
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 0.1,
        "max_train_epochs": 2,
        "shuffle_caption": True,
    }
    words = world.arguments(tmp_path / "out", **flags)
    assert run([*words, "--output_config", f"--config_file={config}"], capsys).code == 0
    assert not (tmp_path / "out").exists()
    direct, from_file = run([*words, "--dry_run"], capsys), run([f"--config_file={config}", "--dry_run"], capsys)
    assert direct.code == from_file.code == 0 and plan_of(direct) == plan_of(from_file)
    again = run([*words, "--output_config", f"--config_file={config}"], capsys)
    assert again.code == 2 and "already exists" in again.err


def plan_of(outcome: Outcome) -> str:
    """The plan without the free space, which other programs change meanwhile."""
    return re.sub(r" of [\d.]+ .B free", "", outcome.out)


def test_debug_dataset_writes_a_page_and_trains_nothing(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = run(world.arguments(tmp_path / "out", debug_dataset=True, reg_data_dir=world.root / "reg"), capsys)
    (page,) = (tmp_path / "out").iterdir()
    assert outcome.code == 0 and f"dataset page: {page}" in outcome.out
    shown = page.read_text(encoding="utf-8")
    assert "image_00.png" in shown and "a photo of sks dog, grass, sky, sun" in shown
