"""Every page can be followed: its files are written and its commands run, in order, on miniatures of what they name."""

from __future__ import annotations

import importlib
import itertools
import re
import shlex
import shutil
import socketserver
from collections.abc import Iterator
from dataclasses import dataclass
from glob import glob
from pathlib import Path

import fsspec
import pytest
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors import safe_open

from library.training.command import run_recipe
from tests import tiny
from tests.data.shards.packing import write_tar
from tests.evaluation import tiny_encoders
from tests.mask_making.models import clipseg
from tests.tools import loras

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
FILES = ("toml", "json")
MODELS = {"sd15": "sd1", "v2-1_768": "sd2", "sd_xl_base_1.0": "sdxl", "sd_xl_refiner_1.0": "refiner"}
DOG = [f"{name}.png" for name in ("sofa", "lawn", "beach", "snow", "street", "stairs", "bed", "boat", "field")]

# What makes a command short. These flags are added where weights are loaded, and beat those of page and file.
TRAINING = (
    "--resolution 64 --min_bucket_reso 64 --max_train_epochs 0 --max_data_loader_n_workers 0 --max_train_steps {}"
)
DRAWING = "--W 64 --H 64 --steps 2"
SHORT = {
    "gen_img.py": DRAWING,
    "tools/find_rare_tokens.py": "--max_length 2",
    "tools/make_class_images.py": f"{DRAWING} --count 2",
    "tools/evaluate_subject.py": "--W 64 --H 64 --steps 1 --scale 1 --images_per_prompt 1 --class_images_per_prompt 0",
    "finetune/prepare_buckets_latents.py": "--max_resolution 64,64 --min_bucket_reso 64",
    "tools/watch.py": "--port 0",
}
WITHOUT_WEIGHTS = {"--dry_run", "--debug_dataset"}
# What stands for a number of steps, for several processes (tests/tools) and for a cloud (tests/data/scan).
INSTEAD = {
    "n_steps 500": "n_steps 1",
    "posthoc_ema_snapshots 10": "posthoc_ema_snapshots 1",
    "step00000500": "step00000001",
    "--processes 2": "--processes 1",
    "s3:": "memory:",
}
# What a command must have printed, besides ending well.
PRINTS = {
    "train_db.py --config_file dog.toml --cache_latents_to_disk": ("latents: 10 read, 0", "captions: 2 read, 0"),
    "fine_tune.py --config_file dog.toml --train_data_dir photos": ("latents: 2 read, 0",),
}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the file that it is to be saved as (empty if the page names none)."""

    language: str
    text: str
    file: str

    @property
    def commands(self) -> list[str]:
        """The commands of a block in sh, each as one line."""
        lines = self.text.replace("\\\n", " ").splitlines() if self.language == "sh" else []
        return [line for line in lines if line.strip()]


def blocks(page: str) -> Iterator[Block]:
    """The blocks of a page. A file is named in its first line, or else in the paragraph before it, as the last one."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        indent, language, body = match.groups()
        body = re.sub(rf"^{indent}", "", body, flags=re.MULTILINE)
        before = text[: match.start()].rstrip().rpartition("\n\n")[2]
        named = re.findall(r"\A# (\S+)\n", body) or re.findall(rf"`([\w.-]+\.{language}l?)`", before)
        yield Block(language, body, named[-1] if named and language in FILES else "")


def run(command: str, steps: int) -> int:
    """Run a command of a page in this process, shortened; returns its exit code."""
    for written, instead in INSTEAD.items():
        command = command.replace(written, instead)
    python, script, *words = shlex.split(command)
    assert python == "python" and (ROOT / script).is_file()
    words = [found for word in words for found in (sorted(glob(word)) if "*" in word else [word])]  # as a shell does
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    is_training = hasattr(module, "RECIPE") or script.startswith("tools/cache_")
    if not WITHOUT_WEIGHTS & set(words):
        words += shlex.split(SHORT.get(script, TRAINING.format(steps) if is_training else ""))
    try:
        return run_recipe(module.RECIPE, words) if hasattr(module, "RECIPE") else int(module.main(words))
    finally:
        AcceleratorState._reset_state(True)  # which a process has once


def images(folder: Path, *names: str) -> None:
    """Images of these names, different from each other and from those of other folders."""
    folder.mkdir(parents=True, exist_ok=True)
    seed = sum("/".join(folder.parts[-2:]).encode())
    for name, path in zip(names, tiny.write_images(folder / "drawn", len(names), seed=seed), strict=True):
        Image.open(path).save(folder / name)
    shutil.rmtree(folder / "drawn")


@pytest.fixture(scope="module")
def belongings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages take a reader to have: models, images and prompts."""
    root = tmp_path_factory.mktemp("belongings")
    for name, family in MODELS.items():
        tiny.write_single_file(root / "models" / f"{name}.safetensors", family)
    images(root / "train" / "10_sks dog", "garden.jpg", *DOG)
    (root / "train" / "10_sks dog" / "garden.txt").write_text("a photo of sks dog", encoding="utf-8")
    for folder in ("train/dog", "train/cat", "reg/dog", "masks/cat", "unseen/dog"):
        images(root / folder, "one.png", "two.png")
    images(root / "masks", "garden.png", *DOG)
    images(root / "images", "garden.jpg", "sofa.png")
    images(root / "photos", "one.png", "two.png")
    for name in ("one", "two"):
        (root / "photos" / f"{name}.caption").write_text("a young woman", encoding="utf-8")
        (root / "photos" / f"{name}.txt").write_text("1girl, white_shirt, rating:safe", encoding="utf-8")
    images(root, "dog.png")
    for name, prompt in (("prompts", "a photo of sks dog"), ("cats", "a cat")):
        lines = [f"{prompt}{where} --w 64 --h 64 --s 1\n" for where in ("", " on a sofa")]
        (root / f"{name}.txt").write_text("".join(lines), encoding="utf-8")
    return root


def furnish(root: Path, belongings: Path, page: str) -> None:
    """Copy what the reader of a page has: the belongings, and what the pages before had them make. Of the models only
    those that the page names, and that of the README."""
    text = (ROOT / page).read_text(encoding="utf-8")
    spare = [f"{name}.safetensors" for name in MODELS if name != "sd15" and name not in text]
    shutil.copytree(belongings, root, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*spare))
    model = belongings / "models" / "sd15.safetensors"
    written = {block.file: block.text for other in ("README.md", "docs/adapters.md") for block in blocks(other)}
    if page != "README.md":
        (root / "dog.toml").write_text(written["dog.toml"], encoding="utf-8")
        (root / "lora.toml").write_text(written["lora.toml"], encoding="utf-8")
        (root / "output").mkdir()
        shutil.copy(model, root / "output" / "dog.safetensors")
        loras.write(root / "output" / "dog_lora.safetensors", loras.tensors("sd1", 4, 2.0, 1))
    if page == "docs/evaluation.md":
        scene = "a {subject} in the snow --w 64 --h 64 --s 1\n"
        (root / "scenes.txt").write_text(scene, encoding="utf-8")
        tiny_encoders.write_dino(root / "models" / "dino")
        tiny_encoders.write_clip(root / "models" / "clip")
    if page == "docs/checkpoints.md":
        for name in ("model", "a", "b"):
            shutil.copy(model, root / f"{name}.safetensors")
        ema = {
            "model_ema." + key.removeprefix("model.").replace(".", ""): value
            for key, value in tiny.original_state_dict("sd1", 1).items()
            if key.startswith("model.diffusion_model.")
        }
        tiny.write_single_file(root / "model.ckpt", "sd1", ema=True, more=ema)
        tiny.write_vae_file(root / "vae.safetensors")
    if page == "docs/data.md":
        for shard in range(2):
            image = (root / "photos" / ("one.png", "two.png")[shard]).read_bytes()
            write_tar(root / "shards" / f"train-{shard:05d}.tar", {"0001.png": image, "0001.txt": b"a dog"})
        clipseg(root / "models" / "clipseg")
    if page == "docs/sdxl.md":  # "the same file without the five adapter lines"
        lines = next(block.text for block in blocks(page) if block.file == "xl.toml").splitlines()
        kept = [line for line in lines if not line.startswith(("network_", "unet_lr"))]
        assert len(lines) - len(kept) == 5
        (root / "xl_full.toml").write_text("\n".join(kept), encoding="utf-8")


@pytest.mark.parametrize("page", [page for page in PAGES if any(block.commands for block in blocks(page))])
def test_a_page_can_be_followed(
    page: str, belongings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    furnish(tmp_path, belongings, page)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socketserver.BaseServer, "serve_forever", lambda server: None)  # as after Ctrl-C
    cloud = fsspec.filesystem("memory")
    cloud.put(f"{tmp_path}/train/", "/bucket/train/", recursive=True)
    try:
        for block in blocks(page):
            if block.file:
                (tmp_path / block.file).write_text(block.text, encoding="utf-8")
            for command in block.commands:
                code = run(command, steps=2 if page == "docs/resume.md" else 1)
                printed = "\n".join(capsys.readouterr())
                assert code == 0, f"{command}\n{printed}"
                for start, expected in PRINTS.items():
                    assert start not in command or all(text in printed for text in expected), printed
    finally:
        cloud.rm("/bucket", recursive=True)
    with safe_open(tmp_path / "output" / "dog.safetensors", "pt") as model:
        assert any(key.startswith("model.") for key in model.keys()), "an adapter has replaced the README's model"


@pytest.mark.parametrize("page", PAGES)
def test_every_file_of_a_page_is_used_by_its_commands(page: str) -> None:
    """So that the test above reads it; and what looks like a command is in a block of them."""
    found = list(blocks(page))
    commands = " ".join(command for block in found for command in block.commands)
    for block in found:
        if block.language in FILES:
            assert block.file and block.file in commands, block.text
        assert block.language == "sh" or not re.search(r"^(python|accelerate) ", block.text, re.MULTILINE), block.text


def test_commands_in_sentences_name_programs_and_flags_that_exist() -> None:
    """`python benchmarks/step.py --steps 5`: these are not run, most of them take minutes."""
    pages = [path for path in ROOT.rglob("*.md") if not path.relative_to(ROOT).parts[0].startswith(".")]
    inline = [
        command for page in pages for command in re.findall(r"`python ([^`]+)`", page.read_text(encoding="utf-8"))
    ]
    assert len(inline) > 10
    for command in inline:
        first, *words = shlex.split(command)
        program = ROOT / (words[0].replace(".", "/") + ".py" if first == "-m" else first)
        assert program.is_file(), command
        if not hasattr(importlib.import_module(".".join(program.relative_to(ROOT).with_suffix("").parts)), "RECIPE"):
            source = program.read_text(encoding="utf-8")
            own = itertools.takewhile(lambda word: word != "--", words)  # then come another program's
            flags = [word for word in own if word.startswith("--")]
            assert all(f'"{name}"' in source or f"    {name[2:]}: " in source for name in flags), command
