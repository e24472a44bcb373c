"""Decide whether a run is sharded (FSDP2), and refuse what has no meaning then. Imports no torch.

accelerate's configuration says so, through the variables that `accelerate launch` sets: ACCELERATE_USE_FSDP and FSDP_*.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.messages import counted, listed, readable_bytes
from library.options.mistakes import Mistakes
from library.options.packages import installed_version
from library.training.optim.optimizer_table import OPTIMIZERS

if TYPE_CHECKING:
    from library.runtime.launch import Launch
    from library.training.adapter.plan import AdapterPlan
    from library.training.optim.optimizers import OptimizerChoice
    from library.training.plan.costs import Costs
    from library.training.plan.facts import RunFacts
    from library.training.saving.state import SavedState

ALONE = ("--sample_prompts", "--evaluation_prompts", "--scheduled_sampling_max_step_offset", "--posthoc_ema_snapshots")
"""What lets one process compute with the model by itself, in the order of check_sharded."""
OLDEST_TORCH = (2, 9)  # with the safetensors form of torch.distributed.checkpoint for shards
_USED = "ACCELERATE_USE_FSDP"
SHARDED = "accelerate launch --use_fsdp --fsdp_version 2"
"""How a run is started whose processes share out what is trained."""


@dataclass(frozen=True)
class Sharding:
    """How a run of `world` processes is sharded. `reshard`: whether a block's weights are let go between forward and
    backward pass."""

    world: int
    reshard: bool = True

    def describe(self, costs: Costs) -> Iterator[str]:
        """What sharding does to memory."""
        kept = "let go between forward and backward pass" if self.reshard else "kept between forward and backward pass"
        whole = costs.training + (self.world - 1) * costs.shards
        yield (
            f"sharded over {counted(self.world, 'process', 'processes')} (FSDP2): "
            f"{readable_bytes(costs.training)} each in place of {readable_bytes(whole)}; beside them two blocks are "
            f"whole while they compute, {kept}"
        )


def read_sharding(
    environment: Mapping[str, str], launch: Launch, mistakes: Mistakes, notes: list[str]
) -> Sharding | None:
    """The sharding that accelerate is configured for; None without, or with a mistake added."""
    if not is_on(environment, _USED):
        return None
    version = environment.get("FSDP_VERSION", "1").strip()
    if version != "2":
        mistakes.add(
            f"accelerate is configured for FSDP {version}, which shards flattened weights",
            f"start with {SHARDED}, or answer 2 in accelerate config",
        )
        return None
    torch = installed_version("torch") or "0"
    if tuple(int(number) for number in re.findall(r"\d+", torch)[:2]) < OLDEST_TORCH:
        mistakes.add(f"sharding with torch {torch}", f"install torch {'.'.join(map(str, OLDEST_TORCH))} or newer")
        return None
    if launch.world == 1:
        notes.append("accelerate is configured for FSDP, but there is one process: nothing is sharded")
        return None
    if is_on(environment, "FSDP_ACTIVATION_CHECKPOINTING"):
        notes.append("fsdp_activation_checkpointing is not read: --gradient_checkpointing does it")
    if is_on(environment, "FSDP_OFFLOAD_PARAMS"):
        mistakes.add(
            "accelerate is configured to keep shards in main memory (fsdp_offload_params), which is not supported",
            "start with --fsdp_offload_params false",
        )
    reshard = environment.get("FSDP_RESHARD_AFTER_FORWARD", "true").strip().lower() not in ("false", "0", "no_shard")
    return Sharding(launch.world, reshard)


def check_sharded(
    facts: RunFacts,
    optimizer: OptimizerChoice,
    adapter: AdapterPlan | None,
    resume: SavedState | None,
    alone: Sequence[object],
    mistakes: Mistakes,
) -> None:
    """Refuse what a sharded run cannot do. `alone`: what the run has of ALONE."""
    if facts.sharding is None:
        return
    remedy = "start without --use_fsdp"
    if adapter is not None:
        mistakes.add(
            "FSDP with an adapter: what is trained is small, and the frozen base model would not be sharded",
            f"{remedy}; --base_model_precision makes the base model smaller",
        )
    if not optimizer.row.sharded:
        able = ", ".join(row.name for row in OPTIMIZERS if row.sharded)
        mistakes.add(
            f"--optimizer_type {optimizer.name} with FSDP: its steps need whole tensors, or values of all of them, and "
            "each process has a part",
            f"use one of {able}, or {remedy}",
        )
    if facts.precision.mixed_precision == "fp16" or facts.precision.trained == "fp16":
        mistakes.add("--mixed_precision fp16 with FSDP: the scale of the loss is not shared", f"use bf16, or {remedy}")
    if resume is not None and not resume.is_sharded:
        mistakes.add(f"--resume {resume.folder} with FSDP: this state is not sharded", remedy)
    if found := computed_apart(facts, alone):
        mistakes.add(
            f"{listed(found, 9)} with FSDP: the model computes only on all processes at once",
            f"remove it, and draw with the saved models (gen_img.py, tools/evaluate_subject.py), or {remedy}",
        )


def computed_apart(facts: RunFacts, alone: Sequence[object]) -> list[str]:
    """What of a run computes with the model besides its steps. `alone`: what it has of ALONE."""
    computed: dict[str, object] = {"validation": facts.validation, "--preservation": not facts.preservation.is_usual}
    computed |= dict(zip(ALONE, alone, strict=True))
    return [name for name, has in computed.items() if has]


def is_on(environment: Mapping[str, str], name: str) -> bool:
    """Whether a variable of accelerate's launcher is switched on."""
    return environment.get(name, "").strip().lower() in ("1", "true", "yes")
