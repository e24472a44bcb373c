"""Compile the blocks of the backbone (torch.compile), each kind of block once for what is alike.

Whole models take long to compile, and once more for each change anywhere; blocks of one kind share their code. The
function that computes a block is compiled, not the block: modules keep their names, so keys of files have no
`_orig_mod`. Checkpointing, block swap and adapters work around and in compiled blocks as in others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from library.options.mistakes import Mistake, UserError

if TYPE_CHECKING:
    from library.training.blocks.compile_plan import Compilation


def compile_blocks(backbone: nn.Module, names: Sequence[str], plan: Compilation | None) -> None:
    """Compile the blocks with these names when they first compute."""
    if plan is None:
        return
    options: dict[str, Any] = {"backend": plan.backend, "dynamic": plan.dynamic, "fullgraph": plan.fullgraph}
    if plan.mode is not None:
        options["mode"] = plan.mode
    for name in names:
        block = backbone.get_submodule(name)
        block.forward = torch.compile(block.forward, **options)


@contextmanager
def compiling(plan: Compilation | None, say: Callable[[str], None], *, twice: bool = False) -> Iterator[None]:
    """While this is open, blocks are compiled as often as the plan allows. Then it says how often they were, and drops
    what was compiled. `twice`: a pass may be back-propagated twice, so it must not write into what was kept for that.

    Two sides that are equal in the first image may differ in the next: torch would compile for equal sides first, and
    a resumed run would begin with another image. Raises UserError if the compiler fails.
    """
    if plan is None:
        yield
        return
    from torch._dynamo import config, utils
    from torch._dynamo.exc import TorchDynamoException
    from torch._functorch import config as derivatives
    from torch.fx.experimental import _config

    symbolic_shapes: Any = _config
    before = utils.counters["stats"]["unique_graphs"]
    limits: dict[str, Any] = {"recompile_limit": plan.limit, "accumulated_recompile_limit": max(256, 8 * plan.limit)}
    try:
        with (
            config.patch(**limits),
            symbolic_shapes.patch(use_duck_shape=False),
            derivatives.patch(donated_buffer=not twice),
        ):
            yield
        say(f"compiled {utils.counters['stats']['unique_graphs'] - before} times, for other widths, sizes and modes")
    except TorchDynamoException as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        what = " ".join(lines[:2]) or type(error).__name__
        ways = "use --dynamo_backend aot_eager (--compile_backend), or remove --torch_compile and --compile"
        ended = f"compiling a block with {plan.backend} failed, or was interrupted: {what}"
        raise UserError([Mistake(ended, f"start again if you stopped the run; else {ways}")]) from error
    finally:
        torch.compiler.reset()
