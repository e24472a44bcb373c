"""Rules between the flags of loss and noise."""

from __future__ import annotations

from itertools import combinations

from library.options.rules.rule_kinds import Excludes, NoEffect, off

WEIGHTINGS = ("min_snr_gamma", "debiased_estimation_loss", "scale_v_pred_loss_like_noise_pred", "v_pred_like_loss")

EXCLUDES = tuple(
    Excludes((one,), other, "each is a weight by timestep, and their product is none of both", "keep one of the two")
    for one, other in combinations(WEIGHTINGS, 2)
)

NO_EFFECT = (
    *(
        NoEffect(name, off("noise_offset"), "no noise is shifted (noise_offset is not set)")
        for name in ("noise_offset_random_strength", "adaptive_noise_scale")
    ),
    NoEffect(
        "ip_noise_gamma_random_strength", off("ip_noise_gamma"), "no input is perturbed (ip_noise_gamma is not set)"
    ),
    NoEffect("snr_floor", off(*WEIGHTINGS), "no weight by timestep depends on the SNR"),
)
