"""README and docs/ say what is so: flags, files, tables, tests and messages that they name are there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import gen_img
import train_db
from library.evaluation.options import EvaluationOptions
from library.families import unsupported
from library.options import parse, render
from library.options.dataset_config.convert import BUILT_IN
from library.options.dataset_config.keys import KEYS
from library.options.dataset_config.kohya import read_kohya
from library.options.dataset_config.simpletuner import read_backend
from library.options.future_flags import FUTURE_FLAGS
from library.options.tool_command import parse_tool, tool_flags
from library.options.train_options import FLAGS
from library.sampling.options import ClassImageOptions, DrawingOptions, DrawingSettings, GenerateOptions
from library.training import command
from library.training.optim.optimizer_table import OPTIMIZERS
from library.training.optim.schedules import SCHEDULES
from networks.settings import ONLY_IN_SD_SCRIPTS
from tests import tiny
from tools import (
    clean_captions_and_tags,
    convert_checkpoint,
    convert_dataset_config,
    convert_diffusers20_original_sd,
    convert_lora,
    evaluate_subject,
    extract_lora_from_dylora,
    extract_lora_from_models,
    find_rare_tokens,
    make_class_images,
    make_masks,
    make_shards,
    merge_captions_to_metadata,
    merge_dd_tags_to_metadata,
    merge_lora,
    merge_models,
    posthoc_ema,
    prepare_buckets_latents,
    resize_lora,
    show_metadata,
    svd_merge_lora,
    watch,
)

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))]

# Flags of other programs that the pages name, and the options that stand in a prompt.
FOREIGN = {
    "base",
    "fsdp_offload_params",
    "fsdp_reshard_after_forward",
    "fsdp_version",
    "help",
    "name",
    "num_cpu_threads_per_process",
    "num_processes",
    "quiet",
    "processes",
    "quick",
    "durations",
    "torch",
    "dist",
    "logdir",
    "seeds",
    "use_deepspeed",
    "use_fsdp",
    "local-dir",
    "cpu",
    "master_addr",
    "master_port",
    "multi_gpu",
    "nnodes",
    "node_rank",
    "nproc_per_node",
}
TOOLS: dict[str, Any] = {
    "gen_img.py": gen_img.TOOL,
    **{
        f"tools/{tool.__name__.rpartition('.')[2]}.py": tool.TOOL
        for tool in (
            clean_captions_and_tags,
            convert_checkpoint,
            convert_dataset_config,
            convert_diffusers20_original_sd,
            convert_lora,
            evaluate_subject,
            extract_lora_from_dylora,
            extract_lora_from_models,
            find_rare_tokens,
            make_class_images,
            make_masks,
            make_shards,
            merge_captions_to_metadata,
            merge_dd_tags_to_metadata,
            merge_lora,
            merge_models,
            posthoc_ema,
            prepare_buckets_latents,
            resize_lora,
            show_metadata,
            svd_merge_lora,
            watch,
        )
    },
}
PROGRAMS = {
    program.name: program
    for program in (parse.DREAMBOOTH, parse.ADAPTERS, parse.SDXL, parse.SDXL_ADAPTERS, parse.FINE_TUNING)
}
FILLING = ("tools/cache_latents.py", "tools/cache_text_encoder_outputs.py")
IN_PROMPTS = {"n", "w", "h", "d", "s", "l", "ss"}


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def tables(page: str) -> Iterator[list[list[str]]]:
    """Every table of a page: rows of cells, the head first."""
    rows: list[list[str]] = []
    for line in [*text(page).splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif rows:
            yield [rows[0], *rows[2:]]
            rows = []


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a language, without the indentation of the list that they may stand in."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```", text(page), re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


def anchors(page: str) -> set[str]:
    """The names that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", text(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_page_of_options_is_rendered_from_the_options() -> None:
    assert text("docs/options.md") == render.docs_page(), "python -m library.options.render > docs/options.md"


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = (ROOT / page).parent / name if name else ROOT / page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked.resolve().relative_to(ROOT).as_posix()), target


def test_every_page_is_linked_from_the_readme() -> None:
    linked = set(re.findall(r"\]\((docs/[^)#]+)", text("README.md")))
    assert linked == set(PAGES) - {"README.md"}


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_is_one(page: str) -> None:
    aliases = {alias for flag in FLAGS.values() for alias in flag.aliases}
    of_tools = {name for tool in TOOLS.values() for name in (*tool_flags(tool.options), *tool.aliases)}
    known = {*FLAGS, *FUTURE_FLAGS, *aliases, *(name.lstrip("-") for name in of_tools), *FOREIGN, *IN_PROMPTS}
    assert not sorted(set(re.findall(r"(?<![\w-])--([A-Za-z][\w-]*)", text(page))) - known)


@pytest.mark.parametrize("page", PAGES)
def test_every_file_of_the_project_that_is_named_exists(page: str) -> None:
    named = re.findall(r"`((?:library|tests|examples|docs|networks|finetune|tools|benchmarks)/[\w/.]*)", text(page))
    assert not [path for path in named if not (ROOT / path).exists()]


def test_the_two_commands_are_there() -> None:
    rows = next(tables("README.md"))[1:]
    commands = [command.strip("`").removeprefix("./") for row in rows for command in row[1:]]
    assert commands == ["first_run.sh", "first_run.bat", "run_tests.sh", "run_tests.bat"]
    assert all((ROOT / command).is_file() for command in commands)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "sh")])
def test_commands_can_be_typed_as_they_stand(page: str) -> None:
    lines = [line for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    for line in lines:
        _, script, *words = shlex.split(line)
        script = script.replace("networks/", "tools/").replace("finetune/", "tools/")  # kohya's names for tools
        if script in TOOLS:
            parse_tool(TOOLS[script], words)
            continue
        if script == "tools/estimate_memory.py":
            _, script, *words = words  # behind -- stands another command
        if script in FILLING:
            assert (ROOT / script).is_file()
            words = words[: words.index("--processes")] if "--processes" in words else words
            script = "train_db.py"  # whose flags they take
        assert script in PROGRAMS, line
        told = [mistake.what for mistake in parse.parse(words, PROGRAMS[script]).mistakes]
        if "--config_file" in words:  # the reader's own file, which is not here
            told = [what for what in told if "there is no such file" not in what and "is not set" not in what]
        assert not told, line


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "toml")])
def test_files_of_options_are_without_a_mistake(page: str, tmp_path: Path) -> None:
    for block in blocks(page, "toml"):
        if "[[datasets" in block:
            continue
        (tmp_path / "page.toml").write_text(block, encoding="utf-8")
        program = parse.ADAPTERS if "network_module" in block else parse.DREAMBOOTH
        parsed = parse.parse(["--config_file", str(tmp_path / "page.toml")], program)
        assert parsed.mistakes == () and parsed.notes == ()


@pytest.mark.parametrize("ending", ["toml", "json"])
def test_files_of_datasets_are_without_a_mistake(ending: str, tmp_path: Path) -> None:
    """kohya's files hold tables, SimpleTuner's a list."""
    found = [block for block in blocks("docs/data.md", ending) if "datasets" in block or block.startswith("[")]
    assert found
    for block in found:
        file = tmp_path / f"data.{ending}"
        file.write_text(block, encoding="utf-8")
        is_list = ending == "json" and block.startswith("[")
        described = read_backend(file, BUILT_IN) if is_list else read_kohya(file, BUILT_IN, masked_loss=True)
        assert described.datasets and not described.mistakes


def test_the_keys_of_dataset_files_are_those_of_the_program() -> None:
    """Every key with its levels; those of ours are marked."""
    letters = {"general": "g", "dataset": "d", "subset": "s"}
    rows = [row for rows in tables("docs/data.md") if rows[0][:2] == ["Key", "Where"] for row in rows[1:]]
    told = {row[0].split("`")[1]: (row[1], "**ours**" in row[0]) for row in rows}
    assert len(told) == len(rows)
    assert {key: levels for key, (levels, _) in told.items()} == {
        key.name: " ".join(letters[level] for level in key.levels) for key in KEYS.values()
    }
    assert {key for key, (_, ours) in told.items() if ours} == {
        "resolutions", "pixels_per_batch", "caption_encoding", "background", "aesthetic_score", "validation",
        "shards", "shard_table"
    }  # fmt: skip


@pytest.mark.parametrize("page", ["docs/differences.md", "docs/reliability.md"])
def test_every_difference_and_fault_names_a_test_that_exists(page: str) -> None:
    for rows in tables(page):
        for row in rows[1:]:
            assert len(row) == len(rows[0]) and all(row), row
            named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row[-1])
            assert named, row
            for path, name in named:
                assert re.search(rf"^def {name}\(", text(path), re.MULTILINE), f"{path}::{name}"


def number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def test_the_tables_of_optimisers_and_schedules_are_those_of_the_program() -> None:
    optimizers, schedules = tables("docs/optimizers.md")
    assert optimizers[1:] == [
        [
            row.name,
            f"`{row.path}`",
            row.package.partition("==")[0] or "-",
            number(4 * row.state_tensors + row.state_bytes),
            " ".join(f"{name}={value}" for name, value in row.defaults.items()) or "-",
        ]
        for row in OPTIMIZERS
    ]
    names = {"half_cycles": "lr_scheduler_num_cycles"}  # what diffusers counts in halves
    assert schedules[1:] == [
        [
            row.name,
            f"`{row.path}`",
            ", ".join(f"`--{names.get(option, option)}`" for option in row.takes if option != "total") or "-",
        ]
        for row in SCHEDULES
    ]


def test_messages_are_those_of_the_program() -> None:
    files = [path for folder in ("library", "networks") for path in sorted((ROOT / folder).rglob("*.py"))]
    sources = "\n".join(path.read_text(encoding="utf-8") for path in files)
    messages = [row[0].strip("`") for rows in tables("docs/mistakes.md") for row in rows[1:]]
    assert messages and not [message for message in messages if message not in sources]


def not_supported() -> str:
    """The README's section of this name."""
    return text("README.md").partition("## Not supported yet\n")[2].partition("\n## ")[0]


def test_every_flag_without_support_is_listed() -> None:
    """But for those that mean nothing without another one, and those whose every value is neutral."""
    listed = set(re.findall(r"`--(\w+)`", not_supported()))
    heads = {
        row.name for row in FUTURE_FLAGS.values() if not row.only_with and not (row.kind == "switch" and row.neutral)
    }
    assert heads <= listed <= set(FUTURE_FLAGS), heads ^ listed


def test_every_argument_of_networks_without_support_is_listed() -> None:
    """But for that of a model that is not supported either."""
    listed = set(re.findall(r"`(\w+)`", not_supported()))
    assert ONLY_IN_SD_SCRIPTS - {"train_llm_adapter"} <= listed


def test_every_kind_of_model_without_support_is_listed() -> None:
    """Those that are recognised as whole models of another kind: their messages name the supported ones instead."""
    kinds = [what for _, what, remedy in unsupported.KINDS if not remedy or "channels" in remedy]
    small = {"a", "an", "another", "channels", "model", "or", "with"}
    words = {word for kind in kinds for word in re.findall(r"[a-z]\w*", kind.lower())} - small
    assert len(kinds) > 5 and not {word for word in words if word not in not_supported().lower()}


def test_the_description_of_a_file_is_what_the_tool_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """But for the numbers, of a miniature."""
    said = {"title": "My fine-tune", "architecture": "stable-diffusion-xl-v1-base", "author": "somebody"}
    path = tiny.write_single_file(
        tmp_path / "fine_tune.safetensors", "sdxl", dtype=torch.float16, position_ids=True,
        more={mark: torch.empty(0) for mark in ("v_pred", "ztsnr")},
        metadata={f"modelspec.{name}": value for name, value in said.items()} | {"modelspec.sai_model_spec": "1.0.1"},
    )  # fmt: skip
    assert convert_checkpoint.main([str(path), "--dry_run"]) == 0
    printed = capsys.readouterr().out.replace(str(path), path.name)
    (shown,) = re.findall(
        r"^```\n(fine_tune\.safetensors: .*?)^```", text("docs/checkpoints.md"), re.MULTILINE | re.DOTALL
    )
    assert re.sub(r"[\d.]+", "0", printed) == re.sub(r"[\d.]+", "0", shown)


def test_flags_of_the_programs_that_draw_are_all_described() -> None:
    described = [set(re.findall(r"`--(\w+)`", str([row[0] for row in rows]))) for rows in tables("docs/sampling.md")]
    assert described[0] == set(tool_flags(GenerateOptions))
    own = set(tool_flags(ClassImageOptions)) - set(tool_flags(DrawingOptions))
    assert described[-1] == own | {"seed"}
    described = [set(re.findall(r"`--(\w+)`", str([row[0] for row in rows]))) for rows in tables("docs/evaluation.md")]
    assert described[-1] == set(tool_flags(EvaluationOptions)) - set(tool_flags(DrawingSettings)) | {"ckpt"}


def test_exit_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """docs/mistakes.md: 2 for mistakes of the user, nothing to train on included; 130 when interrupted."""
    (tmp_path / "train").mkdir()
    words = ["--train_data_dir", str(tmp_path / "train"), "--resolution", "64", "--output_dir", str(tmp_path / "out")]
    words += ["--pretrained_model_name_or_path", str(tmp_path / "gone.safetensors")]
    assert command.run_recipe(train_db.RECIPE, words) == 2
    told = capsys.readouterr().err
    assert "contains no folder like" in told and "gone.safetensors" in told and "Traceback" not in told
    assert gen_img.main([]) == 2

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "parse", interrupted)
    assert command.run_recipe(train_db.RECIPE, words) == 130
