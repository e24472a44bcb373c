"""What the loss is."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.flag import flag


@dataclass(frozen=True)
class ObjectiveOptions:
    """The loss and the noise."""

    prior_loss_weight: float = flag(
        1.0, "Weight of the loss of regularisation images.", at_least=0, metadata="ss_prior_loss_weight"
    )
    min_snr_gamma: float | None = flag(
        None,
        "Cap the weight of a timestep at gamma / SNR(t), which evens out easy and hard timesteps; 5 is usual, 0 = off.",
        at_least=0,
        zero_is_off=True,
        needs="snr",
        metadata="ss_min_snr_gamma",
    )
    noise_offset: float | None = flag(
        None,
        "Shift the noise of each channel by this times a random number, so that very dark and very bright "
        "images can be learned; 0 = off.",
        at_least=0,
        zero_is_off=True,
        metadata="ss_noise_offset",
    )
