"""What an adapter's file says about the run that it comes from: ss_* as sd-scripts writes them, and modelspec.*.

Values are texts made by str(), of what the run does: the seed that was drawn, the rates that apply, the precision that
this machine has, where sd-scripts repeats what the command line said.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from library.checkpoints.metadata import ADAPTER_MINIMUM, IMPLEMENTATIONS
from library.checkpoints.model_hashes import ModelHashes
from library.data.scan.dataset_specs import cache_folder
from library.options.render import metadata as flag_metadata
from library.options.train_options import FLAGS
from library.runtime.seeds import python_random
from library.training.saving.dataset_metadata import dataset_metadata, described_by_file, largest_resolution
from library.training.saving.model_file import clip_skip_of, modelspec, time_of_saving

if TYPE_CHECKING:
    from library.options.groups.adapter import AdapterOptions
    from library.options.groups.model import ModelOptions
    from library.options.train_options import TrainOptions
    from library.training.adapter.plan import AdapterPlan
    from library.training.optim.learning_rates import LearningRates, Optimization
    from library.training.plan.base_model import BaseModel
    from library.training.plan.facts import RunFacts

ROOT = Path(__file__).resolve().parents[3]
_SESSION_BITS = 32


class AdapterMetadata:
    """The metadata of all files of one run: what stays the same is found out once, when this is made.

    Raises CheckpointError for a --metadata_thumbnail that cannot be read.
    """

    def __init__(self, facts: RunFacts, optimization: Optimization, adapter: AdapterPlan) -> None:
        self._facts = facts
        started = time_of_saving().timestamp()
        session = python_random(facts.seed, "session", repr(started)).getrandbits(_SESSION_BITS)
        self._same = {
            **_flags(facts.options),
            **_decided(facts, optimization),
            "ss_session_id": str(session),
            "ss_training_started_at": str(started),
            **_network(facts.options.adapter, adapter),
        }
        # the images of a large data set take a while to count, those of --no_metadata need not be
        if not facts.options.adapter.no_metadata:
            self._same |= dataset_metadata(facts.options, facts.images)
        self._spec = modelspec(
            facts.options,
            facts.base_model,
            largest_resolution(facts.images),
            architecture=f"{facts.base_model.family.architectures[facts.base_model.prediction]}/lora",
            implementation=IMPLEMENTATIONS[facts.base_model.family.adapter_names],
            implementation_version=f"dreamfolder/{revision()}",
            untitled="LoRA",
        )
        self._hashes = {
            kind: ModelHashes(path, cache_folder(facts.options.dataset) / "hashes")
            for kind, path in _hashed_files(facts.options.model).items()
        }

    def begin_hashing(self) -> None:
        """Hash the files of the model in threads, so that the first save need not wait for it."""
        if not self._facts.options.adapter.no_metadata:
            for hashes in self._hashes.values():
                hashes.begin()

    def at(self, step: int) -> dict[str, str]:
        """Metadata of a file that is written now, after `step` optimiser steps. ss_epoch counts finished epochs, the
        last one of the run also where it is cut short."""
        facts, now = self._facts, time_of_saving()
        spec = self._spec | {"modelspec.date": now.replace(microsecond=0).isoformat()}
        if facts.options.adapter.no_metadata:
            return _readable({key: self._same[key] for key in ADAPTER_MINIMUM if key in self._same} | spec)
        ended = step >= facts.duration.steps
        return _readable(
            self._same
            | self._file_hashes()
            | {
                "ss_training_finished_at": str(now.timestamp()),
                "ss_steps": str(step),
                "ss_epoch": str(facts.duration.epochs if ended else facts.order.position(step)[0] - 1),
            }
            | spec
        )

    def _file_hashes(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for kind, hashes in self._hashes.items():
            value = hashes.value()
            if value is not None:
                found |= {f"ss_{kind}_hash": value.short, f"ss_new_{kind}_hash": value.whole}
        return found


def _flags(options: TrainOptions) -> dict[str, str]:
    """What flags say, "None" where they are not set."""
    values = flag_metadata(options)
    by_dataset = described_by_file(options)  # what each dataset has of its own is in ss_datasets
    return {
        flag.metadata: values.get(flag.metadata, "None")
        for flag in FLAGS.values()
        if flag.metadata and flag.metadata.startswith("ss_") and not (by_dataset and flag.per_dataset)
    }


def _decided(facts: RunFacts, optimization: Optimization) -> dict[str, str]:
    """What the plan decided from the flags, the machine, the model and the images."""
    options, base_model, precision = facts.options, facts.base_model, facts.precision
    accumulation = options.memory.gradient_accumulation_steps
    found: dict[str, object] = {
        # sd-scripts' own word where it does not know its commit: ours is in modelspec.implementation_version
        "ss_sd_scripts_commit_hash": "(unknown)",
        "ss_seed": facts.seed,
        # a rate of 0 for what is not trained: in these files "None" means as ss_learning_rate
        "ss_unet_lr": optimization.learning_rates.modules.get(base_model.family.backbone, 0.0),
        "ss_text_encoder_lr": _text_rates(facts.base_model, optimization.learning_rates),
        "ss_optimizer": optimization.optimizer.full_name,
        "ss_lr_scheduler": optimization.schedule.name,
        "ss_lr_warmup_steps": optimization.schedule.warmup_steps,
        "ss_max_train_steps": facts.duration.steps,
        "ss_num_epochs": facts.duration.epochs,
        "ss_num_batches_per_epoch": facts.order.batches_per_epoch,
        "ss_num_train_images": facts.images.scan.train_samples,
        "ss_num_validation_images": len(facts.images.scan.held_out),
        "ss_num_reg_images": facts.images.scan.reg_samples,
        "ss_mixed_precision": precision.mixed_precision,
        "ss_full_fp16": precision.trained == "fp16",
        "ss_fp8_base": False,
        "ss_fp8_base_unet": False,
        "ss_v2": "v2" in base_model.family.capabilities,
        "ss_base_model_version": base_model.family.versions[base_model.prediction],
        "ss_zero_terminal_snr": base_model.objective.zero_terminal_snr,
        "ss_clip_skip": clip_skip_of(options, base_model),
        "ss_sd_model_name": _file_name(options.model.pretrained_model_name_or_path or ""),
    }
    if options.model.vae:
        found["ss_vae_name"] = _file_name(options.model.vae)
    if not described_by_file(options):
        found["ss_total_batch_size"] = options.dataset.train_batch_size * accumulation
    return {key: str(value) for key, value in found.items()}


def _text_rates(base_model: BaseModel, rates: LearningRates) -> object:
    """One rate, or a list of one for each text encoder where they differ."""
    found = [rates.modules.get(name, 0.0) for name in base_model.family.text_encoders]
    return found[0] if len(set(found)) == 1 else found


def _network(options: AdapterOptions, adapter: AdapterPlan) -> dict[str, str]:
    """The adapter. Where its file or its own module sets the rank, "None" as in sd-scripts."""
    found: dict[str, object] = {"ss_network_module": adapter.module}
    if adapter.settings is not None and not options.dim_from_weights:
        found |= {
            "ss_network_dim": adapter.settings.dim,
            "ss_network_alpha": adapter.settings.alpha or adapter.settings.dim,
        }
    if adapter.arguments:
        found["ss_network_args"] = json.dumps({"dropout": options.network_dropout} | dict(adapter.arguments))
    return {key: str(value) for key, value in found.items()}


def _hashed_files(options: ModelOptions) -> dict[str, Path]:
    """Files to hash, by what stands in their keys. A name on the Hugging Face hub has no hash."""
    named = {"sd_model": options.pretrained_model_name_or_path, "vae": options.vae}
    return {
        kind: path for kind, name in named.items() if name is not None and (path := Path(name).expanduser()).exists()
    }


def _file_name(name: str) -> str:
    """Without the folder that it lies in; what is no path here stays."""
    path = Path(name).expanduser()
    return Path(os.path.abspath(path)).name if path.exists() else name


def _readable(found: dict[str, str]) -> dict[str, str]:
    """Texts as a file can hold them: names of files may have bytes that are no text."""
    return {key: value.encode("utf-8", "replace").decode("utf-8") for key, value in found.items()}


def revision(root: Path = ROOT) -> str:
    """The commit of this program, or "unknown" where it does not lie in a git checkout of its own."""
    git = root / ".git"
    try:
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        branch = head.removeprefix("ref: ")
        if branch != head and (git / branch).is_file():
            head = (git / branch).read_text(encoding="utf-8").strip()
        elif branch != head:
            packed = (git / "packed-refs").read_text(encoding="utf-8").splitlines()
            head = next((line.split()[0] for line in packed if line.endswith(f" {branch}")), "")
    except (OSError, ValueError):
        return "unknown"
    return head if re.fullmatch("[0-9a-f]{40,64}", head) else "unknown"
