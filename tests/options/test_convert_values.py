"""Conversion of values as front-ends, files and users write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.options.convert_values import UNSET, BadValue, convert
from library.options.train_options import FLAGS


@pytest.mark.parametrize(
    ("name", "raw", "value"),
    [
        ("learning_rate", "1e-4", 1e-4),
        ("learning_rate", 1, 1.0),
        ("learning_rate", 0, 0.0),
        ("learning_rate_te", 0, 0.0),
        ("learning_rate_te", "5e-7", 5e-7),
        ("prior_loss_weight", 0, 0.0),
        ("max_grad_norm", 0, 0.0),
        ("loss_read_interval", 0, UNSET),
        ("blocks_to_swap", "0", UNSET),
        ("compile_dynamic", True, "true"),
        ("compile_dynamic", False, "false"),
        ("seed", 0, 0),
        ("seed", "1337", 1337),
        ("seed", 1337.0, 1337),
        ("keep_tokens", 0, 0),
        ("max_data_loader_n_workers", 0, 0),
        ("stop_text_encoder_training", -1, -1),
        ("stop_text_encoder_training", 0, 0),
        ("cache_latents", 1, True),
        ("cache_latents", 0, False),
        ("cache_latents", "True", True),
        ("cache_latents", "false", False),
        ("lr_warmup_steps", 0.1, 0.1),
        ("lr_warmup_steps", "0.1", 0.1),
        ("lr_warmup_steps", "100", 100),
        ("lr_warmup_steps", 100.0, 100),
        ("lr_warmup_steps", 1.0, 1.0),
        ("lr_warmup_steps", "10%", 0.1),
        ("lr_warmup_steps", "100%", 1.0),
        ("lr_warmup_steps", 0, 0),
        ("resolution", "512,768", (512, 768)),
        ("resolution", "512, 768", (512, 768)),
        ("resolution", "512", (512, 512)),
        ("resolution", 512, (512, 512)),
        ("resolution", [512, 768], (512, 768)),
        ("resolution", [512], (512, 512)),
        ("optimizer_args", ["weight_decay=0.1", "betas=0.9,0.99"], ("weight_decay=0.1", "betas=0.9,0.99")),
        ("optimizer_args", "weight_decay=0.1 eps=1e-6", ("weight_decay=0.1", "eps=1e-6")),
        ("output_name", 2026, "2026"),
        ("output_dir", "out/db", Path("out/db")),
        ("output_dir", "~no such user/db", Path("~no such user/db")),
        ("max_token_length", 225, 225),
        ("max_token_length", "150", 150),
        ("max_token_length", 255, 225),
    ],
)
def test_values_as_they_are_written(name: str, raw: object, value: object) -> None:
    taken, _ = convert(FLAGS[name], raw)
    assert taken == value and type(taken) is type(value)


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("vae", ""),
        ("learning_rate", ""),
        ("cache_latents", ""),
        ("resolution", "  "),
        ("optimizer_args", []),
        ("optimizer_args", [""]),
        ("preservation", [""]),  # the command line's --preservation ""
        ("max_token_length", 75),
        ("max_token_length", 0),
        ("clip_skip", 0),
        ("max_train_epochs", 0),
        ("max_train_steps", 0),
        ("save_every_n_epochs", 0),
        ("save_last_n_steps", "0"),
        ("min_snr_gamma", 0),
        ("noise_offset", 0.0),
        ("vae_batch_size", 0),
        ("gradient_accumulation_steps", 0),
    ],
)
def test_values_that_mean_not_set(name: str, raw: object) -> None:
    assert convert(FLAGS[name], raw) == (UNSET, "")


def test_only_a_value_read_as_another_one_has_a_reason() -> None:
    assert convert(FLAGS["max_token_length"], 255)[1]
    assert not convert(FLAGS["max_token_length"], 225)[1]


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("learning_rate", "fast"),
        ("learning_rate", True),
        ("learning_rate", -1e-4),
        ("learning_rate", "nan"),
        ("learning_rate", [1e-4]),
        ("seed", 1.5),
        ("seed", -1),
        ("seed", "12a"),
        ("train_batch_size", 0),
        ("train_batch_size", "inf"),
        ("cache_latents", "maybe"),
        ("cache_latents", 2),
        ("cache_latents", 1.0),
        ("lr_warmup_steps", 1.5),
        ("lr_warmup_steps", -1),
        ("lr_warmup_steps", "200%"),
        ("lr_warmup_steps", "%"),
        ("resolution", "big"),
        ("resolution", [512, 512, 512]),
        ("resolution", "512x512"),
        ("resolution", -512),
        ("optimizer_args", ["weight_decay"]),
        ("optimizer_args", ["=1"]),
        ("optimizer_args", 3),
        ("mixed_precision", "fp8"),
        ("max_token_length", 100),
        ("lr_scheduler", "cosinus"),
        ("caption_dropout_rate", 1.5),
        ("output_dir", 3),
        ("output_name", True),
        ("output_name", "a\0b"),
        ("output_dir", "a\0b"),
        ("stop_text_encoder_training", -2),
    ],
)
def test_invalid_values(name: str, raw: object) -> None:
    with pytest.raises(BadValue) as raised:
        convert(FLAGS[name], raw)
    assert raised.value.fault and raised.value.remedy
