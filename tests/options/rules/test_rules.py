"""Rules between flags: mistakes, changed values, notes, and cases without either."""

from __future__ import annotations

import pytest

from library.options.parse import ADAPTERS, Parsed, parse
from library.options.rules import general as rules
from library.options.train_options import FLAGS

NEEDED = ["--pretrained_model_name_or_path=m", "--train_data_dir=t", "--output_dir=o", "--resolution=512"]

ROLLED = "--scheduled_sampling_max_step_offset 2 --scheduled_sampling_probability 0.5"


def with_flags(text: str) -> Parsed:
    return parse([*NEEDED, *text.split()])


def with_adapter(text: str) -> Parsed:
    return parse([*NEEDED, "--network_module=networks.lora", *text.split()], ADAPTERS)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--cache_latents --color_aug", ("--cache_latents", "--color_aug")),
        ("--cache_latents --random_crop", ("--cache_latents", "--random_crop")),
        ("--cache_latents_to_disk --random_crop", ("--cache_latents_to_disk", "--random_crop")),
        ("--full_fp16", ("--full_fp16", '--mixed_precision = "no" (default)')),
        ("--full_fp16 --mixed_precision bf16", ("--full_fp16", '"bf16" (command line)')),
        ("--full_bf16 --mixed_precision fp16", ("--full_bf16", '"fp16"')),
        ("--use_8bit_adam --optimizer_type Lion", ("--use_8bit_adam", '"Lion"')),
        ("--use_lion_optimizer --optimizer_type AdamW8bit", ("--use_lion_optimizer", '"AdamW8bit"')),
        ("--use_lion_optimizer --use_8bit_adam", ("--use_8bit_adam", "--use_lion_optimizer")),
        ("--log_with tensorboard", ("--log_with", "no --logging_dir")),
        ("--log_with all", ("--log_with", "no --logging_dir")),
        ("--preview_target tensorboard", ('"tensorboard"', "no --log_with")),
        ("--preview_target webhook", ('"webhook"', "no --webhook_config")),
        ("--lr_scheduler adafactor --optimizer_type AdamW", ('"adafactor"', '"AdamW"')),
        ("--lr_scheduler piecewise_constant", ('"piecewise_constant"',)),
        ("--lr_scheduler cosine_with_min_lr", ("no --lr_scheduler_min_lr_ratio",)),
        ("--no_token_padding --cache_text_encoder_outputs", ("--cache_text_encoder_outputs ", "--no_token_padding")),
        ("--no_token_padding --max_token_length 150", ("--no_token_padding", "--max_token_length = 150")),
        (
            "--cache_text_encoder_outputs --learning_rate_te 1e-5",
            ("--cache_text_encoder_outputs ", "--learning_rate_te"),
        ),
        ("--cache_text_encoder_outputs_to_disk --learning_rate_te 1e-5", ("_outputs_to_disk ", "--learning_rate_te")),
        (
            "--cache_text_encoder_outputs --cache_text_encoder_outputs_to_disk --learning_rate_te 1e-5",
            ("--cache_text_encoder_outputs ", "--learning_rate_te"),
        ),
        ("--resolution 32", ("32,32", "below 64")),
        ("--resolution 512,63", ("512,63", "below 64")),
        (
            "--enable_bucket --resolution 64 --min_bucket_reso 64 --bucket_reso_steps 128",
            ("64,64", "bucket_reso_steps = 128 (command line)"),
        ),
        ("--enable_bucket --bucket_reso_steps 0", ('bucket_reso_steps = "0"', "below 1")),
        ("--enable_bucket --resolution 128", ("128,128", "min_bucket_reso = 256 (default)")),
        ("--enable_bucket --resolution 512,2048", ("512,2048", "max_bucket_reso = 1024")),
        ("--enable_bucket --resolution 512 --max_bucket_reso 300", ("max_bucket_reso = 300 (command line)",)),
        ("--enable_bucket --resolution 512 --min_bucket_reso 600", ("min_bucket_reso = 600 (command line)",)),
        ("--enable_bucket --min_bucket_reso 640 --max_bucket_reso 384", ("min_bucket_reso", "max_bucket_reso")),
        ("--enable_bucket --min_bucket_reso 32", ("min_bucket_reso", "below 64")),
    ],
)
def test_refused_together(flags: str, named: tuple[str, ...]) -> None:
    (mistake,) = with_flags(flags).mistakes
    assert all(name in mistake.what for name in named)
    assert mistake.remedy


@pytest.mark.parametrize(
    "flags",
    [
        "--full_fp16 --mixed_precision fp16",
        "--full_bf16 --mixed_precision bf16",
        "--use_8bit_adam --optimizer_type adamw8bit",
        "--log_with wandb",
        "--preview_target tensorboard --validation_preview_steps 1 --log_with wandb",
        "--preview_target tensorboard --validation_preview_steps 1 --logging_dir log",
        "--log_with tensorboard --logging_dir log",
        "--lr_scheduler adafactor --optimizer_type transformers.optimization.Adafactor",
        "--lr_scheduler cosine_with_min_lr --lr_scheduler_min_lr_ratio 0",
        "--lr_scheduler cosine_with_min_lr --lr_scheduler_args min_lr=1e-7",
        "--lr_scheduler piecewise_constant --lr_scheduler_args step_rules=1:10,0.1",
        "--lr_scheduler_type torch.optim.lr_scheduler.CosineAnnealingLR --lr_scheduler_args T_max=10",
        "--no_token_padding --max_token_length 75",
        "--resolution 504",
        "--resolution 64 --enable_bucket --bucket_reso_steps 8 --min_bucket_reso 64 --max_bucket_reso 128",
        "--bucket_reso_steps 1",
        "--enable_bucket --bucket_no_upscale --resolution 2048",
        "--random_crop --color_aug",
        "--v2 --v_parameterization",
    ],
)
def test_accepted_without_a_mistake(flags: str) -> None:
    assert with_flags(flags).mistakes == ()


@pytest.mark.parametrize(
    ("flags", "target", "value", "told"),
    [
        ("--cache_latents_to_disk", "cache_latents", True, True),
        ("--use_8bit_adam", "optimizer_type", "AdamW8bit", True),
        ("--use_lion_optimizer", "optimizer_type", "Lion", True),
        ("", "optimizer_type", "AdamW", False),
        ("--lr_warmup_steps 0.1", "lr_scheduler", "constant_with_warmup", True),
        ("--lr_scheduler constant --lr_warmup_steps 10", "lr_scheduler", "constant_with_warmup", True),
        ("--lr_scheduler cosine --lr_warmup_steps 10", "lr_scheduler", "cosine", False),
        ("--lr_scheduler_type a.b.C --lr_warmup_steps 10", "lr_scheduler", "constant", False),
        ("--lr_scheduler adafactor --optimizer_type Adafactor --lr_warmup_steps 9", "lr_warmup_steps", 0, True),
        ("--logging_dir log", "log_with", "tensorboard", False),
        ("--logging_dir log --log_with wandb", "log_with", "wandb", False),
        ("--xformers --sdpa", "sdpa", False, True),
        ("--xformers --mem_eff_attn", "mem_eff_attn", False, True),
        ("--sdpa --mem_eff_attn", "mem_eff_attn", False, True),
        ("--sdpa", "sdpa", True, False),
        ("--cache_text_encoder_outputs_to_disk", "cache_text_encoder_outputs", True, True),
        ("--cache_text_encoder_outputs", "stop_text_encoder_training", -1, True),
        ("--dataset_config d.toml --train_data_dir data", "train_data_dir", None, True),
        ("--save_model_as ckpt --use_safetensors", "save_model_as", "safetensors", True),
        ("--save_model_as diffusers --use_safetensors", "save_model_as", "diffusers_safetensors", True),
        ("--use_safetensors", "save_model_as", None, False),
        ("--save_every_n_epochs 2 --save_n_epoch_ratio 3", "save_n_epoch_ratio", None, True),
        ("--enable_bucket --min_bucket_reso 100 --max_bucket_reso 1000", "min_bucket_reso", 64, True),
        ("--enable_bucket --min_bucket_reso 100 --max_bucket_reso 1000", "max_bucket_reso", 1024, True),
        ("--min_bucket_reso 100", "min_bucket_reso", 100, False),
        ("--masked_loss", "masked_loss", False, True),
        ("--masked_loss --conditioning_data_dir m", "masked_loss", True, False),
        ("--masked_loss --alpha_mask", "masked_loss", True, False),
        *((f"--enable_bucket --bucket_reso_steps {steps}", "bucket_reso_steps", 8, True) for steps in (1, 2, 4, 7)),
        ("--enable_bucket --bucket_reso_steps 12", "bucket_reso_steps", 16, True),
        ("--enable_bucket --bucket_no_upscale --bucket_reso_steps 1", "bucket_reso_steps", 8, True),
        ("--bucket_reso_steps 1", "bucket_reso_steps", 1, False),
        ("--dataset_config d.toml --enable_bucket --bucket_reso_steps 1", "bucket_reso_steps", 1, False),
        ("--data_backend_config d.json --bucket_reso_steps 1", "bucket_reso_steps", 8, True),
        ("--resolution 512,650", "resolution", (512, 648), True),
        ("--resolution 71", "resolution", (64, 64), True),
        ("--resolution 512,650 --enable_bucket", "resolution", (512, 650), True),
        ("--resolution 600 --enable_bucket --bucket_reso_steps 8", "resolution", (600, 600), False),
        ("--resolution 600,600 --enable_bucket --bucket_no_upscale", "resolution", (600, 600), True),
    ],
)
def test_effective_values_and_their_notes(flags: str, target: str, value: object, told: bool) -> None:
    parsed = with_flags(flags)
    assert parsed.mistakes == ()
    group = getattr(parsed.options, FLAGS[target].group)
    assert getattr(group, target) == value
    notes = [note for note in parsed.notes if "more than once" not in note]
    assert any(target in note or str(value) in note for note in notes) == told


def test_ranks_of_no_file_are_those_of_network_dim() -> None:
    parsed = parse([*NEEDED, *"--network_module networks.lora --network_dim 4 --dim_from_weights".split()], ADAPTERS)
    assert parsed.mistakes == () and not parsed.options.adapter.dim_from_weights
    (note,) = parsed.notes
    assert note.startswith("dim_from_weights has no effect: there is no adapter file")
    parsed = parse(
        [*NEEDED, *"--network_module networks.lora --network_weights a --dim_from_weights".split()], ADAPTERS
    )
    assert parsed.options.adapter.dim_from_weights and parsed.notes == ()


def test_an_implied_value_comes_from_where_its_cause_came_from() -> None:
    parsed = with_flags("--use_8bit_adam")
    assert parsed.origins["optimizer_type"] == "command line"
    assert "optimizer_type" not in parsed.set_by_user


def test_epochs_override_steps_and_the_default_of_steps_is_never_noted() -> None:
    assert with_flags("--max_train_epochs 4").notes == ()
    (note,) = with_flags("--max_train_epochs 4 --max_train_steps 1600").notes
    assert "max_train_epochs = 4" in note and "max_train_steps = 1600" in note


def test_a_scheduler_class_overrides_the_name() -> None:
    (note,) = with_flags("--lr_scheduler_type a.b.C --lr_scheduler cosine").notes
    assert "lr_scheduler_type" in note and "cosine" in note


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--save_last_n_epochs 2", "--save_last_n_epochs"),
        ("--save_last_n_steps 200", "--save_last_n_steps"),
        ("--save_every_n_steps 10 --save_last_n_steps_state 20", "save_state is not set"),
        ("--dataset_repeats 5", "--dataset_repeats"),
        ("--scheduled_sampling_probability 0.5", "scheduled_sampling_max_step_offset is not set"),
        ("--scheduled_sampling_stride inference", "scheduled_sampling_max_step_offset is not set"),
        ("--scheduled_sampling_max_step_offset 2", "no sample is rolled"),
        (
            f"{ROLLED} --scheduled_sampling_ramp_steps 9 --scheduled_sampling_prob_end 0",
            "no sample is rolled: their share is 0 in every step",
        ),
        ("--preservation_base half", "no anchor of preservation compares with the base model"),
        ("--preservation reg_images=0.5 --preservation_base half", "no anchor of preservation compares"),
        (f"{ROLLED} --scheduled_sampling_prob_end 0.9", "scheduled_sampling_ramp_steps is not set"),
        (f"{ROLLED} --scheduled_sampling_ramp_shape cosine", "scheduled_sampling_ramp_steps is not set"),
        (f"{ROLLED} --scheduled_sampling_inference_steps 20", "scheduled_sampling_stride is training"),
    ],
)
def test_flags_without_effect_are_noted(flags: str, named: str) -> None:
    parsed = with_flags(flags)
    assert parsed.mistakes == ()
    (note,) = parsed.notes
    assert named in note


def test_a_base_that_an_anchor_needs_is_not_noted() -> None:
    assert with_flags("--preservation reg_images blank_prompt@9- --preservation_base half").notes == ()


def test_a_share_that_falls_to_nothing_rolls_samples() -> None:
    falling = "--scheduled_sampling_max_step_offset 2 --scheduled_sampling_ramp_steps 9"
    assert with_flags(f"{falling} --scheduled_sampling_prob_start 0.5").notes == ()


@pytest.mark.parametrize("precision", ["", "--base_model_precision no_change --text_encoder_1_precision no_change"])
def test_a_probe_of_nothing_is_noted(precision: str) -> None:
    (note,) = with_adapter(f"--quantise_probe {precision}").notes
    assert "quantise_probe" in note and "no part of the base model is quantised" in note


def test_a_probe_of_something_is_not_noted() -> None:
    for format_ in ("--fp8_base", "--fp8_base_unet", "--base_model_precision int8", "--text_encoder_1_precision nf4"):
        assert with_adapter(f"--quantise_probe {format_}").notes == ()


def test_save_last_with_its_saves_is_not_noted() -> None:
    assert with_flags("--save_last_n_epochs 2 --save_every_n_epochs 1").notes == ()
    assert with_flags("--save_last_n_epochs 2 --save_n_epoch_ratio 4").notes == ()


def test_rows_name_flags_and_reasons() -> None:
    rows = (*rules.REQUIRED, *rules.REQUIRES, *rules.EXCLUDES, *rules.OVERRIDES, *rules.NO_EFFECT)
    assert all(row.why for row in rows)
    named = {row.flag for row in (*rules.REQUIRED, *rules.NO_EFFECT)}
    named |= {name for row in rules.REQUIRES for name in row.flags}
    named |= {name for row in rules.EXCLUDES for name in (*row.flags, row.other)}
    named |= {name for row in rules.IMPLIES for name in (row.cause, row.target)}
    named |= {name for row in rules.OVERRIDES for name in (row.winner, row.loser)}
    assert named <= set(FLAGS)


def test_a_broken_rule_resets_a_flag_so_that_nothing_is_reported_twice() -> None:
    parsed = with_flags(
        "--full_fp16 --use_8bit_adam --use_lion_optimizer --lr_scheduler adafactor --cache_latents --color_aug "
        "--resolution 500 --enable_bucket --min_bucket_reso 9999"
    )
    assert len(parsed.mistakes) == 5
    options = parsed.options
    assert not options.memory.full_fp16 and not options.dataset.color_aug
    assert (options.optimizer.optimizer_type, options.optimizer.use_lion_optimizer) == ("AdamW8bit", False)
    assert options.optimizer.lr_scheduler == "constant" and "lr_scheduler" not in parsed.set_by_user
    assert (options.dataset.resolution, options.dataset.min_bucket_reso) == ((512, 512), 256)


def test_a_missing_resolution_is_reported_once_and_replaced() -> None:
    parsed = parse(NEEDED[:3])
    assert len(parsed.mistakes) == 1 and parsed.options.dataset.resolution == (512, 512)
    assert "resolution" not in parsed.set_by_user


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        ("--compile_mode reduce-overhead --compile_fullgraph --compile_dynamic true", 3),
        ("--dynamo_backend eager --compile", 1),
        ("--compile_backend eager --torch_compile", 1),
        ("--offload_param_device cpu --zero3_init_flag --offload_optimizer_nvme_path disk", 3),
        ("--fused_backward_clipping tensor --bf16_rounding kahan --gradient_checkpointing_policy half", 3),
        ("--compile_cache_size_limit 32 --compile_dynamic auto --zero_stage 3 --dynamo_backend no", 0),
    ],
)
def test_settings_of_what_is_not_switched_on_are_not_passed_over_in_silence(words: str, flags: int) -> None:
    """The last row is what front-ends always send."""
    parsed = with_flags(words)
    assert parsed.mistakes == ()
    assert len([note for note in parsed.notes if "has no effect" in note]) == flags == len(parsed.notes)
