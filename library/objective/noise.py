"""The noise of a sample: white noise, offset, pyramid noise and input perturbation.

Each sample draws from its own generators on the CPU, so its noise does not depend on the device, on the number of
processes, or on which samples share its batch.

With n white noise, x0 the (scaled) latents, u uniform in [0, 1) and z, xi standard normal:

    offset        n' = n + o z, z one number for each channel; o = max(0, [u] offset + adaptive |mean of x0|), the
                  mean of each channel (Cross Labs, "Diffusion with offset noise"; kohya's adaptive scale). n' is also
                  the noise that the model has to predict; its variance is 1 + o^2.
    pyramid       see pyramid.py. An offset is added afterwards; with "batch" it is added before the scaling, as in
                  sd-scripts.
    perturbation  x_t = a x0 + s (n' + [u] gamma xi), while the target is still that of n'   (arXiv 2301.11706).

[u] applies with a random strength: one for each sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.objective.pyramid import Pyramid
from library.objective.random_streams import Purpose, Streams

if TYPE_CHECKING:
    from library.options.groups.objective import ObjectiveOptions


@dataclass(frozen=True)
class NoiseShaping:
    """How noise is shaped. By default it is white; 0 and None disable a part.

    The adaptive scale and the random strengths only modify the parts that are enabled.
    """

    offset: float = 0.0
    offset_random_strength: bool = False
    adaptive_scale: float = 0.0
    pyramid: Pyramid | None = None
    perturbation: float = 0.0
    perturbation_random_strength: bool = False

    @classmethod
    def from_options(cls, options: ObjectiveOptions) -> NoiseShaping:
        """The noise shaping of the options."""
        return cls(
            offset=options.noise_offset or 0.0,
            offset_random_strength=options.noise_offset_random_strength,
            adaptive_scale=options.adaptive_noise_scale or 0.0,
            pyramid=Pyramid.from_options(options),
            perturbation=options.ip_noise_gamma or 0.0,
            perturbation_random_strength=options.ip_noise_gamma_random_strength,
        )

    @property
    def needs_streams(self) -> bool:
        """Whether it draws anything besides white noise and shifts."""
        varied = bool(self.offset) and self.offset_random_strength
        return varied or self.pyramid is not None or bool(self.perturbation)

    def shape(self, white: Tensor, shifts: Tensor, streams: Streams, latents: Tensor | None = None) -> Tensor:
        """n' (B, C, h, w) float32, CPU, from `white` noise of that shape and, for an offset, `shifts` z (B, C, 1, 1).

        `latents` (B, C, h, w), scaled, on any device, are needed for an adaptive scale: ValueError without them.
        """
        noise = white
        if self.pyramid is not None and self.pyramid.scaling == "sample":
            noise = self.pyramid.add(noise, streams.generators("pyramid noise"))
        if self.offset:
            noise = noise + self._offsets(streams, latents) * shifts
        if self.pyramid is not None and self.pyramid.scaling == "batch":
            noise = self.pyramid.add(noise, streams.generators("pyramid noise"))
        return noise

    def perturb(self, shape: Sequence[int], streams: Streams) -> Tensor | None:
        """[u] gamma xi for samples of `shape` (C, ...): (B, C, ...) float32, CPU. None if disabled."""
        if not self.perturbation:
            return None
        generators = streams.generators("input noise")
        noise = torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])
        if self.perturbation_random_strength:
            return noise * (_uniform(streams, "input noise strength", noise.dim()) * self.perturbation)
        return noise * self.perturbation

    def _offsets(self, streams: Streams, latents: Tensor | None) -> Tensor | float:
        """o: a number, or a float32 tensor that broadcasts with (B, C, 1, 1)."""
        offset: Tensor | float = self.offset
        if self.offset_random_strength:
            offset = _uniform(streams, "noise offset strength", 4) * self.offset
        if not self.adaptive_scale:
            return offset
        if latents is None:
            raise ValueError("an adaptive noise scale needs the latents")
        means = latents.float().mean(dim=(2, 3), keepdim=True).abs().cpu()
        return (means * self.adaptive_scale + offset).clamp(min=0.0)


WHITE = NoiseShaping()


def draw_white(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Standard normal noise of one sample's `shape` for each generator: (B, ...) float32, CPU."""
    return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])


def _uniform(streams: Streams, purpose: Purpose, dimensions: int) -> Tensor:
    """u of each sample: (B, 1, ...) float32 with `dimensions` axes."""
    values = torch.stack([torch.rand((), generator=generator) for generator in streams.generators(purpose)])
    return values.view(-1, *(1,) * (dimensions - 1))
