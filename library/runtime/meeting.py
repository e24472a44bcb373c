"""The processes of a run find each other, and end together: an error of one ends all, and is told once.

A rank that fails publishes its failure in torch's store. Every rank ends with the failure that was published first; the
writer prints it. Ranks that wait in a collective are woken when the failed one exits and its connections break, so it
does not wait for a writer that is stuck. A thread on every rank looks for failures, and ends a process that does not
notice (NCCL waits for a lost rank until the timeout of the group). A rank that is killed publishes nothing: the others
find its connections broken, and say so.
"""

from __future__ import annotations

import atexit
import ctypes
import io
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

# its functions have the current process group as a default argument, and would keep it until the interpreter ends
import torch.distributed.nn.functional
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # documented, and not in __all__

from library.bounded import json_of
from library.options.mistakes import Mistake, UserError
from library.runtime.launch import Launch

JOINING = timedelta(minutes=10)
"""How long processes wait for each other at the start."""
PATIENCE = 30.0  # seconds that a process has to end by itself after another one has failed
_ALIKE = 5.0  # seconds within which ranks that fail alike, or because of each other, have published it
_VOTE = 20.0  # seconds within which all ranks have come to the same error, also on a machine that does much else
_STUCK_AFTER = 2.0  # seconds after which a writer that has not noticed a failure waits in a collective
_FAILURE, _TOLD, _STUCK, _LEAVING, _RANK, _ALL = "failure", "told", "stuck", "leaving", "rank", "all"
_LOST = re.compile(
    r"connection (closed|reset|refused)|broken pipe|gloo/|\bnccl|timed out|timeout|socket|tcpstore|process group", re.I
)


@dataclass(frozen=True)
class Failure:
    """How a rank failed: `kind` mistakes (a UserError), interrupt or crash; `parts`: (what, remedy) of each mistake, or
    the text to print."""

    rank: int
    kind: str
    parts: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, rank: int, error: BaseException) -> Failure:
        """The failure of a rank by what it raised."""
        if isinstance(error, UserError):
            return cls(rank, "mistakes", tuple((mistake.what, mistake.remedy) for mistake in error.mistakes))
        if isinstance(error, KeyboardInterrupt):
            return cls(rank, "interrupt", ((str(error), ""),))
        return cls(rank, "crash", (("".join(traceback.format_exception(error)), ""),))

    def error(self, world: int) -> BaseException:
        """What a process raises that ends because of this."""
        if self.kind == "interrupt":
            return KeyboardInterrupt(*(what for what, _ in self.parts if what))
        if self.kind == "mistakes":
            return UserError(Mistake(what, remedy) for what, remedy in self.parts)
        return RankError(f"process {self.rank + 1} of {world} failed:\n{self.parts[0][0]}")


class RankError(RuntimeError):
    """Another process of the run failed with an error of the program; the text has its traceback."""


@dataclass
class Meeting:
    """The processes of a run. `store` is torch's, which they all reach; `watched` a connection of its own for the
    thread that looks for failures."""

    launch: Launch
    store: Any
    watched: Any
    _agreed: BaseException | None = None
    _over: threading.Event = field(default_factory=threading.Event)

    def open_group(self, *, cpu: bool, minutes: float | None) -> None:
        """Open the process group: gloo for tensors in main memory, NCCL for those on a GPU. A collective that takes
        longer than `minutes` fails (None: half an hour)."""
        if not cpu:
            torch.cuda.set_device(self.launch.local_rank)
        dist.init_process_group(
            "gloo" if cpu else "cpu:gloo,cuda:nccl",
            store=PrefixStore("group", self.store),
            rank=self.launch.rank,
            world_size=self.launch.world,
            timeout=timedelta(minutes=minutes or 30),
        )
        # accelerate drops the group at the end of a run; for ever one reference more, as destroying it may hang: see
        # end_process
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(dist.group.WORLD))

    def shared_seed(self, draw: Callable[[], int]) -> int:
        """A number that the writer draws, the same on all ranks."""
        if self.launch.is_writer:
            self.store.set("seed", str(draw()))
        return int(self.store.get("seed"))

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """What is raised in this context becomes the failure that all ranks end with."""
        try:
            yield
        except SystemExit:
            raise
        except BaseException as error:
            agreed = self.agree(error)
            if agreed is error:
                raise
            raise agreed from None

    def all_alike(self, text: str) -> bool:
        """Whether all ranks come here with the same text, soon. All get the same answer, and none waits for a rank that
        does not come: so after an error they can still do something together. For one question in a run."""
        keys = [f"{_ALL}/{rank}" for rank in range(self.launch.world)]
        try:
            self.store.set(keys[self.launch.rank], text)
            came = self._wait_for(lambda: bool(self.store.check(keys)), _VOTE)
            own = str(came and len({self.store.get(key) for key in keys}) == 1)
            return bool(self.store.compare_set(f"{_ALL}/answer", "", own) == b"True")  # one may have given up just now
        except RuntimeError:  # the process that holds the store has gone
            return False

    def agree(self, error: BaseException) -> BaseException:
        """What all ranks end with, because this one raised `error`: the failure that was published first."""
        if self._agreed is None:
            self._over.set()
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher sends it as soon as one process has ended
            lost = _LOST.search(str(error)) is not None and isinstance(error, RuntimeError)
            first = self._published() if lost else None
            if first is None:
                error = self._lost(error) if lost else error
                first = self._publish(Failure.of(self.launch.rank, error))
            own = first.rank == self.launch.rank or (first.kind == "interrupt" and isinstance(error, KeyboardInterrupt))
            self._agreed = error if own else first.error(self.launch.world)
        return self._agreed

    def end(self, code: int) -> None:
        """End together, as soon as the writer has told why. `code`: of this process. Call it last."""
        self._over.set()
        try:
            if self.launch.is_writer:
                self.store.set(_TOLD, "1")
            elif code and not self._wait_for(self._writer_knows, PATIENCE):
                print(f"\n{self._agreed}", file=sys.__stderr__, flush=True)
            self.store.add(_LEAVING, 1)
            self._wait_for(lambda: int(self.store.add(_LEAVING, 0)) >= self.launch.world, _ALIKE if code else PATIENCE)
        except RuntimeError:  # the process that holds the store has gone
            if code and not self.launch.is_writer:
                print(f"\n{self._agreed}", file=sys.__stderr__, flush=True)

    def watch(self) -> None:
        """End this process if another one fails and this one does not notice. Runs in a thread."""
        while not self._over.wait(0.5):
            try:
                failed = bool(self.watched.check([_FAILURE]))
            except RuntimeError:
                failed = True
            if failed and not self._over.wait(_STUCK_AFTER):
                with suppress(RuntimeError):
                    if self.launch.is_writer:
                        self.watched.set(_STUCK, "1")
                if not self._over.wait(PATIENCE):
                    self._end_now()

    def _end_now(self) -> None:
        """End this process, which is stuck."""
        try:
            failure = _read(self.watched.get(_FAILURE))
            text = str(failure.error(self.launch.world))
            code = {"mistakes": 2, "interrupt": 130}.get(failure.kind, 1)
        except RuntimeError:
            text, code = "the process that started this run has gone", 1
        if self.launch.is_writer:
            print(f"\n{text}", file=sys.__stderr__, flush=True)
        os._exit(code)

    def _publish(self, failure: Failure) -> Failure:
        """Publish a failure, unless another rank has; returns the first one."""
        text = json.dumps([failure.rank, failure.kind, failure.parts])
        try:
            return _read(self.store.compare_set(_FAILURE, "", text))
        except RuntimeError:  # the process that holds the store has gone
            return failure

    def _published(self) -> Failure | None:
        """The first failure, if one is published soon, and no process of this machine has gone without one."""
        with suppress(RuntimeError):
            self._wait_for(lambda: bool(self.store.check([_FAILURE]) or self._gone()), _ALIKE)
            if self.store.check([_FAILURE]):
                return _read(self.store.get(_FAILURE))
        return None

    def _writer_knows(self) -> bool:
        """Whether the writer has told the failure, or waits for this process in a collective."""
        return bool(self.store.check([_TOLD]) or self.store.check([_STUCK]))

    def _lost(self, error: BaseException) -> UserError:
        """The error of a rank whose connection to another one broke, without a word from that one."""
        gone = self._gone()
        who = "another process of this run" if not gone else listed_processes(gone, self.launch.world)
        reason = str(error).strip().splitlines()[0][:200]
        if re.search(r"timed out|timeout", reason, re.I):
            what, remedy = f"{who} did not answer in time ({reason})", "raise --ddp_timeout if it only was slow"
        else:
            what = f"{who} ended without a message: it was killed, or its machine failed ({reason})"
            remedy = "look for a lack of memory in the system's log (dmesg)"
        return UserError((Mistake(what, f"{remedy}; continue from the last saved state with --resume"),))

    def _gone(self) -> list[int]:
        """Ranks of this machine whose processes no longer exist."""
        if os.name != "posix":
            return []
        gone = []
        for rank in range(self.launch.world):
            try:
                known = self.store.check([f"{_RANK}/{rank}"])  # else `get` would wait for it
                host, pid = self.store.get(f"{_RANK}/{rank}").decode().rsplit(" ", 1) if known else ("", "0")
                if host == socket.gethostname():
                    os.kill(int(pid), 0)
            except ProcessLookupError:
                gone.append(rank)
            except (RuntimeError, OSError, ValueError):
                continue
        return gone

    @staticmethod
    def _wait_for(condition: Callable[[], bool], seconds: float) -> bool:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
        return True


def listed_processes(ranks: list[int], world: int) -> str:
    """`process 2 of 4`, `processes 2, 3 of 4`."""
    word = "process" if len(ranks) == 1 else "processes"
    return f"{word} {', '.join(str(rank + 1) for rank in ranks)} of {world}"


def _read(text: bytes) -> Failure:
    rank, kind, parts = json_of(text)
    return Failure(rank, kind, tuple((what, remedy) for what, remedy in parts))


def end_process(code: int) -> NoReturn:
    """End this process of several at once, without taking the interpreter down.

    That would destroy the process group. Destroying one of gloo waits for its threads, and a thread that has yet to let
    go of a tensor of Python waits for the interpreter: now and then they wait for each other.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


@contextmanager
def meet(launch: Launch) -> Iterator[Meeting]:
    """Find the other processes; then a thread looks for their failures. Processes that do not write are silent.

    Raises UserError if the others do not come.
    """
    address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), os.environ.get("MASTER_PORT", "29500")
    # torchrun and accelerate keep a store themselves
    hosts = launch.is_writer and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    prefix = f"dreamfolder {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    try:
        place = address, int(port)
        kept = TCPStore(*place, launch.world, is_master=hosts, timeout=JOINING, multi_tenant=True)
        watched = TCPStore(*place, is_master=False, wait_for_workers=False, timeout=JOINING)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        what = f"the {launch.world} processes of this run did not find each other at {address}:{port} ({reason})"
        remedy = "start all of them with torchrun or accelerate launch, with the same address and a free port"
        raise UserError((Mistake(what, remedy),)) from error
    store = PrefixStore(prefix, kept)
    meeting = Meeting(launch, store, PrefixStore(prefix, watched))
    store.set(f"{_RANK}/{launch.rank}", f"{socket.gethostname()} {os.getpid()}")
    threading.Thread(target=meeting.watch, daemon=True).start()
    with nullcontext() if launch.is_writer else silent():
        yield meeting


@contextmanager
def silent() -> Iterator[None]:
    """Print nothing in this context."""
    with redirect_stdout(_Silence()), redirect_stderr(_Silence()):
        yield


class _Silence(io.TextIOBase):
    """A stream that forgets what is written."""

    def write(self, text: str) -> int:
        return len(text)
