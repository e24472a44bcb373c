"""Laws of every kind of adapter, on single layers: it begins at nothing, files hold all of it, what is computed without
ΔW is what ΔW gives, and all that it trains is reached by gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from networks.adapter import AdapterError, LayerSettings
from networks.registry import find_kind, load_kind
from tests.networks import layers

SETTINGS: dict[str, dict[str, Any]] = {
    "lora_fa": {},
    "dylora": {"unit": 2},
    "oft": {},
    "loha": {},
    "loha tucker": {"use_tucker": True},
    "lokr": {},
    "lokr large": {},
    "lokr both": {"decompose_both": True},
    "lokr factor": {"factor": 2},
    "lokr whole": {"full_matrix": True},
    "lokr unbalanced": {"unbalanced_factorization": True},
    "lokr tucker": {"use_tucker": True},
    "ia3": {},
    "ia3 input": {"train_on_input": True},
}
DIMS = {"oft": 4, "lokr large": 8, "lokr both": 1}  # of the others 2: small enough for LoKr's w2 to be of low rank
KINDS = sorted({name.split()[0] for name in SETTINGS})

pytestmark = pytest.mark.filterwarnings("error")


def file(name: str) -> Any:
    kind = find_kind(f"networks.{name.split()[0]}")
    assert kind is not None
    return load_kind(kind)


def create(name: str, module: Any, alpha: float = 3.0) -> Any:
    torch.manual_seed(3)
    settings = LayerSettings(dim=DIMS.get(name, 2), alpha=alpha, own=SETTINGS[name])
    return file(name).create(layers.layer(module), settings, module.weight).to(module.weight.dtype)


@pytest.mark.parametrize("shape", layers.SHAPES)
@pytest.mark.parametrize("name", SETTINGS)
def test_it_begins_at_nothing(name: str, shape: str) -> None:
    module = layers.base(shape, torch.float32)
    delta = create(name, module).delta(module.weight)
    assert delta.shape == module.weight.shape and delta.dtype == module.weight.dtype
    assert not delta.any()


@pytest.mark.parametrize("shape", layers.SHAPES)
@pytest.mark.parametrize("name", SETTINGS)
def test_a_file_holds_all_of_it(name: str, shape: str) -> None:
    module = layers.base(shape)
    adapter = layers.nudge(create(name, module))
    tensors = layers.file_of(adapter)
    assert all(value.is_contiguous() for value in tensors.values())
    loaded = file(name).load(layers.layer(module), tensors)
    assert not tensors, "something of the file was not used"
    assert adapter.delta(module.weight).any()
    assert torch.equal(loaded.delta(module.weight), adapter.delta(module.weight))
    assert {value.dtype for value in loaded.parameters()} == {module.weight.dtype}
    for key, value in adapter.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    other = create(name, module)
    other.load_state_dict(layers.file_of(adapter))
    assert torch.equal(other.delta(module.weight), adapter.delta(module.weight))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("shape", layers.SHAPES)
@pytest.mark.parametrize("name", [name for name in SETTINGS if name.split()[0] in ("lora_fa", "dylora", "lokr")])
def test_without_delta_as_with_it(name: str, shape: str, dtype: torch.dtype) -> None:
    module = layers.base(shape, dtype)
    adapter = layers.nudge(create(name, module)).eval()
    x = layers.example(module)
    expected = layers.changed(module, x, adapter.delta(module.weight))
    close = 1e-10 if dtype is torch.float64 else 1e-5
    assert torch.allclose(module(x) + adapter.bypass(x), expected, rtol=close, atol=close)


@pytest.mark.parametrize("shape", layers.SHAPES)
@pytest.mark.parametrize("name", SETTINGS)
def test_gradients_reach_all_that_is_trained(name: str, shape: str) -> None:
    module = layers.base(shape)
    adapter = layers.nudge(create(name, module))
    layers.changed(module, layers.example(module), adapter.delta(module.weight)).square().sum().backward()
    for key, parameter in adapter.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == parameter.requires_grad, key


@pytest.mark.parametrize("name", KINDS)
def test_half_precision_is_read_and_computed_in_the_dtype_asked_for(name: str) -> None:
    module = layers.base("linear", torch.float32)
    adapter = layers.nudge(create(name, module))
    halves = {key: value.bfloat16() if value.ndim else value for key, value in layers.file_of(adapter).items()}
    loaded = file(name).load(layers.layer(module), dict(halves))
    assert {value.dtype for value in loaded.parameters()} == {torch.bfloat16}
    exact = file(name).load(layers.layer(module), {key: value.float() for key, value in halves.items()})
    assert torch.equal(loaded.delta(module.weight), exact.delta(module.weight))
    assert loaded.delta(module.weight.bfloat16()).dtype is torch.bfloat16


@pytest.mark.parametrize("name", KINDS)
def test_a_file_of_another_model_is_refused(name: str) -> None:
    wide, narrow = layers.base("linear"), torch.nn.Linear(23, 39)
    tensors = layers.file_of(create(name, wide))
    with pytest.raises(AdapterError, match=layers.NAME) as caught:
        file(name).load(layers.layer(narrow), tensors)
    assert "the model that the file was trained on" in caught.value.remedy


@pytest.mark.parametrize("name", SETTINGS)
def test_missing_tensors_are_named(name: str) -> None:
    module = layers.base("conv3")
    whole = layers.file_of(create(name, module))
    for key in whole.keys() - {"alpha", "lokr_t2"}:
        with pytest.raises(AdapterError, match=key.removesuffix("_a").removesuffix("_b")):
            file(name).load(layers.layer(module), {other: whole[other] for other in whole.keys() - {key}})


@pytest.mark.parametrize("name", ["lora_fa", "dylora", "loha", "lokr"])
def test_without_alpha_nothing_is_scaled(name: str) -> None:
    module = layers.base("linear")
    tensors = layers.file_of(layers.nudge(create(name, module, alpha=2)))
    whole = file(name).load(layers.layer(module), dict(tensors))
    del tensors["alpha"]
    bare = file(name).load(layers.layer(module), tensors)
    assert torch.equal(bare.delta(module.weight), whole.delta(module.weight))
