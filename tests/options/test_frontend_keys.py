"""Files of front-ends are accepted unchanged by the program that the front-end starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.options.dataset_config.convert import BUILT_IN
from library.options.dataset_config.kohya import read_kohya
from library.options.parse import ADAPTERS, SDXL, SDXL_ADAPTERS, Parsed, Program, parse

FILES = Path(__file__).parents[1] / "frontend_files"

# kohya_ss writes all keys of its form, sorted; ints for floats, 0/1 for some switches.
KOHYA_SS = """
bucket_no_upscale = true
bucket_reso_steps = 64
cache_latents = true
caption_dropout_every_n_epochs = 0
caption_dropout_rate = 0
caption_extension = ".txt"
clip_skip = 1
dynamo_backend = "no"
enable_bucket = true
epoch = 1
gradient_accumulation_steps = 1
huber_c = 0.1
huber_scale = 1
huber_schedule = "snr"
keep_tokens = 0
learning_rate = 1e-5
learning_rate_te = 1e-5
logging_dir = "work/log"
loss_type = "l2"
lr_scheduler = "cosine"
lr_scheduler_args = []
lr_scheduler_num_cycles = 1
lr_scheduler_power = 1
lr_warmup_steps = 0.1
max_bucket_reso = 2048
max_data_loader_n_workers = 0
max_grad_norm = 1
max_timestep = 1000
max_token_length = 75
max_train_steps = 1600
min_bucket_reso = 256
mixed_precision = "fp16"
multires_noise_discount = 0.3
noise_offset_type = "Original"
optimizer_type = "AdamW8bit"
output_dir = "work/out/cat"
output_name = "cat"
persistent_data_loader_workers = 0
pretrained_model_name_or_path = "models/base.safetensors"
prior_loss_weight = 1
resolution = "512,512"
sample_prompts = "work/out/cat/sample/prompt.txt"
sample_sampler = "euler_a"
save_every_n_epochs = 1
save_model_as = "safetensors"
save_precision = "fp16"
train_batch_size = 1
train_data_dir = "work/train"
wandb_run_name = "cat"
xformers = true
"""

# what its form adds or changes with many options set
KOHYA_SS_MANY = {
    "caption_dropout_rate = 0": "caption_dropout_rate = 0.05",
    "clip_skip = 1": "clip_skip = 2",
    "epoch = 1": "epoch = 4\nflip_aug = true\ngradient_checkpointing = true\nmin_snr_gamma = 5\nnoise_offset = 0.05",
    "keep_tokens = 0": "keep_tokens = 1\nmetadata_title = 'my dog'",
    'lr_scheduler = "cosine"': 'lr_scheduler = "cosine_with_restarts"',
    "lr_scheduler_num_cycles = 1": "lr_scheduler_num_cycles = 2",
    "lr_warmup_steps = 0.1": "lr_warmup_steps = 0.05",
    "max_data_loader_n_workers = 0": "max_data_loader_n_workers = 2",
    "max_token_length = 75": "max_token_length = 225",
    "max_train_steps = 1600": "max_train_steps = 1200",
    'optimizer_type = "AdamW8bit"': (
        'optimizer_args = [ "weight_decay=0.1", "betas=0.9,0.99",]\noptimizer_type = "AdamW8bit"'
    ),
    "persistent_data_loader_workers = 0": "persistent_data_loader_workers = 1",
    "prior_loss_weight = 1": 'prior_loss_weight = 1\nreg_data_dir = "work/reg"',
    'sample_prompts = "work/out/cat/sample/prompt.txt"': (
        'sample_every_n_steps = 50\nsample_prompts = "work/out/cat/sample/prompt.txt"'
    ),
    "save_every_n_epochs = 1": (
        "save_every_n_epochs = 1\nsave_every_n_steps = 100\nsave_last_n_epochs = 2\nsave_last_n_epochs_state = 1\n"
        "save_state = true\nseed = 1234\nshuffle_caption = true\nstop_text_encoder_training = 50"
    ),
    "train_batch_size = 1": "train_batch_size = 2",
    "xformers = true": "sdpa = true",
}

# lora-scripts writes false and 0 too, and a max_token_length that no list of choices holds.
LORA_SCRIPTS = """
pretrained_model_name_or_path = "./sd-models/model.safetensors"
v2 = false
train_data_dir = "./train/cat"
resolution = "512,512"
enable_bucket = true
min_bucket_reso = 256
max_bucket_reso = 1024
bucket_reso_steps = 64
output_name = "cat"
output_dir = "./output"
save_model_as = "safetensors"
save_precision = "fp16"
save_every_n_epochs = 2
max_train_epochs = 10
train_batch_size = 1
gradient_checkpointing = false
learning_rate = 1e-6
learning_rate_te = 5e-7
lr_scheduler = "cosine_with_restarts"
lr_warmup_steps = 0
lr_scheduler_num_cycles = 1
optimizer_type = "AdamW8bit"
log_with = "tensorboard"
logging_dir = "./logs"
caption_extension = ".txt"
shuffle_caption = true
weighted_captions = false
keep_tokens = 0
max_token_length = 255
seed = 1337
clip_skip = 2
no_token_padding = false
mixed_precision = "fp16"
xformers = true
lowram = false
cache_latents = true
cache_latents_to_disk = true
persistent_data_loader_workers = true
"""
PREVIEW = """
sample_prompts = "a cat, --n bad,  --w 512  --h 768  --l 7  --s 24  --d 1337"
sample_sampler = "euler_a"
sample_every_n_epochs = 2
"""


def many_options() -> str:
    text = KOHYA_SS
    for old, new in KOHYA_SS_MANY.items():
        assert f"\n{old}\n" in text
        text = text.replace(f"\n{old}\n", f"\n{new}\n")
    return text


def accepted(folder: Path, text: str, *words: str) -> Parsed:
    path = folder / "config_dreambooth-20261120-110519.toml"
    path.write_text(text, encoding="utf-8")
    parsed = parse(["--config_file", str(path), *words])
    assert parsed.mistakes == ()
    return parsed


def test_kohya_ss_with_bare_defaults_without_a_word(tmp_path: Path) -> None:
    parsed = accepted(tmp_path, KOHYA_SS)
    assert parsed.notes == ()
    options = parsed.options
    assert options.dataset.resolution == (512, 512)
    assert options.model.max_token_length is None and options.model.clip_skip == 1
    assert options.optimizer.lr_warmup_steps == 0.1 and options.optimizer.lr_scheduler_args == ()
    assert options.run.log_with == "tensorboard", "a logging_dir alone means tensorboard"
    assert parsed.origins["learning_rate_te"] == "config_dreambooth-20261120-110519.toml"


def test_kohya_ss_with_images_while_training(tmp_path: Path) -> None:
    parsed = accepted(tmp_path, f"{KOHYA_SS}sample_every_n_epochs = 1\n")
    assert parsed.notes == () and parsed.options.preview.sample_every_n_epochs == 1


def test_kohya_ss_with_many_options(tmp_path: Path) -> None:
    parsed = accepted(tmp_path, many_options())
    assert parsed.notes == ()
    options = parsed.options
    assert options.objective.min_snr_gamma == 5.0 and options.objective.noise_offset == 0.05
    assert options.optimizer.optimizer_args == ("weight_decay=0.1", "betas=0.9,0.99")
    assert options.optimizer.stop_text_encoder_training == 50
    assert options.saving.save_last_n_epochs_state == 1


def test_kohya_ss_on_stable_diffusion_2(tmp_path: Path) -> None:
    parsed = accepted(tmp_path, f"{KOHYA_SS}v2 = true\nv_parameterization = true\n")
    assert parsed.options.model.v2 and parsed.options.model.v_parameterization and parsed.notes == ()


def test_kohya_ss_with_its_constant_scheduler_and_its_usual_warm_up(tmp_path: Path) -> None:
    parsed = accepted(tmp_path, KOHYA_SS.replace('"cosine"', '"constant"'))
    assert parsed.options.optimizer.lr_scheduler == "constant_with_warmup"
    assert len(parsed.notes) == 1 and "constant_with_warmup" in parsed.notes[0]


@pytest.mark.parametrize("preview", ["", PREVIEW])
def test_lora_scripts(tmp_path: Path, preview: str) -> None:
    parsed = accepted(tmp_path, LORA_SCRIPTS + preview)
    options = parsed.options
    assert options.model.max_token_length == 225 and options.run.max_train_epochs == 10
    assert "max_train_steps" not in parsed.set_by_user
    assert options.saving.output_dir == Path("output") and options.optimizer.lr_warmup_steps == 0
    assert any("255" in note and "225" in note for note in parsed.notes)
    assert len(parsed.notes) == 1


# --- files as their front-ends wrote them, and the program that they start ---


def parse_written(name: str, program: Program, *words: str) -> Parsed:
    return parse(["--config_file", str(FILES / f"{name}.toml"), *words], program)


@pytest.mark.parametrize(
    ("name", "program", "told"),
    [
        ("kohya_ss_dreambooth_sdxl", SDXL, ()),
        ("kohya_ss_lora_sdxl", SDXL_ADAPTERS, ()),
        ("kohya_ss_lora_sd21_v", ADAPTERS, ()),
        ("lora_scripts_dreambooth_sdxl_finetune", SDXL, ("max_token_length",)),
        ("lora_scripts_lora_sdxl_master_default", SDXL_ADAPTERS, ("max_token_length", "text_encoder_lr")),
    ],
)
def test_a_file_as_it_was_written(name: str, program: Program, told: tuple[str, ...]) -> None:
    parsed = parse_written(name, program)
    assert parsed.mistakes == ()
    assert len(parsed.notes) == len(told) and all(map(str.__contains__, parsed.notes, told)), parsed.notes


def test_front_end_keys_for_two_text_encoders() -> None:
    kohya_ss = parse_written("kohya_ss_dreambooth_sdxl", SDXL).options
    lora_scripts = parse_written("lora_scripts_dreambooth_sdxl_finetune", SDXL).options
    assert kohya_ss.optimizer.train_text_encoder and lora_scripts.optimizer.train_text_encoder
    rates = [(one.optimizer.learning_rate_te1, one.optimizer.learning_rate_te2) for one in (kohya_ss, lora_scripts)]
    assert rates == [(4e-7, 0.0), (5e-7, 5e-7)]
    assert parse_written("kohya_ss_lora_sdxl", SDXL_ADAPTERS).options.adapter.text_encoder_lr == (1e-4, 1e-4)


@pytest.mark.parametrize("program", [ADAPTERS, SDXL_ADAPTERS], ids=lambda program: program.name)
@pytest.mark.parametrize(("kind", "told"), [("default", 0), ("full", 1)])
def test_lora_easy_training_scripts_name_a_file_for_each_half(kind: str, told: int, program: Program) -> None:
    dataset = FILES / f"lets_{kind}_dataset.toml"
    parsed = parse_written(f"lets_{kind}_config", program, f"--dataset_config={dataset}")
    assert parsed.mistakes == () and len(parsed.notes) == told
    assert all("lr_scheduler_type" in note for note in parsed.notes), "keys of its own are passed over"
    assert parsed.options.dataset.dataset_config == dataset


@pytest.mark.parametrize(("kind", "subsets"), [("default", 1), ("full", 2)])
def test_the_dataset_files_of_lora_easy_training_scripts(kind: str, subsets: int) -> None:
    described = read_kohya(FILES / f"lets_{kind}_dataset.toml", BUILT_IN, masked_loss=False)
    assert not described.mistakes and not described.notes
    (dataset,) = described.datasets
    assert len(dataset.subsets) == subsets and dataset.subsets[0].repeats == 20
    if kind == "full":
        assert dataset.buckets.resolution == (512, 768) and dataset.batch_size == 2
        assert dataset.subsets[0].images.flip and dataset.subsets[1].is_reg


def test_lora_easy_training_scripts_name_the_file_as_dim_from_weights(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    written = "network_module = 'networks.lora'\npretrained_model_name_or_path = 'm'\noutput_dir = 'o'\n"
    dataset = FILES / "lets_default_dataset.toml"
    for weights, expected in (("", "a.safetensors"), ("network_weights = 'b.pt'\n", "b.pt")):
        path.write_text(f"{written}dim_from_weights = 'a.safetensors'\n{weights}", encoding="utf-8")
        parsed = parse(["--config_file", str(path), f"--dataset_config={dataset}"], ADAPTERS)
        assert parsed.mistakes == ()
        assert parsed.options.adapter.dim_from_weights and parsed.options.adapter.network_weights == Path(expected)
    path.write_text(f"{written}dim_from_weights = 'maybe'\n", encoding="utf-8")
    (mistake,) = parse(["--config_file", str(path), f"--dataset_config={dataset}"], ADAPTERS).mistakes
    assert "is neither true nor false" in mistake.what


def test_a_project_that_users_share_is_no_file_of_options() -> None:
    parsed = parse_written("lets_gui_saved_project", ADAPTERS)
    (mistake,) = parsed.mistakes
    assert "a front-end's project" in mistake.what
