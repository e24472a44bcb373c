"""Programs that differ in name and defaults: their flags, --help, and whether they train the text encoder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from library.options.parse import ADAPTERS, DREAMBOOTH, FINE_TUNING, SDXL, SDXL_ADAPTERS, Parsed, Program, parse

ROOT = Path(__file__).parents[2]
WHOLE_MODELS, ALL = (DREAMBOOTH, SDXL, FINE_TUNING), (DREAMBOOTH, SDXL, FINE_TUNING, ADAPTERS, SDXL_ADAPTERS)
ON_REQUEST = (SDXL, FINE_TUNING)
NEEDED = ("--pretrained_model_name_or_path=m", "--train_data_dir=t", "--output_dir=o", "--resolution=1024")
HEAVY = {"torch", "numpy", "diffusers", "transformers", "accelerate", "safetensors"}
RATES = ("learning_rate_te", "learning_rate_te1", "learning_rate_te2")

by_name = pytest.mark.parametrize("program", ALL, ids=lambda program: program.name)


def with_flags(program: Program, flags: str = "") -> Parsed:
    module = ("--network_module=networks.lora",) if program.script == "train_network.py" else ()
    return parse([*NEEDED, *module, *flags.split()], program)


def trains_text_encoder(parsed: Parsed) -> bool:
    assert parsed.mistakes == ()
    return parsed.options.optimizer.train_text_encoder


@by_name
def test_each_accepts_a_usual_command_line(program: Program) -> None:
    parsed = with_flags(program)
    assert parsed.mistakes == () and parsed.notes == ()


def test_help_of_each_is_its_own_and_needs_no_heavy_package() -> None:
    names = [program.name for program in ALL]
    code = (
        "import runpy, sys\n"
        "for name in sys.argv[1:]:\n"
        "    sys.argv = [name, '--help']\n"
        "    print('start of', name)\n"
        "    try:\n"
        "        runpy.run_path(name, run_name='__main__')\n"
        "    except SystemExit as end:\n"
        "        assert end.code == 0, name\n"
        f"    assert not {HEAVY!r} & set(sys.modules), name\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    pages = done.stdout.split("start of ")[1:]
    assert [page.splitlines()[0] for page in pages] == names
    for page, program in zip(pages, ALL, strict=True):
        assert f"usage: python {program.name} " in page
        lines = page.splitlines()
        assert ("  --learning_rate_te1 X" in lines) == (program in WHOLE_MODELS)
        assert ("  --network_dim N" in lines) == (program not in WHOLE_MODELS)
        if program in WHOLE_MODELS:
            about = page.partition("  --train_text_encoder\n")[2].partition("\n  --")[0]
            assert ("Default: on." in " ".join(about.split())) == (program is DREAMBOOTH)


def test_only_train_db_trains_the_text_encoder_by_default() -> None:
    assert [trains_text_encoder(with_flags(program)) for program in WHOLE_MODELS] == [True, False, False]
    for program in WHOLE_MODELS:
        assert trains_text_encoder(with_flags(program, "--train_text_encoder"))
        assert not trains_text_encoder(with_flags(program, "--train_text_encoder=false"))


@pytest.mark.parametrize("program", WHOLE_MODELS, ids=lambda program: program.name)
@pytest.mark.parametrize("said", [True, False])
def test_a_file_can_set_it_and_the_command_line_overrides_it(tmp_path: Path, program: Program, said: bool) -> None:
    file = tmp_path / "options.toml"
    file.write_text(f"train_text_encoder = {str(said).lower()}\n", encoding="utf-8")
    parsed = with_flags(program, f"--config_file {file}")
    assert trains_text_encoder(parsed) is said
    assert parsed.origins["train_text_encoder"] == "options.toml" and "train_text_encoder" in parsed.set_by_user
    assert trains_text_encoder(with_flags(program, f"--config_file {file} --train_text_encoder={not said}")) is not said


def test_an_unset_value_leaves_each_its_default() -> None:
    for program, usual in ((DREAMBOOTH, True), (SDXL, False)):
        parsed = with_flags(program, "--train_text_encoder=")
        assert trains_text_encoder(parsed) is usual and parsed.origins["train_text_encoder"] == "default"


# --- what does not go together ---


@pytest.mark.parametrize("cache", ["cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk"])
def test_captions_encoded_once_train_no_text_encoder(cache: str) -> None:
    for program in WHOLE_MODELS:
        parsed = with_flags(program, f"--{cache}")
        assert parsed.mistakes == () and not parsed.options.optimizer.train_text_encoder
        assert any("text encoder is not trained" in note for note in parsed.notes) == (program is DREAMBOOTH)
        (mistake,) = with_flags(program, f"--{cache} --train_text_encoder").mistakes
        assert f"--{cache} (command line) with --train_text_encoder (command line)" in mistake.what
        assert with_flags(program, f"--{cache} --train_text_encoder=false").mistakes == ()


@pytest.mark.parametrize("rate", RATES)
def test_captions_encoded_once_have_no_learning_rate(rate: str) -> None:
    (mistake,) = with_flags(DREAMBOOTH, f"--cache_text_encoder_outputs --{rate} 1e-6").mistakes
    assert f"--{rate} = 1e-06" in mistake.what
    assert with_flags(DREAMBOOTH, f"--cache_text_encoder_outputs --{rate} 0").mistakes == ()
    unasked = with_flags(SDXL, f"--cache_text_encoder_outputs --{rate} 1e-6")
    assert unasked.mistakes == () and any(rate in note for note in unasked.notes), "it was not to be trained anyway"


@pytest.mark.parametrize("name", [*RATES, "stop_text_encoder_training"])
@pytest.mark.parametrize("program", ON_REQUEST, ids=lambda program: program.name)
def test_text_encoder_flags_without_effect_are_noted(program: Program, name: str) -> None:
    (note,) = with_flags(program, f"--{name} 5").notes
    assert f"--{name} = 5" in note and "train_text_encoder" in note
    assert with_flags(program, f"--{name} 0").notes == ()
    assert with_flags(program, f"--{name} 5 --train_text_encoder").notes == ()
    assert with_flags(DREAMBOOTH, f"--{name} 5").notes == ()


def test_the_learning_rate_of_one_text_encoder_overrides_the_common_one_with_a_note() -> None:
    for rate in ("1e-6", "0"):
        parsed = with_flags(DREAMBOOTH, f"--learning_rate_te 1e-5 --learning_rate_te2 {rate}")
        (note,) = parsed.notes
        assert "--learning_rate_te = 1e-05" in note and "learning_rate_te2" in note
        optimizer = parsed.options.optimizer
        assert (optimizer.learning_rate_te, optimizer.learning_rate_te1) == (1e-5, None)
        assert optimizer.learning_rate_te2 == float(rate)


# --- whose flags they have ---


@pytest.mark.parametrize("program", WHOLE_MODELS, ids=lambda program: program.name)
def test_adapter_flags_are_refused_under_the_programs_own_name(program: Program) -> None:
    (mistake,) = with_flags(program, "--network_module networks.lora --network_dim 4").mistakes
    assert "belong to train_network.py" in mistake.what and f"{program.name} trains all weights" in mistake.what


@pytest.mark.parametrize("program", [ADAPTERS, SDXL_ADAPTERS], ids=lambda program: program.name)
def test_whole_model_flags_are_refused_by_adapter_programs(program: Program) -> None:
    (mistake,) = with_flags(program, "--learning_rate_te1 1e-6 --block_lr 1,2").mistakes
    assert '--learning_rate_te1 = 1e-06, --block_lr = "1.0,2.0"' in mistake.what
    assert "belong to train_db.py" in mistake.what and f"{program.name} trains an adapter" in mistake.what


@pytest.mark.parametrize(
    "flags",
    ["--learning_rate_te1 0 --learning_rate_te2 0", "--train_text_encoder", "--block_lr=", "--no_token_padding=false"],
)
def test_neutral_whole_model_flags_are_silent_for_adapters(flags: str) -> None:
    parsed = with_flags(SDXL_ADAPTERS, flags)
    assert parsed.mistakes == () and parsed.notes == ()


# --- values ---


@pytest.mark.parametrize("written", ["1e-6,2e-6,0", "1e-6, 2e-6, 0", "1e-6 2e-6 0"])
def test_rates_of_blocks_are_one_text_or_several(tmp_path: Path, written: str) -> None:
    wanted = (1e-6, 2e-6, 0.0)
    assert parse([*NEEDED, "--block_lr", written], SDXL).options.optimizer.block_lr == wanted
    assert parse([*NEEDED, "--block_lr", *written.split()], SDXL).options.optimizer.block_lr == wanted
    file = tmp_path / "options.toml"
    for text in (f'"{written}"', "[1e-6, 2e-6, 0]", '["1e-6,2e-6", 0]'):
        file.write_text(f"block_lr = {text}\n", encoding="utf-8")
        assert with_flags(SDXL, f"--config_file {file}").options.optimizer.block_lr == wanted


@pytest.mark.parametrize("written", ["1e-6,fast", "1e-6,-1"])
def test_a_rate_of_a_block_that_is_none_is_a_mistake(written: str) -> None:
    (mistake,) = with_flags(SDXL, f"--block_lr {written}").mistakes
    assert "--block_lr" in mistake.what


@pytest.mark.parametrize(("written", "sound"), [("0.2", True), ("0.999", True), ("0", False), ("1", False)])
def test_the_refiners_share_lies_between_none_and_all(written: str, sound: bool) -> None:
    parsed = with_flags(DREAMBOOTH, f"--refiner_training_strength {written}")
    assert (parsed.mistakes == ()) is sound
    assert parsed.options.objective.refiner_training_strength == (float(written) if sound else 0.2)


@pytest.mark.parametrize("others", ["", "--sdpa", "--mem_eff_attn", "--sdpa --mem_eff_attn"])
def test_diffusers_xformers_means_xformers_with_a_note(others: str) -> None:
    parsed = with_flags(FINE_TUNING, f"--diffusers_xformers {others}")
    memory = parsed.options.memory
    assert memory.xformers and not memory.sdpa and not memory.mem_eff_attn
    assert any("diffusers_xformers" in note for note in parsed.notes) and parsed.mistakes == ()
