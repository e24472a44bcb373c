"""Plan the pictures of a preview that is being drawn: --validation_preview_steps. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.messages import counted
from library.sampling.tiny_autoencoder import check_tiny

if TYPE_CHECKING:
    from library.families.family import Family
    from library.options.mistakes import Mistakes
    from library.options.train_options import TrainOptions

FOLDER = "so_far"
"""In the folder of preview images."""


@dataclass(frozen=True)
class SoFarPlan:
    """Every how many sampler steps a picture is made, and by which decoder: `tae`, by the tiny autoencoder at `tae`;
    `linear`, by a linear map that is fitted to the VAE; or `vae`. `targets`: where pictures go besides the folder."""

    every: int
    decoder: str
    tae: Path | None
    targets: frozenset[str]

    def __str__(self) -> str:
        """A line of the plan."""
        by = {"tae": f"by {self.tae}", "linear": "by a linear map fitted to the VAE", "vae": "by the VAE"}[self.decoder]
        also = "".join(f", to {target} too" for target in sorted(self.targets))
        return f"and the predicted clean image every {counted(self.every, 'sampler step')}, decoded {by}{also}"


def decide_so_far(options: TrainOptions, family: Family, mistakes: Mistakes) -> SoFarPlan | None:
    """The plan of --validation_preview_steps, or None without. Adds mistakes."""
    chosen = options.preview
    decoder = chosen.preview_decoder or ("linear" if chosen.preview_tae is None else "tae")
    if decoder == "tae" and chosen.preview_tae is None:
        mistakes.add(
            "--preview_decoder tae: there is no tiny autoencoder", "name one with --preview_tae, or use linear"
        )
    if chosen.preview_tae is not None:
        mistake = check_tiny(chosen.preview_tae, family.latent.channels)
        mistakes.extend([] if mistake is None else [mistake])
    targets = {"tensorboard", "webhook"} if chosen.preview_target == "all" else {chosen.preview_target or "folder"}
    if chosen.validation_preview_steps is None:
        return None
    return SoFarPlan(chosen.validation_preview_steps, decoder, chosen.preview_tae, frozenset(targets - {"folder"}))
