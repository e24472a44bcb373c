"""Forward (noising) processes: what goes into the network, what its output means, and the way back.

`ForwardProcess` is all that training and sampling need of one; `HasSnr` is what loss weights by SNR need beside it.
torch is imported inside the functions only: a family states its process as data, and plans must not wait for torch.
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
"""What a network's output means: the noise n ("epsilon"), or the velocity along the process's path ("v"), which is
a_t n - s_t x0 for a variance-preserving one (arXiv 2202.00512, appendix D)."""


class ForwardProcess(Protocol):
    """How clean samples become noise over the timesteps 0 .. `timesteps` - 1, and how a network leads back.

    All methods take int64 timesteps (B,) on any device and samples (B, ...), and give float32 of the shape and on the
    device of these. They raise ValueError for a prediction that the process does not know.
    """

    @property
    def timesteps(self) -> int:
        """T: timesteps run from 0 to T-1."""

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t: the clean samples `x0` with as much of the noise as timestep t has."""

    def target(self, x0: Tensor, noise: Tensor, t: Tensor, prediction: Prediction) -> Tensor:
        """What the network should answer to x_t."""

    def to_x0(self, x_t: Tensor, output: Tensor, t: Tensor, prediction: Prediction) -> Tensor:
        """The clean samples that an output at x_t amounts to."""

    def step(self, x_t: Tensor, output: Tensor, t: Tensor, t_next: Tensor, prediction: Prediction) -> Tensor:
        """x at `t_next`, which is less noisy, by the output at x_t and without new noise; -1 is the clean sample."""

    def scheduler_arguments(self) -> dict[str, Any]:
        """The process as arguments of diffusers' schedulers."""


@runtime_checkable
class HasSnr(Protocol):
    """A process whose noise can be told as shares a_t of the sample and s_t of the noise, and their ratio."""

    def signal(self, t: Tensor, device: torch.device | None = None) -> Tensor:
        """a_t: (B,) float32 on `device` (that of `t` if not given)."""

    def noise(self, t: Tensor, device: torch.device | None = None) -> Tensor:
        """s_t: (B,) float32 on `device` (that of `t` if not given)."""

    def snr(self, t: Tensor, device: torch.device | None = None) -> Tensor:
        """The signal-to-noise ratio a_t^2 / s_t^2: (B,) float32 on `device` (that of `t` if not given)."""


def require_snr(process: ForwardProcess, wanted_by: str) -> HasSnr:
    """The process, known to have an SNR. Raises ValueError that names who wants it where it has none."""
    if not isinstance(process, HasSnr):
        raise ValueError(f"{wanted_by} needs a signal-to-noise ratio, which {type(process).__name__} does not have")
    return process


@dataclass(frozen=True)
class VariancePreserving:
    """The discrete process of DDPM: x_t = a_t x0 + s_t n with a_t = sqrt(abar_t), s_t = sqrt(1 - abar_t)
    (arXiv 2006.11239, equation 4). `alphas_cumprod[t]` is abar_t for t = 0 .. T-1, in float64.

    Tables are made in float64 and rounded to float32 once, for use. t = -1 is the clean sample: abar = 1.
    `scaled_linear_betas`: first and last beta where the table is such a schedule, as other programs state it.
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
        """The process whose last timestep is noise alone   (arXiv 2305.08891, algorithm 1).

        With q = sqrt(abar): q <- (q - q_last) q_first / (q_first - q_last). The first timestep keeps its values, the
        last one gets abar = 0 exactly, where only a network that predicts v can be trained. All that is asked of the
        process follows from the new table. A process that ends so already is given back as it is.
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
        """The process as diffusers' schedulers take it. They make a scaled-linear schedule themselves, in float32: the
        table's own betas, beta_t = 1 - abar_t / abar_(t-1), would differ from those in the last bit."""
        betas: dict[str, Any]
        if self.scaled_linear_betas is not None:
            first, last = self.scaled_linear_betas
            betas = {"beta_start": first, "beta_end": last, "beta_schedule": "scaled_linear"}
        else:
            products = zip((1.0, *self.alphas_cumprod), self.alphas_cumprod, strict=False)
            betas = {"trained_betas": [1.0 - product / before for before, product in products]}
        return {**betas, "num_train_timesteps": self.timesteps}

    @cached_property
    def _table(self) -> Tensor:
        import torch

        return torch.tensor((1.0, *self.alphas_cumprod), dtype=torch.float64)  # from t = -1 on

    def _cumulative_product(self, t: Tensor) -> Tensor:
        """abar_t in float64 on the CPU: looked up and derived there, exactly, and only then rounded and moved."""
        return self._table[t.cpu() + 1]

    def signal(self, t: Tensor, device: torch.device | None = None) -> Tensor:
        """a_t, the share of the clean sample: (B,) float32 on `device` (that of `t` if not given)."""
        return self._cumulative_product(t).sqrt().float().to(device or t.device)

    def noise(self, t: Tensor, device: torch.device | None = None) -> Tensor:
        """s_t, the share of the noise: (B,) float32 on `device` (that of `t` if not given)."""
        return (1.0 - self._cumulative_product(t)).sqrt().float().to(device or t.device)

    def snr(self, t: Tensor, device: torch.device | None = None) -> Tensor:
        """The signal-to-noise ratio abar_t / (1 - abar_t): (B,) float32 on `device` (that of `t` if not given)."""
        product = self._cumulative_product(t)
        return (product / (1.0 - product)).float().to(device or t.device)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = a_t x0 + s_t n, of the shape of `x0` (B, ...), float32."""
        signal, level = self._shares(t, x0)
        return signal * x0.float() + level * noise.float()

    def target(self, x0: Tensor, noise: Tensor, t: Tensor, prediction: Prediction) -> Tensor:
        """What the network should answer to x_t: n, or a_t n - s_t x0. Of the shape of `x0`, float32.

        Raises ValueError for an unknown prediction.
        """
        if prediction == "epsilon":
            return noise.float()
        _refuse_unknown(prediction)
        signal, level = self._shares(t, x0)
        return signal * noise.float() - level * x0.float()

    def to_x0(self, x_t: Tensor, output: Tensor, t: Tensor, prediction: Prediction) -> Tensor:
        """The clean sample that an output at x_t amounts to: (x_t - s n) / a, or a x_t - s v. Float32.

        Raises ValueError for an unknown prediction.
        """
        signal, level = self._shares(t, x_t)
        if prediction == "epsilon":
            return (x_t.float() - level * output.float()) / signal
        _refuse_unknown(prediction)
        return signal * x_t.float() - level * output.float()

    def step(self, x_t: Tensor, output: Tensor, t: Tensor, t_next: Tensor, prediction: Prediction) -> Tensor:
        """x at `t_next` (-1: the clean sample), deterministic: DDIM with eta = 0   (arXiv 2010.02502, equation 12).

        The clean sample and the noise that the output amounts to, mixed as `t_next` has them. Raises ValueError for an
        unknown prediction.
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
    """A family's process as the options want it, for training and for the images of a model trained so.

    Raises ValueError for a zero terminal SNR of a process that is not variance-preserving.
    """
    if not options.zero_terminal_snr:
        return process
    if not isinstance(process, VariancePreserving):
        raise ValueError(f"zero_terminal_snr needs a variance-preserving process, not {type(process).__name__}")
    return process.zero_terminal()


def _refuse_unknown(prediction: str) -> None:
    if prediction != "v":
        raise ValueError(f'a network predicts "epsilon" or "v", not {prediction!r}')
