"""Options of a quantised base model under an adapter."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.flag import Script, flag

NO_CHANGE = "no_change"
FORMATS = (
    NO_CHANGE,
    *("int8", "int4", "nf4", "fp8"),
    *("int8-quanto", "int4-quanto", "int2-quanto", "fp8-quanto", "int8-torchao", "fp8-torchao", "nf4-bnb"),
)
"""The values of --base_model_precision. The short names stand for one package each (training/quantised/formats.py)."""
_ADAPTERS: Script = "train_network.py"


def _text_encoder(number: int) -> str | None:
    text: str | None = flag(
        None,
        f"Format of text encoder {number} under an adapter, as base_model_precision. Not set = {NO_CHANGE}, or fp8 with"
        " fp8_base.",
        choices=FORMATS,
        script=_ADAPTERS,
    )
    return text


@dataclass(frozen=True)
class QuantisationOptions:
    """How the frozen weights of the base model are stored while an adapter is trained."""

    base_model_precision: str = flag(
        NO_CHANGE,
        "Store the frozen U-Net under an adapter in 8 or 4 bits; trained weights stay fp32, and the saved file fits the"
        " full model. int8 hardly changes it, nf4 is the smallest to be recommended.",
        choices=FORMATS,
        script=_ADAPTERS,
    )
    text_encoder_1_precision: str | None = _text_encoder(1)
    text_encoder_2_precision: str | None = _text_encoder(2)
    text_encoder_3_precision: str | None = _text_encoder(3)
    fp8_base: bool = flag(
        False,
        "Same as base_model_precision fp8, for the text encoders too.",
        script=_ADAPTERS,
        metadata="ss_fp8_base",
    )
    fp8_base_unet: bool = flag(
        False,
        "Same as base_model_precision fp8: the U-Net only, even with fp8_base.",
        script=_ADAPTERS,
        metadata="ss_fp8_base_unet",
    )
    quantise_probe: bool = flag(
        False,
        "Before the first step, list the layers whose output changes most by quantisation, on one batch; then train."
        " Keeps the full weights in main memory until then.",
        script=_ADAPTERS,
        may_change_on_resume=True,
    )
