"""Operations on shapes, which leave in memory what torch's autograd leaves: outputs, tensors saved for the backward
pass, gradients. No torch, no values: a forward and a backward pass of a U-Net take tens of milliseconds.

Lifetimes are those of Python's references, as in torch: a tensor that a model's forward pass still names is alive. What
follows torch's engine is stated where it does.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from library.footprint.ledger import Block, Ledger

FULL, HALF = 4, 2
"""Bytes of a number in fp32, and in fp16 or bf16."""

Shape = tuple[int, ...]
Mode = Literal["record", "off", "again"]


class Tensor:
    """A tensor: shape, bytes of a number, memory, and where its gradient goes. `needs`: a gradient is needed."""

    __slots__ = ("block", "needs", "node", "shape", "slot", "width")

    def __init__(self, shape: Shape, width: int, block: Block | None, *, needs: bool = False) -> None:
        self.shape, self.width, self.block, self.needs = shape, width, block, needs
        self.node: Node | Weight | None = None
        self.slot = 0

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return math.prod(self.shape) * self.width


class Weight:
    """A weight of a module. It is counted elsewhere (`block` None); its gradient is kept here until it is used."""

    __slots__ = ("block", "gradient", "needs", "shape", "width")

    def __init__(self, shape: Shape, width: int, *, needs: bool) -> None:
        self.shape, self.width, self.needs = shape, width, needs
        self.block: Block | None = None
        self.gradient: Block | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return math.prod(self.shape) * self.width


Operand = Tensor | Weight


class Gradient:
    """A gradient on its way from one operation to the one before."""

    __slots__ = ("block",)

    def __init__(self, block: Block) -> None:
        self.block = block
        block.owners += 1

    def __del__(self) -> None:
        self.block.owners -= 1


class Node:
    """The backward pass of one operation: `edges` are (where to, which of its outputs, bytes, whether the memory of the
    incoming gradient is passed on), `extra` bytes that it needs meanwhile."""

    __slots__ = ("edges", "extra", "frame", "number", "saved")

    def __init__(self, number: int, edges: list[Edge], saved: list[Block], extra: int) -> None:
        self.number, self.edges, self.saved, self.extra = number, edges, saved, extra
        self.frame: Frame | None = None


Edge = tuple[Node | Weight, int, int, bool]


class Frame:
    """A part of the forward pass that is computed again in the backward pass: only its inputs are kept."""

    __slots__ = ("computed", "function", "inputs", "nodes", "stored")

    def __init__(self, function: Callable[..., object], inputs: tuple[Tensor, ...]) -> None:
        self.function, self.inputs = function, inputs
        self.nodes: list[Node] = []
        self.stored: list[Block] = []
        self.computed = 0


class _Enough(Exception):
    """All that the backward pass needs has been computed again."""


@dataclass
class Tape:
    """Records operations on shapes.

    `compute`: bytes of a number in which autocast multiplies; None: no autocast. `wide_norms`: whether autocast
    normalises in fp32, as it does on CUDA and not on a CPU. `attention_extra`: bytes per value of the queries that
    attention needs in its backward pass. `held`: None, or the number of values whose gradients are held until their
    weights are updated, which takes `update_bytes` more for each and `update_more` once; `update_frees`: the gradients
    are freed before. `inputs_leave`: the inputs of what is computed again
    are not on the device meanwhile; `keeps_attention`: the results of attention in there are.
    """

    ledger: Ledger
    compute: int | None = None
    wide_norms: bool = True
    attention_extra: int = 0
    held: int | None = None
    update_bytes: int = 0
    update_more: int = 0
    update_frees: bool = False
    inputs_leave: bool = False
    keeps_attention: bool = False
    mode: Mode = "record"
    _count: int = 0
    _frame: Frame | None = None
    _again: list[list[Block]] = field(default_factory=list)
    _wanted: int = 0
    _casts: dict[int, Tensor] = field(default_factory=dict)
    _passes: int = 0
    _measuring: bool = False
    _holding: list[tuple[Block, int]] = field(default_factory=list)

    @contextmanager
    def without_gradients(self) -> Iterator[None]:
        """Record nothing meanwhile."""
        before, self.mode = self.mode, "off"
        try:
            yield
        finally:
            self.mode = before

    def new(self, shape: Shape, width: int) -> Tensor:
        """A tensor that needs no gradient: a batch, noise, ids."""
        return Tensor(shape, width, self.ledger.allocate(math.prod(shape) * width))

    def op(  # noqa: PLR0913 - independent facts about an operation, passed by name
        self,
        inputs: Sequence[Operand],
        shape: Shape,
        width: int,
        *,
        keeps: Sequence[Operand] = (),
        keeps_output: bool = False,
        keeps_more: int = 0,
        backward_extra: int = 0,
        shares: bool = False,
        view: bool = False,
    ) -> Tensor:
        """The output of an operation, and its record.

        `keeps`: inputs saved for the backward pass, with the output or `keeps_more` bytes. `backward_extra`: bytes
        needed only during that. `shares`: the gradient of the output is that of the inputs. `view`: the output lies in
        the memory of the first input.
        """
        needs = self.mode != "off" and any(each.needs for each in inputs)
        saved = [each.block for each in keeps if each.block is not None] if needs else []
        first = needs and bool(keeps) and not (keeps_output or keeps_more)
        if first:
            self._computed_again(saved)
        block = inputs[0].block if view else self.ledger.allocate(math.prod(shape) * width)
        output = Tensor(shape, width, block, needs=needs)
        if not needs:
            return output
        if keeps_output and block is not None:
            saved.append(block)
            if self._frame is not None and self.keeps_attention and keeps_more:
                self._frame.stored.append(block)
        if keeps_more:
            saved.append(self.ledger.allocate(keeps_more))
        saves = bool(keeps) or keeps_output or keeps_more > 0
        if saves and not first:
            self._computed_again(saved)
        if self.mode == "record":
            self._record(output, inputs, saved if saves else None, backward_extra, shares=shares)
        return output

    def _computed_again(self, saved: list[Block]) -> None:
        """Collect what an operation saves while a frame is computed again. This stops before the last operation that
        saves computes, as torch's checkpoint does (early_stop)."""
        if self.mode == "again":
            self._again.append(list(saved))
            if len(self._again) == self._wanted:
                raise _Enough

    def _record(
        self, output: Tensor, inputs: Sequence[Operand], saved: list[Block] | None, extra: int, *, shares: bool
    ) -> None:
        edges = []
        for each in inputs:
            target = each.node if isinstance(each, Tensor) else each
            if each.needs and target is not None:
                same = shares and (each.width == output.width) and (each.shape != () and each.nbytes == output.nbytes)
                slot = each.slot if isinstance(each, Tensor) else 0
                edges.append((target, slot, each.nbytes, same))
        self._count += 1
        node = Node(self._count, edges, [], extra)
        if self._frame is None:
            node.saved = saved or []
        elif saved is not None:
            node.frame = self._frame
            self._frame.nodes.append(node)
        output.node = node

    def split(self, joined: Tensor, parts: int) -> list[Tensor]:
        """Equal parts along the last axis, in the memory of the whole; their gradients are joined in a copy."""
        shape = (*joined.shape[:-1], joined.shape[-1] // parts)
        found = [Tensor(shape, joined.width, joined.block, needs=joined.needs) for _ in range(parts)]
        if joined.needs and self.mode == "record":
            whole = Tensor(joined.shape, joined.width, joined.block, needs=True)
            self._record(whole, [joined], None, 0, shares=False)
            for slot, part in enumerate(found):
                part.node, part.slot = whole.node, slot
        return found

    def join(self, parts: Sequence[Tensor], shape: Shape) -> Tensor:
        """Concatenate: gradients are views of the gradient of the whole."""
        joined = self.op(parts, shape, max(part.width for part in parts))
        if isinstance(joined.node, Node):
            joined.node.edges = [(target, slot, nbytes, True) for target, slot, nbytes, _ in joined.node.edges]
        return joined

    def cast(self, operand: Operand, width: int) -> Operand:
        """The operand in another format, or itself. Autocast keeps the copies of trained weights until it ends."""
        if operand.width == width:
            return operand
        is_kept = isinstance(operand, Weight) and operand.needs and width == self.compute
        found = self._casts.get(id(operand)) if is_kept else None
        if found is None:
            found = self.op([operand], operand.shape, width)
            if is_kept:
                self._casts[id(operand)] = found
        return found

    def autocast_ends(self) -> None:
        """Free the copies that autocast keeps."""
        self._casts = {}

    def checkpoint(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Call a function of which only the inputs are kept for the backward pass (torch.utils.checkpoint, without
        reentrance)."""
        if self.mode != "record":
            return function(*inputs)
        kept = tuple(Tensor(x.shape, x.width, None, needs=True) if x.needs and self.inputs_leave else x for x in inputs)
        before, self._frame = self._frame, Frame(function, kept)
        try:
            return function(*inputs)
        finally:
            self._frame = before

    def backward(self, output: Tensor, *, measuring: bool = False) -> None:
        """Go back from an output, whose gradient is new. Operations in reverse order, each as soon as all gradients of
        its output are there (torch's engine: by sequence number). `measuring`: no gradient of a weight is kept, and
        what is saved is, for another pass."""
        root = output.node
        if not isinstance(root, Node):
            return
        self._passes, self._measuring = self._passes + 1, measuring
        waiting = {root: {output.slot: Gradient(self.ledger.allocate(output.nbytes))}}
        queue = [(-root.number, root)]
        if not measuring:
            output.node = None
        del root
        while queue:
            self._send(*self._one_back(heapq.heappop(queue)[1], waiting), waiting, queue)
        self._update()

    def _one_back(self, node: Node, waiting: dict[Node, dict[int, Gradient]]) -> tuple[list[Edge], list[Gradient]]:
        edges = node.edges
        return edges, self._run(node, waiting.pop(node))

    def _send(
        self,
        edges: list[Edge],
        results: list[Gradient],
        waiting: dict[Node, dict[int, Gradient]],
        queue: list[tuple[int, Node]],
    ) -> None:
        """Pass gradients on to where they are needed next."""
        for (target, slot, _, _), result in zip(edges, results, strict=True):
            if isinstance(target, Weight):
                self._accumulate(target, result)
                continue
            if target not in waiting:
                heapq.heappush(queue, (-target.number, target))
            slots = waiting.setdefault(target, {})
            # added in place, to the one whose memory is its own
            if slot not in slots or slots[slot].block.owners > 1:
                slots[slot] = result

    def _run(self, node: Node, incoming: dict[int, Gradient]) -> list[Gradient]:
        """The gradients of the inputs of an operation; what it saved is freed."""
        if node.frame is not None and node.frame.computed < self._passes:
            self._compute_again(node.frame)
        first = next(iter(incoming.values()))
        results = [Gradient(first.block if same else self.ledger.allocate(nbytes)) for _, _, nbytes, same in node.edges]
        if node.extra:
            self.ledger.allocate(node.extra)
        if node.frame is not None:
            node.saved = []
        if not self._measuring:
            node.saved, node.edges, node.frame = [], [], None
        return results

    def _compute_again(self, frame: Frame) -> None:
        """Fill in what the operations of a frame saved."""
        nodes = frame.nodes
        frame.computed, frame.stored = self._passes, []
        inputs = [x if x.block is not None else self._returned(x) for x in frame.inputs]
        before = (self.mode, self._again, self._wanted, self._casts)
        self.mode, self._again, self._wanted, self._casts = "again", [], len(nodes), {}
        try:
            frame.function(*inputs)
        except _Enough:
            pass
        if not self._measuring:
            frame.nodes = []
        for node, saved in zip(nodes, self._again, strict=True):
            node.saved = saved
        self.mode, self._again, self._wanted, self._casts = before

    def _accumulate(self, weight: Weight, gradient: Gradient) -> None:
        """Keep the gradient of a weight, or add it to the one that is there."""
        if self._measuring:
            return
        if self.held is None:
            if weight.gradient is None:
                weight.gradient = gradient.block
                gradient.block.becomes("gradients")
            return
        gradient.block.becomes("gradients")
        self._holding.append((gradient.block, math.prod(weight.shape)))
        if sum(values for _, values in self._holding) >= self.held:
            self._update()

    def _update(self) -> None:
        """Update the weights whose gradients are held, and free these."""
        if self._holding:
            values = sum(values for _, values in self._holding)
            if self.update_frees:
                self._holding = []
            self.ledger.allocate(self.update_bytes * values + self.update_more)
            self._holding = []

    def _returned(self, left: Tensor) -> Tensor:
        """An input that is back on the device."""
        return Tensor(left.shape, left.width, self.ledger.allocate(left.nbytes), needs=True)
