"""Which model a separate VAE is for. All VAEs of Stable Diffusion have the same shapes, but their latents are scaled by
0.18215 (1.x, 2.x) or 0.13025 (XL and its refiner): with the other factor a model is trained on wrong latents."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from library.checkpoints.files import sha256
from library.checkpoints.header import CheckpointError, Header
from library.checkpoints.tables.published_vaes import LARGEST, SMALLEST, VAES, VaeKind

if TYPE_CHECKING:
    from library.checkpoints.vae_file import VaeFile
    from library.families.family import Family

SCALES: dict[VaeKind, float] = {"sd": 0.18215, "sdxl": 0.13025}
_TITLES: dict[VaeKind, str] = {"sd": "Stable Diffusion 1.x or 2.x", "sdxl": "Stable Diffusion XL"}
_ARCHITECTURE = "modelspec.architecture"


def check_kind(vae: VaeFile, family: Family) -> None:
    """Raise CheckpointError if a VAE is known to be for a model with another scale of latents. A folder's config.json
    is compared elsewhere."""
    kind, reason = vae_kind(vae.header)
    if kind is not None and SCALES[kind] != family.latent.scale:
        raise CheckpointError(
            f"{vae.header.path}: is a VAE of {_TITLES[kind]} (by {reason}). Its latents are scaled by {SCALES[kind]}, "
            f"those of {family.title} by {family.latent.scale}. Give a VAE for this model, or remove the flag."
        )


def vae_kind(header: Header) -> tuple[VaeKind | None, str]:
    """Return the kind of a VAE file and the reason; None if nothing says so.

    By the rest of a whole model, by its metadata, else by the SHA-256 of published files.
    """
    names = header.tensors
    if any(name.startswith(("conditioner.embedders.", "model.diffusion_model.label_emb.")) for name in names):
        return "sdxl", "the model in the file"
    if any(name.startswith("cond_stage_model.") for name in names):
        return "sd", "the model in the file"
    architecture = header.metadata.get(_ARCHITECTURE, "")
    if architecture.startswith(("stable-diffusion-xl", "stable-diffusion-v")):
        return "sdxl" if architecture.startswith("stable-diffusion-xl") else "sd", f"{_ARCHITECTURE} in its metadata"
    files = {place.file for place in header.places.values()}
    kind = _published(files.pop()) if len(files) == 1 else None
    return kind, "its SHA-256" if kind else ""


def _published(file: Path) -> VaeKind | None:
    facts = file.stat()
    if not SMALLEST <= facts.st_size <= LARGEST:
        return None
    return VAES.get(_hash(file, facts.st_size, facts.st_mtime_ns))


@lru_cache(maxsize=4)
def _hash(file: Path, size: int, changed: int) -> str:
    """The SHA-256 of a file in this state: the plan asks for it, and loading again, and it takes up to a second."""
    return sha256(file)
