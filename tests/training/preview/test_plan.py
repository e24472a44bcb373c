"""When images are drawn, their file names, and checks of the prompts before the first step."""

from __future__ import annotations

import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from library.data.buckets import Placement
from library.options.mistakes import Mistakes
from library.options.train_options import TrainOptions, build
from library.sampling.prompts import ImageRequest
from library.training.preview.plan import PreviewPlan, check_prompts, plan_preview, read_requests

TIME = datetime(2026, 1, 31, 23, 59, 58)


def options(prompts: Path | None, **flags: object) -> TrainOptions:
    return build({"sample_prompts": prompts, "output_name": "dog", **flags})


def plan(prompts: Path, **flags: object) -> PreviewPlan:
    preview = plan_preview(options(prompts, **flags))
    assert preview is not None
    return preview


def moments(preview: PreviewPlan, steps: int, steps_per_epoch: int) -> list[str]:
    """s2: after step 2, e1: at the end of epoch 1."""
    due = []
    for step in range(1, steps + 1):
        due += [f"s{step}"] if preview.is_due_after_step(step) else []
        epoch, rest = divmod(step, steps_per_epoch)
        due += [f"e{epoch}"] if not rest and preview.is_due_after_epoch(epoch) else []
    return due


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"sample_every_n_steps": 2}, ["s2", "s4", "s6", "s8"]),
        ({"sample_every_n_epochs": 1}, ["e1", "e2"]),
        ({"sample_every_n_epochs": 2}, ["e2"]),
        ({"sample_every_n_epochs": 2, "sample_every_n_steps": 1}, ["e2"]),
        ({"sample_at_first": True}, []),
    ],
)
def test_when_images_are_drawn(flags: dict[str, object], expected: list[str], tmp_path: Path) -> None:
    assert moments(plan(tmp_path / "p.txt", **flags), steps=8, steps_per_epoch=4) == expected


@pytest.mark.parametrize("flags", [{}, {"sample_every_n_steps": None, "sample_batch_size": 4}])
def test_a_prompt_file_alone_draws_nothing(flags: dict[str, object], tmp_path: Path) -> None:
    """kohya_ss always sends the name of a prompt file, which may be empty or missing."""
    (tmp_path / "empty.txt").touch()
    for name in ("empty.txt", "gone.txt"):
        mistakes = Mistakes()
        assert check_prompts(options(tmp_path / name, **flags), mistakes) == () and not mistakes
        assert plan_preview(options(tmp_path / name, **flags)) is None


def test_image_names_are_kohyas(tmp_path: Path) -> None:
    preview = plan(tmp_path / "p.txt", sample_every_n_steps=1, output_dir=tmp_path / "out")
    assert preview.path("e000003", 0, TIME, None) == tmp_path / "out" / "sample" / "dog_e000003_00_20260131235958.png"
    assert preview.path("000120", 11, TIME, 42).name == "dog_000120_11_20260131235958_42.png"
    nameless = plan(tmp_path / "p.txt", sample_every_n_steps=1, output_dir=tmp_path, output_name=None)
    assert nameless.path("000120", 1, TIME, 0).name == "000120_01_20260131235958_0.png"


def test_defaults_are_kohyas_the_familys_size_and_the_runs_sampler(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a dog\na cat --w 320 --ss heun\n", encoding="utf-8")
    chosen = options(tmp_path / "p.txt", sample_at_first=True, sample_sampler="euler_a")
    kohyas, ours = plan_preview(chosen), plan_preview(chosen, (768, 640))
    assert kohyas is not None and ours is not None
    dog = ImageRequest("a dog", "", 512, 512, None, 30, 7.5, "euler_a")
    assert read_requests(kohyas) == [dog, ImageRequest("a cat", width=320, sampler="heun")]
    assert [(one.width, one.height) for one in read_requests(ours)] == [(768, 640), (320, 640)]


def test_refined_images_are_taken_in_turn_and_have_their_own_sizes(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a --w 1024\nb\nc --d 3\n", encoding="utf-8")
    placements = (Placement(bucket=(64, 72), resized=(80, 72)), Placement(bucket=(80, 64), resized=(80, 64)))
    preview = plan_preview(options(tmp_path / "p.txt", sample_every_n_epochs=1), (1024, 1024), placements)
    assert preview is not None and [preview.refined_image(place) for place in range(3)] == [0, 1, 0]
    sizes = [(one.prompt, one.width, one.height) for one in read_requests(preview)]
    assert sizes == [("a", 64, 72), ("b", 80, 64), ("c", 64, 72)]
    assert "refining images of the dataset at the end of every epoch" in str(preview)


def test_prompt_sizes_without_effect_are_noted(tmp_path: Path) -> None:
    chosen = options(tmp_path / "p.txt", sample_every_n_epochs=1)
    for prompt, count in (("a dog --w 640", 1), ("a dog", 0)):
        (tmp_path / "p.txt").write_text(prompt, encoding="utf-8")
        notes = check_prompts(chosen, Mistakes(), refines=True)
        assert len(notes) == count and all("--w" in note for note in notes)
        assert check_prompts(chosen, Mistakes()) == ()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("gone.txt", None, "cannot be read"),
        ("gone.TOML", None, "cannot be read"),
        ("p.yaml", "a dog", "unknown extension"),
        ("p.json", "[", "is invalid"),
        ("p.txt", "a dog --ss euler_b", "euler_b"),
    ],
)
def test_wrong_prompts_are_mistakes(name: str, content: str | None, words: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")
    mistakes = Mistakes()
    check_prompts(options(tmp_path / name, sample_every_n_epochs=1), mistakes)
    (mistake,) = mistakes
    assert words in mistake.what and mistake.what.startswith("--sample_prompts") and mistake.remedy


def test_an_empty_file_may_be_filled_later(tmp_path: Path) -> None:
    """kohya_ss makes one by itself, and users may write into it during a run."""
    (tmp_path / "prompt.txt").write_text("\n# nothing yet\n", encoding="utf-8")
    mistakes = Mistakes()
    (note,) = check_prompts(options(tmp_path / "prompt.txt", sample_every_n_epochs=1), mistakes)
    assert not mistakes and "is empty" in note


def test_a_prompt_option_without_effect_is_noted_once(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a dog --cn x.png\na cat --cn x.png\n", encoding="utf-8")
    mistakes = Mistakes()
    (note,) = check_prompts(options(tmp_path / "p.txt", sample_at_first=True), mistakes)
    assert "--cn x.png" in note and not mistakes


def test_a_prompt_may_replace_the_file_name() -> None:
    """lora-scripts sends the text itself; with much of it, longer than a name can be."""
    text = "(masterpiece:1.2), 1girl, solo, " + "grass, " * 90 + "--n lowres, bad anatomy,  --w 512  --h 768  --d 1337"
    mistakes = Mistakes()
    chosen = options(Path(text), sample_every_n_epochs=2)
    (note,) = check_prompts(chosen, mistakes)
    assert not mistakes and "used as a prompt" in note
    (request,) = read_requests(plan(Path(text), sample_every_n_epochs=2))
    assert request.prompt.startswith("(masterpiece:1.2), 1girl") and request.negative_prompt == "lowres, bad anatomy,"
    assert (request.width, request.height, request.seed) == (512, 768, 1337)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"sample_every_n_steps": 1}, "drawn after every step,"),
        ({"sample_every_n_epochs": 2}, "drawn at the end of every 2nd epoch,"),
        ({"sample_every_n_steps": 11, "sample_at_first": True}, "before the first step and after every 11th step,"),
        ({"sample_every_n_steps": 101}, "after every 101st step,"),
        ({"sample_at_first": True}, "drawn before the first step, in "),
    ],
)
def test_the_plan_describes_prompts_and_moments(flags: dict[str, object], words: str, tmp_path: Path) -> None:
    text = str(plan(tmp_path / "p.txt", output_dir=tmp_path, **flags))
    (tmp_path / "p.txt").touch()
    assert words in text and str(tmp_path / "p.txt") in text and text.endswith(f"in {tmp_path / 'sample'}")


def test_a_folder_in_the_way_is_found_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a dog", encoding="utf-8")
    (tmp_path / "sample").write_text("a file", encoding="utf-8")
    mistakes = Mistakes()
    check_prompts(options(tmp_path / "p.txt", sample_at_first=True, output_dir=tmp_path), mistakes)
    assert "sample" in str(*mistakes) and "not a folder" in str(*mistakes)


def test_the_plan_needs_no_torch() -> None:
    program = "import sys, library.training.preview.plan; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_tags_for_adapters_are_told_to_be_text(tmp_path: Path) -> None:
    """Elsewhere they draw with a file of --network_dir, which a run does not have."""
    (tmp_path / "p.txt").write_text("a dog <lora:snow:0.8>\na cat\n", encoding="utf-8")
    (note,) = check_prompts(options(tmp_path / "p.txt", sample_at_first=True), Mistakes())
    assert "<lora:snow:0.8> stays in the text" in note
