"""The optimizers that have a short name. Data only; a new one is one row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class OptimizerRow:
    """One optimizer.

    `path`: the class at its place of definition, which goes into the metadata. `package`: the optional package that
    it needs, with its version. `defaults`: arguments that belong to the short name; users may override them. The
    state of a parameter takes `state_tensors` numbers in the format of the weights plus `state_bytes` bytes.
    `fp32_state`: state and arithmetic stay precise with fp16 weights. `learning_rate_free`: the optimizer estimates
    the learning rate, and the given rate is a factor of about 1. `schedule_free`: it averages weights instead of
    lowering the learning rate. `sharded`: each weight's step depends on its own gradients only, so a process can take
    it with a part of a tensor. `per_tensor`: a weight's step depends on the gradients of its own tensor only, so
    tensors can be stepped one after the other.
    """

    name: str
    path: str
    package: str = ""
    defaults: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    state_tensors: float = 0.0
    state_bytes: float = 0.0
    fp32_state: bool = False
    learning_rate_free: bool = False
    schedule_free: bool = False
    sharded: bool = False
    per_tensor: bool = False


_MOMENTUM = MappingProxyType({"momentum": 0.9, "nesterov": True})
# 8-bit state: one byte per number, and one fp32 scale per block of 256 numbers
_BYTE = 1 + 4 / 256


def _bitsandbytes(name: str, path: str, state_bytes: float, defaults: Mapping[str, Any] | None = None) -> OptimizerRow:
    return OptimizerRow(
        name,
        f"bitsandbytes.optim.{path}",
        "bitsandbytes==0.50.2",
        defaults or MappingProxyType({}),
        state_bytes=state_bytes,
        fp32_state=True,
        per_tensor=True,
    )


def _d_adaptation(name: str, path: str, state_tensors: float) -> OptimizerRow:
    return OptimizerRow(
        name, f"dadaptation.{path}", "dadaptation==3.2", state_tensors=state_tensors, learning_rate_free=True
    )


def _schedule_free(name: str, path: str, state_tensors: float) -> OptimizerRow:
    return OptimizerRow(
        name,
        f"schedulefree.{path}",
        "schedulefree==1.4.1",
        state_tensors=state_tensors,
        schedule_free=True,
        per_tensor=True,
    )


OPTIMIZERS: tuple[OptimizerRow, ...] = (
    OptimizerRow("AdamW", "torch.optim.adamw.AdamW", state_tensors=2, sharded=True, per_tensor=True),
    _bitsandbytes("AdamW8bit", "adamw.AdamW8bit", 2 * _BYTE),
    _bitsandbytes("PagedAdamW", "adamw.PagedAdamW", 8),
    _bitsandbytes("PagedAdamW8bit", "adamw.PagedAdamW8bit", 2 * _BYTE),
    _bitsandbytes("PagedAdamW32bit", "adamw.PagedAdamW32bit", 8),
    OptimizerRow(
        "Lion",
        "lion_pytorch.lion_pytorch.Lion",
        "lion-pytorch==0.2.5",
        state_tensors=1,
        sharded=True,
        per_tensor=True,
    ),
    _bitsandbytes("Lion8bit", "lion.Lion8bit", _BYTE),
    _bitsandbytes("PagedLion8bit", "lion.PagedLion8bit", _BYTE),
    OptimizerRow(
        "SGDNesterov", "torch.optim.sgd.SGD", defaults=_MOMENTUM, state_tensors=1, sharded=True, per_tensor=True
    ),
    _bitsandbytes("SGDNesterov8bit", "sgd.SGD8bit", _BYTE, _MOMENTUM),
    # in kohya's scripts the plain name has always meant the Adam of the first paper
    _d_adaptation("DAdaptation", "experimental.dadapt_adam_preprint.DAdaptAdamPreprint", 3),
    _d_adaptation("DAdaptAdamPreprint", "experimental.dadapt_adam_preprint.DAdaptAdamPreprint", 3),
    _d_adaptation("DAdaptAdaGrad", "dadapt_adagrad.DAdaptAdaGrad", 3),
    _d_adaptation("DAdaptAdam", "dadapt_adam.DAdaptAdam", 3),
    _d_adaptation("DAdaptAdan", "dadapt_adan.DAdaptAdan", 5),
    _d_adaptation("DAdaptAdanIP", "experimental.dadapt_adan_ip.DAdaptAdanIP", 5),
    _d_adaptation("DAdaptLion", "dadapt_lion.DAdaptLion", 2),
    _d_adaptation("DAdaptSGD", "dadapt_sgd.DAdaptSGD", 3),
    OptimizerRow(
        "Prodigy", "prodigyopt.prodigy.Prodigy", "prodigyopt==1.1.2", state_tensors=4, learning_rate_free=True
    ),
    # factored second moments over the last two dimensions: for SD's U-Net with its 3 x 3 kernels 2.1 bytes a parameter
    OptimizerRow(
        "Adafactor",
        "transformers.optimization.Adafactor",
        defaults=MappingProxyType({"relative_step": True}),
        state_bytes=2.1,
        fp32_state=True,
        per_tensor=True,
    ),
    _schedule_free("AdamWScheduleFree", "adamw_schedulefree.AdamWScheduleFree", 2),
    _schedule_free("SGDScheduleFree", "sgd_schedulefree.SGDScheduleFree", 1),
    _schedule_free("RAdamScheduleFree", "radam_schedulefree.RAdamScheduleFree", 2),
)
