"""The passes of a variant of Stable Diffusion over shapes, for the plan's prediction of memory. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from library.families.clip.footprint import text_encoder
from library.families.sd import footprint
from library.families.sd.variant import Variant
from library.footprint.model import Conditions, Footprint
from library.footprint.module import Module
from library.footprint.tape import Tensor


def footprint_of(variant: Variant) -> Footprint:
    """The passes of a variant's modules."""
    return Footprint(
        encode_text=partial(_encode_text, variant),
        predict=partial(_predict, variant),
        encode_images=footprint.encode,
        decode_latents=footprint.decode,
    )


def _encode_text(
    variant: Variant, encoders: Mapping[str, Module], ids: Mapping[str, Tensor], *, skipped: int = 0
) -> Conditions:
    """Encoders with sizes beside them (SDXL) give the states before their last layer, without the final norm."""
    found = {}
    for text in variant.texts:
        batch, chunks, length = ids[text.name].shape
        rows = Tensor((batch * chunks, length), ids[text.name].width, ids[text.name].block)
        found[text.name] = text_encoder(
            encoders[text.name],
            rows,
            activation=text.activation,
            skipped=1 if variant.ids else skipped,
            normalised=not variant.ids,
            projects=text.projects,
        )
    tape = encoders[variant.texts[0].name].tape
    batch, chunks, length = ids[variant.texts[0].name].shape
    joined = chunks * (length - 2) + 2
    width = sum(states.shape[-1] for states in found.values())
    states = list(found.values())
    together = states[0] if len(states) == 1 and chunks == 1 else tape.join(states, (batch, joined, width))
    if not variant.ids:
        return {"states": together}
    last = encoders[variant.texts[-1].name]
    return {"states": together, "pooled": tape.new((batch, last.tensors["text_projection.weight"][0]), together.width)}


def _predict(variant: Variant, backbone: Module, noisy: Tensor, conditioning: Conditions) -> Tensor:
    return footprint.unet(
        backbone,
        noisy,
        conditioning["states"],
        pooled=conditioning.get("pooled"),
        ids=variant.ids,
        heads=variant.heads,
        head_size=variant.head_size,
    )
