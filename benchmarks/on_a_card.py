"""Everything that only a graphics card can tell, in under nine minutes: one table for each part, in order of worth.

    python benchmarks/on_a_card.py [--minutes 8.8] [--only device agreement speed memory vae] [--tiny] [--pretend]

Each row is printed when it is known, so that a run that is cut off keeps what it had. Each part runs in processes of
its own with a time limit, so that a crash, a lack of memory or a hang of one leaves the others. Nothing is downloaded,
and no checkpoint is needed: models of full size are hollow files (card/hollow.py) whose weights are drawn on the
device.

device     names, versions, and the rates of matrix products and of memory, by which the rest is judged
agreement  20 steps on the miniatures of the tests: are the losses those of the CPU, to the tolerance of each row?
speed      SD1.5 and SDXL: seconds a step at batch 1, a profile, then the largest batch that gains
memory     peaks at batch 1 with the options for little memory, beside the bars of the project
vae        images a second of the VAE's encoder

--tiny runs all of it on miniatures, also where there is no card; --pretend on the tests' pretend device. Needs the
packages of requirements.txt and this repository, tests included.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.card.agreement_rows import STEPS, largest_difference, rows  # noqa: E402
from benchmarks.card.cases import MEMORY, SPEED, Case  # noqa: E402
from benchmarks.card.children import Child  # noqa: E402
from benchmarks.card.tables import Bars, Table, gigabytes, seconds_text  # noqa: E402
from benchmarks.machine import describe  # noqa: E402

PARTS = ("device", "agreement", "speed", "memory", "vae")
# Seconds that each process of a part may take; what one does not use is left to the others.
LIMITS = {"device": 60.0, "agreement": 125.0, "speed": 68.0, "memory": 130.0, "vae": 40.0}
KEPT = {"speed": 160.0, "memory": 25.0}  # seconds that a part leaves to those behind it
SHORTEST = 8.0  # seconds: in less, a process finds out nothing
RUN_COLUMNS = (
    "run", "batch", "s a step", "images/s", "of the bf16 rate", "allocated", "predicted", "reserved", "first step", "",
)  # fmt: skip
CLOSING = 3.0  # seconds kept for the last table


@dataclass
class Session:
    """One run of the script: where its files are, until when it may run, what it found."""

    folder: Path
    end: float
    words: tuple[str, ...] = ()
    tiny: bool = False
    rates: dict[str, float] = field(default_factory=dict)
    bars: Bars = field(default_factory=Bars)

    def left(self) -> float:
        """Seconds left."""
        return self.end - time.monotonic()

    def limit(self, part: str) -> float:
        """Seconds that a process of a part may take. Miniatures take what is left: they show whether it works."""
        left = self.left() - CLOSING
        return max(1.0, left if self.tiny else min(LIMITS[part], left - KEPT.get(part, 0.0)))

    def child(self, module: str, *words: object, limit: float, cpu: bool = False) -> Child:
        """A measuring process. `cpu`: it must not see the card."""
        environment = {"XDG_CACHE_HOME": str(self.folder), "PYTHONUNBUFFERED": "1"}
        chosen = [*map(str, words), *(word for word in self.words if not (cpu and word == "--pretend"))]
        if cpu:
            environment |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "4"}
        return Child(f"benchmarks.card.{module}", chosen, limit, environment)


def say(text: str = "") -> None:
    """Print at once."""
    print(text, flush=True)


def device_part(session: Session) -> None:
    """Name, versions and rates."""
    child, table = session.child("rates", limit=session.limit("device")), Table("what", "measured")
    for found in child.results():
        if found["kind"] == "device":
            facts = ", ".join(f"{name} {value}" for name, value in found["facts"].items())
            versions = ", ".join(f"{name} {value}" for name, value in found["versions"].items())
            table.row("device", f"{found['type']}: {facts or 'the processor'}")
            table.row("torch", f"{found['torch']}, {found['build']}")
            table.row("packages", versions)
        elif "error" in found:
            table.row(found["name"], f"not here: {found['error']}")
        elif found["kind"] == "rate":
            session.rates[found["name"]] = found["flops"]
            table.row(f"matrix product, {found['name']}", f"{found['flops'] / 1e12:.4g} TFLOP/s")
        elif found["kind"] == "bandwidth":
            table.row(found["name"], f"{found['bytes'] / 1e9:.4g} GB/s")
    table.end(child)


def agreement_part(session: Session) -> None:
    """The losses of the miniatures on the card beside those on the CPU, which another process computes meanwhile."""
    known = rows(tiny=session.tiny)
    end = time.monotonic() + session.limit("agreement")
    children = {where: start_agreement(session, where, 0, end) for where in ("device", "cpu")}
    table = Table("run", "compared with", "difference of the first loss", "largest of all", "tolerance", "s", "")
    found: dict[tuple[str, str], dict[str, Any]] = {}
    waiting, begun = list(known), ""
    try:
        while waiting and not all(child.ended for child in children.values()):
            for where, child in children.items():
                result = child.poll(0.2)
                if result is not None and result["kind"] == "losses":
                    found[where, result["row"]] = result
                elif result is not None and where == "device":
                    begun = result["row"]
            for row in [row for row in waiting if ready(row, found)]:
                waiting.remove(row)
                compare(table, row, found["device", row.name], found.get(("cpu", row.against or row.name)))
            if children["device"].broke and begun:  # go on behind the row that broke it
                table.row(begun, remark=children["device"].ended)
                first = 1 + [row.name for row in known].index(begun)
                children["device"], begun = start_agreement(session, "device", first, end), ""
    finally:
        for child in children.values():
            child.kill()
    for row in waiting:
        if ("device", row.name) in found:
            compare(table, row, found["device", row.name], None)
    for child in children.values():
        table.end(child)


def start_agreement(session: Session, where: str, first: int, end: float) -> Child:
    """A process that trains the miniatures on the "device" or on the "cpu", from the row with this number on."""
    steps = 3 if session.tiny else STEPS
    limit = max(1.0, end - time.monotonic())
    return session.child(
        "agreement", session.folder / f"{where} {first}", where, steps, first, limit=limit, cpu=where == "cpu"
    )


def ready(row: Any, found: Mapping[tuple[str, str], dict[str, Any]]) -> bool:
    """Whether a row can be told: it failed, or both sides are known."""
    own = found.get(("device", row.name))
    return own is not None and (bool(own["error"]) or ("cpu", row.against or row.name) in found)


def compare(table: Table, row: Any, own: Mapping[str, Any], cpu: Mapping[str, Any] | None) -> None:
    """Print the row of a run."""
    beside = row.against or "itself"
    if own["error"]:
        table.row(row.name, beside, "", "", "", f"{own['seconds']:.1f}", remark=f"not here: {own['error']}")
        return
    losses, wanted = dict(own["losses"]), dict(cpu["losses"]) if cpu is not None else {}
    difference = largest_difference(losses, wanted)
    why = "" if cpu is None else cpu["error"]
    verdict = f"the CPU's losses are not known {why}".strip()
    if difference is not None:
        verdict = "equal" if difference <= row.tolerance else "DIFFERENT"
    shown, first = "", ""
    if difference is not None:  # the first loss is there before a weight has changed
        shown, first = f"{difference:.1e}", f"{abs(losses[1] - wanted[1]) / abs(wanted[1]):.1e}"
    table.row(row.name, beside, first, shown, f"{row.tolerance:g}", f"{own['seconds']:.1f}", remark=verdict)


def speed_part(session: Session) -> None:
    """Seconds a step and the best batch of each case, each in a process of its own."""
    table = Table(*RUN_COLUMNS)
    profiles = []
    for case in SPEED:
        best: dict[str, Any] = {}
        limit = session.limit("speed")
        if limit < SHORTEST:
            table.row(case.name, remark="no time left")
            continue
        deadline = time.time() + limit - 2
        child = session.child("full_runs", session.folder, f"{deadline:.1f}", "speed", case.name, limit=limit)
        for found in child.results():
            if found["kind"] == "profile":
                profiles.append(found)
            elif found["kind"] == "run":
                run_row(session, table, case, found)
                if found["seconds"] and found["batch"] / found["seconds"] > best.get("images", 0.0):
                    best = {**found, "images": found["batch"] / found["seconds"]}
        if best and case.share is not None and "bf16" in session.rates:
            share = best["flops"] / best["seconds"] / session.rates["bf16"]
            what = f"{case.name}: share of the matrix rate at the best batch ({best['batch']})"
            session.bars.add(what, f"{share:.1%}", f">= {case.share:.0%}", met=share >= case.share)
        table.end(child)
    for found in profiles:
        profile_table(found)


def run_row(session: Session, table: Table, case: Case, found: Mapping[str, Any]) -> None:
    """Print the row of a measured run, and judge it if it is the one at batch 1."""
    batch, seconds = found["batch"], found["seconds"]
    if found["error"] or not seconds:
        why = "out of memory" if found["out_of_memory"] else f"not here: {found['error']}"
        table.row(case.name, str(batch), remark=why)
        return
    rate, share = session.rates.get("bf16"), ""
    if rate:
        share = f"{found['flops'] / seconds / rate:.1%}"
    remark = "" if found["last_loss"] is not None else "no loss was logged"
    if found["before"] > 5e7:
        remark = f"{gigabytes(found['before'])} were still allocated before".strip()
    table.row(
        case.name, str(batch), seconds_text(seconds), f"{batch / seconds:.4g}", share,
        gigabytes(found["allocated"]), "" if batch > 1 else gigabytes(found["predicted"]), gigabytes(found["reserved"]),
        f"{found['first_step']:.1f} s", remark=remark,
    )  # fmt: skip
    if batch == 1 and case.seconds is not None:
        shown = f"{seconds:.4f} s"
        session.bars.add(f"{case.name}: a step at batch 1", shown, f"<= {case.seconds} s", met=seconds <= case.seconds)
    if batch == 1 and case.peak is not None and found["allocated"] is not None:
        bar = gigabytes(int(case.peak))
        session.bars.add(
            f"{case.name}: peak", gigabytes(found["allocated"]), f"< {bar}", met=found["allocated"] < case.peak
        )


def profile_table(found: Mapping[str, Any]) -> None:
    """Print the largest kernels of a case, and what is left between them."""
    wall, busy = found["wall"], found["busy"]
    waits = ", ".join(f"{name} {count:.1f}" for name, count in found["waits"].items()) or "none seen"
    idle = f"{1 - busy / wall:.1%}" if wall else "?"
    say(
        f"\n{found['case']}, under the profiler: {wall * 1e3:.2f} ms a step, {busy * 1e3:.2f} ms of them in kernels "
        f"({idle} between them), {found['launched']:.0f} kernels; calls that may wait, a step: {waits}\n"
    )
    table = Table("kernel", "ms a step", "times a step", "share of all kernels")
    for name, seconds, times in found["kernels"]:
        table.row(
            name.replace("|", "/"), f"{seconds * 1e3:.3f}", f"{times:.1f}", f"{seconds / busy:.1%}" if busy else ""
        )


def memory_part(session: Session) -> None:
    """Peaks of the cases for little memory, of one model after the other."""
    table = Table(*RUN_COLUMNS)
    for model in ("sd15", "sdxl"):  # the quicker one first
        cases = {case.name: case for case in MEMORY if case.model == model}
        names = list(cases)
        while names and (limit := session.limit("memory")) >= SHORTEST:
            deadline, before = f"{time.time() + limit - 5:.1f}", len(names)
            child = session.child("full_runs", session.folder, deadline, "memory", *names, limit=limit)
            for found in child.results():
                if found["kind"] == "run":
                    run_row(session, table, cases[found["case"]], found)
                    names.remove(found["case"])
            table.end(child)
            if not child.broke:
                break
            del names[: len(names) == before]  # the case that broke it without a word; go on behind it
        if names:
            table.row(", ".join(names), remark="no time left")


def vae_part(session: Session) -> None:
    """Images a second of the VAE's encoder."""
    child, table = session.child("rates", "--vae", limit=session.limit("vae")), Table("VAE", "batch", "images/s")
    for found in child.results():
        if found["kind"] == "vae":
            table.row(f"{found['side']} px", str(found["batch"]), found.get("error") or f"{found['images']:.4g}")
    table.end(child)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.8, help="time for everything; default 8.8")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--tiny", action="store_true", help="miniatures instead of models of full size, few steps")
    parser.add_argument("--pretend", action="store_true", help="on the pretend device of the tests")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    words = tuple(f"--{name}" for name in ("tiny", "pretend") if getattr(options, name))
    parts = {
        "device": device_part, "agreement": agreement_part, "speed": speed_part, "memory": memory_part, "vae": vae_part,
    }  # fmt: skip
    say(describe())
    with tempfile.TemporaryDirectory(prefix="on a card ", ignore_cleanup_errors=True) as folder:
        session = Session(Path(folder), end, words, tiny=options.tiny)
        for name in (name for name in PARTS if name in options.only):
            say(f"\n## {name}, {session.left():.0f} s left\n")
            if session.left() < CLOSING:
                say("no time left")
                continue
            try:
                parts[name](session)
            except Exception as error:  # noqa: BLE001 - the other parts are still worth their time
                say(f"\nthis part failed: {type(error).__name__}: {error}")
        if options.tiny:
            say("\nminiatures: the bars below mean nothing, but show that each was judged")
        session.bars.show(say)
    say(f"\n{60 * options.minutes - (end - time.monotonic()):.0f} s in all")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
