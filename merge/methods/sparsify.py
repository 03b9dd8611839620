"""Thinning out one expert's values before they are merged: which positions stay, and with which probability.

Pure functions of the values on the expert's support; random numbers are handed in and made by `uniform`, whose stream
depends on a seed, the expert and the tensor's name only. Ties of magnitude go to the lower position everywhere.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np
import torch
from torch import Tensor


def kept(density: float, size: int) -> int:
    """k = max(1, ⌊density · size⌋), the product in double precision."""
    return max(1, int(density * size))


def trim(values: Tensor, keep: int) -> Tensor:
    """Positions (int64, ascending) of the `keep` largest |values| [n] (TIES, arXiv 2306.01708, step 1)."""
    n = values.numel()
    if keep >= n:
        return torch.arange(n)
    return _positions(_largest(values.abs(), keep))


def breadcrumbs(values: Tensor, size: int, density: float, gamma: float) -> Tensor:
    """Positions (int64, ascending) that are neither outliers nor small (Model Breadcrumbs, arXiv 2312.06795).

    Of `size` values, those that are not among the n of `values` being zero, the ⌊γ·size⌋ largest go and of the rest the
    smallest, so that k = max(1, ⌊density·size⌋) stay; where k + ⌊γ·size⌋ exceeds `size`, fewer of the largest go.
    """
    n = values.numel()
    keep = kept(density, size)
    top = max(0, min(int(gamma * size), size - keep))
    # zeros outside the support are the smallest and go first
    middle = min(n, keep + top)
    magnitude = values.abs()
    chosen = _largest(magnitude, middle)
    chosen &= ~_largest(magnitude, min(n, top))
    return _positions(chosen)


def drop(uniforms: Tensor, probabilities: Tensor | float) -> Tensor:
    """Positions (int64, ascending) that stay: where the uniform number [n] is below the keep probability."""
    return _positions(uniforms < probabilities)


def magprune(values: Tensor, rows: Tensor, density: float, epsilon: float) -> Tensor:
    """Keep probabilities, fp32 [n], of MAGPRUNE (DELLA, arXiv 2406.11617): larger values stay more often.

    Within each row (`rows` int64 [n], ascending) they rise linearly with the rank of |values| from density - ε to
    density + ε, as in mergekit; a row of one value has `density`.
    """
    n = values.numel()
    if not n:
        return torch.zeros(0)
    # one sort by (row, |value|): the bits of a float that is not negative are in its order; rows are ascending, so
    # that row r's ranks fill row r's places
    order = ((rows << 32) + values.abs().view(torch.int32)).argsort(stable=True)
    _, of_row, counts = torch.unique_consecutive(rows, return_inverse=True, return_counts=True)
    place = torch.arange(n) - (counts.cumsum(0) - counts)[of_row]
    last = (counts - 1)[of_row]
    share = torch.where(last > 0, place.float() / last.clamp(min=1).float(), 0.5)
    return torch.empty(n).index_copy_(0, order, (density - epsilon) + share * (2 * epsilon))


def uniform(seed: int, identity: str, name: str, n: int) -> Tensor:
    """Uniform numbers in [0, 1), fp32 [n], multiples of 2**-24: the same for the same arguments on every machine.

    NumPy's counter-based Philox, keyed by the SHA-256 of (seed, identity of the expert, name of the tensor).
    """
    digest = hashlib.sha256(json.dumps([seed, identity, name]).encode()).digest()
    raw = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(n)
    return torch.from_numpy((raw >> np.uint64(40)).astype(np.float32) * np.float32(2**-24))


def _positions(mask: Tensor) -> Tensor:
    # numpy finds them several times as fast as torch
    return torch.from_numpy(np.flatnonzero(mask.numpy()))


def _largest(magnitude: Tensor, keep: int) -> Tensor:
    """Mask (bool [n]) of the `keep` largest, ties to the lower position."""
    n = magnitude.numel()
    if keep <= 0 or keep >= n:
        return torch.full((n,), keep > 0)
    threshold = magnitude.kthvalue(n - keep + 1).values
    above = magnitude > threshold
    equal = _positions(magnitude == threshold)[: keep - int(above.sum())]
    above[equal] = True
    return above
