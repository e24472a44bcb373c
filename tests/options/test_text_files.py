"""A file of another kind, or none that can be read, is one mistake that says what the file is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from library.data.scan.metadata_files import read_metadata
from library.options.dataset_config.convert import BUILT_IN
from library.options.dataset_config.kohya import read_kohya
from library.options.dataset_config.simpletuner import read_backend
from library.options.datasets import CaptionSettings
from library.options.mistakes import Mistake, UserError
from library.options.parse import parse
from library.options.text_files import recognise_text
from library.sampling.prompts import read_prompts

# Files as their programs write them; the flag that takes each is the key.
FILES = {
    "--config_file": (
        "options.toml",
        'pretrained_model_name_or_path = "a.safetensors"\ntrain_data_dir = "t"\noutput_dir = "o"\nresolution = "64,64"',
    ),
    "--dataset_config": (
        "data.toml",
        '[general]\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = "x"\nnum_repeats = 2',
    ),
    "--data_backend_config": (
        "backend.json",
        json.dumps(
            [{"id": "a", "type": "local", "instance_data_dir": "x"}, {"id": "t", "dataset_type": "text_embeds"}]
        ),
    ),
    "--in_json": ("meta.json", json.dumps({"a.png": {"caption": "a"}, "b.png": {"tags": "b", "image_size": [1, 2]}})),
    "--sample_prompts": ("prompts.toml", '[prompt]\nwidth = 64\n[[prompt.subset]]\nprompt = "a dog"'),
}
MORE = (
    ("--sample_prompts", "prompts.json", '[{"prompt": "a dog", "width": 64}]'),
    ("--dataset_config", "data.json", '{"general": {}, "datasets": [{"subsets": [{"image_dir": "x"}]}]}'),
    ("--config_file", "sections.toml", '[general]\noutput_dir = "o"\n[train]\nlearning_rate = 1e-4'),
    ("--config_file", "config.json", '{"--model_family": "sdxl", "--learning_rate": "1e-4", "--output_dir": "o"}'),
    ("--config_file", "part.json", '{"scheduled_sampling_max_step_offset": 10}'),
    ("--in_json", "meta.jsonl", '{"image_path": "a.png", "caption": "a"}\n{"image_path": "b.png", "caption": "b"}\n'),
)
KOHYA_SS = json.dumps({"LoRA_type": "Standard", "output_dir": "o", "learning_rate": 1e-4, "max_resolution": "512,512"})


def reported(read: Callable[[], object]) -> list[Mistake]:
    """The mistakes of a reader that raises them or returns them in a record."""
    try:
        result = read()
    except UserError as error:
        return list(error.mistakes)
    return list(getattr(result, "mistakes", ()))


READERS: dict[str, Callable[[Path], list[Mistake]]] = {
    "--config_file": lambda path: reported(lambda: parse([f"--config_file={path}"])),
    "--dataset_config": lambda path: reported(lambda: read_kohya(path, BUILT_IN)),
    "--data_backend_config": lambda path: reported(lambda: read_backend(path, BUILT_IN)),
    "--in_json": lambda path: reported(lambda: read_metadata(path, CaptionSettings())),
    "--sample_prompts": lambda path: reported(lambda: read_prompts(path)),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(("flag", "name", "text"), [*((flag, *file) for flag, file in FILES.items()), *MORE])
def test_a_file_of_another_kind_is_one_mistake_that_names_its_flag(
    reader: str, flag: str, name: str, text: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    found = READERS[reader](tmp_path / name)
    if flag == reader:
        assert not any(" is a " in mistake.what for mistake in found)
        return
    (mistake,) = found
    known = not name.endswith(".jsonl") or reader == "--config_file"  # elsewhere the extension says enough
    assert mistake.remedy == f"pass it as {flag}" or not known
    assert str(tmp_path / name) in mistake.what


@pytest.mark.parametrize("reader", READERS)
def test_a_front_ends_project_is_called_so(reader: str, tmp_path: Path) -> None:
    (tmp_path / "dog.json").write_text(KOHYA_SS, encoding="utf-8")
    (mistake,) = READERS[reader](tmp_path / "dog.json")
    assert "dog.json is a front-end's project, not " in mistake.what and "--config_file" in mistake.remedy


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("mark", ['"_class_name": "UNet2DConditionModel"', '"transformers_version": "4.54.0"'])
def test_the_file_of_a_model_with_the_same_name_is_called_so(reader: str, mark: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(f'{{{mark}, "attention_head_dim": [5, 10]}}', encoding="utf-8")
    (mistake,) = READERS[reader](tmp_path / "config.json")
    assert "is the config.json of a model, not " in mistake.what and "its folder" in mistake.remedy


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("ending", [".toml", ".json"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "is a folder, not a file"),
        (b'\x80\x02\0\0\0\0\0\0{"__metadata__": 1}', "is not a text file"),
        ('a = "Hündchen"'.encode("latin-1"), "is not in UTF-8"),
        ("a = 1".encode("utf-16"), "is not in UTF-8"),
    ],
)
def test_what_is_no_text_is_one_mistake(
    reader: str, ending: str, content: bytes | None, words: str, tmp_path: Path
) -> None:
    path = tmp_path / f"a{ending}"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    (mistake,) = READERS[reader](path)
    assert words in mistake.what and str(path) in mistake.what and mistake.remedy


def test_options_that_are_missing_with_their_file_are_not_missed(tmp_path: Path) -> None:
    """Other mistakes of the command line are reported too, but none that the file's options may settle."""
    words = ["--num_repeats=3", "--full_fp16", "--seed=x", "--no_such_flag", f"--config_file={tmp_path / 'gone.toml'}"]
    parsed = parse(words)
    assert not parsed.is_complete
    said = [mistake.what for mistake in parsed.mistakes]
    assert len(said) == 3 and "there is no such file" in said[0]
    assert "--seed" in said[1] and "--no_such_flag" in said[2]


@pytest.mark.parametrize("text", ["", "[]", "{}", "a = 1", "{", '{"a": {"b": 1}}', "a dog\na cat", "[1, 2]", "x: y"])
def test_what_is_unknown_is_not_guessed(text: str) -> None:
    assert recognise_text(text) is None


@pytest.mark.parametrize("name", [path.name for path in (Path(__file__).parents[1] / "frontend_files").glob("*.toml")])
def test_files_of_front_ends_are_recognised(name: str) -> None:
    text = (Path(__file__).parents[1] / "frontend_files" / name).read_text(encoding="utf-8")
    kind = recognise_text(text)
    assert kind is not None
    expected = "a dataset file" if "_dataset" in name else "a file of training options"
    assert kind.title == ("a front-end's project" if "project" in name else expected)
