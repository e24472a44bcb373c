"""The end of a run: what was written, how long it took, and a next command that works as printed."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_network
from library.training import ending
from library.training.ending import describe_end, prompt_of
from library.training.loop import epoch_loss
from library.training.saving.state import Progress
from tests.training.running import World, make_world, run

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("my world"))


def said(err: str) -> list[str]:
    """Log lines without time and level."""
    return [line.partition(" INFO ")[2] for line in err.splitlines() if " INFO " in line]


def test_files_and_folders_are_listed_once_with_their_sizes(tmp_path: Path) -> None:
    model, state, gone = tmp_path / "dog.safetensors", tmp_path / "dog-state", tmp_path / "dog-000001.safetensors"
    model.write_bytes(bytes(1_500_000))
    (state / "part").mkdir(parents=True)
    (state / "part" / "a.bin").write_bytes(bytes(2000))
    (state / "b.bin").write_bytes(bytes(500))
    lines = list(describe_end(12, 11, CPU, [gone, model, state, None, model]))
    assert re.fullmatch(r"done: 12 steps in 11 s with loading and saving, at most \d+\.\d [GM]B of memory", lines[0])
    assert lines[1:] == ["written:", f"  {model} (1.5 MB)", f"  {state} (2.5 kB)"]


def test_of_many_files_the_last_are_named(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number:02d}" for number in range(20)]
    for path in paths:
        path.write_bytes(b"")
    lines = list(describe_end(1, 1, CPU, paths))[2:]
    assert lines[0].strip() == "8 earlier ones" and len(lines) == 13 and "19 (" in lines[-1]


def test_the_memory_is_that_which_the_system_counts() -> None:
    """/proc/self/status has the same peak, in kB of 1024 bytes."""
    status = Path("/proc/self/status")
    if not status.is_file():
        pytest.skip("there is no /proc here")
    kilobytes = int(re.search(r"VmHWM:\s+(\d+)", status.read_text(encoding="utf-8"))[1])  # type: ignore[index]
    (text,) = ending.peak_memory(CPU)
    value, unit = text.split()[:2]
    assert float(value) * {"MB": 1e6, "GB": 1e9}[unit] == pytest.approx(kilobytes * 1024, rel=0.1)


def test_a_caption_becomes_a_prompt() -> None:
    assert prompt_of("a photo of\nsks dog,") == "a photo of sks dog"
    assert prompt_of("") == prompt_of("--n dog") == "a photo"
    assert len(prompt_of("tag, " * 100)) <= 120 and not prompt_of("tag, " * 100).endswith(",")


def test_the_mean_loss_of_an_epoch_and_of_the_one_before() -> None:
    first = Progress(step=4, epoch=1, window=4, epoch_losses=[0.5, 0.25, 0.75, 0.5])
    assert epoch_loss(first, 4) == "loss of epoch 1: 0.5000"
    second = Progress(step=6, epoch=2, window=2, epoch_losses=[0.25, 0.5], last_epoch_losses=first.epoch_losses)
    assert epoch_loss(second, 4) == "loss of epoch 2: 0.3750 (over 2 of 4 steps), epoch 1: 0.5000"


def test_a_whole_model_is_drawn_with_by_the_command_that_is_printed(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {"max_train_steps": 1, "train_batch_size": 8, "output_name": "my dog", "clip_skip": 2}
    outcome = run(world.arguments(tmp_path / "out put", **flags), capsys)
    assert outcome.code == 0, outcome.err
    lines = said(outcome.err)
    (done,) = [line for line in lines if line.startswith("done: 1 step in ")]
    after = lines[lines.index(done) + 1 :]
    model = tmp_path / "out put" / "my dog.safetensors"
    curve = model.with_name("my dog-loss.png")
    assert after[0] == "written:"
    assert after[1] == f"  {model} ({model.stat().st_size / 1e6:.1f} MB)"
    assert after[2] == f"  {curve} ({curve.stat().st_size / 1e3:.1f} kB)"
    assert after[3].startswith(f"  {model.with_name('my dog-run.jsonl')} (")
    assert any(re.fullmatch(r"loss of epoch 1: \d\.\d{4}", line) for line in lines)
    words = shlex.split(after[4].removeprefix("next: "))
    assert words[1:] == [
        _from_here(ROOT / "gen_img.py"), "--ckpt", str(model), "--prompt", words[5], "--clip_skip", "2"
    ]  # fmt: skip
    assert words[5] == "sks dog" or words[5] == "a photo of sks dog, grass, sky, sun" or "cat" in words[5]
    import gen_img

    monkeypatch.chdir(tmp_path)
    assert gen_img.main([*words[2:], "--steps=1", "--H=64", "--W=64"]) == 0
    assert len(list((tmp_path / "outputs").glob("*.png"))) == 1


def _from_here(path: Path) -> str:
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def test_an_adapter_is_drawn_with_by_the_command_that_is_printed(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {"max_train_steps": 1, "train_batch_size": 8, "network_module": "networks.lora", "use_safetensors": None}
    outcome = run(world.arguments(tmp_path / "out", **flags), capsys, train_network.RECIPE)
    assert outcome.code == 0, outcome.err
    saved = tmp_path / "out" / "dog.safetensors"
    (each,) = [line for line in said(outcome.err) if line.startswith("each saved file has ")]
    assert float(each.split()[4]) * 1e3 == pytest.approx(saved.stat().st_size, rel=0.15)  # the header is not counted
    words = shlex.split(said(outcome.err)[-1].removeprefix("next: "))
    assert words[1].endswith("gen_img.py")
    assert words[2:] == ["--ckpt", str(world.model), "--network_weights", str(saved), "--prompt", words[-1]]

    again = run(
        world.arguments(tmp_path / "two", base_weights=[saved], base_weights_multiplier=[0.5], **flags),
        capsys,
        train_network.RECIPE,
    )
    words = shlex.split(said(again.err)[-1].removeprefix("next: "))
    second = tmp_path / "two" / "dog.safetensors"
    assert words[4:9] == ["--network_weights", str(saved), str(second), "--network_mul", "0.5"]
    import gen_img

    monkeypatch.chdir(tmp_path)
    assert gen_img.main([*words[2:], "--steps=1", "--H=64", "--W=64"]) == 0
    assert len(list((tmp_path / "outputs").glob("*.png"))) == 1


def test_commands_are_quoted_for_the_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    line = ending.command("gen_img.py", "--prompt", "it's a dog")
    if sys.platform != "win32":
        shown = subprocess.run(["sh", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True, encoding="utf-8")
        assert shown.stdout.splitlines()[1:] == ["gen_img.py", "--prompt", "it's a dog"]
