"""Every user error ends the real command with exit code 2 and a message that names the error and the remedy, without a
traceback and without files."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from library.data import retries
from library.training.plan import writable_paths
from library.training.saving.saver import Saver
from library.training.saving.state import Progress
from library.training.saving.state_writer import StateWriter
from tests import tiny
from tests.small_disk import mounted
from tests.training.running import Outcome, World, make_world, run


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("mistakes"))


@pytest.fixture
def data(world: World, tmp_path: Path) -> Path:
    """A copy of the training folders that a test may damage."""
    return Path(shutil.copytree(world.root / "train", tmp_path / "data"))


class Refused:
    """Runs the command, which must refuse, and returns its messages."""

    def __init__(self, world: World, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.world, self.out, self.capsys = world, out, capsys

    def __call__(self, *parts: str, **flags: object) -> list[str]:
        """The mistakes of the message: with `parts` a single one, which contains all of them."""
        outcome = run(self.world.arguments(self.out, **flags), self.capsys)
        found = blocks(outcome)
        assert outcome.code == 2 and found and "Traceback" not in outcome.err, outcome.err
        assert not self.out.exists() and "running training" not in outcome.err
        if parts:
            assert len(found) == 1, found
            assert not [part for part in parts if part not in found[0]], found[0]
        return found


@pytest.fixture
def refused(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    return Refused(world, tmp_path / "out", capsys)


def blocks(outcome: Outcome) -> list[str]:
    """The mistakes of a message."""
    return [] if "\n- " not in outcome.err else outcome.err.split("\n- ")[1:]


# --- images and captions ---


def test_no_folder_with_repeats(world: World, refused: Refused, tmp_path: Path) -> None:
    inside = world.root / "train" / "2_sks dog"
    refused("contains no folder", "3 images", f"--train_data_dir={world.root / 'train'}", train_data_dir=inside)
    (tmp_path / "plain" / "dogs").mkdir(parents=True)
    refused("--train_data_dir", "contains no folder", "10_sks dog", train_data_dir=tmp_path / "plain")
    refused("--train_data_dir", "there is no folder", "check the path", train_data_dir=tmp_path / "nowhere")
    (tmp_path / "dog.zip").touch()
    refused("--train_data_dir", "dog.zip is a file, not a folder", train_data_dir=tmp_path / "dog.zip")


def test_an_empty_folder(data: Path, refused: Refused) -> None:
    (data / "3_sks thing").mkdir()
    refused("3_sks thing contains no image", "add images", train_data_dir=data)


def test_a_folder_that_begins_with_a_date(data: Path, refused: Refused) -> None:
    (data / "2_sks dog").rename(data / "20261105_sks dog")
    refused("20261105 times", "date", "10_", train_data_dir=data)
    shutil.rmtree(data / "1_zwx cat")
    refused("20261105 times", train_data_dir=data)


def test_regularisation_without_an_image(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "reg" / "1_dog").mkdir(parents=True)
    refused("regularisation folder", "1_dog contains no image", reg_data_dir=tmp_path / "reg")
    (tmp_path / "reg" / "1_dog").rmdir()
    refused("--reg_data_dir", "contains no folder", '"1_dog"', reg_data_dir=tmp_path / "reg")
    refused("--reg_data_dir: there is no folder", reg_data_dir=tmp_path / "none")


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ({"resolution": 72, "enable_bucket": True}, ("72,72", "is smaller than --min_bucket_reso = 256")),
        ({"resolution": 8}, ("below 64",)),
        ({"resolution": -64}, ("is not a resolution",)),
    ],
)
def test_sizes(refused: Refused, flags: dict[str, object], parts: tuple[str, ...]) -> None:
    refused("--", *parts, **flags)


def test_a_caption_in_another_encoding(data: Path, refused: Refused) -> None:
    file = data / "2_sks dog" / "image_00.txt"
    file.write_bytes("für Elise".encode("latin-1"))
    refused(str(file), "UTF-8", "save it as", train_data_dir=data)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_a_caption_with_a_byte_order_mark_is_read(
    world: World, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], encoding: str
) -> None:
    (data / "2_sks dog" / "image_00.txt").write_bytes("für Elise, a very long one".encode(encoding))
    outcome = run(world.arguments(tmp_path / "out", train_data_dir=data, dry_run=True), capsys)
    assert outcome.code == 0 and '"für Elise, a very long one"' in outcome.out


def test_damaged_images_are_named_and_left_out_up_to_a_tenth(
    world: World, data: Path, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    cut, empty = data / "2_sks dog" / "image_01.png", data / "2_sks dog" / "new.jpg"
    cut.write_bytes(cut.read_bytes()[:60])
    empty.write_bytes(b"")
    refused("2 of 6 images cannot be used", str(cut), str(empty), "zero bytes", "repair", train_data_dir=data)
    tiny.write_images(data / "1_many", 16, size=(64, 64), seed=4)
    outcome = run(world.arguments(refused.out, train_data_dir=data, dry_run=True), capsys)
    assert outcome.code == 0 and not refused.out.exists()
    assert f"left out: {cut} (" in outcome.out and f"left out: {empty} (" in outcome.out
    assert "2_sks dog: 2 images x 2 = 4 samples" in outcome.out


def become_unreadable(path: Path) -> None:
    """Damage the pixels alone: begin and end are whole, so the plan trusts the file."""
    Image.effect_noise((80, 64), 90).convert("RGB").save(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 100] = bytes(100)
    path.write_bytes(content)


def test_an_image_that_cannot_be_cached(
    world: World, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noisy = data / "2_sks dog" / "image_01.png"
    become_unreadable(noisy)
    out = tmp_path / "out"
    outcome = run(world.arguments(out, train_data_dir=data, max_train_steps=8, cache_latents=True), capsys)
    (block,) = blocks(outcome)
    assert outcome.code == 2 and "Traceback" not in outcome.err
    assert f"image {noisy} cannot be decoded" in block and "remove it" in block
    assert not out.exists() and not list(data.rglob("*.npz"))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_turns_out_to_be_unreadable_is_left_out(
    world: World,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    workers: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(retries, "DELAYS", (0.0,))
    noisy = data / "2_sks dog" / "image_01.png"
    become_unreadable(noisy)
    flags = {"max_train_steps": 8, "max_data_loader_n_workers": workers}
    outcome = run(world.arguments(tmp_path / "out", train_data_dir=data, **flags), capsys)
    assert outcome.code == 0 and "Traceback" not in outcome.err
    assert f"sample left out: image {noisy} cannot be decoded" in outcome.err


# --- models ---


def zeros(path: Path, **shapes: tuple[int, ...]) -> Path:
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path)
    return path


FOREIGN = {
    "XL": {
        "conditioner.embedders.1.model.transformer.resblocks.0.ln_1.weight": (8,),
        "model.diffusion_model.label_emb.0.0.weight": (8, 8),
        "model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3),
    },
    "LoRA": {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (4, 8)},
    "VAE": {"decoder.conv_in.weight": (8, 4, 3, 3), "encoder.conv_in.weight": (8, 3, 3, 3)},
    "foo.bar": {"foo.bar": (3,)},
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_another_kind_of_file(refused: Refused, tmp_path: Path, kind: str) -> None:
    file = zeros(tmp_path / "foreign.safetensors", **FOREIGN[kind])
    refused("--pretrained_model_name_or_path", str(file), kind, pretrained_model_name_or_path=file)


def test_a_wrong_vae_is_reported_with_its_flag(refused: Refused, tmp_path: Path) -> None:
    file = zeros(tmp_path / "lora.safetensors", **FOREIGN["LoRA"])
    refused("--vae: ", str(file), vae=file)
    refused("--vae: ", "no such file", vae=tmp_path / "none.pt")
    both = refused(vae=file, pretrained_model_name_or_path=file)
    assert len(both) == 2, "a wrong model does not hide a wrong VAE"


@pytest.mark.parametrize("ending", [".safetensors", ".ckpt"])
def test_a_truncated_checkpoint(world: World, refused: Refused, tmp_path: Path, ending: str) -> None:
    whole, cut = world.model, tmp_path / f"cut{ending}"
    if ending == ".ckpt":
        whole = tmp_path / "whole.ckpt"
        torch.save({"state_dict": {"model.diffusion_model.out.2.bias": torch.zeros(5000)}}, whole)
    content = whole.read_bytes()
    cut.write_bytes(content[: len(content) // 2])
    refused(str(cut), "incomplete", "Get it again", pretrained_model_name_or_path=cut)
    cut.write_bytes(b"")
    refused(str(cut), "empty", pretrained_model_name_or_path=cut)
    cut.write_text("<html>404</html>", encoding="utf-8")
    refused(str(cut), "neither", pretrained_model_name_or_path=cut)


def test_a_model_that_is_not_there(refused: Refused, tmp_path: Path) -> None:
    refused("no such file", "Check the path", pretrained_model_name_or_path=tmp_path / "model.safetensors")
    refused(
        "nothing is downloaded",
        "hf download someone/some-model --local-dir some-model",
        pretrained_model_name_or_path="someone/some-model",
    )
    refused("model_index.json", pretrained_model_name_or_path=tmp_path)
    refused("--pretrained_model_name_or_path", "home", pretrained_model_name_or_path="~nobody-here/model.ckpt")


@pytest.mark.parametrize(
    ("tensor", "remedy"),
    [
        ("model.diffusion_model.out.2.weight", "download the model again"),
        ("first_stage_model.decoder.conv_out.weight", "--vae"),  # never used in training, and never to be saved
    ],
)
def test_a_model_with_a_nan_is_refused_before_the_first_step(
    world: World, refused: Refused, tmp_path: Path, tensor: str, remedy: str
) -> None:
    tensors = load_file(world.model)
    tensors[tensor].view(-1)[0] = torch.nan
    save_file(tensors, tmp_path / "nan.safetensors")
    refused("NaN", "nan.safetensors", remedy, pretrained_model_name_or_path=tmp_path / "nan.safetensors")


def test_flags_that_the_model_does_not_use(refused: Refused) -> None:
    refused("--v2", "Stable Diffusion 1", "remove it", v2=True)
    refused("--write_inference_yaml", "remove it", write_inference_yaml=True)
    refused("--clip_skip 4, but the text encoder has 3 layers", "use 3 or less", clip_skip=4, dry_run=True)


# --- output ---


def test_a_file_where_a_folder_should_be(refused: Refused, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine", encoding="utf-8")
    for flag in ("output_dir", "logging_dir"):
        refused(f"--{flag}", str(file), "not a folder", "use another", **{flag: file})
        refused(f"--{flag}", "not a folder", **{flag: file / "below" / "it"})
    refused("--console_log_file", "is a folder", console_log_file=tmp_path)
    assert file.read_text(encoding="utf-8") == "mine"


def test_a_name_that_files_cannot_have(refused: Refused) -> None:
    refused("--output_name", "too long", "another name", output_name="n" * 250)
    refused("--output_name", "NUL", output_name="a\0b")
    refused("--output_name", "it ends with /", output_name="models/")
    refused("--output_name", "'\\n'", output_name="a\nb")
    assert writable_paths.file_name_problem("dog: best", on_windows=True)
    assert not writable_paths.file_name_problem("dog: 1.5", on_windows=False)


@pytest.mark.parametrize("save_as", ["safetensors", "diffusers"])
def test_a_foreign_folder_at_the_path_of_the_final_model(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], save_as: str
) -> None:
    mine = tmp_path / "out" / ("dog.safetensors" if save_as == "safetensors" else "dog") / "holiday.jpg"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    flags = {"save_model_as": save_as, "use_safetensors": False}
    outcome = run(world.arguments(tmp_path / "out", **flags), capsys)
    (block,) = blocks(outcome)
    assert outcome.code == 2 and str(mine.parent) in block and "another --output_name" in block
    assert mine.read_bytes() == b"mine"


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file system of 40 MB: one miniature model of 31 MB fits and not two. There is no other folder to save in, and
    a run does not wait for room (tests/faults has what it does then)."""
    monkeypatch.setattr("library.training.saving.saver.other_folders", lambda *_: iter(()))
    monkeypatch.setattr("library.training.saving.unsaved.PATIENCE", 0)
    with mounted(tmp_path / "disk", "40m") as disk:
        yield disk


def test_not_enough_disk_for_the_files_to_come(refused: Refused, small_disk: Path) -> None:
    found = refused(output_dir=small_disk / "out", save_every_n_steps=1, max_train_steps=3)
    assert len(found) == 1 and "the output files need 122" in found[0] and "--save_precision fp16" in found[0]
    assert not list(small_disk.iterdir())


def after_step(step: int, act: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Call `act` after `step` steps of a run, before anything is saved."""
    original = Saver.save_due

    def hooked(self: Saver, progress: Progress, *, epoch_ended: bool) -> None:
        if progress.step == step and not epoch_ended:
            act()
        original(self, progress, epoch_ended=epoch_ended)

    monkeypatch.setattr(Saver, "save_due", hooked)


@pytest.mark.parametrize("save_as", ["safetensors", "ckpt", "diffusers", "diffusers_safetensors"])
def test_a_disk_that_fills_up_while_saving(
    world: World,
    small_disk: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    save_as: str,
) -> None:
    monkeypatch.setattr("library.training.saving.saver.check_space", lambda path, size: None)  # as if it was free then
    out = small_disk / "out"
    before = out / "dog.safetensors"
    out.mkdir()
    before.write_bytes(b"the last good one")

    def fill() -> None:
        (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free - 12 * 10**6))

    after_step(1, fill, monkeypatch)
    flags = {"save_model_as": save_as, "use_safetensors": False}
    outcome = run(world.arguments(out, max_train_steps=1, **flags), capsys)
    *_, block = blocks(outcome)  # the others tell what is tried
    assert outcome.code == 2 and "Traceback" not in outcome.err
    assert "could not be written" in block and "No space left" in block and "--resume" in block
    assert block.count("could not be written") == 1
    record = out / "dog-run.jsonl"
    assert sorted(out.iterdir()) == [record, before] and before.read_bytes() == b"the last good one"


def test_a_disk_that_fills_up_while_a_state_is_saved(
    world: World, small_disk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("library.training.plan.plan.check_disk", lambda costs, mistakes: None)
    monkeypatch.setattr("library.training.saving.saver.check_space", lambda path, size: None)
    outcome = run(world.arguments(small_disk / "out", max_train_steps=1, save_state=True), capsys)
    *_, block = blocks(outcome)
    assert outcome.code == 2 and "Traceback" not in outcome.err and "No space left" in block
    left = {file.name for file in (small_disk / "out").iterdir()}
    assert left == {"dog.safetensors", "dog-run.jsonl"}


def test_a_folder_that_cannot_be_written_has_no_second_mistake_about_its_room(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("library.training.plan.costs.free_bytes", lambda folder: 0)
    (tmp_path / "file").touch()
    refused("--output_dir", "is a file, not a folder", output_dir=tmp_path / "file")
    refused("the output files need", "0.0 kB free", output_dir=tmp_path / "out")


def test_a_thumbnail_that_is_not_there(refused: Refused, tmp_path: Path) -> None:
    refused("--metadata_thumbnail", "Check the path", metadata_thumbnail=tmp_path / "none.png")


# --- flags ---


def test_flags_that_exclude_each_other(refused: Refused) -> None:
    refused("--cache_latents", "--color_aug", "remove one", cache_latents=True, color_aug=True)
    refused("--cache_latents", "--random_crop", "remove one", cache_latents=True, random_crop=True)
    refused("--full_fp16", "--mixed_precision", "--mixed_precision fp16", full_fp16=True)
    refused("--learning_rate 0", "nothing would be trained", learning_rate=0)


@pytest.fixture
def not_installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Packages that importlib does not find while their names stand in this list."""
    names: list[str] = []
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in names else find(name, *rest))
    yield names


@pytest.mark.parametrize(
    ("optimizer", "package"), [("AdamW8bit", "bitsandbytes"), ("Prodigy", "prodigyopt"), ("DAdaptAdam", "dadaptation")]
)
def test_an_optimiser_whose_package_is_not_installed(
    refused: Refused, not_installed: list[str], optimizer: str, package: str
) -> None:
    not_installed.append(package)
    refused(f"--optimizer_type {optimizer}", package, "pip install", optimizer_type=optimizer, learning_rate=1)


def test_a_tracker_whose_package_is_not_installed(refused: Refused, not_installed: list[str], tmp_path: Path) -> None:
    not_installed.append("wandb")
    refused("--log_with wandb", "pip install wandb", log_with="wandb")
    refused("--log_with all", "pip install wandb", log_with="all", logging_dir=tmp_path / "log")
    preset = tmp_path / "preset.toml"
    preset.write_text('log_with = "wandb"\n', encoding="utf-8")
    refused("--log_with wandb", "pip install wandb", config_file=preset, strict=True)


@pytest.mark.parametrize("log_with", ["wandb", "all"])
def test_a_file_that_asks_for_a_tracker_that_is_not_installed_is_logged_for_tensorboard(
    world: World, not_installed: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], log_with: str
) -> None:
    not_installed.append("wandb")
    preset = tmp_path / "preset.toml"
    preset.write_text(f'log_with = "{log_with}"\n', encoding="utf-8")
    flags = {"config_file": preset, "dry_run": True}
    outcome = run(world.arguments(tmp_path / "out", logging_dir=tmp_path / "log", **flags), capsys)
    said = f'--log_with = "{log_with}" (preset.toml): the package wandb is not installed, so the run is logged for'
    assert outcome.code == 0 and said in outcome.out and f"logs for tensorboard: {tmp_path / 'log'}" in outcome.out
    if log_with == "wandb":
        outcome = run(world.arguments(tmp_path / "out", **flags), capsys)
        assert outcome.code == 0 and "not installed, so nothing is logged" in outcome.out


def test_the_settings_of_trackers(refused: Refused, tmp_path: Path) -> None:
    file = tmp_path / "trackers.toml"
    flags = {"logging_dir": tmp_path / "log", "log_tracker_config": file}
    refused("--log_tracker_config", "no such file", **flags)
    file.write_text("[tensorbord]\n", encoding="utf-8")
    refused("--log_tracker_config", "tensorbord", "[wandb]", **flags)
    file.write_text("[tensorboard]\nno_such_setting = 1\n", encoding="utf-8")
    refused("tensorboard could not be started", "no_such_setting", "--log_tracker_config", **flags)


def test_a_resume_folder_without_a_state(refused: Refused, tmp_path: Path) -> None:
    refused("--resume", "no such folder", "--save_state", resume=tmp_path / "none")
    refused("--resume", "train_state.json", resume=tmp_path)
    (tmp_path / "train_state.json").write_text("{}", encoding="utf-8")
    refused("--resume", "not a training state", resume=tmp_path)


def test_a_damaged_state_is_refused(world: World, refused: Refused, capsys: pytest.CaptureFixture[str]) -> None:
    saved = refused.out.with_name("saved")
    assert run(world.arguments(saved, max_train_steps=1, save_state=True), capsys).code == 0
    state = saved / "dog-state"
    refused(
        "it was saved after step 1, and this run has 1 step\n", "--max_train_steps", resume=state, max_train_steps=1
    )
    refused("--optimizer_type was AdamW", "is SGD now", resume=state, max_train_steps=2, optimizer_type="SGD")
    for file in sorted(state.iterdir()):
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        refused("--resume", str(state), resume=state, max_train_steps=2)
        file.write_bytes(content)
    (state / "optimizer.bin").unlink()
    refused("--resume", "optimizer.bin is missing", "--resume auto", resume=state, max_train_steps=2)


def test_six_mistakes_of_six_kinds_are_reported_together(refused: Refused, data: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text('learning_rat = 1e-5\nlr_scheduler = "cosine"\n', encoding="utf-8")
    (data / "2_sks dog" / "image_00.txt").write_bytes("Möwe".encode("latin-1"))
    (tmp_path / "taken").write_bytes(b"")
    model = zeros(tmp_path / "lora.safetensors", **FOREIGN["LoRA"])
    found = refused(
        config_file=config,
        train_data_dir=data,
        pretrained_model_name_or_path=model,
        output_dir=tmp_path / "taken",
        resume=tmp_path / "none",
        train_batch_size="many",
    )
    named = ("--train_batch_size", "learning_rat ", "caption file", "lora.safetensors", "--output_dir", "--resume")
    assert len(found) == len(named)
    assert all(any(name in block for block in found) for name in named), found


def test_mistakes_of_measuring_are_told_before_the_model_is_found(refused: Refused, tmp_path: Path) -> None:
    found = refused(
        pretrained_model_name_or_path=tmp_path / "none.safetensors",
        train_data_dir=tmp_path / "none",
        keep_best="beauty",
        early_stop="validation_loss",
        evaluation_prompts="live",
        evaluation_clip=tmp_path / "clip",
    )
    named = ("none.safetensors", "--train_data_dir", "--keep_best beauty", "--early_stop", "--evaluation_clip")
    assert len(found) == len(named)
    assert all(any(name in block for block in found) for name in named), found


# --- errors during a run ---


def saved(out: Path) -> list[str]:
    """The names of all that a run wrote, but its record."""
    return [path.name for path in out.iterdir() if path.name != "dog-run.jsonl"]


def test_a_loss_that_is_not_finite_stops_the_run_and_writes_nothing_with_it(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"optimizer_type": "SGD", "learning_rate": "1e30", "max_grad_norm": 0, "train_batch_size": 3}
    outcome = run(world.arguments(tmp_path / "out", max_train_steps=4, save_every_n_steps=2, **flags), capsys)
    (block,) = blocks(outcome)
    assert outcome.code == 2 and "Traceback" not in outcome.err
    assert "not finite at step 2 (epoch 1)" in block and re.search(r"\.png \(loss nan, timestep \d+\)", block)
    assert "--learning_rate" in block and "--mixed_precision bf16" in block and "--max_grad_norm" in block
    assert "model and state are saved as of step 1: continue with --resume" in block
    left = {"dog-loss.png", "dog-step00000001-state", "dog-step00000001.safetensors"}
    assert set(saved(tmp_path / "out")) == left


def test_weights_that_are_not_finite_are_not_saved(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    flags = {"optimizer_type": "SGD", "learning_rate": "3e38", "optimizer_args": ["weight_decay=1e9"]}
    outcome = run(world.arguments(out, max_train_steps=1, save_state=True, **flags), capsys)
    (block,) = blocks(outcome)
    assert outcome.code == 2 and "NaN" in block and "free some space" not in block and "older files were kept" in block
    assert saved(out) == []


def test_an_interrupt_ends_a_run_without_half_files(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    after_step(2, interrupt, monkeypatch)
    flags = {"max_train_steps": 5, "save_every_n_steps": 1, "max_data_loader_n_workers": 1}
    outcome = run(world.arguments(tmp_path / "out", **flags), capsys)
    assert outcome.code == 130 and "Traceback" not in outcome.err
    saved = tmp_path / "out" / "dog-step00000001.safetensors"
    assert f"interrupted after step 2: the last saved model is {saved}" in outcome.err
    assert "no state was saved to continue from; --save_state" in outcome.err
    left = {"dog-loss.png", "dog-run.jsonl", "dog-step00000001.safetensors"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == left
    assert not multiprocessing.active_children()


def test_an_interrupt_names_the_state_to_continue_from(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(StateWriter, "_may_copy", lambda self: False)  # so the state is complete before the next step
    out = tmp_path / "my out"
    flags = {"max_train_steps": 5, "save_every_n_steps": 2, "save_state": True}
    with pytest.MonkeyPatch.context() as patch:
        after_step(3, interrupt, patch)
        outcome = run(world.arguments(out, **flags), capsys)
    state = out / "dog-step00000002-state"
    assert outcome.code == 130
    assert f"interrupted after step 3: the last saved model is {out / 'dog-step00000002.safetensors'}" in outcome.err
    assert f'-> continue from the last saved state with --resume "{state}"' in outcome.err
    after_step(3, interrupt, monkeypatch)
    resumed = run(world.arguments(out, **{**flags, "save_every_n_steps": None}, resume=state), capsys)
    assert "interrupted after step 3: no model was saved" in resumed.err
    assert f'no state was saved since; start from the same one again with --resume "{state}"' in resumed.err


@pytest.mark.skipif(os.name == "nt", reason="processes of Windows get no such signal")
def test_a_termination_does_what_an_interrupt_does(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    after_step(1, lambda: os.kill(os.getpid(), signal.SIGTERM), monkeypatch)
    outcome = run(world.arguments(tmp_path / "out", max_train_steps=50), capsys)
    assert outcome.code == 143 and "stopped after step 2: model and state are saved" in outcome.err
    assert len(outcome.losses) == 2 and signal.getsignal(signal.SIGTERM) is before
    left = {"dog-loss.png", "dog-step00000002-state", "dog-step00000002.safetensors"}
    assert set(saved(tmp_path / "out")) == left


@pytest.mark.skipif(os.name == "nt", reason="processes of Windows get no such signal")
def test_a_worker_that_dies(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill_workers() -> None:
        for child in multiprocessing.active_children():
            os.kill(child.pid or 0, 9)

    after_step(1, kill_workers, monkeypatch)
    outcome = run(world.arguments(tmp_path / "out", max_train_steps=60, max_data_loader_n_workers=1), capsys)
    (block,) = blocks(outcome)
    assert outcome.code == 2 and "Traceback" not in outcome.err
    assert "prepares images died" in block and "--max_data_loader_n_workers" in block
    assert not multiprocessing.active_children(), "torch would go on watching them, and raise at any time"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:114] . DefaultCPUAllocator: can't allocate memory: ..."),
        MemoryError(),
    ],
)
def test_an_exhausted_memory(
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
) -> None:
    def exhausted() -> None:
        raise error

    after_step(1, exhausted, monkeypatch)
    outcome = run(world.arguments(tmp_path / "out", max_train_steps=2), capsys)
    (block,) = blocks(outcome)
    assert outcome.code == 2 and "out of memory" in block and "--gradient_checkpointing" in block


def test_a_bug_keeps_its_traceback(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("a bug")

    after_step(1, fail, monkeypatch)
    with pytest.raises(RuntimeError, match="a bug"):
        run(world.arguments(tmp_path / "out", max_train_steps=2), capsys)
