"""What is done to stand-ins reaches the forward pass of the real modules, and nothing else."""

from __future__ import annotations

import torch
from torch import nn

from library.checkpoints.adapter_key_names import AdapterPart
from networks.third_party.stand_ins import stand_ins


class Attention(nn.Module):
    """As small as a module with the name of diffusers' can be."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(2, 2)
        self.to_k = self.to_q  # one layer in two places
        self.config = {"heads": 1}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.to_q(x)


PARTS = (
    AdapterPart("text_encoder", "text_encoder1", "lora_te", frozenset(), level="text_model."),
    AdapterPart("unet", "unet", "lora_unet", frozenset()),
)
X = torch.tensor([[1.0, 2.0]])


def model() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"unet": Attention(), "text_encoder": Attention()}


def test_the_tree_that_is_seen() -> None:
    real = model()
    seen = stand_ins(real, PARTS)
    assert [name for name, _ in seen.text_encoder.named_modules()] == ["", "text_model", "text_model.to_q"]
    assert type(seen.unet).__name__ == "CrossAttention" and isinstance(seen.unet, Attention)
    assert type(stand_ins(real, PARTS, hidden=["Attention"]).unet).__name__ == "_Attention"
    assert seen.unet.to_q.weight is real["unet"].to_q.weight and seen.unet.to_q is seen.unet.to_k
    assert seen.text_encoder.config == {"heads": 1} and not hasattr(seen.text_encoder, "nothing")
    assert torch.equal(seen.text_encoder(X), real["text_encoder"](X))


def test_a_patched_forward_is_put_in_and_taken_out() -> None:
    real = model()
    before = real["unet"](X)
    seen = stand_ins(real, PARTS)
    old = seen.unet.to_q.forward
    seen.unet.to_q.forward = lambda x: old(x) + 1
    del seen.unet.to_q.weight  # as LyCORIS's `full` does; the base keeps its own
    seen.unet.to_q.weight = nn.Parameter(torch.zeros(2, 2))
    assert torch.equal(real["unet"](X), before)
    for _ in range(2):
        assert seen.attach() == 1
        assert torch.equal(real["unet"](X), torch.zeros(2, 2)[:1] + real["unet"].to_q.bias + 1)
        seen.detach()
        assert torch.equal(real["unet"](X), before) and "forward" not in real["unet"].to_q.__dict__


def test_a_layer_that_was_replaced_is_put_in_too() -> None:
    real = model()
    before = real["text_encoder"](X)
    seen = stand_ins(real, PARTS)
    inner = seen.text_encoder.text_model
    inner.to_q = nn.Sequential(inner.to_q, nn.Tanh())
    assert seen.attach() == 1
    assert torch.equal(real["text_encoder"](X), before.tanh()) and not torch.equal(before.tanh(), before)
    assert len([*real["text_encoder"].modules()]) == 2  # what replaced it is no part of the base
    seen.detach()
    assert torch.equal(real["text_encoder"](X), before) and isinstance(real["text_encoder"].to_q, nn.Linear)


def test_a_forward_that_was_patched_before_stays() -> None:
    real = model()
    layer = real["unet"].to_q
    layer.forward = first = lambda x: x * 3
    seen = stand_ins(real, PARTS)
    assert seen.attach() == 0 and layer.forward is first
    old = seen.unet.to_q.forward
    seen.unet.to_q.forward = lambda x: old(x) + 1
    seen.attach()
    assert torch.equal(real["unet"](X), X * 3 + 1)
    seen.detach()
    assert layer.forward is first


def test_the_tensors_are_the_same_wherever_the_model_goes() -> None:
    real = model()
    seen = stand_ins(real, PARTS)
    real["unet"].to(torch.float64)
    assert seen.unet.to_q.weight.dtype == torch.float64
