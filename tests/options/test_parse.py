"""Command line and --config_file together: precedence, origins, and all mistakes at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.options.flag import Flag
from library.options.parse import Parsed, Program, parse
from library.options.train_options import FLAGS, TrainOptions, values_of

NEEDED = (
    "--pretrained_model_name_or_path=m.safetensors",
    "--train_data_dir=train",
    "--output_dir=out",
    "--resolution=512",
)


def good(*words: str) -> Parsed:
    """Parse a complete command line that must have no mistakes."""
    parsed = parse([*NEEDED, *words])
    assert parsed.mistakes == ()
    return parsed


def config(folder: Path, text: str) -> str:
    path = folder / "options.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def whats(parsed: Parsed) -> list[str]:
    return [mistake.what for mistake in parsed.mistakes]


def test_with_required_flags_only_all_other_values_are_unset_defaults() -> None:
    parsed = good()
    needed = {"pretrained_model_name_or_path", "train_data_dir", "output_dir", "resolution"}
    assert parsed.set_by_user == needed
    assert set(parsed.origins) == set(FLAGS)
    assert {name for name, origin in parsed.origins.items() if origin == "default"} == set(FLAGS) - needed
    values, defaults = values_of(parsed.options), values_of(TrainOptions())
    changed = {name for name in values if values[name] != defaults[name]}
    assert changed == needed | {"optimizer_type"} and values["optimizer_type"] == "AdamW"
    assert parsed.notes == ()


def test_both_spellings_of_a_value_lists_switches_and_negative_numbers() -> None:
    parsed = good(
        "--learning_rate", "1e-5", "--seed=7", "--optimizer_args", "weight_decay=0.1", "betas=0.9,0.99",
        "--cache_latents", "--shuffle_caption=true", "--flip_aug=false", "--stop_text_encoder_training", "-1",
    )  # fmt: skip
    optimizer, dataset = parsed.options.optimizer, parsed.options.dataset
    assert optimizer.learning_rate == 1e-5 and parsed.options.run.seed == 7
    assert optimizer.optimizer_args == ("weight_decay=0.1", "betas=0.9,0.99")
    assert optimizer.stop_text_encoder_training == -1
    caption, cache = parsed.options.caption, parsed.options.cache
    assert (cache.cache_latents, caption.shuffle_caption, dataset.flip_aug) == (True, True, False)


def test_the_command_line_overrides_the_file_and_origins_show_it(tmp_path: Path) -> None:
    path = config(tmp_path, "learning_rate = 1e-4\nseed = 3\nsave_state = true\n")
    parsed = good("--config_file", path, "--seed", "9", "--save_state=false")
    assert parsed.options.optimizer.learning_rate == 1e-4
    assert parsed.options.run.seed == 9 and parsed.options.saving.save_state is False
    assert parsed.origins["learning_rate"] == "options.toml"
    assert parsed.origins["seed"] == "command line"
    assert parsed.origins["train_batch_size"] == "default"
    assert {"learning_rate", "seed", "save_state"} <= parsed.set_by_user


def test_an_empty_value_on_the_command_line_unsets_that_of_the_file(tmp_path: Path) -> None:
    parsed = good("--config_file", config(tmp_path, 'vae = "v.pt"\n'), "--vae", "")
    assert parsed.options.model.vae is None and "vae" not in parsed.set_by_user


def test_the_file_is_found_without_its_ending_and_with_a_bom(tmp_path: Path) -> None:
    (tmp_path / "v1.5.toml").write_bytes(b"\xef\xbb\xbfseed = 3\n")
    parsed = good("--config_file", str(tmp_path / "v1.5"))
    assert parsed.options.run.seed == 3
    assert parsed.options.run.config_file == tmp_path / "v1.5.toml"


def test_tables_are_flattened_one_level(tmp_path: Path) -> None:
    parsed = good("--config_file", config(tmp_path, "seed = 3\n[training]\nlearning_rate = 1e-4\n[other]\nv2 = true\n"))
    assert (parsed.options.run.seed, parsed.options.optimizer.learning_rate, parsed.options.model.v2) == (3, 1e-4, True)


def test_one_key_with_two_values_in_two_tables_is_a_mistake(tmp_path: Path) -> None:
    path = config(tmp_path, "[a]\nseed = 3\nv2 = true\n[b]\nseed = 4\nv2 = true\n")
    (what,) = whats(parse([*NEEDED, "--config_file", path]))
    assert "seed" in what and "3" in what and "4" in what and "options.toml" in what


@pytest.mark.parametrize("spelling", ["--seed 3 --seed 4", "--seed=3 --seed=4"])
def test_the_last_of_a_repeated_flag_is_used_with_a_note(spelling: str) -> None:
    parsed = good(*spelling.split())
    assert parsed.options.run.seed == 4
    assert any("--seed" in note for note in parsed.notes)


@pytest.mark.parametrize("written", ["", "none", "  "])
def test_an_empty_caption_extension_means_that_no_file_is_read(tmp_path: Path, written: str) -> None:
    """As in sd-scripts, where an image's caption file is then its path without its ending."""
    path = config(tmp_path, f'caption_extension = "{written}"\n')
    parsed = good("--config_file", path)
    assert parsed.options.caption.caption_extension == ".none"
    assert any("no caption file is read" in note for note in parsed.notes) == (written != "none")


def test_the_misspelt_caption_extension_counts_and_a_missing_dot_is_added(tmp_path: Path) -> None:
    path = config(tmp_path, 'caption_extension = ".a"\ncaption_extention = "b"\n')
    assert good("--config_file", path).options.caption.caption_extension == ".b"
    assert good("--config_file", path, "--caption_extension", "txt").options.caption.caption_extension == ".txt"
    parsed = good("--caption_extention", "cap", "--caption_extension", ".txt")
    assert parsed.options.caption.caption_extension == ".cap"
    assert "caption_extension" in parsed.set_by_user


def test_all_mistakes_at_once_each_with_flag_value_origin_and_remedy(tmp_path: Path) -> None:
    path = config(
        tmp_path, 'learning_rat = 1e-4\ntrain_batch_size = "two"\nsave_precision = "fp8"\ntrain_inpainting = true\n'
    )
    parsed = parse(
        ["--config_file", path, "--sed", "3", "--learning_rate", "fast", "--clip_skip", "--keep_tokens=-1",
         "--cache_latents", "no", "--full_fp16"]
    )  # fmt: skip
    expected = [
        ('"two"', "train_batch_size", "options.toml"),
        ('"fp8"', "save_precision", "options.toml"),
        ("learning_rat ", "options.toml"),
        ("--train_inpainting", "options.toml", "not supported in this version"),
        ("--sed", "command line"),
        ('"fast"', "--learning_rate", "command line"),
        ("--clip_skip", "no value"),
        ("--keep_tokens", '"-1"', "below 0"),
        ('"no"', "belongs to no flag"),
        ("--full_fp16", '--mixed_precision = "no"', "default"),
        ("--pretrained_model_name_or_path is not set",),
        ("--train_data_dir is not set",),
        ("--resolution is not set",),
        ("--output_dir is not set",),
    ]
    for words in expected:
        assert any(all(word in what for word in words) for what in whats(parsed)), words
    assert len(parsed.mistakes) == len(expected)
    assert all(mistake.remedy for mistake in parsed.mistakes)
    assert parsed.options.optimizer.learning_rate == 2e-6, "a faulty flag stands at its default"
    remedies = " ".join(mistake.remedy for mistake in parsed.mistakes)
    assert "did you mean --seed?" in remedies and "did you mean learning_rate?" in remedies


def test_a_value_that_cannot_be_read_is_one_mistake_and_not_a_missing_flag_too() -> None:
    parsed = parse([*NEEDED[:3], "--resolution", "big", "--enable_bucket"])
    assert len(parsed.mistakes) == 1 and '"big"' in whats(parsed)[0]


@pytest.mark.parametrize(
    ("content", "part"),
    [(b"seed = 3\nvae = C:\\train\n", "line 2"), (b'output_name = "\xe4"\n', "UTF-8"), (b"", "")],
)
def test_a_file_that_is_no_toml_is_one_mistake(tmp_path: Path, content: bytes, part: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    parsed = parse([*NEEDED, "--config_file", str(path)])
    assert len(parsed.mistakes) == (1 if part else 0)
    assert all("bad.toml" in what and part in what for what in whats(parsed))


def test_a_missing_file_is_a_mistake(tmp_path: Path) -> None:
    (what,) = whats(parse([*NEEDED, "--config_file", str(tmp_path / "none")]))
    assert "none" in what and "no such file" in what


@pytest.mark.parametrize("named", ["/", ".", ".."])
def test_a_path_without_a_name_is_a_folder(named: str) -> None:
    (what,) = whats(parse([*NEEDED, "--config_file", named]))
    assert "this is a folder, not a file" in what


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[general_args.args]\nseed = 3\n", "is a front-end's project"),
        ("[[datasets]]\nbatch_size = 2\n", "is a dataset file"),
        ("[[images]]\nsize = 2\n", "no option"),
    ],
)
def test_a_file_of_another_kind_is_a_mistake(tmp_path: Path, text: str, words: str) -> None:
    (what,) = whats(parse([*NEEDED, "--config_file", config(tmp_path, text)]))
    assert words in what


@pytest.mark.parametrize("word", ["--learning-rate", "--train_batchsize", "--nonsense_of_mine"])
def test_an_unknown_flag_on_the_command_line_is_one_mistake_with_its_values(word: str) -> None:
    assert len(parse([*NEEDED, word, "1", "2"]).mistakes) == 1


def test_abbreviations_are_not_guessed() -> None:
    assert len(parse([*NEEDED, "--learning_r", "1e-4"]).mistakes) == 1


def test_keys_of_files(tmp_path: Path) -> None:
    path = config(
        tmp_path, 'epoch = 4\nnoise_offset_type = "Original"\nmy_key = 1\nyour_key = 2\ncache_latent = true\n'
    )
    parsed = parse([*NEEDED, "--config_file", path, "--allow_unknown_keys"])
    (mistake,) = parsed.mistakes
    assert "cache_latent " in mistake.what and "cache_latents" in mistake.remedy
    (note,) = parsed.notes
    assert "my_key" in note and "your_key" in note and "options.toml" in note
    assert "epoch" not in note and "noise_offset_type" not in note


def test_front_end_keys_of_another_kind_of_training_are_refused_when_on(tmp_path: Path) -> None:
    for name in ("train_inpainting", "train_t5xxl"):
        silent = good("--config_file", config(tmp_path, f"seed = 1\n{name} = false\n"))
        assert silent.notes == ()
        (what,) = whats(parse([*NEEDED, "--config_file", config(tmp_path, f"seed = 1\n{name} = true\n")]))
        assert f"{name} = true" in what


def test_front_end_keys_are_unknown_on_the_command_line() -> None:
    assert len(parse([*NEEDED, "--epoch", "4"]).mistakes) == 1


def test_config_file_works_only_on_the_command_line(tmp_path: Path) -> None:
    parsed = good("--config_file", config(tmp_path, 'config_file = "other.toml"\noutput_config = true\nseed = 1\n'))
    assert parsed.options.run.output_config is False and len(parsed.notes) == 2
    assert parsed.options.run.config_file == tmp_path / "options.toml"


def test_writing_a_config_reads_none_and_needs_no_complete_run(tmp_path: Path) -> None:
    parsed = parse(["--output_config", "--config_file", str(tmp_path / "new"), "--seed", "3"])
    assert parsed.mistakes == ()
    assert parsed.options.run.config_file == tmp_path / "new.toml"


def test_help_ends_the_program_with_success(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(["--seed", "x", "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    words = set(printed.split())
    assert {name for name in FLAGS if f"--{name}" in words} == {
        name for name, flag in FLAGS.items() if flag.script != "train_network.py"
    }


def tool() -> Program:
    own = {"processes": Flag("processes", "", "integer", 1, "How many.", at_least=1)}
    return Program(flags=own, unneeded=frozenset({"output_dir"}), help=lambda: "about the tool")


def test_a_program_has_flags_of_its_own_and_needs_fewer(capsys) -> None:
    without = [word for word in NEEDED if "output_dir" not in word]
    assert ["--output_dir" in what for what in whats(parse(without))] == [True]
    parsed = parse([*without, "--processes", "3"], tool())
    assert not parsed.mistakes and parsed.program_values == {"processes": 3} and "processes" in parsed.set_by_user
    assert parse(without, tool()).program_values == {"processes": 1}
    assert not parse([*NEEDED]).program_values
    with pytest.raises(SystemExit):
        parse(["--help"], tool())
    assert capsys.readouterr().out == "about the tool\n"


def test_mistakes_in_a_programs_own_flags_are_reported_with_all_others(tmp_path) -> None:
    words = ["--processes", "0", "--learning_rate", "x", "--procesess", "2"]
    parsed = parse([*NEEDED, *words], tool())
    assert [what.split(" ")[0] for what in whats(parsed)] == ["--processes", "--learning_rate", "--procesess"]
    assert any("--processes" in mistake.remedy for mistake in parsed.mistakes)
    path = config(tmp_path, "processes = 2\n")
    assert parse([*NEEDED, "--config_file", path], tool()).program_values == {"processes": 2}
    assert len(parse([*NEEDED, "--processes", "2"]).mistakes) == 1
