"""library/options/tool_command.py: parsing, help and exit codes of small tools."""

from __future__ import annotations

import errno
import io
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from library.options.flag import flag
from library.options.mistakes import Mistake, Mistakes, UserError
from library.options.tool_command import Tool, help_text, parse_tool, run_tool

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = (
    *(f"networks/{name}.py" for name in (
        "merge_lora", "sdxl_merge_lora", "svd_merge_lora", "resize_lora", "extract_lora_from_models",
        "extract_lora_from_dylora", "check_lora_weights", "lora_interrogator",
    )),
    *(f"finetune/{name}.py" for name in (
        "merge_captions_to_metadata", "merge_dd_tags_to_metadata", "clean_captions_and_tags", "prepare_buckets_latents",
    )),
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    models: tuple[Path, ...] = flag((), "the files")
    ratios: tuple[float, ...] = flag((), "numbers")
    rank: int = flag(4, "a rank", at_least=1)
    loud: bool = flag(False, "say more")


def check(options: Options, mistakes: Mistakes) -> None:
    if options.rank == 3:
        mistakes.add("--rank 3 is odd", "give 4")


def work(options: Options) -> None:
    if options.loud:
        raise UserError([Mistake("too loud", "be quiet")])
    print(options)


TOOL = Tool("Do it.", "python it.py", Options, work, {"models": "give --models a"}, check)


def test_words_become_options() -> None:
    found = parse_tool(TOOL, ["--models", "a b.pt", "ç.pt", "--ratios", "-0.5", "2", "--rank=8", "--loud"])
    assert found == Options((Path("a b.pt"), Path("ç.pt")), (-0.5, 2.0), 8, True)


@pytest.mark.parametrize(
    "words",
    [
        ["--loud", "a.pt", "8", "-1.5", "2"],
        ["--models", "a.pt", "--rank", "8", "--ratios", "-1.5", "2", "--loud"],
        ["a.pt", "-l", "--rank=8", "--ratios", "-1.5", "2"],
        ["a.pt", "-l=true", "--order=8", "--ratios", "-1.5", "2"],
    ],
)
def test_positional_values_and_aliases(words: list[str]) -> None:
    """A switch takes no word, so the word after it is positional; the last positional flag, a list, takes the rest."""
    tool = replace(TOOL, positional=("models", "rank", "ratios"), aliases={"-l": "--loud", "--order": "--rank"})
    assert parse_tool(tool, words) == Options((Path("a.pt"),), (-1.5, 2.0), 8, True)


def test_a_word_too_many_is_a_mistake() -> None:
    tool = replace(TOOL, positional=("rank",))
    with pytest.raises(UserError) as raised:
        parse_tool(tool, ["8", "9", "--models", "a"])
    assert '"9" (command line) belongs to no flag' in str(raised.value)
    assert "  rank " in help_text(tool) and "  --rank" not in help_text(tool)


def test_all_mistakes_are_reported_at_once() -> None:
    with pytest.raises(UserError) as raised:
        parse_tool(TOOL, ["--rnk", "2", "--ratios", "viel", "--rank", "3", "astray"])
    told = str(raised.value)
    for word in (
        "--rnk",
        "did you mean --rank?",
        "--ratios",
        "not a number",
        "--rank 3 is odd",
        "no --models",
        "astray",
    ):
        assert word in told


def test_a_remedy_of_a_flag_that_is_not_here_stands_before_a_similar_flag() -> None:
    with pytest.raises(UserError, match=r"--ranks .*is not a flag of this program(?s:.*)-> use one --rank$"):
        parse_tool(replace(TOOL, required={}, remedies={"ranks": "use one --rank"}), ["--ranks", "4"])


def test_a_wrong_value_is_not_reported_as_missing() -> None:
    with pytest.raises(UserError) as raised:
        parse_tool(Tool("", "", Options, work, {"ratios": "give some"}), ["--ratios", "viel"])
    assert "no --ratios" not in str(raised.value)


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tool(TOOL, ["--help"]) == 0
    told = capsys.readouterr().out
    assert "--rank" in told and "Default: 4." in told and "usage: python it.py" in told
    assert run_tool(TOOL, ["--models", "a"]) == 0
    assert run_tool(TOOL, ["--models", "a", "--loud"]) == 2
    assert "- too loud\n    -> be quiet" in capsys.readouterr().err


def test_help_lists_every_flag() -> None:
    assert all(f"--{name}" in help_text(TOOL) for name in ("models", "ratios", "rank", "loud"))


def test_help_of_kohya_s_tools_needs_no_torch() -> None:
    program = """
import runpy, sys
for name in sys.argv[1:]:
    sys.argv = [name, "--help"]
    try:
        runpy.run_path(name, run_name="__main__")
    except SystemExit as end:
        assert end.code == 0, name
    assert not {"torch", "numpy", "safetensors", "diffusers"} & set(sys.modules), name
"""
    answer = subprocess.run(
        [sys.executable, "-c", program, *SCRIPTS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.count("usage: ") == len(SCRIPTS)


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of Windows do not break")
@pytest.mark.parametrize(
    "script",
    ["train_db.py", "train_network.py", "gen_img.py", "tools/cache_latents.py", "networks/merge_lora.py",
     "tools/convert_checkpoint.py"],
)  # fmt: skip
def test_help_that_nobody_reads_ends_without_a_traceback(script: str) -> None:
    command = [sys.executable, str(ROOT / script), "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as program:
        assert program.stdout is not None and program.stderr is not None
        program.stdout.close()  # before the program writes: head has gone
        assert (program.stderr.read(), program.wait()) == (b"", 1)


class Closed(io.StringIO):
    """Standard output of Windows whose reader is gone."""

    def flush(self) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")


def test_only_a_broken_output_ends_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(options: Options) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    with pytest.raises(OSError, match="Invalid argument"):
        run_tool(replace(TOOL, work=fail), ["--models", "a"])
    monkeypatch.setattr(sys, "stdout", Closed())
    with pytest.raises(SystemExit) as end:
        run_tool(replace(TOOL, work=fail), ["--models", "a"])
    assert end.value.code == 1
