"""Flags of later versions: silent if neutral, refused if they would change the weights, else listed in one note."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.options.future_flags import FUTURE_FLAGS, OTHER, WEIGHTS
from library.options.parse import Parsed, parse
from library.options.render import config_toml
from library.options.train_options import FLAGS

NEEDED = "pretrained_model_name_or_path = 'm'\ntrain_data_dir = 't'\noutput_dir = 'o'\nresolution = '512,512'\n"


def parse_file(folder: Path, text: str) -> Parsed:
    path = folder / "gui.toml"
    path.write_text(NEEDED + text, encoding="utf-8")
    return parse(["--config_file", str(path)])


NEUTRAL = """
alpha_mask = false
caption_separator = ";"
caption_tag_dropout_rate = 0
dynamo_backend = "no"
huber_c = 0.5
huber_scale = 1
huber_schedule = "constant"
ip_noise_gamma = 0
keep_tokens_separator = ""
learning_rate_te1 = ""
loss_type = "l2"
max_timestep = 1000
min_timestep = 0
multires_noise_discount = 0.8
multires_noise_iterations = 0
network_args = []
network_dropout = 0
network_train_unet_only = false
sample_every_n_epochs = 0
sample_prompts = "prompt.txt"
sample_sampler = "euler_a"
token_warmup_min = 3
token_warmup_step = 0
train_text_encoder = true
validation_seed = 3
wandb_run_name = "me"
weighted_captions = 0
zero_stage = 3
zero_terminal_snr = "false"
"""


def test_neutral_values_are_silent(tmp_path: Path) -> None:
    parsed = parse_file(tmp_path, NEUTRAL)
    assert parsed.mistakes == () and parsed.notes == ()


@pytest.mark.parametrize("name", [name for name, later in FUTURE_FLAGS.items() if later.default is not None])
def test_every_default_is_silent_on_the_command_line_too(name: str) -> None:
    parsed = parse([f"--{name}={str(FUTURE_FLAGS[name].default)}"])
    assert not any(name in mistake.what for mistake in parsed.mistakes) and parsed.notes == ()


@pytest.mark.parametrize(
    ("name", "written", "said"),
    [
        ("dataset_class", '"my.Dataset"', '"my.Dataset"'),
        ("train_inpainting", "true", "true"),
        ("skip_image_resolution", "512", "[512, 512]"),
        ("prompts_file", '"leco.toml"', "leco.toml"),
        ("token_string", '"sks"', '"sks"'),
        ("t5xxl", '"t5.safetensors"', "t5.safetensors"),
        ("timestep_sampling", '"sigmoid"', '"sigmoid"'),
        ("weighting_scheme", '"logit_normal"', '"logit_normal"'),
    ],
)
def test_flags_that_would_change_the_weights_are_refused(tmp_path: Path, name: str, written: str, said: str) -> None:
    (mistake,) = parse_file(tmp_path, f"{name} = {written}\n").mistakes
    assert f"--{name} = {said} (gui.toml)" in mistake.what
    assert "not supported in this version" in mistake.what
    assert "remove it" in mistake.remedy


def test_harmless_flags_are_listed_in_one_note(tmp_path: Path) -> None:
    text = 'cuda_allow_tf32 = true\nshow_timesteps = "image"\nshow_timesteps_offset = 2.0\n'
    parsed = parse_file(tmp_path, text)
    assert parsed.mistakes == ()
    (note,) = parsed.notes
    for name in ("cuda_allow_tf32", "show_timesteps ", "show_timesteps_offset"):
        assert name in note
    assert "gui.toml" in note


def test_what_kohya_ss_sends_for_newer_versions(tmp_path: Path) -> None:
    """Its page for torch.compile and timesteps: fields with defaults are silent until the feature is on."""
    fields = 'compile_mode = "default"\ncompile_backend = "inductor"\ncompile_dynamic = "auto"\n'
    fields += 'compile_cache_size_limit = 32\nshow_timesteps_resolution = "1024,1024"\nblocks_to_swap = 0\n'
    parsed = parse_file(tmp_path, fields)
    assert parsed.mistakes == () and parsed.notes == ()
    parsed = parse_file(tmp_path, f'{fields}compile = true\nshow_timesteps = "image"\ncuda_allow_tf32 = true\n')
    assert parsed.mistakes == () and parsed.options.compilation.compile
    (note,) = parsed.notes
    for name in ("show_timesteps ", "show_timesteps_resolution", "cuda_allow_tf32"):
        assert name in note


def test_a_secret_is_never_shown(tmp_path: Path) -> None:
    parsed = parse_file(tmp_path, 'wandb_api_key = "secret-key"\n')
    (note,) = parsed.notes
    assert "wandb_api_key" in note and "secret-key" not in note
    assert "secret-key" not in config_toml(parsed.options)


def test_adapter_flags_are_one_mistake_naming_what_the_program_trains(tmp_path: Path) -> None:
    text = 'network_module = "networks.lora"\nnetwork_dim = 8\nunet_lr = 1e-4\ntext_encoder_lr = [5e-5]\n'
    text += "network_alpha = 1\n"
    (mistake,) = parse_file(tmp_path, text).mistakes
    for part in ("network_module", "network_dim = 8", "unet_lr", "text_encoder_lr", "train_network.py", "all weights"):
        assert part in mistake.what
    assert "network_alpha" not in mistake.what, "at its default it asks for nothing"


def test_a_value_of_a_wrong_type_is_not_neutral(tmp_path: Path) -> None:
    (mistake,) = parse_file(tmp_path, 'train_inpainting = "masks"\n').mistakes
    assert "masks" in mistake.what


def test_words_after_a_flag_of_another_script_belong_to_it() -> None:
    parsed = parse(["--network_args", "conv_dim=4", "conv_alpha=1", "--sample_sampler", "ddim", "--train_inpainting"])
    whats = [mistake.what for mistake in parsed.mistakes if "is not set" not in mistake.what]
    assert len(whats) == 2 and any("conv_alpha=1" in what for what in whats)


def test_the_table_is_sound() -> None:
    for later in FUTURE_FLAGS.values():
        assert later.changes in (WEIGHTS, OTHER)
        for condition in later.only_with:
            name = condition.partition("=")[0]
            assert name in FUTURE_FLAGS or name in FLAGS
