"""The passes of a family's modules over shapes leave what diffusers and transformers leave."""

from __future__ import annotations

import pytest
import torch

from library.families.registry import FAMILIES
from library.footprint.ledger import Ledger
from library.footprint.module import Module
from library.footprint.tape import FULL, Tape
from library.training.memory import checkpoint_activations
from tests import tiny
from tests.footprint.counted import Counted

BY_NAME = {family.name: family for family in FAMILIES}


def on_tape(module: torch.nn.Module, tape: Tape, **settings: bool) -> Module:
    return Module(tape, {name: tuple(each.shape) for name, each in module.named_parameters()}, **settings)


@pytest.mark.parametrize("way", ["encode_images", "decode_latents"])
def test_vae(way: str) -> None:
    vae, footprint = tiny.diffusers_modules("sd1").vae, BY_NAME["sd1"].footprint
    shape = (2, 3, 96, 64) if way == "encode_images" else (2, 4, 12, 8)
    values = torch.zeros(shape)
    with torch.no_grad(), Counted([*vae.parameters(), values]) as counted:
        vae.encode(values) if way == "encode_images" else vae.decode(values)
    tape = Tape(Ledger(), mode="off")
    given = tape.new(shape, FULL)
    assert footprint is not None
    getattr(footprint, way)(on_tape(vae, tape), given)
    assert tape.ledger.peak - given.nbytes == pytest.approx(counted.peak, rel=0.01)


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_text_encoder(family: str, checkpoints: bool) -> None:
    """With gradients: the activations that the backward pass finds."""
    module, footprint = tiny.diffusers_modules(family).text_encoder, BY_NAME[family].footprint
    assert footprint is not None
    module.requires_grad_(True).train()
    if checkpoints:
        checkpoint_activations(module)
    tokens = torch.randint(5, 40, (2, 77))
    with Counted([*module.parameters(), *module.buffers(), tokens]) as counted:
        output = module(tokens).last_hidden_state
    live = counted.live
    with counted:
        output.sum().backward()
    tape = Tape(Ledger())
    ids = tape.new((2, 1, 77), 8)
    parts = {"text_encoder": on_tape(module, tape, trains=True, checkpoints=checkpoints)}
    states = footprint.encode_text(parts, {"text_encoder": ids})["states"]
    assert tape.ledger.live["activations"] - ids.nbytes == pytest.approx(live, rel=0.01)
    tape.backward(states)
    assert tape.ledger.peak - ids.nbytes == pytest.approx(counted.peak, rel=0.01)


def test_what_a_tape_frees_is_counted_no_longer() -> None:
    ledger = Ledger(granularity=512)
    tape = Tape(ledger)
    first = tape.new((100,), FULL)
    assert ledger.live["activations"] == 512
    second = tape.op([first], (200,), FULL)
    del first
    assert (ledger.live["activations"], ledger.peak) == (1024, 1536)
    del second
    assert ledger.live["activations"] == 0
