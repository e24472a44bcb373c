"""Help, documentation, TOML and metadata are rendered from the flags, and a written file reads back the same."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from library.options import render
from library.options.mistakes import UserError
from library.options.parse import parse
from library.options.train_options import FLAGS, GROUPS, TrainOptions, values_of

ROOT = Path(__file__).parents[2]
NEEDED = ["--pretrained_model_name_or_path=m", "--train_data_dir=t", "--output_dir=o", "--resolution=512,768"]


@pytest.mark.parametrize("script", ["train_db.py", "train_network.py"])
def test_help_names_every_flag_of_the_program_once_and_keeps_its_width(script: str) -> None:
    lines = render.help_text(80, script).splitlines()
    heads = [line.split()[0] for line in lines if line.startswith("  --")]
    assert heads == [f"--{name}" for name, flag in FLAGS.items() if flag.script in (None, script)]
    assert all(len(line) <= 80 for line in lines if line.startswith("   "))


def test_the_docs_page_has_a_table_a_group_and_a_row_a_flag() -> None:
    page = render.docs_page()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == list(FLAGS)
    assert page.count("\n## ") == len(GROUPS)
    assert all(row.count("|") - row.count("\\|") == 5 for row in rows), "four cells each"
    assert "&lt;repeats&gt;" in page, "a name in angle brackets is no HTML tag"


def test_a_written_config_reads_back_to_the_same_options(tmp_path: Path) -> None:
    words = [*NEEDED, "--use_8bit_adam", "--lr_warmup_steps=0.1", "--optimizer_args", "weight_decay=0.1", "--seed=0",
             "--max_train_epochs=3", "--cache_latents_to_disk", "--learning_rate_te=0",
             "--metadata_title", 'a "dog"']  # fmt: skip
    path = tmp_path / "written.toml"
    first = parse([*words, "--output_config", "--config_file", str(path)]).options
    assert render.write_config(first) == path
    assert set(tomllib.loads(path.read_text(encoding="utf-8"))) == set(GROUPS)
    again = parse(["--config_file", str(path)])
    assert again.mistakes == () and again.notes == ()
    ours, theirs = values_of(first), values_of(again.options)
    assert {name for name in ours if ours[name] != theirs[name]} == {"output_config"}


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("seed = 1\n", encoding="utf-8")
    with pytest.raises(UserError, match="already exists"):
        render.write_config(parse(["--output_config", "--config_file", str(path)]).options)
    assert path.read_text(encoding="utf-8") == "seed = 1\n"
    with pytest.raises(UserError, match="no file to write"):
        render.write_config(TrainOptions())


def test_metadata_holds_what_is_set_as_text() -> None:
    parsed = parse([*NEEDED, "--clip_skip=2", "--metadata_author=me", "--training_comment=hello"])
    found = render.metadata(parsed.options)
    assert found["ss_clip_skip"] == "2" and found["modelspec.author"] == "me"
    assert found["ss_training_comment"] == "hello" and found["ss_resolution"] == "(512, 768)"
    assert found["ss_learning_rate"] == "2e-06" and found["ss_color_aug"] == "False"
    assert "modelspec.license" not in found and "ss_seed" not in found


def test_options_import_nothing_but_the_standard_library() -> None:
    program = (
        "import json, sys; sys.argv[1:] = ['--seed', 'x']\n"
        "import library.options.parse as parse; parse.parse()\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", program], cwd=ROOT, capture_output=True, encoding="utf-8", check=True
    )
    foreign = set(json.loads(done.stdout)) - set(sys.stdlib_module_names) - {"library", "__main__", "__mp_main__"}
    assert {name for name in foreign if not name.startswith("_")} == set()
