"""Resolve number formats and attention from the options and the capabilities of the machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from library.messages import pip_install
from library.options.mistakes import Mistake
from library.runtime.abilities import computes_bf16

if TYPE_CHECKING:
    import torch

    from library.options.groups.memory import MemoryOptions
    from library.runtime.device import Machine

FloatName = Literal["fp32", "fp16", "bf16"]
MixedPrecision = Literal["no", "fp16", "bf16"]
Attention = Literal["sdpa", "xformers", "mem_eff"]

BYTES: dict[str, int] = {"float": 4, "fp32": 4, "fp16": 2, "bf16": 2}
"""Bytes per number, by the names used in options."""


@dataclass(frozen=True)
class Precision:
    """The number formats and the attention of a run.

    `trained`, `frozen` and `vae` are the dtypes of these modules' weights, `base` that of the frozen weights under an
    adapter. `notes` report replaced settings; with --strict they are `mistakes` instead.
    """

    mixed_precision: MixedPrecision
    trained: FloatName
    frozen: FloatName
    vae: FloatName
    base: FloatName
    attention: Attention
    notes: tuple[str, ...] = ()
    mistakes: tuple[Mistake, ...] = ()

    @property
    def uses_scaler(self) -> bool:
        """Whether the loss is scaled to prevent underflow of fp16 gradients."""
        return self.mixed_precision == "fp16"

    @property
    def has_fp16_gradients(self) -> bool:
        """Whether gradients are fp16 (full_fp16), which torch's scaler accepts only if configured to."""
        return self.trained == "fp16"


@dataclass(frozen=True)
class _Replacement:
    setting: str
    replacement: str
    reason: str

    def note(self) -> str:
        """For the plan."""
        return f"{self.setting}: {self.reason}; using {self.replacement} instead"

    def mistake(self) -> Mistake:
        """For --strict."""
        return Mistake(
            f"{self.setting}: {self.reason}", f"set {self.replacement}, or remove --strict to have it replaced"
        )


def resolve(options: MemoryOptions, machine: Machine, *, strict: bool = False) -> Precision:
    """Resolve formats and attention for a machine.

    Unsupported settings are replaced with a note (fp16 and full_fp16 on a CPU: fp32; xformers without CUDA or not
    installed: sdpa), or are mistakes with `strict`. Weights of trained modules are fp32 unless full_fp16 or full_bf16
    is set, those of frozen modules have the compute dtype; the VAE is fp32 with no_half_vae.
    """
    replaced: list[_Replacement] = []
    mixed = _mixed_precision(options, machine, replaced)
    attention = _attention(options, machine, replaced)
    computed: FloatName = "fp32" if mixed == "no" else mixed
    full = (options.full_fp16 and mixed == "fp16") or (options.full_bf16 and mixed == "bf16")
    return Precision(
        mixed_precision=mixed,
        trained=computed if full else "fp32",
        frozen=computed,
        vae="fp32" if options.no_half_vae else computed,
        base=cast(FloatName, options.base_precision) if computed == "fp32" else computed,
        attention=attention,
        notes=(*_slow_format(mixed, machine), *(() if strict else (replacement.note() for replacement in replaced))),
        mistakes=tuple(replacement.mistake() for replacement in replaced) if strict else (),
    )


def _mixed_precision(options: MemoryOptions, machine: Machine, replaced: list[_Replacement]) -> MixedPrecision:
    requested = cast(MixedPrecision, options.mixed_precision or "no")
    if requested == "fp16" and machine.is_cpu:
        flags = "--mixed_precision fp16" + (" and --full_fp16" if options.full_fp16 else "")
        replaced.append(_Replacement(flags, "--mixed_precision no (fp32)", "fp16 training is not supported on a CPU"))
        return "no"
    return requested


def _slow_format(mixed: MixedPrecision, machine: Machine) -> tuple[str, ...]:
    """A note if the GPU has to convert for each operation."""
    if mixed != "bf16" or computes_bf16(machine) is not False:
        return ()
    return (
        f"--mixed_precision bf16: {machine.name} has no arithmetic for it, which makes it slow; fp16 is faster there",
    )


def _attention(options: MemoryOptions, machine: Machine, replaced: list[_Replacement]) -> Attention:
    """xformers, else mem_eff_attn, else sdpa (the default)."""
    if not options.xformers:
        return "mem_eff" if options.mem_eff_attn and not options.sdpa else "sdpa"
    if machine.kind != "cuda":
        replaced.append(_Replacement("--xformers", "--sdpa", "it needs a CUDA GPU, and none was found"))
        return "sdpa"
    if not machine.has_xformers:
        replaced.append(
            _Replacement("--xformers", "--sdpa", f"the package is not installed ({pip_install('xformers')})")
        )
        return "sdpa"
    return "xformers"


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of an option value: float or fp32, fp16, bf16. Raises ValueError for others."""
    import torch

    dtypes = {"float": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    if name not in dtypes:
        raise ValueError(f"unknown number format {name!r}, must be one of {', '.join(dtypes)}")
    return dtypes[name]
