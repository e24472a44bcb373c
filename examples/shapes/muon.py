"""Muon: orthogonalised momentum. Small networks need far fewer steps with it.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". The Newton-Schulz iteration and its three
coefficients are theirs; convolutions are treated as matrices of (outputs, inputs x kernel). torch.optim.Muon supports
matrices only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def orthogonal(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Approximately the nearest semi-orthogonal matrices (..., rows, columns): singular values of about 0.7 to 1.2."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum for weights of two dimensions or more; weights of one shape step together."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step along the orthogonal momentum, scaled so that wide and tall weights move alike."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                alike.setdefault(parameter.flatten(1).shape, []).append(parameter)
            for (rows, columns), parameters in alike.items():
                update = orthogonal(self._ahead(parameters, group["momentum"]))
                rate = group["lr"] * max(1.0, rows / columns) ** 0.5
                for parameter, change in zip(parameters, update, strict=True):
                    parameter.add_(change.view_as(parameter), alpha=-rate)

    def _ahead(self, parameters: Sequence[nn.Parameter], momentum: float) -> Tensor:
        """The gradients drawn towards their moving averages: (parameters, rows, columns)."""
        ahead = []
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            average = state["momentum"].lerp_(parameter.grad, 1 - momentum)
            ahead.append(parameter.grad.lerp(average, momentum).flatten(1))
        return torch.stack(ahead)


class Optimizers:
    """Muon for a network's inner weights, AdamW for the rest (embeddings, norms, biases, first and last layers)."""

    def __init__(self, modules: Iterable[nn.Module], muon_rate: float, adam_rate: float, steps: int) -> None:
        inner, rest = [], []
        for module in modules:
            for name, parameter in module.named_parameters():
                outer = parameter.ndim < 2 or "embedding.weight" in name or "conv_in" in name or "conv_out" in name
                (rest if outer else inner).append(parameter)
        self.parameters = inner + rest
        self.optimizers = (
            Muon(inner, muon_rate),
            torch.optim.AdamW(rest, adam_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
        )
        self.steps, self.done = steps, 0
        self.rates = (muon_rate, adam_rate)

    def step(self) -> None:
        """Clip the gradients' norm at 1, step, and set them free. The rate warms up and falls to nothing in a line."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        factor = min(1.0, (self.done + 1) / 50, 1.25 * (1 - self.done / self.steps))
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad()
        self.done += 1

    def state(self) -> dict[str, object]:
        """What `restore` needs."""
        return {"done": self.done, "optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.done = state["done"]
        for optimizer, values in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(values)
