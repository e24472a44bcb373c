"""A state has no weights that a run never changes: they are those of the base model, or it is not resumed."""

from __future__ import annotations

import copy
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from library.options.mistakes import UserError
from library.training.saving.state import Progress, load_state, read_state
from library.training.saving.trained_weights import FROZEN, weights_of
from library.training.trainable import Group, Part
from tests.training.saving.states import save


class Blocks(nn.Module):
    """A trained block with running statistics, and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.trained, self.norm, self.frozen = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2, dtype=torch.bfloat16)


def a_part(module: nn.Module) -> Part:
    names = ("trained.weight", "trained.bias", "norm.weight", "norm.bias")
    return Part("unet", module, 1e-3, groups=(Group("block0", names, 1e-3),))


def trained(module: Blocks) -> Blocks:
    """A copy whose trained weights and statistics are others."""
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.trained.weight.add_(1)
        other.norm.running_mean.add_(2)  # type: ignore[union-attr, operator]
    return other


def test_frozen_weights_are_left_out_and_come_from_the_base_model(tmp_path: Path) -> None:
    base = Blocks()
    run = trained(base)
    save(tmp_path / "state", Progress(step=1), {"unet": weights_of(a_part(run))})
    saved = load_file(tmp_path / "state" / "model.safetensors")
    assert not any(name.startswith("frozen.") for name in saved) and "norm.running_mean" in saved
    frozen = [base.frozen.bias, base.frozen.weight]  # by name; bytes as they lie in memory
    crc = zlib.crc32(b"".join(each.detach().view(torch.int16).numpy().tobytes() for each in frozen))
    assert int(saved[FROZEN]) == crc

    resumed = copy.deepcopy(base)
    load_state(read_state(tmp_path / "state"), {"unet": weights_of(a_part(resumed))})
    assert all(torch.equal(run.state_dict()[name], tensor) for name, tensor in resumed.state_dict().items())


def test_another_base_model_is_refused(tmp_path: Path) -> None:
    base = Blocks()
    save(tmp_path / "state", Progress(step=1), {"unet": weights_of(a_part(base))})
    with torch.no_grad():
        base.frozen.bias[0] += 1
    with pytest.raises(UserError, match="(?s)which is another one now.*began with .--pretrained_model_name_or_path"):
        load_state(read_state(tmp_path / "state"), {"unet": weights_of(a_part(base))})


def test_a_state_of_an_earlier_version_has_all_weights(tmp_path: Path) -> None:
    base = Blocks()
    run = trained(base)
    save(tmp_path / "state", Progress(step=1), {"unet": run})
    load_state(read_state(tmp_path / "state"), {"unet": weights_of(a_part(base))})
    assert all(torch.equal(run.state_dict()[name], tensor) for name, tensor in base.state_dict().items())


def test_a_part_that_is_trained_as_a_whole_is_saved_as_a_whole() -> None:
    module = Blocks()
    assert weights_of(Part("unet", module, 1e-3, stop_after=1)) is module
