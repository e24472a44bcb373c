"""Values that saved presets of kohya_ss hold: each file gives a plan, and a note where a value is replaced.

The files in frontend_files/presets are what its form writes, with one such value or two: the keys of the form are
sorted, values that are empty or off are left out, and in those of a LoRA 0 too.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fine_tune
import sdxl_train
import sdxl_train_network
import train_db
import train_network
from library.training import trackers
from library.training.recipe import Recipe
from tests import tiny
from tests.training.running import Outcome, make_world, run

PRESETS = Path(__file__).parent / "frontend_files" / "presets"
STEPS = "bucket_reso_steps = {} ({}.toml) becomes 8, a multiple of 8"
AREA = '--resolution = "{}" ({}.toml): only its area counts'
CAPTIONS_OFF = 'no image has a {} file: no caption file is read, and "sks dog" is the caption of all'
TOLD = {
    "lora_sd15_bucket_steps_1": [STEPS.format(1, "lora_sd15_bucket_steps_1")],
    "lora_sd15_bucket_steps_1_without_buckets": [],
    "lora_sd15_bucket_steps_2_adafactor": [STEPS.format(2, "lora_sd15_bucket_steps_2_adafactor")],
    "lora_sd21_v_bucket_steps_4": [STEPS.format(4, "lora_sd21_v_bucket_steps_4")],
    "lora_sdxl_bucket_steps_1": [STEPS.format(1, "lora_sdxl_bucket_steps_1")],
    "dreambooth_sdxl_bucket_steps_4": [STEPS.format(4, "dreambooth_sdxl_bucket_steps_4")],
    "lora_sd15_resolution_512_650": [AREA.format("512,650", "lora_sd15_resolution_512_650")],
    "lora_sd15_resolution_512_650_without_buckets": ["becomes 512x648: sides are multiples of 8", "512x648: 8"],
    "dreambooth_sd15_resolution_600_600": [AREA.format("600,600", "dreambooth_sd15_resolution_600_600")],
    "lora_sd15_captions_foldername": [CAPTIONS_OFF.format(".none-use-foldername"), 'all captioned "sks dog"'],
    "lora_sd15_captions_txt2": [CAPTIONS_OFF.format(".txt2"), 'all captioned "sks dog"'],
    "dreambooth_sd15_captions_txt_no_file": [CAPTIONS_OFF.format(".txt-no file"), 'all captioned "sks dog"'],
    "lora_sd15_min_snr_and_debiased": [
        "--min_snr_gamma with --debiased_estimation_loss: their weights multiply",
        "min-SNR weighting with gamma 10 times debiased weighting",
    ],
    "lora_sd15_images_below_a_step": ["5 images are narrower than bucket_reso_steps = 128 (the options)", "80x64: 6"],
    "lora_sd15_dim_from_weights_without_weights": ["dim_from_weights has no effect", "rank 8"],
    "lora_sd15_masked_loss_without_masks": ["masked_loss has no effect: there are no masks"],
    "lora_sd15_wandb": ["the package wandb is not installed, so the run is logged for tensorboard"],
    "lora_sd15_loha_bucket_steps_1": [STEPS.format(1, "lora_sd15_loha_bucket_steps_1")],
    "dreambooth_sd15_dataset_config": [],
    "finetune_sd15_resolution_512_650": [
        AREA.format("512,650", "finetune_sd15_resolution_512_650"), "3 images x 10 = 30 samples",
    ],
}  # fmt: skip
NOT_TOLD = ("becomes", "only its area", "no effect", "no image has", "not installed", "narrower", "multiply")
TRAINED = (
    "lora_sd15_bucket_steps_1", "lora_sd15_resolution_512_650", "dreambooth_sd15_captions_txt_no_file",
    "lora_sd15_min_snr_and_debiased", "lora_sd15_images_below_a_step",
)  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, images and files that the presets name."""
    root = tmp_path_factory.mktemp("presets")
    make_world(root)
    for family in ("sd2", "sdxl"):
        tiny.write_single_file(root / f"{family}.safetensors", family)
    (root / "out" / "sample").mkdir(parents=True)
    (root / "out" / "sample" / "prompt.txt").touch()  # kohya_ss always makes it and sends its path
    captions = {f"image_{number:02}": {"caption": "a photo of sks dog"} for number in range(3)}
    (root / "meta_cap.json").write_text(json.dumps(captions), encoding="utf-8")
    (root / "dataset.toml").write_text(
        "[general]\nenable_bucket = true\nbucket_reso_steps = 64\n[[datasets]]\nresolution = 512\n"
        f"[[datasets.subsets]]\nimage_dir = '{root / 'train' / '2_sks dog'}'\nclass_tokens = 'sks dog'\n"
        "caption_extension = '.txt'\n",
        encoding="utf-8",
    )
    return root


def recipe_of(preset: str) -> Recipe:
    """The program that kohya_ss starts from the tab of this preset."""
    if preset.startswith("finetune"):
        return fine_tune.RECIPE
    if preset.startswith("lora"):
        return sdxl_train_network.RECIPE if "sdxl" in preset else train_network.RECIPE
    return sdxl_train.RECIPE if "sdxl" in preset else train_db.RECIPE


def start(root: Path, preset: str, capsys: pytest.CaptureFixture[str], *words: str) -> Outcome:
    """Run a preset in the folder of the fixture, as kohya_ss does."""
    file = root / f"{preset}.toml"
    text = (PRESETS / file.name).read_text(encoding="utf-8")
    file.write_text(text.replace("@WORK@", root.as_posix()), encoding="utf-8")
    return run(["--config_file", str(file), *words], capsys, recipe_of(preset))


def test_every_preset_is_tried() -> None:
    assert sorted(TOLD) == sorted(file.stem for file in PRESETS.iterdir()) and len(TOLD) == 20


@pytest.mark.parametrize("preset", TOLD)
def test_a_preset_gives_a_plan_that_says_what_is_replaced(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, preset: str
) -> None:
    find = trackers.importlib.util.find_spec
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    outcome = start(root, preset, capsys, "--dry_run")
    assert outcome.code == 0, outcome.err
    for words in TOLD[preset]:
        assert words in outcome.out
    if not TOLD[preset]:
        assert not any(words in outcome.out for words in NOT_TOLD), outcome.out


@pytest.mark.parametrize("preset", TRAINED)
def test_a_preset_trains(root: Path, capsys: pytest.CaptureFixture[str], preset: str) -> None:
    outcome = start(root, preset, capsys, "--max_train_steps=2", "--no_half_vae", f"--output_dir={root / preset}")
    assert outcome.code == 0, outcome.err
    assert sorted(outcome.losses) == [1, 2] and (root / preset / f"{preset}.safetensors").is_file()
