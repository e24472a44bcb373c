"""Number formats and attention: what was asked for, what this machine can do, and what is said about the difference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from library.options.mistakes import Mistake

if TYPE_CHECKING:
    import torch

    from library.options.groups.memory import MemoryOptions
    from library.runtime.device import Machine

FloatName = Literal["fp32", "fp16", "bf16"]
MixedPrecision = Literal["no", "fp16", "bf16"]
Attention = Literal["sdpa", "xformers", "mem_eff"]

BYTES: dict[str, int] = {"float": 4, "fp32": 4, "fp16": 2, "bf16": 2}
"""Bytes of one number, by the names that the options use."""


@dataclass(frozen=True)
class Precision:
    """The decision.

    `trained`, `frozen` and `vae` are the formats that the weights of these modules are kept in, `base` that of the
    frozen weights under an adapter. `notes` say what was replaced; under --strict they are `mistakes` instead.
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
        """Whether losses are scaled against underflow of fp16 gradients."""
        return self.mixed_precision == "fp16"

    @property
    def has_fp16_gradients(self) -> bool:
        """Whether gradients themselves are fp16 (full_fp16), which torch's scaler must be told to accept."""
        return self.trained == "fp16"


@dataclass(frozen=True)
class _Replacement:
    asked: str
    taken: str
    why: str

    def note(self) -> str:
        """For the plan."""
        return f"{self.asked}: {self.why}; {self.taken} is used instead"

    def mistake(self) -> Mistake:
        """For --strict."""
        return Mistake(f"{self.asked}: {self.why}", f"ask for {self.taken}, or leave out --strict to have it replaced")


def resolve(options: MemoryOptions, machine: Machine, *, strict: bool = False) -> Precision:
    """Decide formats and attention for a machine.

    What the machine lacks is replaced and noted (fp16 on a CPU: fp32, full_fp16 with it; xformers without CUDA or
    not installed: sdpa), or a mistake under `strict`. Weights of trained modules are fp32 unless full_fp16 or full_bf16
    says otherwise, those of frozen ones have the format of the computation; the VAE is fp32 with no_half_vae.
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
        notes=() if strict else tuple(each.note() for each in replaced),
        mistakes=tuple(each.mistake() for each in replaced) if strict else (),
    )


def _mixed_precision(options: MemoryOptions, machine: Machine, replaced: list[_Replacement]) -> MixedPrecision:
    asked = cast(MixedPrecision, options.mixed_precision or "no")
    if asked == "fp16" and machine.is_cpu:
        flags = "--mixed_precision fp16" + (" and --full_fp16" if options.full_fp16 else "")
        replaced.append(_Replacement(flags, "--mixed_precision no (fp32)", "a CPU does not train in fp16"))
        return "no"
    return asked


def _attention(options: MemoryOptions, machine: Machine, replaced: list[_Replacement]) -> Attention:
    """xformers, then mem_eff_attn, then sdpa, which is also what nothing asked for means."""
    if not options.xformers:
        return "mem_eff" if options.mem_eff_attn and not options.sdpa else "sdpa"
    if machine.kind != "cuda":
        replaced.append(_Replacement("--xformers", "--sdpa", "it needs a CUDA card and there is none here"))
        return "sdpa"
    if not machine.has_xformers:
        replaced.append(_Replacement("--xformers", "--sdpa", "the package is not installed (pip install xformers)"))
        return "sdpa"
    return "xformers"


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a format by the options' names: float or fp32, fp16, bf16. Raises ValueError for others."""
    import torch

    dtypes = {"float": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    if name not in dtypes:
        raise ValueError(f"number formats are {', '.join(dtypes)}, not {name!r}")
    return dtypes[name]
