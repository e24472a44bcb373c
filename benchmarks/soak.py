"""Kill a run again and again, each time resume it with --resume auto, and compare the end with that of the same run
undisturbed: losses of all steps, and the final model bit for bit.

    python -m benchmarks.soak --kills 200

A run is killed (SIGKILL) at a random moment, or at a random call that writes: while a file is flushed, between two
renames, before old files are removed. A third of the kills are signals that a run obeys instead (SIGINT, SIGTERM), and
now and then the newest state is damaged before it is resumed. Needs a POSIX system: runs are forked from one process
that has imported everything, so that a kill costs a second. Trains miniatures on one core.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process with more threads cannot be forked

NAME = "dog"
STEPS = 12
BY_CALL = ("fsync", "replace", "rmdir", "unlink", "mkdir")  # of os: what saving consists of
# What a run does: 3 steps an epoch, a save of model and state every two, of which two are kept.
COMMON: dict[str, object] = {
    "resolution": 64, "output_name": NAME, "caption_extension": ".txt", "seed": 1, "learning_rate": 1e-3,
    "train_batch_size": 2, "gradient_accumulation_steps": 2, "max_train_steps": STEPS, "save_every_n_steps": 2,
    "save_last_n_steps": 3, "save_state": True, "flip_aug": True, "use_safetensors": True, "resume": "auto",
    "max_data_loader_n_workers": 0,
}  # fmt: skip
KINDS: dict[str, dict[str, object]] = {
    "pixels": {},
    "latents on disk": {"cache_latents_to_disk": True},
    "bf16, averages": {"mixed_precision": "bf16", "full_bf16": True, "use_ema": True},
    "fused, rounded": {
        "mixed_precision": "bf16", "full_bf16": True, "fused_backward_pass": True, "gradient_accumulation_steps": 1,
    },
    "read late": {"loss_read_interval": 50, "use_ema": True},
    "measured": {"validation_split": 0.34, "validate_every_n_steps": 2, "keep_best": "validation_loss"},
}  # fmt: skip


@dataclass
class Tally:
    """What happened."""

    kills: int = 0
    signals: int = 0
    damaged: int = 0
    runs: int = 0
    steps_repeated: int = 0
    different: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Death:
    """How a run ends: after so many seconds, or at its `call`-th call of one of BY_CALL, by a signal."""

    number: int
    seconds: float | None = None
    call: int | None = None


def words(world: Path, out: Path, flags: dict[str, object]) -> list[str]:
    """The command line of a run."""
    chosen = {
        "pretrained_model_name_or_path": world / "sd1.safetensors", "train_data_dir": world / "train",
        "output_dir": out, "data_cache_dir": world / "remembered", **COMMON, **flags,
    }  # fmt: skip
    given = [f"--{name}" if value is True else f"--{name}={value}" for name, value in chosen.items()]
    return [word for word, value in zip(given, chosen.values(), strict=True) if value is not False]


def run_forked(arguments: Sequence[str], log: Path, death: Death | None) -> int:
    """Run the recipe in a fork, until it ends or dies. Returns its wait status."""
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        code = 1
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.setsid()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if death is not None and death.call is not None:
                die_at_call(death.call)
            import train_db
            from library.training.command import run_recipe

            code = run_recipe(train_db.RECIPE, arguments)
            sys.stdout.flush()
        except BaseException:  # noqa: BLE001 - told, as nobody catches what a fork raises
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)
    if death is not None and death.seconds is not None:
        end = time.monotonic() + death.seconds
        while time.monotonic() < end:
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                return status
            time.sleep(0.002)
        os.kill(process, death.number)
    return os.waitpid(process, 0)[1]


def die_at_call(number: int) -> None:
    """Let this process kill itself at its `number`-th call of one of BY_CALL."""
    calls = [0]

    def dying(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            calls[0] += 1
            if calls[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*given, **named)

        return call

    for name in BY_CALL:
        setattr(os, name, dying(getattr(os, name)))


def outcome(out: Path) -> tuple[dict[int, float], str]:
    """The losses of a run from its record, those of later attempts last, and the hash of its final model."""
    losses: dict[int, float] = {}
    for line in (out / f"{NAME}-run.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            event = json.loads(line)
        except ValueError:  # the line in which the run was killed
            continue
        if event["type"] == "training.status" and "loss" in event["data"]:
            losses[event["step"]] = event["data"]["loss"]
    return losses, hash_of(out / f"{NAME}.safetensors")


def hash_of(model: Path) -> str:
    """A hash of the tensors of a model: its metadata hold the time."""
    content = model.read_bytes()
    return hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()


def damage_newest(out: Path, draw: random.Random) -> bool:
    """Flip a bit of, or cut off, a file of the newest state, if there is an older one."""
    states = sorted(out.glob(f"{NAME}*-state"), key=lambda state: state.stat().st_mtime)
    if len(states) < 2:
        return False
    file = draw.choice(sorted(path for path in states[-1].iterdir() if path.is_file()))
    place = draw.randrange(max(1, file.stat().st_size))
    if draw.random() < 0.5:
        os.truncate(file, place)
        return True
    with file.open("r+b") as stream:
        stream.seek(place)
        byte = stream.read(1)
        stream.seek(place)
        stream.write(bytes([byte[0] ^ (1 << draw.randrange(8))]))
    return True


def deaths(draw: random.Random, seconds: float, calls: int) -> Iterator[Death]:
    """Random deaths of a run that would take so many seconds, and make so many calls."""
    while True:
        kind = draw.random()
        if kind < 1 / 3:
            yield Death(signal.SIGKILL, call=draw.randint(1, calls))
        else:
            number = signal.SIGKILL if kind < 2 / 3 else draw.choice((signal.SIGINT, signal.SIGTERM))
            yield Death(number, seconds=draw.uniform(0.2, 1) * seconds)


def soak(kind: str, world: Path, folder: Path, kills: int, draw: random.Random, tally: Tally) -> None:
    """Let a run die `kills` times; as often as one ends meanwhile, it is compared and begun again."""
    flags, log = KINDS[kind], folder / "log.txt"
    whole = folder / "undisturbed"
    began = time.monotonic()
    if run_forked(words(world, whole, flags), log, None):
        raise SystemExit(f"{kind}: the undisturbed run failed:\n{log.read_text(encoding='utf-8')}")
    seconds, expected = time.monotonic() - began, outcome(whole)
    ways = deaths(draw, seconds, 150)
    left = kills
    while left > 0:
        out = folder / f"killed-{left}"
        attempts = 0
        while True:
            if out.is_dir() and draw.random() < 0.2:
                tally.damaged += damage_newest(out, draw)
            # so that a run makes progress at last
            death = next(ways) if attempts < 4 and left > 0 else None
            status = run_forked(words(world, out, flags), log, death)
            attempts += 1
            tally.runs += 1
            if status == 0:
                break
            code = os.waitstatus_to_exitcode(status)
            if code not in (-signal.SIGKILL, 130, 143):
                raise SystemExit(f"{kind}: a run ended with {code}:\n{log.read_text(encoding='utf-8')[-4000:]}")
            left -= 1
            tally.kills += code == -signal.SIGKILL
            tally.signals += code != -signal.SIGKILL
        found = outcome(out)
        rest = [path.name for path in out.rglob("*dreamfolder-*")]
        for what, wrong in (("losses", found[0] != expected[0]), ("model", found[1] != expected[1]), ("files", rest)):
            if wrong:
                tally.different.append(f"{kind}, {out}: {what} {rest or ''}".strip())
        if not tally.different:
            shutil.rmtree(out)
        log.unlink()


def make_world(folder: Path) -> None:
    """A miniature model and images."""
    from tests.training import running

    running.make_world(folder)


def import_everything() -> None:
    """What every run imports, so that the forks need not."""
    import accelerate  # noqa: F401
    import diffusers.models.autoencoders.autoencoder_kl
    import diffusers.models.unets.unet_2d_condition  # noqa: F401
    import torch
    import transformers.models.clip.modeling_clip
    import transformers.models.clip.tokenization_clip  # noqa: F401

    import library.training.session  # noqa: F401
    import train_db  # noqa: F401

    torch.set_num_threads(1)


def main(given: Sequence[str] | None = None) -> int:
    """Kill and resume. Returns 1 if an end differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="how often a run dies, over all kinds of runs")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--kinds", nargs="+", choices=tuple(KINDS), default=list(KINDS), help="kinds of runs")
    parser.add_argument("--folder", type=Path, help="where to train; not set: a temporary folder, removed at the end")
    chosen = parser.parse_args(given)
    import_everything()
    tally, draw = Tally(), random.Random(chosen.seed)
    with tempfile.TemporaryDirectory() as temporary:
        place = chosen.folder or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        world = place / "world"
        make_world(world)
        for number, kind in enumerate(chosen.kinds):
            share = chosen.kills // len(chosen.kinds) + (number < chosen.kills % len(chosen.kinds))
            (place / str(number)).mkdir()
            soak(kind, world, place / str(number), share, draw, tally)
            print(f"{kind}: {share} deaths", flush=True)
    print(
        f"{tally.kills} kills and {tally.signals} signals in {tally.runs} runs, {tally.damaged} newest states damaged "
        f"before they were resumed: {len(tally.different)} ends differ (seed {chosen.seed})"
    )
    for line in tally.different:
        print(line)
    return bool(tally.different)


if __name__ == "__main__":
    sys.exit(main())
