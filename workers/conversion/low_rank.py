"""A dense delta as the product of two thin factors: exactly where it has so low a rank, else the nearest of a rank.

A merge of LoRA experts by a linear method is one: its rank is at most the sum of theirs. The range is found with a
random sketch (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithms 4.3 and 4.4; the same draws every time), in
float64, so that a weight of full rank is told apart without its full decomposition.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.adapters.format import LowRank

EXACT = 1e-6
"""Relative error up to which a factorisation is that of the delta itself: deltas are rounded to fp32."""

_FIRST, _MOST = 16, 512
"""Ranks that are tried for an exact factorisation: the first one, doubled up to the last one."""
_MARGIN, _POWERS = 16, 4
"""Columns of a sketch beyond the rank, and passes over the weight that sharpen a truncated one."""


def factorise_exactly(delta: Tensor) -> LowRank | None:
    """Factors of ``delta`` [out, in] of its own rank, None where they would be no smaller, or of a rank above 512."""
    rows, cols = delta.shape
    wide = delta.double()
    most, at = min(_MOST, (rows * cols - 1) // (rows + cols)), _FIRST
    while most > 0:
        last = at >= most  # a square sketch may be near singular, and no wider one follows
        found = _truncate(wide, min(at, most), powers=0, margin=_MARGIN if last else 0)
        if relative_error(wide, found) <= EXACT:
            return found
        if last:
            return None
        at *= 2
    return None


def factorise(delta: Tensor, rank: int) -> LowRank:
    """Factors of rank ``rank`` at most whose product is nearest to ``delta`` [out, in] in the Frobenius norm."""
    return _truncate(delta.double(), rank, _POWERS, _MARGIN)


def relative_error(delta: Tensor, factors: LowRank) -> float:
    """‖scale · b a − delta‖ / ‖delta‖ in the Frobenius norm, 0 for a delta of zero."""
    norm = float(torch.linalg.vector_norm(delta.double()))
    if not norm:
        return 0.0
    product = factors.scale * (factors.b.double() @ factors.a.double())
    return float(torch.linalg.vector_norm(product.sub_(delta))) / norm


def _truncate(wide: Tensor, rank: int, powers: int, margin: int) -> LowRank:
    """The leading part of a sketched decomposition, without directions that are rounding; balanced, fp32, scale 1."""
    generator = torch.Generator().manual_seed(0)
    width = min(rank + margin, *wide.shape)
    basis = torch.linalg.qr(wide @ torch.randn(wide.shape[1], width, generator=generator, dtype=torch.float64)).Q
    for _ in range(powers):
        basis = torch.linalg.qr(wide @ torch.linalg.qr(wide.T @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.T @ wide, full_matrices=False)
    tail = values.square().flip(0).cumsum(0).flip(0).sqrt()  # what is lost by stopping before each
    kept = max(1, min(rank, int((tail > EXACT / 4 * torch.linalg.vector_norm(values)).sum())))
    roots = values[:kept].sqrt()
    return LowRank((roots[:, None] * right[:kept]).float(), (basis @ left[:, :kept] * roots).float(), 1.0)
