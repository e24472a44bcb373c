"""Rules between flags of loss and noise."""

from __future__ import annotations

from library.options.rules.rule_kinds import NoEffect, off

WEIGHTINGS = ("min_snr_gamma", "debiased_estimation_loss", "scale_v_pred_loss_like_noise_pred", "v_pred_like_loss")

NO_EFFECT = (
    *(
        NoEffect(name, off("noise_offset"), "noise_offset is not set")
        for name in ("noise_offset_random_strength", "adaptive_noise_scale")
    ),
    NoEffect("ip_noise_gamma_random_strength", off("ip_noise_gamma"), "ip_noise_gamma is not set"),
    NoEffect("snr_floor", off(*WEIGHTINGS), "no loss weight depends on the SNR"),
)
