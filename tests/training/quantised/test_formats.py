"""The formats: rounding as their definitions say, the bytes that the plan counts, one for each value of the flag."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from library.families.sd.load import import_packages
from library.options.groups import quantisation as flags
from library.runtime.imports import quiet_libraries
from library.runtime.packed_weight import PackedWeight
from library.training.quantised import backends
from library.training.quantised.backends import make_arena, pack
from library.training.quantised.formats import FORMATS, Format

DISTINCT = [name for name in FORMATS if "-" in name]
SHAPES = ((24, 320), (16, 32, 3, 3))


@pytest.fixture(scope="module", autouse=True)
def _packages() -> None:
    """As a run imports them: first diffusers, without the quantisers."""
    quiet_libraries()
    import_packages()


def weight(shape: tuple[int, ...]) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.05
    made[2] = 0  # as a layer that begins at zero
    return made


def packed_in(full: Tensor, chosen: Format) -> PackedWeight:
    """Packed as the first of two weights of its shape."""
    arena = make_arena(chosen, [tuple(full.shape)] * 2, full.device)
    packed = pack(full, chosen, arena)
    pack(torch.randn(full.shape), chosen, arena)
    assert arena.used <= len(arena.memory)
    return packed


def test_every_value_of_the_flag_has_a_format() -> None:
    assert {flags.NO_CHANGE, *FORMATS} == set(flags.FORMATS)
    assert {name: FORMATS[name] for name in ("int8", "int4", "fp8", "nf4")} == {
        "int8": FORMATS["int8-quanto"],
        "int4": FORMATS["int4-quanto"],
        "fp8": FORMATS["fp8-quanto"],
        "nf4": FORMATS["nf4-bnb"],
    }


@pytest.fixture(scope="module", autouse=True)
def _no_compiler() -> Iterator[None]:
    """Most machines have none, and a lock that a stopped compilation leaves behind stops all others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("optimum.quanto.library.extensions.extension.load", None)
        patch.setattr("torch.utils.cpp_extension.load", None)
        yield


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", DISTINCT)
def test_bytes_and_zeros(name: str, shape: tuple[int, ...]) -> None:
    packed = packed_in(weight(shape), FORMATS[name])
    dense = packed.unpacked()
    assert packed.packed.nbytes == FORMATS[name].nbytes(shape)
    assert dense.shape == shape and dense.dtype is torch.float32 and bool(dense.isfinite().all())
    assert not dense[2].any(), "zeros stay zeros"
    moved = packed.packed.to(torch.device("cpu")).unpack(torch.empty(shape[0], dense[0].numel()))
    assert torch.equal(moved.view(shape), dense)


def step_by_definition(full: Tensor, name: str, group: int) -> Tensor:
    """The largest error that a value may have by the definition of its format, of the shape of `full`."""
    rows = full.reshape(-1, group)
    largest = rows.abs().amax(1, keepdim=True)
    if name.startswith("int8"):  # at least 255 even steps between plus and minus the largest value of a row
        error = largest / 127 / 2
    elif name.startswith("fp8"):  # three bits after the leading one, and steps of 2 ** -9 below 2 ** -6 of 448
        error = torch.maximum(rows.abs() / 16, largest / 448 / 2**9 / 2)
    elif name == "nf4-bnb":  # the widest gap between neighbours (arXiv 2305.14314, appendix E): -1 and -0.696
        error = largest * (1 - 0.6961928) / 2
    else:  # even steps between the least and the largest value of a group
        steps = {"int4-quanto": 15, "int2-quanto": 3}[name]
        error = (rows.amax(1, keepdim=True).clamp(min=0) - rows.amin(1, keepdim=True).clamp(max=0)) / steps / 2
    return error.expand_as(rows).reshape(full.shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", DISTINCT)
def test_rounding_is_that_of_the_definition(name: str, shape: tuple[int, ...]) -> None:
    """No value is further from the full one than half a step; a wrong group, row or scale would be."""
    full, chosen = weight(shape), FORMATS[name]
    full[1] *= 100
    found = packed_in(full, chosen).unpacked()
    worst = ((found - full).abs() / step_by_definition(full, name, chosen.group_in(shape)).clamp(min=1e-30)).max()
    assert 0.5 < float(worst) < 1.02


@pytest.mark.parametrize("name", DISTINCT)
def test_large_weights_are_packed_in_pieces_without_a_trace(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    full = torch.randn(200, 96, generator=torch.Generator().manual_seed(3))
    whole = packed_in(full, FORMATS[name])
    monkeypatch.setattr(backends, "_PIECE", 64 * 96)
    pieces = packed_in(full, FORMATS[name])
    assert torch.equal(pieces.unpacked(), whole.unpacked()) and pieces.packed.nbytes == whole.packed.nbytes
    assert len(backends._pieces((200, 96))) == 4


def test_a_group_never_crosses_rows_unless_it_may() -> None:
    int4, nf4 = FORMATS["int4"], FORMATS["nf4"]
    assert int4.group_in((8, 320)) == 64 and int4.group_in((8, 4, 3, 3)) == 4 and nf4.group_in((8, 40)) == 64
    assert not int4.fits((8, 4, 3, 3)) and int4.fits((8, 32, 3, 3)) and not int4.fits((8,))
    assert not nf4.fits((3, 3)), "half a byte is left"


@pytest.mark.parametrize("name", ["int4-quanto", "int2-quanto"])
def test_an_odd_number_of_groups(name: str) -> None:
    full = weight((5, 96))  # groups of 32: the last byte rows are not full
    error = (packed_in(full, FORMATS[name]).unpacked() - full).abs()
    assert bool((error <= step_by_definition(full, name, 32) * 1.01 + 1e-7).all())
