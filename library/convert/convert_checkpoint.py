"""Convert a checkpoint to another kind of file, tensor by tensor, without a model in memory.

Written by the code and tables that save trained models. No torch at module level.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from library.checkpoints.files import TensorReader
from library.checkpoints.header import CheckpointError, Header
from library.checkpoints.lazy import LazyTensor, torch_dtype
from library.checkpoints.prediction_marks import MARKS, declared_prediction, declaring, marks
from library.convert import ema_copies
from library.families.sd.checkpoint_parts import CheckpointParts, other_noise, split_checkpoint
from library.families.sd.configs import check_tensors
from library.messages import counted, listed
from library.runtime.imports import frequent_thread_switches

if TYPE_CHECKING:
    from library.families.family import Family, SaveAs
    from library.objective.process import Prediction

Ema = Literal["drop", "use", "keep"]
FOLDERS = ("diffusers", "diffusers_safetensors")
_SCHEDULE = ("rescale_betas_zero_snr", "timestep_spacing")  # a folder's settings for zero terminal SNR


@dataclass(frozen=True)
class Conversion:
    """The settings of a conversion.

    `dtype`: of the weights ("F32", "F16", "BF16"; None: unchanged). `vae`: another VAE. `ema`: drop EMA copies, use
    them as weights, or keep them (single files only). `prediction` and `zero_terminal_snr`: declared in the target
    (None: as in the source). `variant`: of a folder's files ("fp16"). `reference`: a folder to take scheduler and
    tokenizers from. `metadata`: of a .safetensors file. `epoch` and `steps`: added to those of a .ckpt.
    """

    save_as: SaveAs
    dtype: str | None = None
    vae: Path | None = None
    ema: Ema = "drop"
    prediction: Prediction | None = None
    zero_terminal_snr: bool | None = None
    variant: str = ""
    reference: Header | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    epoch: int = 0
    steps: int = 0


def convert(source: Header, family: Family, path: Path, conversion: Conversion) -> tuple[str, ...]:
    """Write the checkpoint to `path` as another file or folder and return messages for the user.

    Needs the memory of one tensor. Raises CheckpointError; an existing target is unchanged then.
    """
    from library.families.sd import save as sd_save

    header = _prepared(source, family, conversion)
    reader = TensorReader(header)
    split = split_checkpoint(family, family.variant, reader, conversion.vae, conversion.prediction)
    zero = split.zero_terminal_snr if conversion.zero_terminal_snr is None else conversion.zero_terminal_snr
    kept = _kept(source, split, conversion, zero=zero)
    options = sd_save.SaveOptions(
        conversion.save_as,
        None if conversion.dtype is None else torch_dtype(conversion.dtype),
        conversion.metadata,
        steps=conversion.steps,
        epoch=conversion.epoch,
        variant=conversion.variant,
    )
    with (
        frequent_thread_switches(),
        ThreadPoolExecutor(1) as thread,
    ):  # importing the packages takes as long as writing gigabytes
        modules = Modules(thread.submit(_modules, str(source.path), family, split))
        contents = sd_save.Contents(
            parts=split.parts,
            modules=modules,
            kept=kept,
            tokenizers=family.tokenizer(conversion.reference or header).by_encoder,
            source=header,
            process=family.process,
            prediction=split.prediction,
            zero_terminal_snr=zero,
        )
        notes = sd_save.write(family.variant, contents, path, options, check=modules.wait)
    reader.close()
    return (*split.notes, *_notes(source, family, conversion, kept, split.prediction, zero=zero), *notes)


class Modules(Mapping[str, Any]):
    """Modules of a model on the meta device, made in another thread; access waits for them."""

    def __init__(self, future: Future[dict[str, Any]]) -> None:
        self._future = future

    def wait(self) -> None:
        """Wait for the modules; raises the error of the thread, such as missing tensors."""
        self._future.result()

    def __getitem__(self, part: str) -> Any:
        return self._future.result()[part]

    def __iter__(self) -> Iterator[str]:
        return iter(self._future.result())

    def __len__(self) -> int:
        return len(self._future.result())


def _modules(where: str, family: Family, split: CheckpointParts) -> dict[str, Any]:
    """Make the modules without weights. Raises CheckpointError if the tensors do not match them."""
    import torch

    from library.families.sd import load as sd_load

    sd_load.import_packages()
    modules = {}
    with torch.device("meta"):
        for part, make in sd_load.makers(family.variant).items():
            modules[part] = make(split.configs[part])
            check_tensors(where, part, split.parts[part], sd_load.shapes_of(modules[part]))
    return modules


def _prepared(source: Header, family: Family, conversion: Conversion) -> Header:
    """Return the source with the EMA copies handled and the scheduler replaced or without zero terminal SNR."""
    if conversion.ema == "use":
        source = ema_copies.with_averages(source)
    elif conversion.ema == "keep":
        if conversion.save_as in FOLDERS:
            raise CheckpointError(
                "a diffusers folder cannot contain EMA copies. Use them as weights (--ema use), leave them out "
                "(--ema drop), or write a single file."
            )
        tensors = {name: info for name, info in source.tensors.items() if not name.startswith(ema_copies.PREFIX)}
        source = replace(source, tensors=tensors)
    if conversion.prediction is not None and other_noise(family, source):
        source = declaring(source, conversion.prediction)  # the user corrects the file
    scheduler = source.configs.get("scheduler")
    if conversion.reference is not None:
        scheduler = conversion.reference.configs.get("scheduler", scheduler)
    if scheduler and conversion.zero_terminal_snr is False and scheduler.get("rescale_betas_zero_snr"):
        scheduler = {name: value for name, value in scheduler.items() if name not in _SCHEDULE}
    if scheduler is not None and scheduler != source.configs.get("scheduler"):
        source = replace(source, configs={**source.configs, "scheduler": scheduler})
    return source


def _kept(source: Header, split: CheckpointParts, conversion: Conversion, *, zero: bool) -> dict[str, LazyTensor]:
    """Return the tensors written besides the parts: those of the file, and EMA copies if kept.

    A prediction type set by the user is marked in every kind of file.
    """
    kept = dict(split.kept)
    if conversion.prediction:
        kept |= marks(split.prediction, zero_terminal_snr=zero)
    if conversion.ema == "keep":
        reader = TensorReader(source)
        for name in ema_copies.names(source):
            copy = reader.lazy(name)
            kept[name] = copy if conversion.dtype is None or name in ema_copies.NUMBERS else copy.cast(conversion.dtype)
    return kept


def _notes(
    source: Header,
    family: Family,
    conversion: Conversion,
    kept: Mapping[str, LazyTensor],
    prediction: Prediction,
    *,
    zero: bool,
) -> Iterator[str]:
    declared = declared_prediction(source)
    if conversion.ema == "use":
        yield "the EMA copies are used as the U-Net's weights"
    if conversion.prediction is None and declared.prediction is None:
        yield f"{source.path} does not declare its prediction type: epsilon is assumed; --prediction_type v sets v"
    said = listed(other_noise(family, source)) or declared.prediction
    if conversion.prediction is not None and said not in (None, conversion.prediction):
        where = declared.where or "its scheduler_config.json"
        yield f"{source.path} declares {said} ({where}); written as {conversion.prediction}"
    if source.scaled and conversion.dtype is None:
        scaled = f"{counted(len(source.scaled), 'weight')} in fp8 with scales"
        yield f"{scaled} are written as float32; fp16 takes half the space"
    if zero and prediction == "epsilon":
        yield "zero terminal SNR with epsilon: at pure noise it carries no information; such models should predict v"
    lost = sorted(set(kept) - set(MARKS))
    if conversion.save_as in FOLDERS and lost:
        yield f"left out, as diffusers folders cannot contain them: {listed(lost)}"


def kind_of(path: Path, *, safetensors: bool = True) -> SaveAs | None:
    """Return the format for a path: by its extension, or a folder if there is none; None for other extensions."""
    formats: dict[str, SaveAs] = {".safetensors": "safetensors", ".ckpt": "ckpt", ".pt": "ckpt", ".pth": "ckpt"}
    formats[""] = "diffusers_safetensors" if safetensors else "diffusers"
    return formats.get(path.suffix.lower())
