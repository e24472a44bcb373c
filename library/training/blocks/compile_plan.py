"""Decide whether and how blocks are compiled. Imports no torch."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.options.mistakes import Mistakes

if TYPE_CHECKING:
    from library.options.groups.compilation import CompileOptions
    from library.runtime.device import Machine
    from library.training.plan.facts import RunFacts

_BACKENDS = ("inductor", "cudagraphs", "aot_eager", "eager", "tvm")
"""Those of the installed torch that compile a training; the others belonged to earlier versions of torch."""
_WITH_GRAPHS = ("reduce-overhead", "max-autotune")
_LIMIT = 64


@dataclass(frozen=True)
class Compilation:
    """How blocks are compiled: see torch.compile. `mode` None: the default. `dynamic`: one compilation for all sizes;
    decided here, as torch would decide by the sizes that come first, which are others in a resumed run. `limit`:
    compilations of each kind of block."""

    backend: str
    mode: str | None = None
    dynamic: bool = False
    fullgraph: bool = False
    limit: int = _LIMIT

    def line(self) -> str:
        """What the plan says."""
        mode = f", mode {self.mode}" if self.mode else ""
        sizes = "once for all sizes" if self.dynamic else "once for each size"
        return f"blocks compiled with {self.backend}{mode}, {sizes}, each kind of block {self.limit} times at most"


def decide_compilation(facts: RunFacts, mistakes: Mistakes, notes: list[str]) -> Compilation | None:
    """How a run compiles; None if it does not. What the machine lacks is a note, or a mistake with --strict."""
    options: CompileOptions = facts.options.compilation
    if not (options.torch_compile or options.compile):
        return None
    flag, backend = "--dynamo_backend", options.dynamo_backend
    if not options.torch_compile or (backend == "inductor" and options.compile):
        flag, backend = "--compile_backend", options.compile_backend
    if backend not in _BACKENDS:
        mistakes.add(f"{flag} {backend}: the installed torch does not have it", f"use one of {', '.join(_BACKENDS)}")
        return None
    inductor = backend == "inductor"
    graphs = backend == "cudagraphs" or (inductor and options.compile_mode in _WITH_GRAPHS)
    if graphs and facts.options.memory.blocks_to_swap:
        mistakes.add(
            "--blocks_to_swap with CUDA graphs: they read weights where they were first, and swapped ones move",
            "use --compile_mode default with the backend inductor, or remove --blocks_to_swap",
        )
    if facts.sharding is not None or facts.zero is not None:
        name = "FSDP" if facts.zero is None else "DeepSpeed"
        mistakes.add(f"--torch_compile with {name} is not supported", "remove one of the two")
    lacking = missing_for(backend, facts.machine)
    if lacking and facts.options.run.strict:
        mistakes.add(f"--torch_compile: {lacking}", "install it, or remove --strict to compute uncompiled")
    if lacking:
        notes.append(f"--torch_compile: {lacking}; nothing is compiled")
        return None
    sizes = {bucket for _, bucket in facts.images.table.samples}
    asked = options.compile_dynamic
    return Compilation(
        backend=backend,
        mode=options.compile_mode if inductor and options.compile_mode != "default" else None,
        dynamic=asked == "true" or (asked in (None, "auto") and len(sizes) > 1),
        fullgraph=options.compile_fullgraph,
        limit=options.compile_cache_size_limit or _LIMIT,
    )


def missing_for(backend: str, machine: Machine) -> str:
    """What the machine lacks for a backend; "" if nothing."""
    if backend == "cudagraphs" and machine.kind != "cuda":
        return "cudagraphs needs a CUDA card"
    if backend != "inductor" or machine.kind == "mps":
        return ""
    if machine.kind == "cpu":
        names = [os.environ.get("CXX", ""), *(("cl",) if sys.platform == "win32" else ("g++", "clang++", "c++"))]
        if not any(name and shutil.which(name) for name in names):
            return f"inductor needs a C++ compiler ({', '.join(filter(None, names))}), and none was found"
        return ""
    if importlib.util.find_spec("triton") is None:
        return "inductor needs the package triton (on Windows triton-windows), which is not installed"
    if sys.platform != "win32" and not any(shutil.which(name) for name in ("gcc", "cc", "clang")):
        return "triton needs a C compiler (gcc or clang), and none was found"
    return ""
