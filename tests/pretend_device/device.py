"""A device for tests that computes on the CPU and is as strict as a card.

Its name in torch is "pretend". An operation over tensors of two devices is an error, except for scalars (tensors
without dimensions) of the CPU. What a card would have to wait for, and what is copied to it, is an `Event` with the
line that caused it. Its memory is counted by the bytes of storages.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import sys
import threading
import types
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from library.training.plan.memory import assumptions
from tests.pretend_device.build import CannotBuildError, library_file

NAME = "pretend"
# for the plan: only what tensors need, with the norms in float32 that cards have
MEMORY = assumptions.DeviceMemory(context=0, workspace=0, granularity=1, wide_norms=True, attention_extra=0, spare=0.0)
ROOT = Path(__file__).parents[2]
_PROJECT = tuple(f"{ROOT / name}" for name in ("library/", "networks/", "tools/", "train_", "gen_img", "sdxl_train"))
_TESTS = f"{ROOT / 'tests'}/"
_LISTENER = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int64, ctypes.c_int, ctypes.c_void_p, ctypes.c_int
)

Kind = Literal["read", "upload", "wait", "mismatch", "refused"]


@dataclass(frozen=True)
class Event:
    """Something that a card and its host exchange. `kind`: a read to the host (also an operation whose result the host
    has to see, such as nonzero: 0 bytes), an upload, a wait for a stream, an event or the device; or an operation that
    was refused, over tensors of two devices or for lack of memory. `waits`: whether the host waits for it: not if the
    copy is non_blocking and from or to pinned memory. `line`: the innermost line of the project, "library/x.py:12"."""

    kind: Kind
    operation: str
    bytes: int
    waits: bool
    line: str


@dataclass
class Device:
    """The device, and what happened on it since it was made available or since `forget`."""

    library: ctypes.CDLL
    events: list[Event] = field(default_factory=list)

    def of(self, kind: Kind) -> list[Event]:
        """The events of a kind."""
        return [event for event in self.events if event.kind == kind]

    def lines(self, kind: Kind) -> Counter[str]:
        """How many events of a kind each line caused."""
        return Counter(event.line for event in self.of(kind))

    def forget(self) -> None:
        """Forget all events and operations so far."""
        self.events.clear()
        self.operations()

    def operations(self) -> Counter[str]:
        """How often each operation ran since it was last asked or forgotten: each is a launch of a kernel on a card."""
        text = ctypes.create_string_buffer(1 << 20)
        self.library.pretend_operations(text, len(text), 1)
        rows = (row.split() for row in text.value.decode().splitlines())
        return Counter({name: int(times) for name, times in rows})

    @property
    def memory(self) -> int:
        """Bytes of the storages that are alive."""
        return int(self.library.pretend_current())

    @property
    def peak(self) -> int:
        """The most bytes that were alive at once since the last `reset_peak`."""
        return int(self.library.pretend_peak())

    def reset_peak(self) -> None:
        """Count the peak from now on."""
        self.library.pretend_reset_peak()

    def limit(self, size: int) -> None:
        """Refuse what would need more memory than this many bytes, with torch's OutOfMemoryError; 0: no limit."""
        self.library.pretend_limit(ctypes.c_int64(size))


@contextmanager
def available() -> Iterator[Device]:
    """Make the device available to torch. Skips the test where it cannot be built.

    Backward passes run in the thread that calls them, as on a CPU: torch makes its threads for devices once, before a
    later test registers this one.
    """
    try:
        library = _load()
    except CannotBuildError as reason:
        pytest.skip(str(reason))
    device = Device(library)
    listener = _listener_of(device)  # lives as long as this function
    library.pretend_start(listener)
    gc.collect()  # what an earlier run left in cycles is not this one's
    device.reset_peak()
    device.operations()
    threads = torch.autograd.set_multithreading_enabled(False)
    try:
        with threads, _set_data_over_devices():
            yield device
    finally:
        library.pretend_stop()
        del listener


@contextmanager
def _set_data_over_devices() -> Iterator[None]:
    """Let `tensor.data = other` change the device, so that modules which are moved keep their parameters, as on a card.
    torch does that for its own devices only."""
    data, compatible = torch.Tensor.data, torch._has_compatible_shallow_copy_type

    def set_data(self: torch.Tensor, value: torch.Tensor) -> None:
        if self.device.type != value.device.type and NAME in (self.device.type, value.device.type):
            torch.ops.pretend.set_data(self, value)
        else:
            data.__set__(self, value)  # type: ignore[attr-defined]

    def has_compatible_type(one: torch.Tensor, other: torch.Tensor) -> bool:
        return NAME in (one.device.type, other.device.type) or compatible(one, other)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "data", property(data.__get__, set_data))  # type: ignore[attr-defined]
        patch.setattr(torch, "_has_compatible_shallow_copy_type", has_compatible_type)
        yield


def _listener_of(device: Device) -> Any:
    """What the library calls for each event."""

    def listen(kind: bytes, operation: bytes, size: int, waits: int, to: int, room: int) -> None:
        line = _line()
        device.events.append(Event(kind.decode(), operation.decode(), size, bool(waits), line))  # type: ignore[arg-type]
        ctypes.memmove(to, f"{line}\0".encode(), min(len(line.encode()) + 1, room))

    return _LISTENER(listen)


def _line() -> str:
    """The innermost line of the project in this thread, or in the main thread if this one runs none of its lines; of
    the tests if no line is the project's."""
    for frame in (sys._getframe(2), sys._current_frames().get(threading.main_thread().ident or 0)):
        fallback = ""
        while frame is not None:
            file = frame.f_code.co_filename
            if file.startswith(_PROJECT):
                return f"{Path(file).relative_to(ROOT).as_posix()}:{frame.f_lineno}"
            if not fallback and file.startswith(_TESTS) and file != __file__:
                fallback = f"{Path(file).relative_to(ROOT).as_posix()}:{frame.f_lineno}"
            frame = frame.f_back
        if fallback:
            return fallback
    return ""


@contextmanager
def chosen() -> Iterator[Device]:
    """Make the device available, and let a run choose it: as the machine that the plan sees
    (`library/runtime/device.py`), and as the device of accelerate."""
    from library.runtime import device as choice

    describe = choice.describe_machine
    machine: Any = choice.Machine(NAME, "a pretend device", 8 << 30)  # type: ignore[arg-type]
    is_chosen = True

    def describe_machine(environment: Mapping[str, str] | None = None) -> choice.Machine:
        return machine if is_chosen else describe(environment)  # in modules that are first imported meanwhile, too

    with available() as device, pytest.MonkeyPatch.context() as patch:
        for module in list(sys.modules.values()):
            if getattr(module, "describe_machine", None) is describe:
                patch.setattr(module, "describe_machine", describe_machine)
        patch.setitem(assumptions.DEVICES, NAME, MEMORY)
        patch.setenv("ACCELERATE_TORCH_DEVICE", NAME)  # without an index, as accelerate chooses a single card
        yield device
    is_chosen = False


@functools.cache
def _load() -> ctypes.CDLL:
    """Register the device, once in a process."""
    import torch._dynamo  # looks at functions that are replaced below

    path = library_file()
    torch.utils.rename_privateuse1_backend(NAME)
    torch.ops.load_library(str(path))
    library = ctypes.CDLL(str(path))
    for count in (library.pretend_current, library.pretend_peak, library.pretend_operations):
        count.restype = ctypes.c_int64
    library.pretend_operations.argtypes = (ctypes.c_char_p, ctypes.c_int64, ctypes.c_int)
    library.pretend_start.argtypes = (_LISTENER,)
    torch._register_device_module(NAME, _module(library))  # type: ignore[no-untyped-call]
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    return library


def _module(library: ctypes.CDLL) -> types.ModuleType:
    """torch.pretend: what torch and accelerate expect of a device's module."""
    module: Any = types.ModuleType(f"torch.{NAME}")
    accelerator = torch.accelerator
    module.is_available = module.is_initialized = lambda: bool(library.pretend_is_available())
    module.device_count = library.pretend_is_available
    module.current_device = lambda: 0
    module.set_device = lambda device: None
    module.synchronize = accelerator.synchronize
    module.current_stream = accelerator.current_stream
    module.Stream, module.Event = torch.Stream, torch.Event
    module.stream = lambda stream: stream
    module._is_in_bad_fork = lambda: False
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    module.is_bf16_supported = lambda *_: True

    @functools.cache
    def generator() -> torch.Generator:
        library.pretend_ask_for_default_generator()
        return torch.Generator(NAME)

    module.get_rng_state = lambda *_: generator().get_state()
    module.set_rng_state = lambda state, *_: generator().set_state(state)
    module.get_rng_state_all = lambda: [generator().get_state()]
    module.set_rng_state_all = lambda states: generator().set_state(states[0])
    module.manual_seed = module.manual_seed_all = lambda seed: generator().manual_seed(seed)
    module.initial_seed = lambda: generator().initial_seed()
    for name in ("empty_cache", "memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(module, name, getattr(accelerator, name))
    module.reset_peak_memory_stats = accelerator.reset_peak_memory_stats
    module.mem_get_info = accelerator.get_memory_info
    return module
