"""Options of DeepSpeed's ZeRO, under the names of sd-scripts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from library.options.flag import ReadAs, flag

_DEVICES = ("cpu", "nvme")
_NONE = (ReadAs("none", None),)


@dataclass(frozen=True)
class DeepSpeedOptions:
    """How DeepSpeed shares out what is trained over the processes; without effect unless `deepspeed` is set."""

    may_change_on_resume: ClassVar[bool] = True  # what a state depends on is a fact of its own: plan/identity.py

    deepspeed: bool = flag(
        False,
        "Share out optimizer state, gradients and weights over the processes with DeepSpeed's ZeRO, as accelerate "
        "launch --use_deepspeed does. FSDP2 does the same without another package and with fewer limits.",
    )
    zero_stage: int = flag(
        2,
        "What DeepSpeed shares out: 1 the optimizer state, 2 gradients too, 3 weights too, 0 nothing.",
        choices=(0, 1, 2, 3),
    )
    offload_optimizer_device: str | None = flag(
        None,
        "Where DeepSpeed keeps the optimizer state and computes its steps: cpu. nvme is refused.",
        choices=_DEVICES,
        read_as=_NONE,
    )
    offload_optimizer_nvme_path: Path | None = flag(None, "Folder for offload_optimizer_device nvme, which is refused.")
    offload_param_device: str | None = flag(
        None,
        "Where DeepSpeed keeps weights that do not compute (zero_stage 3): cpu. nvme is refused.",
        choices=_DEVICES,
        read_as=_NONE,
    )
    offload_param_nvme_path: Path | None = flag(None, "Folder for offload_param_device nvme, which is refused.")
    zero3_init_flag: bool = flag(
        False,
        "Share out weights while the model is made (zero_stage 3). Not needed: weights are read one tensor at a time, "
        "and shared out once the model is whole in main memory.",
    )
    zero3_save_16bit_model: bool = flag(
        False, "Save a whole model under zero_stage 3. Not needed: saved models are always whole, in save_precision."
    )
    fp16_master_weights_and_gradients: bool = flag(
        False, "Keep DeepSpeed's own copy of the weights, and gradients, in fp16. Refused, as fp16 is with DeepSpeed."
    )
