"""Everything that was asked for stands in the plan: each flag once, each setting of a dataset file, no secret."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import train_network
from library.options.flag import Flag
from library.options.mistakes import UserError
from library.options.parse import ADAPTERS, SDXL, parse
from library.options.train_options import FLAGS
from library.training.plan.given import SAID, given_options
from library.training.plan.plan import Plan, decide
from library.training.plan.text import as_text, describe, sections
from library.training.precache.plan import decide_caching, describe_caching
from tests.training.running import World, make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def options_of(plan: Plan) -> str:
    return " ".join(sections(plan)["options"])


def test_what_has_no_line_of_its_own_is_listed_by_name(world: World, tmp_path: Path) -> None:
    """The options that a user looked for in vain."""
    arguments = world.arguments(
        tmp_path, network_module="networks.lora", network_dropout=0.1, clip_skip=2, weighted_captions=True,
        max_grad_norm=0, scale_weight_norms=1, gradient_checkpointing=True, flip_aug=True, use_safetensors=None,
        lr_scheduler="cosine_with_restarts", lr_scheduler_num_cycles=3, training_comment="for me, only",
    )  # fmt: skip
    plan = decide(parse(arguments, train_network.RECIPE.program))
    assert options_of(plan) == (
        "clip_skip 2, flip_aug, caption_extension .txt, weighted_captions, network_dropout 0.1, scale_weight_norms 1, "
        'max_grad_norm 0, lr_scheduler_num_cycles 3, gradient_checkpointing, training_comment "for me, only"'
    )


def test_defaults_are_those_of_the_program() -> None:
    """sdxl_train.py does not train text encoders unless told to, as sd-scripts'."""
    assert "train_text_encoder" not in parse(["--seed=1"], SDXL).given
    assert "train_text_encoder" in parse(["--seed=1", "--train_text_encoder"], SDXL).given
    assert parse(["--seed=1", "--max_grad_norm=1.0"], ADAPTERS).given == {"seed"}


def test_secrets_are_never_shown() -> None:
    secrets = [name for name, flag in FLAGS.items() if flag.secret]
    words = [f"--{name}=hunter2" for name in secrets]
    words += ["--conditioning_data_dir=s3://user:hunter2@bucket/masks"]
    parsed = parse(words)
    (line,) = given_options(parsed.options, parsed.given)
    assert "hunter2" not in line and "s3://bucket/masks" in line
    assert all(f"{name} (not shown)" in line for name in secrets) and "wandb_api_key" in secrets


def other_value(flag: Flag) -> str:
    """A value that is not the default."""
    special = {
        "optimizer_type": "Lion", "lr_scheduler_type": "torch.optim.lr_scheduler.ConstantLR",
        "network_module": "networks.loha", "optimizer_args": "weight_decay=0.5", "network_args": "conv_dim=2",
        "min_timestep": "7", "max_timestep": "900", "stop_text_encoder_training": "5",
        "resolution": "128", "text_encoder_lr": "0.5", "block_lr": "1,2",
        "scheduled_sampling_inference_steps": "20", "keep_best": "validation_loss",
        "early_stop": "validation_loss:3", "huggingface_repo_id": "me/my-dog",
    }  # fmt: skip
    if flag.name in special:
        return special[flag.name]
    if flag.kind == "switch":
        return str(not flag.default)
    if flag.choices:
        return str(next(choice for choice in flag.choices if choice != flag.default))
    if flag.kind in ("integer", "number", "steps or share"):
        return "0.5" if flag.at_most == 1 or flag.below == 1 or flag.kind == "number" else "3"
    return "some"


# What must be on so that a flag has a meaning, and what must be off.
ROLLED = {"scheduled_sampling_max_step_offset": 2, "scheduled_sampling_probability": 0.4}
RAMP = {"scheduled_sampling_ramp_steps": 10}
COMPANIONS: dict[str, dict[str, object]] = {
    "token_warmup_min": {"token_warmup_step": 4, "shuffle_caption": True},
    "keep_tokens": {"shuffle_caption": True},
    "keep_tokens_separator": {"caption_tag_dropout_rate": 0.1},
    "num_repeats": {"class_tokens": "a dog", "train_data_dir": "2_sks dog"},
    "class_tokens": {"class_tokens": "a dog", "train_data_dir": "2_sks dog"},
    "huber_c": {"loss_type": "huber"},
    "huber_scale": {"loss_type": "huber"},
    "huber_schedule": {"loss_type": "smooth_l1"},
    "noise_offset_random_strength": {"noise_offset": 0.1},
    "adaptive_noise_scale": {"noise_offset": 0.1},
    "multires_noise_discount": {"multires_noise_iterations": 6},
    "multires_noise_scaling": {"multires_noise_iterations": 6},
    "ip_noise_gamma_random_strength": {"ip_noise_gamma": 0.1},
    "timestep_bias_multiplier": {"timestep_bias_strategy": "earlier"},
    "timestep_bias_portion": {"timestep_bias_strategy": "earlier", "timestep_bias_multiplier": 2},
    "timestep_bias_begin": {"timestep_bias_strategy": "range", "timestep_bias_multiplier": 2},
    "timestep_bias_end": {"timestep_bias_strategy": "range", "timestep_bias_multiplier": 2},
    **{name: ROLLED for name in FLAGS if name.startswith("scheduled_sampling_")},
    **{f"scheduled_sampling_{name}": {**ROLLED, **RAMP} for name in ("ramp_shape", "prob_start", "prob_end")},
    "scheduled_sampling_inference_steps": {**ROLLED, "scheduled_sampling_stride": "inference"},
    "mask_floor": {"alpha_mask": True},
    "mask_invert": {"alpha_mask": True},
    "mask_normalise": {"alpha_mask": True},
    "validate_every_n_steps": {"validation_split": 0.4},
    "validate_every_n_epochs": {"validation_split": 0.4},
    "keep_best": {"validation_split": 0.4},
    "early_stop": {"validation_split": 0.4},
    "full_bf16": {"mixed_precision": "bf16"},
    "bf16_rounding": {"mixed_precision": "bf16", "full_bf16": True},
    "fused_backward_clipping": {"fused_backward_pass": True},
    "full_fp16": {"mixed_precision": "fp16"},
    "use_safetensors": {"use_safetensors": None},
    "learning_rate": {"learning_rate": None},
    "seed": {"seed": 7},
    "output_name": {"output_name": None},
    "max_train_epochs": {"max_train_steps": None},
    "huggingface_repo_id": {"huggingface_token": "hf_token"},
    "save_state_to_huggingface": {"huggingface_token": "hf_token", "huggingface_repo_id": "me/my-dog"},
}
# Said with files and models that this test has not, or in what the program does.
NOT_HERE = {
    "dry_run", "output_config", "debug_dataset", "config_file", "pretrained_model_name_or_path", "vae", "v2",
    "v_parameterization",
    "train_data_dir", "reg_data_dir", "dataset_repeats", "network_weights", "base_weights", "base_weights_multiplier",
    "block_lr", "learning_rate_te1", "learning_rate_te2", "resume", "sample_prompts", "sample_every_n_steps",
    "sample_every_n_epochs", "sample_at_first", "preview_refiner", "masked_loss", "output_dir", "zero_terminal_snr",
    "full_fp16",
    "xformers", "diffusers_xformers", "sdpa", "max_data_loader_n_workers", "lr_scheduler_type", "log_with",
}  # fmt: skip
ADAPTER_FLAGS = {name for name, flag in FLAGS.items() if flag.script == "train_network.py"}


@pytest.mark.parametrize("name", sorted(set(SAID) - NOT_HERE))
def test_a_flag_that_is_not_listed_stands_in_another_line(
    name: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its value changes the plan outside of the list of options: otherwise it would be said nowhere."""
    monkeypatch.delenv("HF_HUB_OFFLINE")  # a plan uploads nothing
    companions = dict(COMPANIONS.get(name, {}))
    if "train_data_dir" in companions:
        companions["train_data_dir"] = world.root / "train" / str(companions["train_data_dir"])
    adapter = {"network_module": "networks.lora", "use_safetensors": None} if name in ADAPTER_FLAGS else {}
    program = train_network.RECIPE.program if adapter else replace(SDXL, defaults={}, name="train_db.py")
    value = other_value(FLAGS[name])
    plain = world.arguments(tmp_path, **{"max_train_steps": 30, **adapter, **companions})
    chosen = world.arguments(tmp_path, **{"max_train_steps": 30, **adapter, **companions, name: value})
    try:
        texts = [describe(decide(parse(words, program))) for words in (plain, chosen)]
    except UserError as error:
        pytest.fail(f"--{name} {value}: {error}")
    without_list = [[line for line in text.splitlines() if not line.startswith("  options ")] for text in texts]
    assert without_list[0] != without_list[1]


def test_settings_of_a_dataset_file_stand_where_they_hold(world: World, tmp_path: Path) -> None:
    dog, cat = (json.dumps(str(world.root / "train" / name)) for name in ("2_sks dog", "1_zwx cat"))
    file = tmp_path / "data.toml"
    file.write_text(
        f"""[general]
resolution = 64
caption_extension = ".txt"
[[datasets]]
enable_bucket = true
min_bucket_reso = 64
[[datasets.subsets]]
image_dir = {dog}
class_tokens = "dog"
flip_aug = true
shuffle_caption = true
background = "#00ff00"
[[datasets.subsets]]
image_dir = {cat}
class_tokens = "cat"
caption_separator = ";"
keep_tokens = 2
""",
        encoding="utf-8",
    )
    flags = {"dataset_config": file, "train_data_dir": None, "resolution": None}
    lines = describe(decide(parse(world.arguments(tmp_path / "out", **flags)))).splitlines()
    (of_dog,) = [line for line in lines if "2_sks dog: " in line]
    (of_cat,) = [line for line in lines if "1_zwx cat: " in line]
    assert of_dog.endswith(', 2 captioned "dog", flip_aug, background #00ff00')
    assert of_cat.endswith(', all captioned "cat", keep_tokens 2, caption_separator ;')
    assert any("in batches of 1, enable_bucket, min_bucket_reso 64" in line for line in lines)


@pytest.mark.parametrize("kind", ["latents", "captions"])
def test_plans_of_the_cache_tools_say_it_too(kind: str, world: World, tmp_path: Path) -> None:
    flag = {"latents": "cache_latents_to_disk", "captions": "cache_text_encoder_outputs_to_disk"}[kind]
    flags = {flag: True, "clip_skip": 2, "no_half_vae": True, "learning_rate_te": 0}
    plan = decide_caching(parse(world.arguments(tmp_path, **flags), _tool()), kind)  # type: ignore[arg-type]
    (line,) = [line for line in describe_caching(plan).splitlines() if line.startswith("  options ")]
    assert "clip_skip 2" in line and "no_half_vae" in line and "cache_" not in line


def _tool():  # type: ignore[no-untyped-def]
    from library.options.parse import Program
    from library.training.precache.command import OWN_FLAGS, UNNEEDED

    return Program(flags=OWN_FLAGS, unneeded=UNNEEDED)


def test_lines_fit_into_a_terminal_and_break_between_words_only() -> None:
    path = "/data/" + "x" * 60 + "/my-dog.safetensors"
    words = " ".join(["word"] * 30)
    lines = as_text("plan", [("files", [path, words])], 40).splitlines()
    assert lines[1].split() == ["files", path] or path in lines[2].split()
    assert all(len(line) <= 40 for line in lines if path not in line)
    assert sum(line.count("word") for line in lines) == 30
    assert as_text("plan", [("files", [path, words])]).splitlines()[2].count("word") == 30
