"""An average of ΔW in float32, and the model holding the nearest factors of the adapter's rank for a while.

The mean of A and the mean of B do not make the mean of B A. So the products themselves are averaged, as whole matrices
(out, in), and decomposed only when the average is looked at: the best approximation of a rank by its singular values
(Eckart and Young, 1936).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from library.training.averaging.weight_average import WeightAverage, restore_shadows, restored
from networks.arithmetic.svd import leading

Product = tuple[nn.Parameter, nn.Parameter]
"""Down (r, in, ...) and up (out, r, ...) of a layer, whose product makes ΔW."""


class DeltaAverage:
    """A shadow in float32 of each product on `device`, and of what else is trained, such as DoRA's magnitudes.

    `say` is told how much of the average its rank leaves out.
    """

    def __init__(
        self,
        products: Sequence[Product],
        others: Sequence[nn.Parameter],
        device: torch.device,
        say: Callable[[str], None],
    ) -> None:
        self.products = products
        self.others = WeightAverage(others, device)
        self.device = device
        self.say = say
        self.deltas = [_matrix(up, device) @ _matrix(down, device) for down, up in products]
        self._factors: list[tuple[Tensor, Tensor]] | None = None  # of the deltas as they are now
        self._left_out = 0.0

    @property
    def shadows(self) -> list[Tensor]:
        """The averages: those of the products, then the others."""
        return [*self.deltas, *self.others.shadows]

    @property
    def size(self) -> int:
        """Bytes of the average."""
        return sum(shadow.nbytes for shadow in self.shadows)

    @torch.no_grad()
    def move(self, share: float | Tensor) -> None:
        """Give the weights of now this share of the average."""
        self._factors = None
        for delta, (down, up) in zip(self.deltas, self.products, strict=True):
            factors = _matrix(up, self.device), _matrix(down, self.device)
            if isinstance(share, Tensor):
                delta.lerp_(factors[0] @ factors[1], share.to(self.device))
            else:
                delta.addmm_(*factors, beta=1 - share, alpha=share)
        self.others.move(share)

    @contextmanager
    def holding(self) -> Iterator[None]:
        """While this is open, the factors are those of the average, rounded to their own format."""
        with restored([factor for product in self.products for factor in product]), self.others.holding():
            for (down, up), (new_down, new_up) in zip(self.products, self._decomposed(), strict=True):
                down.data.copy_(new_down.view_as(down))
                up.data.copy_(new_up.view_as(up))
            yield

    def metadata(self) -> dict[str, str]:
        """What a file says of this average: what part of its energy (the sum of its squares) the rank leaves out."""
        self._decomposed()
        return {"ss_ema_left_out": f"{self._left_out:.3g}"}

    def load(self, saved: Sequence[Tensor]) -> None:
        """Restore saved shadows, bit for bit. Raises ValueError if they belong to other parameters."""
        restore_shadows(self.shadows, saved)
        self._factors = None

    @torch.no_grad()
    def _decomposed(self) -> list[tuple[Tensor, Tensor]]:
        """Down and up of each product, computed once for all that happens after a step."""
        if self._factors is None:
            self._factors, kept, total = [], 0.0, 0.0
            for delta, (down, _) in zip(self.deltas, self.products, strict=True):
                rank = down.shape[0]
                found = leading(delta, rank)
                up, new_down = found.factors(rank)
                lacking = rank - up.shape[1]  # a rank above that of the layer
                self._factors.append(
                    (nn.functional.pad(new_down, (0, 0, 0, lacking)), nn.functional.pad(up, (0, lacking)))
                )
                kept += float(found.values[:rank].double().square().sum())
                total += float(torch.linalg.vector_norm(delta, dtype=torch.float64)) ** 2
            self._left_out = max(0.0, 1 - kept / total) if total else 0.0
            self.say(f"EMA of ΔW: the rank of the adapter leaves out {self._left_out:.2%} of its energy")
        return self._factors


def _matrix(factor: nn.Parameter, device: torch.device) -> Tensor:
    return factor.detach().flatten(1).to(device, torch.float32)
