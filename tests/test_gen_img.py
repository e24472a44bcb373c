"""gen_img.py: images from the command line, and one clear line for each mistake."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image, ImageChops

import gen_img
from library.options.mistakes import UserError
from library.sampling.draw_command import decide
from library.sampling.options import GenerateOptions
from tests import tiny

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.write_single_file(tmp_path_factory.mktemp("m") / "dog.safetensors", "sd1")


def run(model: Path, out: Path, *words: str) -> int:
    return gen_img.main(["--ckpt", str(model), "--outdir", str(out), "--steps", "2", "--W", "64", "--H", "64", *words])


def test_images_from_the_command_line(model, tmp_path):
    words = ["--prompt", "a dog --n bad", "--images_per_prompt", "2", "--seed", "7", "--sampler", "euler_a"]
    assert run(model, tmp_path / "new", *words) == 0
    first, second = sorted((tmp_path / "new").iterdir())
    assert re.fullmatch(r"im_\d{14}_000_7\.png", first.name) and re.fullmatch(r"im_\d{14}_001_8\.png", second.name)
    with Image.open(first) as image:
        assert image.size == (64, 64)
        assert (image.text["prompt"], image.text["negative-prompt"], image.text["seed"]) == ("a dog", "bad", "7")


def test_a_bar_shows_the_steps_of_all_images(model, tmp_path, capsys):
    """2 images of 2 steps and one of 3; in a file the bar is a whole line at the end."""
    prompts = tmp_path / "p.txt"
    prompts.write_text("a dog\na cat\na cow --s 3\n", encoding="utf-8")
    assert run(model, tmp_path / "out", "--from_file", str(prompts), "--batch_size", "2") == 0
    shown = capsys.readouterr()
    (line,) = [line for line in shown.err.splitlines() if line.startswith("drawing")]
    assert "100%" in line and " 7/7 [" in line
    assert [line[:5] for line in shown.out.splitlines()[:3]] == ["[1/3]", "[2/3]", "[3/3]"]


def test_prompts_from_a_file_in_a_diffusers_folder_with_another_vae(tmp_path):
    folder = tiny.write_diffusers(tmp_path / "sd2", "sd2", prediction="v_prediction")
    prompts = tmp_path / "p.txt"
    prompts.write_text("ein Hündchen --d 3 --h 128\n# not this\na cat\n", encoding="utf-8")
    vae = tiny.write_vae_file(tmp_path / "vae.safetensors")
    assert run(folder, tmp_path / "out", "--from_file", str(prompts), "--vae", str(vae), "--v2") == 0
    sizes = {}
    for path in (tmp_path / "out").iterdir():
        with Image.open(path) as image:
            sizes[path.name[18:22]] = image.size
    assert sizes["000_"] == (64, 128) and sizes["001_"] == (64, 64)


def test_one_seed_is_one_image(model, tmp_path):
    for name in ("a", "b"):
        assert run(model, tmp_path / name, "--prompt", "a dog", "--seed", "1", "--bf16") == 0
    (first,), (second,) = (list((tmp_path / name).iterdir()) for name in ("a", "b"))
    with Image.open(first) as one, Image.open(second) as two:
        assert one.tobytes() == two.tobytes()


def test_a_model_trained_with_zero_terminal_snr_is_drawn_with_it(model, tmp_path):
    """A diffusers folder tells it, a file does not."""
    told = tiny.write_diffusers(tmp_path / "told", "sd1", prediction="v_prediction")
    config = told / "scheduler" / "scheduler_config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text(encoding="utf-8")) | {"rescale_betas_zero_snr": True}), encoding="utf-8"
    )
    drawn = []
    for ckpt, more in ((model, []), (model, ["--zero_terminal_snr"]), (told, [])):
        out = tmp_path / str(len(drawn))
        assert run(ckpt, out, "--prompt", "a dog", "--seed", "1", "--v_parameterization", *more) == 0
        (path,) = out.iterdir()
        with Image.open(path) as image:
            drawn.append(image.convert("RGB"))
    assert ImageChops.difference(drawn[0], drawn[1]).getbbox() is not None
    assert ImageChops.difference(drawn[1], drawn[2]).getbbox() is None


@pytest.fixture(scope="module")
def refiner(tmp_path_factory) -> Path:
    return tiny.write_single_file(tmp_path_factory.mktemp("m") / "refiner.safetensors", "refiner")


def test_a_refiner_refines_a_image_and_draws_none(refiner, tmp_path, capsys):
    (image,) = tiny.write_images(tmp_path, 1, size=(100, 72))
    words = [
        "--ckpt",
        str(refiner),
        "--prompt",
        "a dog",
        "--seed",
        "1",
        "--steps",
        "6",
        "--outdir",
        str(tmp_path / "o"),
    ]
    assert gen_img.main(words) == 2
    error = capsys.readouterr().err
    assert "refiner" in error and "only refines images" in error and "--image_path" in error
    assert gen_img.main([*words, "--image_path", str(image)]) == 0
    (path,) = (tmp_path / "o").iterdir()
    with Image.open(path) as drawn:
        assert drawn.size == (96, 72)


def test_sdxl_draws_in_its_own_size_and_at_its_own_layer(tmp_path):
    path = tiny.write_single_file(tmp_path / "sdxl.safetensors", "sdxl")
    options = GenerateOptions(ckpt=str(path), prompt="a dog --w 640")
    (prompt,) = decide(options).prompts
    assert (prompt.width, prompt.height) == (640, 1024)
    (prompt,) = decide(replace(options, W=512, H=768, prompt="a dog", clip_skip=1)).prompts
    assert (prompt.width, prompt.height) == (512, 768)
    with pytest.raises(UserError, match="--clip_skip 3, but .* Stable Diffusion XL"):
        decide(replace(options, clip_skip=3))
    assert decide(options).vae_in_full(replace(options, fp16=True))
    assert not decide(options).vae_in_full(replace(options, bf16=True))


def test_images_drawn_at_once_are_those_drawn_one_by_one(model, tmp_path):
    drawn = {}
    for size in (1, 2):
        words = ["--prompt", "a dog", "--negative_prompt", "fog", "--images_per_prompt", "3", "--seed", "1"]
        assert run(model, tmp_path / str(size), *words, "--batch_size", str(size)) == 0
        drawn[size] = []
        for path in sorted((tmp_path / str(size)).iterdir(), key=lambda path: path.name[18:]):
            with Image.open(path) as image:
                assert image.text["negative-prompt"] == "fog"
                drawn[size].append((image.text["seed"], image.convert("RGB")))
    assert [seed for seed, _ in drawn[1]] == [seed for seed, _ in drawn[2]] == ["1", "2", "3"]
    for (_, alone), (_, together) in zip(drawn[1], drawn[2], strict=True):
        assert max(high for _, high in ImageChops.difference(alone, together).getextrema()) <= 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prompt", "x", "--foo", "1"], ["--foo"]),
        (["--prompt", "x", "--sampler", "bla"], ["bla", "euler_a"]),
        (["--prompt", "x --ss bla"], ["bla", "euler_a"]),
        (["--W", "100", "--steps", "many"], ["--W 100", "--steps", "--prompt"]),
        (["--prompt", "x", "--from_file", "y.txt"], ["either"]),
        (["--from_file", "gone.txt"], ["gone.txt"]),
        (["--prompt", "x", "--fp16", "--bf16"], ["exclude"]),
        (["--prompt", "x", "--v2"], ["--v2", "1.x"]),
        (["--prompt", "x", "--sdxl"], ["--sdxl", "1.x"]),
        (["--prompt", "x", "--zero_terminal_snr"], ["--zero_terminal_snr", "--v_parameterization"]),
        (["--prompt", "x", "--vae", "gone.pt"], ["gone.pt"]),
        (["--prompt", "x", "--image_path", "gone.png"], ["--image_path gone.png"]),
        (["--prompt", "x", "--strength", "0.5"], ["--strength", "--image_path"]),
        (["--prompt", "x", "--clip_skip", "9"], ["--clip_skip 9", "3 layers"]),
    ],
)
def test_mistakes_are_told_without_a_traceback(model, tmp_path, capsys, words, said):
    assert run(model, tmp_path / "out", *words) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in said) and "Traceback" not in error
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize(("ckpt", "said"), [("gone.safetensors", "no such file"), ("someone/model", "downloaded")])
def test_a_model_that_is_not_there_is_never_fetched(tmp_path, capsys, ckpt, said, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    assert gen_img.main(["--ckpt", ckpt, "--prompt", "x", "--outdir", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_told(model, tmp_path, capsys):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    assert run(model, tmp_path / "file" / "out", "--prompt", "x") == 2
    assert "--outdir" in capsys.readouterr().err


def test_help_and_mistakes_need_no_torch():
    code = (
        "import sys, gen_img\n"
        "assert gen_img.main(['--help']) == 0 and gen_img.main(['--foo']) == 2\n"
        "assert gen_img.main(['--ckpt', 'gone.ckpt', '--prompt', 'x']) == 2\n"
        "sys.exit(', '.join(m for m in ('torch', 'numpy', 'diffusers', 'transformers') if m in sys.modules) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert all(flag in done.stdout for flag in ("--ckpt", "--from_file", "--images_per_prompt", "--sampler"))
