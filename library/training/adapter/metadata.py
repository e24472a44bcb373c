"""Metadata of an adapter's file: ss_* as sd-scripts writes them, and modelspec.*.

Values are texts made by str(). They describe the run itself (drawn seed, effective learning rates, precision on this
machine), where sd-scripts repeats the command line.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
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
    """The metadata of all files of one run. What all files share is computed once, by the constructor.

    Raises CheckpointError for a --metadata_thumbnail that cannot be read.
    """

    def __init__(self, facts: RunFacts, optimization: Optimization, adapter: AdapterPlan) -> None:
        self._facts = facts
        started = time_of_saving().timestamp()
        session = python_random(facts.seed, "session", repr(started)).getrandbits(_SESSION_BITS)
        self._shared = {
            **_flags(facts.options),
            **_decided(facts, optimization),
            "ss_session_id": str(session),
            "ss_training_started_at": str(started),
            **_network(facts.options.adapter, adapter),
        }
        # counting a large dataset takes a while, and --no_metadata does not need it
        if not facts.options.adapter.no_metadata:
            self._shared |= dataset_metadata(facts.options, facts.images)
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
        """Hash the files of the model in threads, so that the first save does not wait for it."""
        if not self._facts.options.adapter.no_metadata:
            for hashes in self._hashes.values():
                hashes.begin()

    def at(self, step: int, about: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
        """Metadata of a file that is written now, after `step` optimizer steps. ss_epoch counts finished epochs; at the
        end of the run also an incomplete last one. `about`: of an average, with --no_metadata too."""
        facts, now = self._facts, time_of_saving()
        spec = self._spec | dict(about) | {"modelspec.date": now.replace(microsecond=0).isoformat()}
        if facts.options.adapter.no_metadata:
            return _as_utf8({key: self._shared[key] for key in ADAPTER_MINIMUM if key in self._shared} | spec)
        is_final = step >= facts.duration.steps
        return _as_utf8(
            self._shared
            | self._file_hashes()
            | {
                "ss_training_finished_at": str(now.timestamp()),
                "ss_steps": str(step),
                "ss_epoch": str(facts.duration.epochs if is_final else facts.order.position(step)[0] - 1),
            }
            | spec
        )

    def _file_hashes(self) -> dict[str, str]:
        metadata: dict[str, str] = {}
        for kind, hashes in self._hashes.items():
            value = hashes.value()
            if value is not None:
                metadata |= {f"ss_{kind}_hash": value.short, f"ss_new_{kind}_hash": value.whole}
        return metadata


def _flags(options: TrainOptions) -> dict[str, str]:
    """The values of flags, "None" if they are not set."""
    values = flag_metadata(options)
    by_dataset = described_by_file(options)  # settings per dataset are in ss_datasets
    return {
        flag.metadata: values.get(flag.metadata, "None")
        for flag in FLAGS.values()
        if flag.metadata and flag.metadata.startswith("ss_") and not (by_dataset and flag.per_dataset)
    }


def _decided(facts: RunFacts, optimization: Optimization) -> dict[str, str]:
    """The decisions of the plan."""
    options, base_model, precision = facts.options, facts.base_model, facts.precision
    metadata: dict[str, object] = {
        # what sd-scripts writes if it does not know its commit; ours is in modelspec.implementation_version
        "ss_sd_scripts_commit_hash": "(unknown)",
        "ss_seed": facts.seed,
        # 0 if it is not trained: in these files "None" means the value of ss_learning_rate
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
        "ss_v2": "v2" in base_model.family.capabilities,
        "ss_base_model_version": base_model.family.versions[base_model.prediction],
        "ss_zero_terminal_snr": base_model.objective.zero_terminal_snr,
        "ss_clip_skip": clip_skip_of(options, base_model),
        "ss_sd_model_name": _file_name(options.model.pretrained_model_name_or_path or ""),
    }
    if options.model.vae:
        metadata["ss_vae_name"] = _file_name(options.model.vae)
    if not described_by_file(options):
        metadata["ss_total_batch_size"] = options.dataset.train_batch_size * facts.window
    return {key: str(value) for key, value in metadata.items()}


def _text_rates(base_model: BaseModel, rates: LearningRates) -> object:
    """One learning rate, or a list with one for each text encoder if they differ."""
    text_rates = [rates.modules.get(name, 0.0) for name in base_model.family.text_encoders]
    return text_rates[0] if len(set(text_rates)) == 1 else text_rates


def _network(options: AdapterOptions, adapter: AdapterPlan) -> dict[str, str]:
    """The settings of the adapter; "None" if its file or a third-party module sets the rank, as in sd-scripts."""
    metadata: dict[str, object] = {"ss_network_module": adapter.module}
    if adapter.settings is not None and not options.dim_from_weights:
        metadata |= {
            "ss_network_dim": adapter.settings.dim,
            "ss_network_alpha": adapter.settings.alpha or adapter.settings.dim,
        }
    if adapter.arguments:
        metadata["ss_network_args"] = json.dumps({"dropout": options.network_dropout} | dict(adapter.arguments))
    return {key: str(value) for key, value in metadata.items()}


def _hashed_files(options: ModelOptions) -> dict[str, Path]:
    """Files to hash, by the part of their metadata keys. A model of the Hugging Face Hub has no hash."""
    named = {"sd_model": options.pretrained_model_name_or_path, "vae": options.vae}
    return {
        kind: path for kind, name in named.items() if name is not None and (path := Path(name).expanduser()).exists()
    }


def _file_name(name: str) -> str:
    """The file name of a path; a name that is no existing path is returned unchanged."""
    path = Path(name).expanduser()
    return Path(os.path.abspath(path)).name if path.exists() else name


def _as_utf8(metadata: dict[str, str]) -> dict[str, str]:
    """Replace what UTF-8 cannot encode: file names may contain bytes that are no text."""
    return {key: value.encode("utf-8", "replace").decode("utf-8") for key, value in metadata.items()}


def revision(root: Path = ROOT) -> str:
    """The commit of this program, or "unknown" outside a git checkout."""
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
