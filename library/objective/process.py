"""Forward (noising) processes: noising, the model's target, and denoising.

`ForwardProcess` is the interface for training and sampling; `HasSnr` adds what SNR weightings need. torch is imported
inside functions only: families define their process as data, and the plan must not wait for torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from library.options.groups.objective import ObjectiveOptions

Prediction = Literal["epsilon", "v"]
"""What the model predicts: the noise n ("epsilon"), or the velocity along the process's path ("v"), which is
a_t n - s_t x0 for a variance-preserving process (arXiv 2202.00512, appendix D)."""


class ForwardProcess(Protocol):
    """How clean samples become noise over the timesteps 0 .. `timesteps` - 1, and how a model's output reverses it.

    All methods take int64 timesteps (B,) on any device and samples (B, ...), and return float32 of the samples' shape
    and device. They raise ValueError for a prediction that the process does not support.
    """

    @property
    def timesteps(self) -> int:
        """T: timesteps run from 0 to T-1."""

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t: the clean samples `x0` with the noise of timestep t."""

    def implied_noise(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise with which the clean samples `x0` are at `x_t`: the inverse of add_noise."""

    def target(self, x0: Tensor, noise: Tensor, t: Tensor, prediction: Prediction) -> Tensor:
        """The target of the model's prediction at x_t."""

    def to_x0(self, x_t: Tensor, output: Tensor, t: Tensor, prediction: Prediction) -> Tensor:
        """The clean samples that the model's output at x_t implies."""

    def step(self, x_t: Tensor, output: Tensor, t: Tensor, t_next: Tensor, prediction: Prediction) -> Tensor:
        """x at the less noisy `t_next`, from the output at x_t, without new noise; -1 is the clean sample."""

    def scheduler_arguments(self) -> dict[str, Any]:
        """The arguments of diffusers' schedulers for this process."""


@runtime_checkable
class HasSnr(Protocol):
    """A process x_t = a_t x0 + s_t n with a signal-to-noise ratio."""

    def signal(self, t: Tensor, device: torch.device | None = None) -> Tensor:
        """a_t: (B,) float32 on `device` (that of `t` if not given)."""

    def noise(self, t: Tensor, device: torch.device | None = None) -> Tensor:
        """s_t: (B,) float32 on `device` (that of `t` if not given)."""

    def snr(self, t: Tensor, device: torch.device | None = None) -> Tensor:
        """The signal-to-noise ratio a_t^2 / s_t^2: (B,) float32 on `device` (that of `t` if not given)."""


def require_snr(process: ForwardProcess, feature: str) -> HasSnr:
    """The process as one with an SNR. Raises ValueError that names the `feature` that needs it if there is none."""
    if not isinstance(process, HasSnr):
        raise ValueError(f"{feature} needs a signal-to-noise ratio, which {type(process).__name__} does not have")
    return process


@dataclass(frozen=True)
class VariancePreserving:
    """The discrete process of DDPM: x_t = a_t x0 + s_t n with a_t = sqrt(abar_t), s_t = sqrt(1 - abar_t)
    (arXiv 2006.11239, equation 4). `alphas_cumprod[t]` is abar_t for t = 0 .. T-1, in float64.

    Tables are computed in float64 and rounded to float32 once. t = -1 is the clean sample: abar = 1.
    `scaled_linear_betas`: the first and last beta if the table is a scaled-linear schedule, for diffusers.
    """

    alphas_cumprod: tuple[float, ...] = field(repr=False)
    scaled_linear_betas: tuple[float, float] | None = None

    @classmethod
    def scaled_linear(
        cls, timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
    ) -> VariancePreserving:
        """The schedule of Stable Diffusion 1, 2 and XL: sqrt(beta) grows linearly from sqrt(start) to sqrt(end)."""
        first, last = math.sqrt(beta_start), math.sqrt(beta_end)
        table = []
        product = 1.0
        for k in range(timesteps):
            beta = (first + k / (timesteps - 1) * (last - first)) ** 2
            product *= 1.0 - beta
            table.append(product)
        return cls(tuple(table), (beta_start, beta_end))

    def zero_terminal(self) -> VariancePreserving:
        """The process with zero terminal SNR: its last timestep is pure noise   (arXiv 2305.08891, algorithm 1).

        With q = sqrt(abar): q <- (q - q_last) q_first / (q_first - q_last). The first timestep is unchanged, the last
        one gets exactly abar = 0, where only v-prediction can be trained. A process that has zero terminal SNR is
        returned unchanged.
        """
        roots = [math.sqrt(product) for product in self.alphas_cumprod]
        first, last = roots[0], roots[-1]
        if last == 0.0:
            return self
        table = [((root - last) * first / (first - last)) ** 2 for root in roots[:-1]]
        return VariancePreserving((*table, 0.0))

    @property
    def timesteps(self) -> int:
        """T: timesteps run from 0 to T-1."""
        return len(self.alphas_cumprod)

    def scheduler_arguments(self) -> dict[str, Any]:
        """The arguments of diffusers' schedulers. They compute a scaled-linear schedule themselves, in float32: betas
        from the table, beta_t = 1 - abar_t / abar_(t-1), would differ in the last bit."""
        betas: dict[str, Any]
        if self.scaled_linear_betas is not None:
            first, last = self.scaled_linear_betas
            betas = {"beta_start": first, "beta_end": last, "beta_schedule": "scaled_linear"}
        else:
            products = zip((1.0, *self.alphas_cumprod), self.alphas_cumprod, strict=False)
            betas = {"trained_betas": [1.0 - product / before for before, product in products]}
        return {**betas, "num_train_timesteps": self.timesteps}

    @cached_property
    def _tables(self) -> dict[str, Tensor]:
        """a_t, s_t and their ratio squared from t = -1 on, (3, T + 1) float32, by device. They are computed in float64
        on the CPU, and only then rounded and moved, once: a step looks up its timesteps without waiting."""
        import torch

        product = torch.tensor((1.0, *self.alphas_cumprod), dtype=torch.float64)
        return {"cpu": torch.stack((product.sqrt(), (1.0 - product).sqrt(), product / (1.0 - product))).float()}

    def _look_up(self, row: int, t: Tensor, device: torch.device | None) -> Tensor:
        from library.runtime.transfers import upload

        device = device or t.device
        table = self._tables.get(str(device))
        if table is None:
            table = self._tables[str(device)] = self._tables["cpu"].to(device)
        return table[row][upload(t, device) + 1]

    def signal(self, t: Tensor, device: torch.device | None = None) -> Tensor:
        """a_t, the share of the clean sample: (B,) float32 on `device` (that of `t` if not given)."""
        return self._look_up(0, t, device)

    def noise(self, t: Tensor, device: torch.device | None = None) -> Tensor:
        """s_t, the share of the noise: (B,) float32 on `device` (that of `t` if not given)."""
        return self._look_up(1, t, device)

    def snr(self, t: Tensor, device: torch.device | None = None) -> Tensor:
        """The signal-to-noise ratio abar_t / (1 - abar_t): (B,) float32 on `device` (that of `t` if not given)."""
        return self._look_up(2, t, device)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = a_t x0 + s_t n, of the shape of `x0` (B, ...), float32."""
        signal, level = self._shares(t, x0)
        return signal * x0.float() + level * noise.float()

    def implied_noise(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """n = (x_t - a_t x0) / s_t, of the shape of `x0`, float32. s_t > 0 at every timestep."""
        signal, level = self._shares(t, x0)
        return (x_t.float() - signal * x0.float()) / level

    def target(self, x0: Tensor, noise: Tensor, t: Tensor, prediction: Prediction) -> Tensor:
        """The target of the model's prediction at x_t: n, or a_t n - s_t x0. Of the shape of `x0`, float32.

        Raises ValueError for an unknown prediction.
        """
        if prediction == "epsilon":
            return noise.float()
        _check_prediction(prediction)
        signal, level = self._shares(t, x0)
        return signal * noise.float() - level * x0.float()

    def to_x0(self, x_t: Tensor, output: Tensor, t: Tensor, prediction: Prediction) -> Tensor:
        """The clean sample that the model's output at x_t implies: (x_t - s n) / a, or a x_t - s v. Float32.

        Raises ValueError for an unknown prediction.
        """
        signal, level = self._shares(t, x_t)
        if prediction == "epsilon":
            return (x_t.float() - level * output.float()) / signal
        _check_prediction(prediction)
        return signal * x_t.float() - level * output.float()

    def step(self, x_t: Tensor, output: Tensor, t: Tensor, t_next: Tensor, prediction: Prediction) -> Tensor:
        """x at `t_next` (-1: the clean sample), deterministic: DDIM with eta = 0   (arXiv 2010.02502, equation 12).

        Mixes the clean sample and the noise that the output implies as at `t_next`. Raises ValueError for an unknown
        prediction.
        """
        x0 = self.to_x0(x_t, output, t, prediction)
        if prediction == "epsilon":
            return self.add_noise(x0, output, t_next)
        signal, level = self._shares(t, x_t)
        return self.add_noise(x0, signal * output.float() + level * x_t.float(), t_next)

    def _shares(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(a_t, s_t), each shaped (B, 1, 1, ...) to multiply `like` (B, ...), on its device."""
        shape = (-1,) + (1,) * (like.dim() - 1)
        return self.signal(t, like.device).view(shape), self.noise(t, like.device).view(shape)


def resolve_process(options: ObjectiveOptions, process: ForwardProcess) -> ForwardProcess:
    """The family's process with --zero_terminal_snr applied, for training and for sampling.

    Raises ValueError for a zero terminal SNR with a process that is not variance-preserving.
    """
    if not options.zero_terminal_snr:
        return process
    if not isinstance(process, VariancePreserving):
        raise ValueError(f"zero_terminal_snr needs a variance-preserving process, not {type(process).__name__}")
    return process.zero_terminal()


def _check_prediction(prediction: str) -> None:
    if prediction != "v":
        raise ValueError(f'the prediction must be "epsilon" or "v", not {prediction!r}')
