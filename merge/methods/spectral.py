"""Merges that see a weight as a matrix: one step on the singular values of Σδ, with its singular vectors kept.

With Σδ = U diag(s) Vᵀ, the merged δ of a weight is

    λ · (mean s / mean q) · U diag(q) Vᵀ,    q = s · max(s / s₁, floor)^(p - 1),

that is s^p down to `floor` times the largest singular value s₁, and proportional to s below. p = 1 is task arithmetic
(Ilharco et al., arXiv 2212.04089), p = 0 makes all directions equal (Iso-C, Marczak et al., arXiv 2502.04959), p < 0
turns those that many experts share, which a sum counts many times, below those of single experts (this project's own,
as far as a search of the literature showed).

Without the floor, a direction that Σδ lacks and that rounding alone fills would get the largest weight of all. With it
the step is a continuous function of Σδ that leaves a zero a zero: neither the signs of singular vectors nor the choice
of vectors for equal or zero singular values matter.

U is never computed. The smaller Gram matrix ΣδᵀΣδ = V diag(s²) Vᵀ is taken in double precision, as squaring halves the
digits; then U diag(q) Vᵀ = (Σδ V) diag(q / s) Vᵀ. Vectors and Σδ V serve every p, floor and λ.

Vectors and scalars have no directions; they are merged as by task arithmetic (`merge.methods.lowering`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from infra.errors import MergeError

CHUNK_BYTES = 1 << 23
"""Bytes in double precision at a time: of a large embedding only a part is widened."""


@dataclass(frozen=True)
class Spectrum:
    """Singular values and right singular vectors of a matrix [m, n] with m ≥ n, or (`wide`) of its transpose.

    `values` fp64 [n], divided by the largest one (all 0 for a zero matrix). `vectors` fp32 [n, n], in
    columns. `projected` fp32 [m, n], the matrix times the vectors: column i has the length of singular value i.
    """

    values: Tensor
    vectors: Tensor
    projected: Tensor
    wide: bool

    def reweighted(self, p: float, floor: float) -> Tensor:
        """(mean s / mean q) U diag(q) Vᵀ of the module's docstring, fp32, in the matrix's own shape."""
        gains = self.values.clamp(min=floor).pow(p - 1)
        total = float((self.values * gains).sum())
        return self._scaled(gains.mul_(float(self.values.sum()) / total if total else 0.0))

    def isotropic(self, keep: int, floor: float) -> Tensor:
        """mean(s) · UVᵀ of the `keep` largest directions, fp32; of those above `floor` only, where these are fewer."""
        held = self.values > floor
        held[: max(0, held.numel() - keep)] = False  # by rising singular value
        mean = float(self.values[held].mean()) if bool(held.any()) else 0.0
        return self._scaled(torch.where(held, mean / self.values.clamp(min=floor), 0.0))

    def _scaled(self, gains: Tensor) -> Tensor:
        gains = gains.float()
        if self.wide:
            return (self.vectors * gains) @ self.projected.T
        return (self.projected * gains) @ self.vectors.T


def spectrum(matrix: Tensor) -> Spectrum:
    """The spectrum of a matrix fp32 [rows, columns] (at least one of each), on the matrix's device.

    Raises MergeError where the matrix is not finite, or where its eigenvalues are not found.
    """
    wide = matrix.shape[0] < matrix.shape[1]
    tall = matrix.T if wide else matrix
    largest, vectors = eigenvectors(tall)
    projected = torch.empty(tall.shape, dtype=torch.float32, device=matrix.device)
    squares = torch.zeros(tall.shape[1], dtype=torch.float64, device=matrix.device)
    for rows in row_chunks(tall.shape):
        part = tall[rows].double().div_(largest or 1.0) @ vectors
        # roots of eigenvalues would be 1e-8 of the largest where there is nothing
        squares += torch.linalg.vector_norm(part, dim=0).square_()
        projected[rows] = part.mul_(largest).float()
    values = squares.sqrt_()
    return Spectrum(values / (values.max() or 1.0), vectors.float(), projected, wide)


def eigenvectors(tall: Tensor) -> tuple[float, Tensor]:
    """The largest |entry| of a matrix fp32 [m, n], m ≥ n, and its right singular vectors, fp64 [n, n] in columns, by
    rising singular value. Raises as `spectrum`."""
    low, high = (float(end) for end in torch.aminmax(tall))
    largest = max(-low, high)
    if not math.isfinite(largest):
        raise MergeError("the sum of the experts' changes overflows fp32; look for a diverged expert")
    gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64, device=tall.device)
    for rows in row_chunks(tall.shape):
        part = tall[rows].double().div_(largest or 1.0)  # squares of the smallest fp32 numbers are no fp64 ones
        gram.addmm_(part.T, part)
    try:
        return largest, torch.linalg.eigh(gram)[1]
    except RuntimeError as error:  # LinAlgError, or the library's own
        raise MergeError(f"no eigenvalues of the summed change's Gram matrix: {error}") from None


def split_rows(name: str, shape: Sequence[int], fused: Sequence[int] = ()) -> tuple[int, ...]:
    """The matrices that a tensor [rows, …] or a stack [experts, rows, …] holds one below the other: rows of each.

    Their width is the product of the remaining dimensions. A convolution [out, in, …] is one matrix [out, in · …]; a
    tensor of three dimensions in a module called `experts` (a mixture of experts, as transformers stores it) is one
    matrix for each. `fused` are the rows of the parts of a fused weight, which become matrices of their own.
    """
    if len(shape) == 3 and "experts" in name.split("."):
        return (shape[1],) * shape[0]
    return tuple(fused) or (shape[0],)


def stacked(name: str, shape: Sequence[int]) -> tuple[int, int, int]:
    """The matrices that a tensor of two or more dimensions is, all of one shape: how many, their rows and columns."""
    parts = split_rows(name, shape)
    return len(parts), parts[0], math.prod(shape) // max(1, sum(parts))


def merge_device() -> str:
    """Where this process finds singular vectors: on the GPU that it was given, if any."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def row_chunks(shape: Sequence[int]) -> list[slice]:
    """The rows of a matrix of this shape, `CHUNK_BYTES` in double precision at a time."""
    step = max(1, CHUNK_BYTES // (8 * max(1, shape[1])))
    return [slice(start, start + step) for start in range(0, shape[0], step)]
