"""Render the options as --help, docs/options.md, a TOML file and metadata."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from library.options.flag import Flag, Script
from library.options.mistakes import Mistake, UserError
from library.options.train_options import FLAGS, GROUPS, TrainOptions, values_of
from library.whole_files import write_text

TITLES = {
    "model": "Model",
    "dataset": "Images",
    "caption": "Captions",
    "mask": "Masks",
    "cache": "Caches",
    "objective": "Loss",
    "rollout": "Rollout (scheduled sampling)",
    "preservation": "Preservation",
    "optimizer": "Optimizer and learning rates",
    "adapter": "Adapter",
    "averaging": "Average of the weights",
    "memory": "Precision, memory and speed",
    "compilation": "Compiling",
    "quantisation": "Quantised base model",
    "saving": "Saved files",
    "hub": "Hugging Face Hub",
    "preview": "Preview images",
    "validation": "Validation",
    "evaluation": "Evaluation of a subject",
    "processes": "Several processes",
    "deepspeed": "DeepSpeed",
    "run": "Run",
}

_USAGE = "--pretrained_model_name_or_path MODEL --train_data_dir DIR --output_dir DIR --resolution 512"
_WHOLE = "Train all weights of a model on your images"
_ADAPTER = (
    "Train an adapter (LoRA and its relatives) on your images: a small file to use with the base model.",
    "Requires --network_module, for example networks.lora.",
)
_LIKE_TRAIN_DB = (
    "The same as train_db.py under a name of sd-scripts, except that text encoders are trained only with "
    "--train_text_encoder."
)
_LIKE_TRAIN_NETWORK = "The same as train_network.py under sd-scripts' name for Stable Diffusion XL."
_ABOUT: Mapping[str, tuple[str, ...]] = {
    "train_db.py": (f"{_WHOLE} (DreamBooth).",),
    "train_network.py": _ADAPTER,
    "sdxl_train.py": (f"{_WHOLE} (Stable Diffusion XL).", _LIKE_TRAIN_DB),
    "sdxl_train_network.py": (*_ADAPTER, _LIKE_TRAIN_NETWORK),
    "fine_tune.py": (f"{_WHOLE} (fine-tuning).", _LIKE_TRAIN_DB),
}
# Flag.script -> remark in docs/options.md on a flag that only one kind of training has.
_ONLY: Mapping[Script, str] = {"train_db.py": "Only for whole models.", "train_network.py": "Only for adapters."}


def help_text(
    width: int | None = None,
    script: Script = "train_db.py",
    name: str = "",
    defaults: Mapping[str, object] = MappingProxyType({}),
) -> str:
    """The --help text of a program, wrapped to `width` characters (None: the terminal's width).

    `script` selects the flags; `name` is the program's own name if it differs; `defaults` replaces flags' defaults.
    """
    width = width or max(60, min(120, shutil.get_terminal_size((100, 24)).columns))
    name = name or script
    lines = [
        *(line for about in _ABOUT[name] for line in textwrap.wrap(about, width)),
        "",
        f"usage: python {name} {_USAGE} [more flags]",
        f"       python {name} --config_file options.toml [more flags]",
    ]
    for group in GROUPS:
        lines += ["", f"{TITLES[group]}:"]
        for known in _flags(group):
            if known.script not in (None, script):
                continue
            flag = replace(known, default=defaults.get(known.name, known.default))
            lines.append(f"  --{flag.name} {_placeholder(flag)}".rstrip())
            lines += textwrap.wrap(
                f"{flag.help}{_facts(flag)}", width - 8, initial_indent=" " * 8, subsequent_indent=" " * 8
            )
    return "\n".join(lines)


def docs_page() -> str:
    """The text of docs/options.md: one table per group."""
    lines = [
        "# Options of the training programs",
        "",
        "Options of `train_db.py` (whole models) and `train_network.py` (adapters); flags of one only are marked.",
        "`sdxl_train.py` and `fine_tune.py` have the options of `train_db.py`, `sdxl_train_network.py` those of",
        "`train_network.py`.",
        "Each option is a flag of the command line (`--name value`) and a key of a `--config_file` (`name = value`);",
        "the command line overrides the file. This page is generated (`python -m library.options.render`).",
    ]
    for group in GROUPS:
        lines += ["", f"## {TITLES[group]}", "", "| Flag | Type | Default | Meaning |", "|---|---|---|---|"]
        for flag in _flags(group):
            only = f" {_ONLY[flag.script]}" if flag.script else ""
            meaning = f"{flag.help}{_limits(flag)}{only}".replace("|", "\\|").replace("<", "&lt;").replace(">", "&gt;")
            lines.append(f"| `{flag.name}` | {_type(flag)} | {_default(flag)} | {meaning} |")
    return "\n".join(lines) + "\n"


def config_toml(options: TrainOptions) -> str:
    """The options as the TOML of a --config_file, one table per group, without flags that are not set.

    max_train_steps is omitted if max_train_epochs overrides it. Needs the package tomli_w.
    """
    import tomli_w  # only where a file is written

    values = values_of(options)
    overridden = "max_train_steps" if values["max_train_epochs"] else ""
    tree: dict[str, dict[str, object]] = {}
    for name, value in values.items():
        flag = FLAGS[name]
        if value is not None and name != overridden and not (flag.only_on_command_line or flag.secret):
            tree.setdefault(flag.group, {})[name] = _toml(value)
    return tomli_w.dumps(tree)


def write_config(options: TrainOptions) -> Path:
    """Write config_toml to the file named by --config_file, which must not exist yet (--output_config).

    Returns the file's path. Raises UserError if no file is named, it exists, or it cannot be written.
    """
    path = options.run.config_file
    if path is None:
        raise UserError(
            [Mistake("--output_config has no file to write", "add --config_file with the name of the file")]
        )
    if path.exists():
        raise UserError([Mistake(f"--output_config: {path} already exists", "name another file, or delete this one")])
    try:
        write_text(path, config_toml(options))
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            [Mistake(f"--output_config: {path} cannot be written: {reason}", "name another file")]
        ) from error
    return path


def metadata(options: TrainOptions) -> dict[str, str]:
    """Metadata key -> str() of the value, for every flag that has a key and is set."""
    values = values_of(options)
    keys: dict[str, str] = {}
    for name, flag in FLAGS.items():
        value = values[name]
        if flag.metadata and value is not None:
            keys[flag.metadata] = str(value)
    return keys


def _flags(group: str) -> Iterator[Flag]:
    return (flag for flag in FLAGS.values() if flag.group == group)


def _placeholder(flag: Flag) -> str:
    if flag.kind == "switch":
        return ""
    if flag.kind == "list":
        return "KEY=VALUE ..." if flag.pairs else "TEXT ..."
    return _NAMES[flag.kind]


_NAMES: Mapping[str, str] = {
    "integer": "N",
    "number": "X",
    "steps or share": "N|X",
    "text": "TEXT",
    "numbers": "X ...",
    "paths": "PATH ...",
    "path": "PATH",
    "path or URL": "PATH",
    "width,height": "W,H",
    "from,to": "X,X",
}


def _type(flag: Flag) -> str:
    return "list of key=value" if flag.pairs else flag.kind


def _default(flag: Flag) -> str:
    if flag.default is None or flag.default in ("", ()):
        return "not set"
    if isinstance(flag.default, bool):
        return "on" if flag.default else "off"
    return f"`{flag.default}`"


def _limits(flag: Flag) -> str:
    """The flag's choices and aliases as sentences, or an empty text."""
    parts = []
    if flag.choices:
        parts.append(f"One of {', '.join(str(choice) for choice in flag.choices)}.")
    if flag.aliases:
        parts.append(f"Also accepted as {', '.join(flag.aliases)}.")
    return "".join(f" {part}" for part in parts)


def _facts(flag: Flag) -> str:
    default = _default(flag).strip("`")
    return _limits(flag) + ("" if default in ("not set", "off") else f" Default: {default}.")


def _toml(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple) and value and isinstance(value[0], Path):
        return [str(path) for path in value]
    if isinstance(value, tuple):
        return ",".join(str(side) for side in value) if value and isinstance(value[0], int) else list(value)
    return value


if __name__ == "__main__":
    print(docs_page(), end="")
