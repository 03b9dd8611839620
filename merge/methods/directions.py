"""The leading directions of an expert's matrix, carried up the tree, and what makes those of all experts orthogonal.

A direction is a row [which matrix of the tensor, singular value, left vector, right vector], fp32. Joining experts
writes their rows one below the other, so that a node holds N · r rows of 2 + rows + columns numbers for r directions of
each expert: with r = min(rows, columns) / N, as published, at most about twice the weight itself at the root, and far
less below. Rows keep their bits on the way, and are put in one order before anything is added up: neither the tree nor
the order of experts can be seen in the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from merge.methods.spectral import eigenvectors, row_chunks

NONE = 1e-6
"""Directions below this share of the largest singular value are rounding of fp32 values, and none."""

HEAD = 2
"""Numbers of a row before its vectors."""


def leading(matrix: Tensor, keep: int, which: int = 0, norm: float = 0.0) -> Tensor:
    """The `keep` largest directions of a matrix fp32 [rows, columns], fp32 [at most keep, 2 + rows + columns].

    Fewer where the matrix has a lower rank, or where it is what is left of one of that `norm` and the rest is rounding.
    Of each pair of vectors, the largest entry of the right one (of equal ones the first) is positive. Which vectors
    belong to equal singular values is the library's choice; no method's result depends on it unless `keep` cuts
    through them.
    """
    wide = matrix.shape[0] < matrix.shape[1]
    tall = matrix.T if wide else matrix
    keep = min(keep, tall.shape[1])
    largest, vectors = eigenvectors(tall)
    right = vectors[:, vectors.shape[1] - keep :].flip(1)  # a copy
    left = torch.empty(tall.shape[0], keep, dtype=torch.float64)
    for rows in row_chunks(tall.shape):
        left[rows] = tall[rows].double().div_(largest or 1.0) @ right
    del vectors
    values = torch.linalg.vector_norm(left, dim=0)
    held = values > NONE * max(float(values.max()) if keep else 0.0, norm / (largest or 1.0))
    values, left, right = values[held], left[:, held] / values[held], right[:, held]
    if wide:
        left, right = right, left
    peak = right.abs().argmax(dim=0, keepdim=True) if values.numel() else torch.zeros(1, 0, dtype=torch.int64)
    signs = right.gather(0, peak).sign()
    head = torch.stack([torch.full_like(values, which), values * largest])
    return torch.cat([head, left * signs, right * signs]).T.float().contiguous()


def in_order(rows: Tensor) -> Tensor:
    """The rows by falling singular value, equal ones by their bytes: the same in whatever order they were joined."""
    data = rows.numpy()
    order = sorted(range(len(data)), key=lambda at: (-float(data[at, 1]), data[at].tobytes()))
    return rows[torch.tensor(order, dtype=torch.int64)]


def vectors_of(rows: Tensor, which: int, height: int) -> tuple[Tensor, Tensor, Tensor]:
    """Singular values fp64 [k], left [k, rows] and right vectors [k, columns] of one matrix of a tensor."""
    own = rows[rows[:, 0] == which].double()
    return own[:, 1], own[:, HEAD : HEAD + height], own[:, HEAD + height :]


def common_directions(isotropic: Tensor) -> tuple[float, Tensor, Tensor]:
    """c, and U fp64 [k, rows] and V [k, columns] in rows, of a matrix fp32 that is c UᵀV; of a zero one, none."""
    wide = isotropic.shape[0] < isotropic.shape[1]
    tall = isotropic.T if wide else isotropic
    largest, vectors = eigenvectors(tall)
    left = torch.cat([tall[rows].double() @ vectors for rows in row_chunks(tall.shape)])
    values = torch.linalg.vector_norm(left, dim=0)
    held = values > 0.5 * float(values.max())
    scale = float(values[held].mean()) if largest else 0.0
    left, right = (left[:, held] / values[held]).T, vectors[:, held].T
    return (scale, right, left) if wide else (scale, left, right)


def orthogonal(vectors: Tensor) -> Tensor:
    """The rows closest to `vectors` fp64 [k, n] that are orthonormal (Procrustes): its polar factor.

    Of more rows than dimensions, or of dependent ones, those with orthonormal columns on what they span.
    """
    rows, columns = vectors.shape
    if not rows:
        return vectors
    gram = vectors @ vectors.T if rows <= columns else vectors.T @ vectors
    values, basis = torch.linalg.eigh(gram)
    spanned = values > NONE**2 * float(values[-1])  # squares of singular values; below is the vectors' own rounding
    root = (basis * torch.where(spanned, values.clamp(min=1e-300).rsqrt(), 0.0)) @ basis.T
    return root @ vectors if rows <= columns else vectors @ root
