"""The measures of DreamBooth's evaluation, as functions of embeddings.

Ruiz et al. 2022 (arXiv 2208.12242), sections 4.2 and 4.3: DINO and CLIP-I (subject fidelity), CLIP-T (prompt fidelity),
PRES (prior preservation) and DIV (diversity). Embeddings are (n, d) tensors, one row per image or text; every function
computes in float64 on the CPU, and no measure compares an image with itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def cosines(rows: Tensor, columns: Tensor) -> Tensor:
    """The cosine similarity of each row (n, d) with each column (m, d): (n, m)."""
    return _unit(rows) @ _unit(columns).T


def fidelity(generated: Tensor, real: Tensor) -> Tensor:
    """For each generated image the mean cosine with all real images, (n,): DINO, CLIP-I, and PRES for images of the
    class. Their mean is the mean pairwise similarity of the paper."""
    return cosines(generated, real).mean(1)


def real_baseline(real: Tensor) -> float | None:
    """The mean cosine of different real images: what a perfect subject fidelity would be. None for a single image."""
    pairs = _of_pairs(real)
    return float(pairs.mean()) if len(pairs) else None


def prompt_fidelity(images: Tensor, texts: Tensor) -> Tensor:
    """The cosine of each image (n, d) with the text (n, d) of its prompt, (n,): CLIP-T."""
    return (_unit(images) * _unit(texts)).sum(1)


def clip_score(images: Tensor, texts: Tensor) -> Tensor:
    """The CLIP score of torchmetrics and SimpleTuner, 100 cos, (n,); they set a mean below 0 to 0. Hessel et al. 2021
    (arXiv 2104.08718) have 2.5 max(cos, 0) instead."""
    return 100 * prompt_fidelity(images, texts)


def diversity(generated: Tensor) -> float | None:
    """The mean of 1 - cos over the pairs of images (n, d) of one prompt; None for a single image. The paper's DIV has
    LPIPS in place of 1 - cos."""
    pairs = _of_pairs(generated)
    return float(1 - pairs.mean()) if len(pairs) else None


def nearest(generated: Tensor, real: Tensor) -> tuple[list[float], list[int]]:
    """For each generated image the cosine with the nearest real image, and the index of that."""
    values, places = cosines(generated, real).max(1)
    return values.tolist(), places.tolist()


def copy_threshold(real: Tensor) -> float:
    """The cosine with a real image above which a generated one may be a copy of it: nearer than any two different real
    images are to each other, at least 0.9. At most 0.99: a folder may have one image twice."""
    pairs = _of_pairs(real)
    return min(max(0.9, float(pairs.max())), 0.99) if len(pairs) else 0.95


def mean(values: Sequence[float]) -> float:
    """The mean."""
    return float(torch.tensor(values, dtype=torch.float64).mean())


def _of_pairs(rows: Tensor) -> Tensor:
    """The cosines of all pairs i < j of rows, (n (n - 1) / 2,)."""
    first, second = torch.triu_indices(len(rows), len(rows), offset=1)
    return cosines(rows, rows)[first, second]


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows.detach().to("cpu", torch.float64), dim=1)
