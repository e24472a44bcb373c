"""Read a text file that the user names, and recognise one of another kind by its content.

Every reader of options, datasets, metadata and prompts uses both, so that a file at the wrong flag is one mistake.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from library.bounded import json_of, read_bytes, toml_of
from library.limits import OPTIONS_FILE
from library.options.mistakes import Mistake


@dataclass(frozen=True)
class FileKind:
    """A kind of file: its name in messages, and what to do with it."""

    title: str
    remedy: str


OPTIONS = FileKind("a file of training options", "pass it as --config_file")
PROJECT = FileKind(
    "a front-end's project",
    "pass the TOML file of options that the front-end writes when it trains (kohya_ss: config_....toml in the output "
    "folder) as --config_file",
)
SIMPLETUNER = FileKind("SimpleTuner's config.json", "pass it as --config_file")
MODEL = FileKind("the config.json of a model", "to train the model, pass its folder as --pretrained_model_name_or_path")
DATASETS = FileKind("a dataset file", "pass it as --dataset_config")
BACKENDS = FileKind("a data backend file of SimpleTuner", "pass it as --data_backend_config")
METADATA = FileKind("a metadata file of images and captions", "pass it as --in_json")
PROMPTS = FileKind("a file of prompts", "pass it as --sample_prompts")

# Options of which every training needs some, and no dataset file has any.
_OF_TRAINING = frozenset(
    "pretrained_model_name_or_path train_data_dir dataset_config output_dir output_name learning_rate unet_lr "
    "network_module optimizer_type lr_scheduler max_train_steps max_train_epochs mixed_precision".split()
)
_OF_SIMPLETUNER = frozenset(
    "model_family data_backend_config base_model_precision use_ema scheduled_sampling_max_step_offset".split()
)
_OF_MODEL = frozenset({"_class_name", "_diffusers_version", "transformers_version"})
_OF_KOHYA_SS = frozenset("LoRA_type max_resolution model_list additional_parameters".split())
_OF_METADATA = frozenset({"caption", "tags", "image_size", "train_resolution"})
_OF_BACKENDS = frozenset({"instance_data_dir", "dataset_type", "cache_dir_vae"})
_BINARY_HEAD = 4096


def read_text(path: Path, named: str, most: int = OPTIONS_FILE) -> str | Mistake:
    """The text of a file in UTF-8, with or without a byte order mark. `named`: flag and path, for the mistake about a
    file that is missing, a folder, not readable, larger than `most` bytes, or not text."""
    if path.is_dir():
        return Mistake(f"{named} is a folder, not a file", "name the file in it")
    try:
        content = read_bytes(path, most)
    except FileNotFoundError:
        return Mistake(f"{named} cannot be read: there is no such file", "check the path")
    except OSError as error:
        return Mistake(f"{named} cannot be read: {error.strerror or error}", "check its path and permissions")
    except ValueError as error:
        return Mistake(f"{named} is not read: {error}", "check the path")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        if b"\0" in content[:_BINARY_HEAD] and not utf_16:
            return Mistake(f"{named} is not a text file", "check the path")
        line = content.count(b"\n", 0, error.start) + 1
        return Mistake(f"{named} is not in UTF-8 (line {line}, byte {error.start})", "save the file as UTF-8")


def other_kind(named: str, content: object, wanted: FileKind, *also: FileKind) -> Mistake | None:
    """The mistake about a file that is known and neither of the `wanted` kind nor of those that are read `also`.
    `content`: the text, or what TOML or JSON have made of it."""
    found = recognise_text(content) if isinstance(content, str) else recognise(content)
    if found is None or found in (wanted, *also):
        return None
    return Mistake(f"{named} is {found.title}, not {wanted.title}", found.remedy)


def recognise_text(text: str) -> FileKind | None:
    """The kind of a text in JSON or TOML; None if it is in neither or unknown."""
    if len(text) > OPTIONS_FILE:
        return None
    try:
        return _recognise_json(json_of(text))
    except ValueError:
        pass
    try:
        return recognise(toml_of(text))
    except ValueError:
        pass
    first, _, rest = text.partition("\n")
    return METADATA if rest and first.startswith("{") and '"image_path"' in first else None


def recognise(tree: object) -> FileKind | None:
    """The kind of a parsed file; None if unknown."""
    if isinstance(tree, list):
        return _recognise_list(tree)
    if not isinstance(tree, dict):
        return None
    tables = {name: value for name, value in tree.items() if isinstance(value, Mapping)}
    if any(name.endswith("_args") and "args" in table for name, table in tables.items()):
        return PROJECT  # of LoRA_Easy_Training_Scripts
    if isinstance(tree.get("datasets"), list):
        return DATASETS
    if tree.keys() == {"prompt"}:
        return PROMPTS
    if tables and tables.keys() == tree.keys() and any(_OF_METADATA & table.keys() for table in tables.values()):
        return METADATA
    names = {*tree, *(name for table in tables.values() for name in table)}
    if names & _OF_TRAINING:
        return OPTIONS
    return DATASETS if tables.keys() == {"general"} else None


def _recognise_json(tree: object) -> FileKind | None:
    """Options in JSON are SimpleTuner's, which are flat, or those of a front-end's project."""
    kind = recognise(tree)
    if not isinstance(tree, dict) or kind not in (None, OPTIONS):
        return kind
    names = {name.strip().lstrip("-") for name in tree}
    if names & _OF_KOHYA_SS:
        return PROJECT
    if names & _OF_MODEL:
        return MODEL
    is_flat = not any(isinstance(value, Mapping) for value in tree.values())
    if names & _OF_SIMPLETUNER or (is_flat and names & _OF_TRAINING):
        return SIMPLETUNER
    return PROJECT if kind is OPTIONS else None


def _recognise_list(members: list[object]) -> FileKind | None:
    tables = [member for member in members if isinstance(member, Mapping)]
    if any(_OF_BACKENDS & table.keys() for table in tables):
        return BACKENDS
    is_prompts = any("prompt" in table for table in tables) or any(isinstance(member, str) for member in members)
    return PROMPTS if is_prompts else None
