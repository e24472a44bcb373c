"""A checkpoint as another kind of file: taken apart and put together tensor by tensor, with no model in memory.

What is written is what `sd_save` writes of a trained model, by the same tables. No torch at module level.
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
from library.checkpoints.prediction_marks import MARKS, declared_prediction, marks
from library.convert import ema_copies
from library.convert.report import some
from library.families.sd.checkpoint_parts import CheckpointParts, split_checkpoint
from library.runtime.imports import work_beside

if TYPE_CHECKING:
    from library.families.family import Family, SaveAs
    from library.objective.process import Prediction

Ema = Literal["drop", "use", "keep"]
FOLDERS = ("diffusers", "diffusers_safetensors")
_SCHEDULE = ("rescale_betas_zero_snr", "timestep_spacing")  # what a folder says of zero terminal SNR, and with it


@dataclass(frozen=True)
class Conversion:
    """What becomes of a checkpoint.

    `dtype` of the weights ("F32", "F16", "BF16"; None: as they are); `vae` another VAE; `ema` what becomes of EMA
    copies: left out, put in place of the weights, or kept (single files alone); `prediction` and `zero_terminal_snr`
    what is said of the model (None: what it says itself); `variant` of a folder's files ("fp16"); `reference` a folder
    whose scheduler and tokenizers are taken; `metadata` of a .safetensors file; `epoch` and `steps` are added to those
    of a .ckpt.
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


def convert(source: Header, family: Family, path: Path, wanted: Conversion) -> tuple[str, ...]:
    """Write the checkpoint to `path` as another file or folder; returns what the user should be told.

    Memory: one tensor, whatever the size of the model. Raises CheckpointError, leaving what was there.
    """
    from library.families.sd import save as sd_save

    header = _prepared(source, wanted)
    reader = TensorReader(header)
    apart = split_checkpoint(family, family.variant, reader, wanted.vae, wanted.prediction)
    zero = apart.zero_terminal_snr if wanted.zero_terminal_snr is None else wanted.zero_terminal_snr
    kept = _kept(source, apart, wanted, zero=zero)
    options = sd_save.SaveOptions(
        wanted.save_as,
        None if wanted.dtype is None else torch_dtype(wanted.dtype),
        wanted.metadata,
        steps=wanted.steps,
        epoch=wanted.epoch,
        variant=wanted.variant,
    )
    with work_beside(), ThreadPoolExecutor(1) as beside:  # importing the packages takes as long as writing gigabytes
        modules = Modules(beside.submit(_modules, str(source.path), family, apart))
        contents = sd_save.Contents(
            parts=apart.parts,
            modules=modules,
            kept=kept,
            tokenizers=family.tokenizer(wanted.reference or header).by_encoder,
            source=header,
            process=family.process,
            prediction=apart.prediction,
            zero_terminal_snr=zero,
        )
        notes = sd_save.write(family.variant, contents, path, options, check=modules.wait)
    reader.close()
    return (*apart.notes, *_told(source, wanted, kept, apart.prediction, zero=zero), *notes)


class Modules(Mapping[str, Any]):
    """Modules of a model on the meta device, made in another thread; asked for one, it waits for them."""

    def __init__(self, made: Future[dict[str, Any]]) -> None:
        self._made = made

    def wait(self) -> None:
        """Wait until they are made; raises what went wrong, such as tensors that are missing."""
        self._made.result()

    def __getitem__(self, part: str) -> Any:
        return self._made.result()[part]

    def __iter__(self) -> Iterator[str]:
        return iter(self._made.result())

    def __len__(self) -> int:
        return len(self._made.result())


def _modules(where: str, family: Family, apart: CheckpointParts) -> dict[str, Any]:
    """The modules without weights. Raises CheckpointError where the tensors are not those of the modules."""
    import torch

    from library.families.sd import load as sd_load

    sd_load.import_packages()
    made = {}
    with torch.device("meta"):
        for part, make in sd_load.makers(family.variant).items():
            made[part] = make(apart.configs[part])
            sd_load.check_tensors(where, part, apart.parts[part], made[part].state_dict())
    return made


def _prepared(source: Header, wanted: Conversion) -> Header:
    """The source as it is to be taken apart: with its EMA copies in place of the weights, or without them; a folder
    without what its scheduler says of a schedule that it is not to have."""
    if wanted.ema == "use":
        source = ema_copies.with_averages(source)
    elif wanted.ema == "keep":
        if wanted.save_as in FOLDERS:
            raise CheckpointError(
                "a diffusers folder has no place for EMA copies. Use them in place of the weights (--ema use), leave "
                "them out (--ema drop), or write one file."
            )
        tensors = {name: info for name, info in source.tensors.items() if not name.startswith(ema_copies.PREFIX)}
        source = replace(source, tensors=tensors)
    scheduler = source.configs.get("scheduler")
    if wanted.reference is not None:
        scheduler = wanted.reference.configs.get("scheduler", scheduler)
    if scheduler and wanted.zero_terminal_snr is False and scheduler.get("rescale_betas_zero_snr"):
        scheduler = {name: value for name, value in scheduler.items() if name not in _SCHEDULE}
    if scheduler is not None and scheduler != source.configs.get("scheduler"):
        source = replace(source, configs={**source.configs, "scheduler": scheduler})
    return source


def _kept(source: Header, apart: CheckpointParts, wanted: Conversion, *, zero: bool) -> dict[str, LazyTensor]:
    """What goes along beside the parts: what the file has, and EMA copies if they stay.

    A prediction that is asked for is marked whatever the kind of file.
    """
    kept = dict(apart.kept)
    if wanted.prediction:
        kept |= marks(apart.prediction, zero_terminal_snr=zero)
    if wanted.ema == "keep":
        reader = TensorReader(source)
        for name in ema_copies.names(source):
            copy = reader.lazy(name)
            kept[name] = copy if wanted.dtype is None or name in ema_copies.NUMBERS else copy.cast(wanted.dtype)
    return kept


def _told(
    source: Header, wanted: Conversion, kept: Mapping[str, LazyTensor], prediction: Prediction, *, zero: bool
) -> Iterator[str]:
    said = declared_prediction(source)
    if wanted.ema == "use":
        yield "the U-Net is that of the EMA copies"
    if wanted.prediction is None and said.prediction is None:
        yield (
            f"{source.path} does not say what its U-Net predicts: epsilon is assumed; "
            "--prediction_type v for a model that predicts v"
        )
    elif wanted.prediction is not None and said.prediction not in (None, wanted.prediction):
        yield f"{source.path} says {said.prediction} ({said.where}); written as {wanted.prediction}"
    if zero and prediction == "epsilon":
        yield "zero terminal SNR with epsilon: where all is noise, predicting it tells nothing; such models predict v"
    lost = sorted(set(kept) - set(MARKS))
    if wanted.save_as in FOLDERS and lost:
        yield f"without a place in a diffusers folder, and left out: {some(lost)}"


def kind_of(path: Path, *, safetensors: bool = True) -> SaveAs | None:
    """What is written to a path: by its ending one file, without one a folder; None for any other ending."""
    endings: dict[str, SaveAs] = {".safetensors": "safetensors", ".ckpt": "ckpt", ".pt": "ckpt", ".pth": "ckpt"}
    endings[""] = "diffusers_safetensors" if safetensors else "diffusers"
    return endings.get(path.suffix.lower())
