"""LoKr: how a layer is divided, ΔW from its factors (arXiv 2309.14859), and its rank dropout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from networks import lokr, shapes
from networks.adapter import AdapterError, LayerSettings
from networks.settings import read_settings
from tests.networks import layers


def made(shape: str, dim: int = 2, rank_dropout: float = 0.0, **own: Any) -> tuple[Any, Any]:
    module = layers.base(shape)
    torch.manual_seed(1)
    settings = LayerSettings(dim=dim, alpha=6.0, rank_dropout=rank_dropout, own=own)
    return module, layers.nudge(lokr.create(layers.layer(module), settings, module.weight).double())


@pytest.mark.parametrize(
    ("number", "factor", "expected"),
    # LyCORIS' own table, without 360, of which the package says otherwise than its table
    [
        (127, -1, (1, 127)), (127, 16, (1, 127)), (128, -1, (8, 16)), (128, 2, (2, 64)), (128, 16, (8, 16)),
        (250, -1, (10, 25)), (250, 4, (2, 125)), (250, 8, (5, 50)),
        (512, 4, (4, 128)), (1024, -1, (32, 32)), (1024, 16, (16, 64)),
    ],
)  # fmt: skip
def test_how_numbers_are_divided(number: int, factor: int, expected: tuple[int, int]) -> None:
    assert shapes.factorization(number, factor) == expected


def test_numbers_are_divided_as_lycoris_does() -> None:
    theirs = pytest.importorskip("lycoris.functional.general").factorization
    for number in (*range(1, 200), 320, 640, 768, 960, 1024, 1280, 1920, 2560, 3072, 5120, 10240):
        for factor in (-1, 0, 1, 2, 3, 4, 6, 8, 16, 64, 5000):
            assert shapes.factorization(number, factor) == theirs(number, factor), (number, factor)


@pytest.mark.parametrize("shape", layers.SHAPES)
def test_it_is_the_papers_product(shape: str) -> None:
    module, adapter = made(shape)
    held = layers.file_of(adapter)
    second = held["lokr_w2_a"] @ held["lokr_w2_b"]
    expected = 6 / 2 * torch.kron(held["lokr_w1"], second).reshape(module.weight.shape)
    assert torch.allclose(adapter.delta(module.weight), expected, rtol=1e-12, atol=1e-12)


def test_whole_factors_are_not_scaled() -> None:
    module, adapter = made("linear", dim=100_000)
    held = layers.file_of(adapter)
    assert torch.equal(adapter.delta(module.weight), torch.kron(held["lokr_w1"], held["lokr_w2"]))
    assert float(held["alpha"].half()) < float("inf"), "a file in half precision holds a number"


def test_sizes_of_a_real_layer() -> None:
    """SD1's 320 x 768 at dim 8, where the files of LyCORIS have these shapes."""
    layer = layers.layer(torch.nn.Linear(768, 320))
    adapter = lokr.create(layer, LayerSettings(dim=8, alpha=1.0), torch.empty(320, 768))
    shapes = {key: tuple(value.shape) for key, value in adapter.state_dict().items()}
    assert shapes == {"alpha": (), "lokr_w1": (16, 24), "lokr_w2_a": (20, 8), "lokr_w2_b": (8, 32)}


@pytest.mark.parametrize("shape", ["linear", "strided"])
@pytest.mark.parametrize("dim", [2, 8])
def test_rank_dropout_drops_outputs(shape: str, dim: int) -> None:
    module, adapter = made(shape, dim=dim, rank_dropout=0.5)
    x = layers.example(module)
    whole = adapter.eval().bypass(x)
    torch.manual_seed(2)
    found = adapter.train().bypass(x)
    axis = 1 if found.ndim == 4 else -1
    kept = found.movedim(axis, 0).flatten(1).any(1)
    assert 0 < kept.sum() < len(kept)
    expected = whole.movedim(axis, 0) * 2
    expected[~kept] = 0
    assert torch.allclose(found.movedim(axis, 0), expected, rtol=1e-10, atol=1e-10)


def test_a_convolution_in_groups() -> None:
    torch.manual_seed(1)
    module = torch.nn.Conv2d(16, 24, 3, padding=1, groups=2).double().requires_grad_(False)
    adapter = layers.nudge(
        lokr.create(layers.layer(module), LayerSettings(dim=2, alpha=1.0), module.weight).double()
    ).eval()
    x = layers.example(module)
    expected = layers.changed(module, x, adapter.delta(module.weight))
    assert torch.allclose(module(x) + adapter.bypass(x), expected, rtol=1e-10, atol=1e-10)


def test_kohyas_files_of_1x1_convolutions() -> None:
    """Its lokr_w2 has no axes for the kernel there, LyCORIS' has."""
    module, adapter = made("conv1", dim=8)
    held = layers.file_of(adapter)
    held["lokr_w2"] = held["lokr_w2"].flatten(1)
    assert torch.equal(lokr.load(layers.layer(module), held).delta(module.weight), adapter.delta(module.weight))


@pytest.mark.parametrize(
    ("role", "shape"),
    [("lokr_w1", (5, 5)), ("lokr_w2_a", (8, 3)), ("lokr_w2_b", (2, 7)), ("lokr_w1", (20,)), ("lokr_w2_a", (2, 2))],
)
def test_factors_that_do_not_fit_are_refused(role: str, shape: tuple[int, ...]) -> None:
    module, adapter = made("linear")
    held = layers.file_of(adapter) | {role: torch.zeros(shape)}
    with pytest.raises(AdapterError, match=layers.NAME):
        lokr.load(layers.layer(module), held)


def test_arguments() -> None:
    settings, mistakes = read_settings(
        "networks.lokr", dim=8, arguments=["factor=4", "decompose_both=False", "full_matrix=1", "use_tucker=true"]
    )
    told = {"factor": 4, "decompose_both": False, "full_matrix": True, "use_tucker": True}
    assert not mistakes
    assert settings.own == told | {"unbalanced_factorization": False}
    for wrong in ("factor=-2", "factor=2.5", "dropout=0.1", "algo=lokr"):
        assert len(read_settings("networks.lokr", arguments=[wrong])[1]) == 1
