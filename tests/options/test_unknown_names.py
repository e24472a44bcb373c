"""Names that no flag has: on the command line, in files, and what to write instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.options.parse import ADAPTERS, DREAMBOOTH, Parsed, Program, parse
from library.options.train_options import FLAGS
from library.options.written_elsewhere import way_out
from networks.registry import KINDS
from networks.settings import COMMON

NEEDED = ["--pretrained_model_name_or_path=m", "--train_data_dir=t", "--resolution=512", "--output_dir=o"]
NETWORK = ["--network_module=networks.lora"]


def of_file(folder: Path, text: str, *words: str, program: Program = DREAMBOOTH) -> Parsed:
    path = folder / "gui.toml"
    path.write_text(text, encoding="utf-8")
    return parse([*NEEDED, *(NETWORK if program is ADAPTERS else ()), f"--config_file={path}", *words], program)


def told(parsed: Parsed) -> list[str]:
    return [f"{mistake.what} -> {mistake.remedy}" for mistake in parsed.mistakes]


@pytest.mark.parametrize(
    ("words", "write"),
    [
        (["--conv_dim", "4"], "write --network_args conv_dim=4"),
        (["--down_lr_weight", "0", "1"], "write --network_args down_lr_weight=0,1"),
        (["--lokr_factor=8"], "write --network_args factor=8"),
        (["--weight_decay", "0.1"], "write --optimizer_args weight_decay=0.1"),
        (["--adam_beta1", "0.9"], "write --optimizer_args betas=0.9,0.999"),
        (["--dim", "8"], "write --network_dim 8"),
        (["--alpha", "4"], "write --network_alpha 4"),
        (["--lr", "1e-4"], "write --learning_rate 1e-4"),
        (["--epochs", "3"], "write --max_train_epochs 3"),
        (["--instance_data_dir", "dogs"], "write --train_data_dir dogs"),
        (["--text_encoder_lr1", "1e-5"], "--text_encoder_lr 5e-5 2e-5"),
        (
            ["--num_cpu_threads_per_process", "2"],
            "belongs to accelerate launch: write it before the name of the program",
        ),
        (["--multi_gpu"], "belongs to accelerate launch"),
        (["--learning-rate", "1"], "did you mean --learning_rate?"),
        (["--nonsense_of_mine", "1"], "--help lists all flags"),
        (["--seed", "-1"], "leave --seed out"),
        (["--validation_seed", "-1"], "leave --validation_seed out"),
    ],
)
def test_what_to_write_instead(words: list[str], write: str) -> None:
    (answer,) = told(parse([*NEEDED, *NETWORK, *words], ADAPTERS))
    assert words[0].partition("=")[0] in answer and write in answer


@pytest.mark.parametrize("raw", ["1", "0.5", "true", '"text"', '["a"]'])
def test_an_unknown_key_that_is_on_is_a_mistake(raw: str, tmp_path: Path) -> None:
    text = f"seed = 1\nnonsense_of_mine = {raw}\nmore_of_it = {raw}\n"
    (answer,) = told(of_file(tmp_path, text))
    assert "gui.toml" in answer and "nonsense_of_mine = " in answer and "more_of_it = " in answer
    assert "remove them, or add --allow_unknown_keys" in answer
    allowed = of_file(tmp_path, text, "--allow_unknown_keys")
    assert not allowed.mistakes and allowed.notes == (
        "unknown keys in gui.toml, ignored: nonsense_of_mine, more_of_it",
    )
    assert not of_file(tmp_path, f"{text}allow_unknown_keys = true\n").mistakes


@pytest.mark.parametrize("raw", ['""', "false", "0", "0.0", "[]", '"false"', '"None"', '"0"'])
def test_an_unknown_key_that_is_off_is_noted(raw: str, tmp_path: Path) -> None:
    parsed = of_file(tmp_path, f"seed = 1\nnonsense_of_mine = {raw}\n")
    assert not parsed.mistakes and parsed.notes == ("unknown keys in gui.toml, ignored: nonsense_of_mine",)


def test_keys_of_front_ends_are_silent(tmp_path: Path) -> None:
    parsed = of_file(tmp_path, 'epoch = 4\nnoise_offset_type = "Original"\ngpu_ids = ["0"]\n')
    assert not parsed.mistakes and not parsed.notes


def test_a_misspelt_key_is_a_mistake_even_if_unknown_keys_are_allowed(tmp_path: Path) -> None:
    (answer,) = told(of_file(tmp_path, "learning_rat = 1e-4\n", "--allow_unknown_keys"))
    assert "did you mean learning_rate?" in answer


def test_a_key_that_is_written_elsewhere_is_answered(tmp_path: Path) -> None:
    for text, write in (
        ("conv_dim = 8", 'write network_args = ["conv_dim=8"]'),
        ("dylora_unit = 4", 'write network_args = ["unit=4"]'),
        ("betas = [0.9, 0.99]", 'write optimizer_args = ["betas=0.9,0.99"]'),
        ("rank = 8", "write network_dim"),
        ("num_processes = 2", "belongs to accelerate launch, not into a file"),
        ("gradient_accumulation_step = 2", "did you mean gradient_accumulation_steps?"),
        ('network_args_custom = ["a=1"]', "network_args"),
    ):
        (answer,) = told(of_file(tmp_path, f"seed = 1\n{text}\n", program=ADAPTERS))
        assert write in answer


def test_a_field_of_a_front_end_that_stands_in_the_arguments_is_silent(tmp_path: Path) -> None:
    text = 'conv_dim = 8\nprodigy_d_coef = 2.0\nnetwork_args = ["conv_dim=8"]\n'
    text += 'optimizer_args = "decouple=True d_coef=2.0"\n'
    parsed = of_file(tmp_path, text, program=ADAPTERS)
    assert not parsed.mistakes and not parsed.notes
    (answer,) = told(of_file(tmp_path, 'conv_dim = 8\nnetwork_args = ["conv_dim_of_mine=8"]\n', program=ADAPTERS))
    assert "conv_dim = 8" in answer


def test_the_table_knows_the_arguments_of_our_networks_and_no_flag() -> None:
    """But for those that are too common: init; dropout is --network_dropout."""
    arguments = {argument.name for kind in KINDS for argument in (*COMMON, *kind.arguments)} - {"init"}
    assert not [name for name in arguments if not way_out(name, "1", in_file=False)]
    assert not [name for name in FLAGS if way_out(name, "1", in_file=False)]
