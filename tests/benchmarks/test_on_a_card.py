"""benchmarks/on_a_card.py: what its parts tell each other, and one run measured for real. The whole of it runs with
--tiny, which takes minutes."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

import train_db
import train_network
from benchmarks.card import agreement, hollow
from benchmarks.card.agreement_rows import ROWS, Row, largest_difference
from benchmarks.card.cases import MEMORY, SPEED, arithmetic
from benchmarks.card.children import Child
from benchmarks.card.full_runs import arguments, prepare
from benchmarks.card.lines import emit, parse
from benchmarks.card.measured_run import Marks, measure
from benchmarks.card.tables import Bars, Table
from benchmarks.on_a_card import RUN_COLUMNS, SHORTEST, Session, compare, run_row
from library.checkpoints.files import read_header
from library.families.registry import detect
from library.options.parse import parse as parse_command
from library.training.quantised import backends


def test_results_are_lines_among_others(capfd: pytest.CaptureFixture[str]) -> None:
    emit("rate", name="bf16", flops=1e12)
    line = capfd.readouterr().out
    assert parse(line) == {"kind": "rate", "name": "bf16", "flops": 1e12}
    assert parse("steps:  40%|####      | 2/5 " + line) == parse(line)
    assert parse(line[:-5]) is None, "cut off"
    assert parse("steps: 1") is None


PROGRAM = """
from benchmarks.card.lines import emit
print("noise")
emit("run", batch=1)
{end}
"""


@pytest.mark.parametrize(
    ("end", "limit", "told", "found"),
    [
        ("", 60, "done", 1),
        ("raise SystemExit('CUDA error: an illegal memory access')", 60, "exit code 1: noise / CUDA error", 1),
        ("import time; time.sleep(600)", 0, "stopped after 0 s", 0),
        pytest.param(
            "import subprocess; subprocess.Popen(['sleep', '600'])",
            60,
            "done",
            1,
            marks=pytest.mark.skipif(os.name != "posix", reason="processes are ended by their group"),
        ),
    ],
    ids=["done", "crash", "hang", "children that outlive it"],
)
def test_a_process_ends_without_the_others(tmp_path: Path, end: str, limit: float, told: str, found: int) -> None:
    (tmp_path / "measures.py").write_text(PROGRAM.format(end=end), encoding="utf-8")
    child = Child("measures", [], limit, {"PYTHONPATH": str(tmp_path)})
    assert len(list(child.results())) == found
    assert child.ended.startswith(told)
    assert child.broke == told.startswith("exit code")


def test_a_row_is_printed_at_once_and_stays_one_row(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("run", "remark")
    table.row("a | b", "two\nlines")
    assert capsys.readouterr().out.splitlines() == ["| run | remark |", "|---|---|", "| a / b | two lines |"]
    table.row("c", remark="no time left")
    assert capsys.readouterr().out == "| c | no time left |\n"
    wide = Table("run", "batch", "s", "")
    wide.row("d", remark="not here")
    assert capsys.readouterr().out.splitlines()[-1] == "| d |  |  | not here |"


def run_of(seconds: float, batch: int = 1) -> dict[str, object]:
    return {
        "batch": batch, "seconds": seconds, "error": "", "out_of_memory": False, "flops": 2e12 * batch,
        "first_step": 9.0, "allocated": int(1.7e9), "reserved": None, "predicted": int(1.6e9), "before": 0,
        "last_loss": 0.1,
    }  # fmt: skip


def test_bars_are_judged_at_batch_1(capsys: pytest.CaptureFixture[str]) -> None:
    session = Session(Path(), 0.0, rates={"bf16": 800e12}, bars=Bars())
    table = Table(*RUN_COLUMNS)
    for seconds, batch in ((0.034, 1), (0.036, 1), (0.2, 8)):
        run_row(session, table, SPEED[0], run_of(seconds, batch))
    run_row(session, table, MEMORY[1], run_of(0.1))
    assert [met for *_, met in session.bars.found] == [True, False, True]
    assert "7.4%" in capsys.readouterr().out  # 2 TFLOP in 34 ms are 58.8 of 800 TFLOP/s


@pytest.mark.parametrize("left", [9.0, 60.0, 200.0, 500.0])
def test_memory_and_vae_keep_their_time(left: float) -> None:
    """However long a part before them takes, and its last process too."""
    session = Session(Path(), time.monotonic() + left)
    for part, behind in (("speed", ("memory", "vae")), ("memory", ("vae",))):
        limit = session.limit(part)
        if limit >= SHORTEST:
            after = Session(Path(), session.end - limit)
            assert all(after.limit(later) >= SHORTEST for later in behind)
    assert session.limit("vae") <= left


@pytest.mark.parametrize("known", ROWS, ids=lambda row: row.name)
def test_every_flag_of_a_row_is_one_of_its_program(known: Row, tmp_path: Path) -> None:
    recipe = train_network.RECIPE if known.trains == "adapter" else train_db.RECIPE
    words = agreement.arguments(known, tmp_path, tmp_path, 2, strict=True)
    assert not [str(each) for each in parse_command(words, recipe.program).mistakes if "not a flag" in str(each)]


def test_losses_are_compared_step_by_step() -> None:
    assert largest_difference({1: 0.5, 2: 0.99}, {1: 0.5, 2: 1.0}) == pytest.approx(0.01)
    assert largest_difference({1: 0.5}, {1: 0.5, 2: 1.0}) is None
    assert largest_difference({}, {}) is None
    assert all(not row.against or row.against in {other.name for other in ROWS} for row in ROWS)
    assert len({row.name for row in ROWS}) == len(ROWS)


def test_a_step_is_counted_as_forward_and_backward_passes() -> None:
    """Kaplan et al. 2020, section 2.1: a backward pass takes twice a forward pass, of which half for the inputs."""
    lora, _, _, full = SPEED
    assert arithmetic(lora, {"unet": 1.0, "text_encoder": 10.0}) == 2
    assert arithmetic(full, {"unet": 1.0, "text_encoder": 10.0}) == 33


def test_packed_weights_get_the_asked_spread() -> None:
    torch.manual_seed(1)
    codes = torch.zeros(64, 256, dtype=torch.int8), torch.ones(64, 1)
    halves = torch.zeros(32, 256, dtype=torch.uint8)
    pieces = (
        backends._Scaled(*codes),
        backends._Scaled(codes[0].to(torch.float8_e4m3fn), codes[1].clone()),
        backends._Grouped(halves, 4, torch.ones(64, 1), torch.ones(64, 1)),
    )
    for piece in pieces:
        hollow._fill_packed(piece, 0.05)
        weight = piece.unpack(torch.empty(64, 256))
        assert weight.std().item() == pytest.approx(0.05, rel=0.1)
        assert abs(weight.mean().item()) < 0.002


@pytest.mark.slow
def test_a_real_run_is_measured_from_a_checkpoint_that_takes_no_space(tmp_path: Path) -> None:
    prepare(tmp_path, SPEED[:1], tiny=True)
    file = tmp_path / "tiny-sd1.safetensors"
    if hasattr(file.stat(), "st_blocks"):
        assert file.stat().st_blocks * 512 < file.stat().st_size / 10
    header = read_header(file)
    assert detect(header).name == "sd1"
    marks = Marks(1, 1, 1)
    measured = measure(train_network.RECIPE, arguments(SPEED[0], tmp_path, 2, marks.total, tiny=True), marks)
    assert measured.code == 0, measured.error
    assert list(measured.losses) == [1, 2, 3]
    assert all(0.1 < loss < 10 for loss in measured.losses.values()), "the weights are not zero"
    assert measured.seconds and measured.first_step and measured.profiled_seconds
    assert any("mm" in event.key for event in measured.profile.key_averages())
    assert not [path for path in tmp_path.rglob("dog.safetensors") if path.stat().st_size > 1], "no model was written"


def test_what_cannot_run_here_is_told(tmp_path: Path) -> None:
    measured = measure(train_network.RECIPE, ["--network_dim=4", "--cuda_tea=1"], None)
    assert measured.code == 2
    assert "cuda_tea" in measured.why_not or "required" in measured.why_not
    assert not measured.out_of_memory


def test_a_run_is_told_beside_the_cpus(capsys: pytest.CaptureFixture[str]) -> None:
    def losses(*values: float, error: str = "") -> dict[str, object]:
        return {"losses": [[step, value] for step, value in enumerate(values, 1)], "error": error, "seconds": 2.0}

    table, row = Table(*"abcdef", ""), ROWS[0]
    compare(table, row, losses(1.0, 1.0), losses(1.0, 1.001))
    compare(table, row, losses(1.0, 1.1), losses(1.0, 1.0))
    compare(table, row, losses(error="xformers is not installed"), losses(1.0))
    compare(table, row, losses(1.0), None)
    told = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [cells[-1] for cells in told] == [
        "equal |", "DIFFERENT |", "not here: xformers is not installed |", "the CPU's losses are not known |"
    ]  # fmt: skip
    assert told[0][2:5] == ["0.0e+00", "1.0e-03", "0.002"]
