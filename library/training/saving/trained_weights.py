"""The weights of a module in a training state, without those that the run never changes (blocks with a learning rate of
0): they come from the base model when it is resumed, and are known by a checksum."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from library.training.trainable import Part, named_parameters

FROZEN = "frozen_crc32"
"""The entry of a state with the checksum of the weights that are not in it."""


def frozen_names(part: Part) -> frozenset[str]:
    """The parameters of a part that no group trains. A part that stops was trained before, and has none."""
    if not part.groups:
        return frozenset()
    trained = {name for group in part.groups for name in group.parameters}
    return frozenset(named_parameters(part.module).keys() - trained)


def checksum_of(module: nn.Module, names: frozenset[str]) -> int:
    """The CRC-32 of parameters, in the order of their names."""
    parameters, crc = named_parameters(module), 0
    for name in sorted(names):
        flat = parameters[name].detach().to("cpu").contiguous().flatten()
        crc = zlib.crc32(flat.view(torch.uint8).numpy().data, crc)
    return crc


class AnotherBase(ValueError):
    """The frozen weights of a run are not those of the state. `remedy`: what the user can do."""

    remedy = "use the base model that the saved run began with (--pretrained_model_name_or_path)"


@dataclass
class TrainedWeights:
    """Saves and restores what is trained of a module. States of earlier versions, which hold all of it, are restored
    as they are."""

    module: nn.Module
    frozen: frozenset[str]
    _checksum: int | None = field(default=None, init=False)

    def state_dict(self) -> dict[str, Tensor]:
        """All entries of the module's that are not frozen, and the checksum of the others."""
        trained = {name: tensor for name, tensor in self.module.state_dict().items() if name not in self.frozen}
        return {**trained, FROZEN: torch.tensor(self._frozen_checksum())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved state. Raises AnotherBase if the frozen weights are not those of the saved run."""
        if FROZEN not in state:
            self.module.load_state_dict(state)
            return
        if int(state[FROZEN]) != self._frozen_checksum():
            raise AnotherBase("its frozen blocks come from the base model, which is another one now")
        own = {name: tensor for name, tensor in self.module.state_dict().items() if name in self.frozen}
        self.module.load_state_dict({**own, **{name: each for name, each in state.items() if name != FROZEN}})

    def _frozen_checksum(self) -> int:
        """Of the weights as they are in this run, which does not change them."""
        if self._checksum is None:
            self._checksum = checksum_of(self.module, self.frozen)
        return self._checksum


def weights_of(part: Part) -> nn.Module | TrainedWeights:
    """What a state holds of a part: the module, or what is trained of it."""
    frozen = frozen_names(part)
    return TrainedWeights(part.module, frozen) if frozen else part.module
