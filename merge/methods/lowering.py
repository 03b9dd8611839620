"""One small pure function per merge method: from the joined statistics of one tensor to the merged δ.

In a weighted reduction every δ was multiplied by its expert's weight and counts hold sums of weights, so that the same
functions serve both.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from infra.errors import MergeError
from merge.methods.directions import NONE
from merge.methods.once import Once
from merge.methods.parameters import Params, even_share, number
from merge.methods.sparsify import kept, trim
from merge.methods.spectral import Spectrum, spectrum, split_rows
from merge.methods.statistic_table import own_count, values_at
from merge.methods.statistics import TensorStatistics
from workers.adapters.support import SparseTensor


@dataclass(frozen=True)
class Root:
    """What is lowered: one tensor's joined statistics, and what candidates share while they are lowered from them.

    `experts` are all that are merged, those without this tensor included. `reference` is the earlier round's δ of the
    tensor (None where that has no such tensor). `fused` are the rows of the parts of a fused weight, where they are
    known. `device` is where singular vectors are found; all else stays on the CPU. `once`: what several candidates, or
    the lifts before them, are made of.
    """

    statistics: TensorStatistics
    experts: int
    reference: SparseTensor | None = None
    name: str = ""
    fused: tuple[int, ...] = ()
    device: str = "cpu"
    once: Once = field(default_factory=Once, repr=False, compare=False)

    def __getitem__(self, name: str) -> Tensor:
        return self.statistics.arrays[name]

    @cached_property
    def everywhere(self) -> Tensor:
        """Every position of the tensor, int64: one support for all candidates whose δ is dense."""
        full = self.statistics.indices.numel() == self.statistics.numel
        return self.statistics.indices if full else torch.arange(self.statistics.numel)

    def spectra(self, rows: tuple[int, ...]) -> list[Spectrum]:
        """The spectra of Σδ, of the matrices that lie one below the other in it; found once."""
        return self.once(("spectra", rows), lambda: self._spectra(rows))

    def _spectra(self, rows: tuple[int, ...]) -> list[Spectrum]:
        statistics, flat = self.statistics, total(self)
        if flat.numel() != statistics.numel:
            flat = torch.zeros(statistics.numel).index_copy_(0, statistics.indices, flat)
        matrix = flat.view(sum(rows), -1).to(self.device)
        return [spectrum(part) for part in matrix.split(rows)]


def total(root: Root) -> Tensor:
    """Σδ, fp32 [n]: always this statistic, as the sum of both masses is rounded otherwise."""
    return root["sum"]


def count(root: Root) -> Tensor:
    """Experts (or the sum of their weights) whose support holds the position, fp32 [n]."""
    if "count" in root.statistics.arrays:
        return root["count"].float()
    return root["positive_count"].float() + root["negative_count"].float() + root["zero_count"].float()


def mean(root: Root, params: Params) -> Tensor:
    """Σδ / N: a position that an expert lacks counts as 0."""
    return total(root) / root.experts


def overlap_mean(root: Root, params: Params) -> Tensor:
    """Σδ / count; weighted: Σwδ / Σw over the experts that hold the position."""
    return total(root) / _divisor(count(root), root.statistics.weighted)


def total_delta(root: Root, params: Params) -> Tensor:
    """Σδ, and in a weighted reduction Σwδ."""
    return total(root)


def scaled_sum(root: Root, params: Params) -> Tensor:
    """λ Σδ."""
    return number(params, "lambda") * total(root)


def ties(root: Root, params: Params) -> Tensor:
    """λ times the mean of the δ that agree with the elected sign (TIES, steps 2 and 3).

    The sign with the larger total mass is elected, zero counting as positive (as in mergekit and PEFT); values that are
    zero vote for nothing and are not averaged. Weighted: the masses are Σwδ and the mean divides by Σw.
    """
    mass, elected = _elected_mass(root)
    agreeing = _choose(elected >= 0, root["positive_count"], root["negative_count"])
    return mass.div_(_divisor(agreeing, root.statistics.weighted)).mul_(number(params, "lambda"))


def ties_sum(root: Root, params: Params) -> Tensor:
    """The sum of the δ that agree with the elected sign: TIES without the division ("dis-sum" in the authors' code)."""
    return _elected_mass(root)[0]


def _elected_mass(root: Root) -> tuple[Tensor, Tensor]:
    """The larger total mass with its sign, and what has that sign (0 where both are equal)."""
    up, down = root["positive_mass"], root["negative_mass"]
    elected = up + down  # 0 only where both are equal, as fp32 has subnormal numbers
    return torch.maximum(up, -down).copysign_(elected), elected


def magmax(root: Root, params: Params) -> Tensor:
    """λ times the δ of largest magnitude (MagMax); of two of opposite sign and one magnitude, the positive one."""
    up, down = root["positive_max"], root["negative_max"]
    return torch.maximum(up, down).copysign_(up - down).mul_(number(params, "lambda"))


def elect(root: Root, params: Params) -> Tensor:
    """The unified δ of EMR: the sign of Σδ (zero counts as positive) and the largest magnitude that agrees with it."""
    return _choose(total(root) >= 0, root["positive_max"], -root["negative_max"]) + 0.0


def consensus(root: Root, params: Params) -> Tensor:
    """λ times the earlier round's δ where the TALL masks of at least `at_least` experts hold, 0 elsewhere."""
    agreed = root["agreement_count"].int() >= int(number(params, "at_least"))
    merged = values_at(root.reference, root.statistics.indices)
    return merged.mul(number(params, "lambda")).mul_(agreed.float()).add_(0.0)


def fisher_mean(root: Root, params: Params) -> Tensor:
    """Σfδ / Σf over the experts that hold the position: the base outside a support carries no mass."""
    return root["fisher_mass"] / _divisor(root["fisher"], True)


def sce_selection(root: Root, params: Params) -> SparseTensor:
    """Σδ on the positions that SCE selects: of those whose δ vary over the N experts, the share of largest variance.

    k = max(1, ⌊density · n⌋) of the n positions with a variance, ties to the lower position, as in mergekit; all
    positions of the union at density 1. An expert that lacks a position has δ = 0 there. Of a single expert nothing
    varies and there is nothing to choose by: all its positions are selected.
    """
    statistics, merged, density = root.statistics, total(root), number(params, "density")
    if density == 1 or root.experts == 1:
        return SparseTensor(statistics.shape, statistics.indices, merged)
    squares = root["square_sum"].double() * root.experts
    variance = squares - merged.double().square()  # times N²
    # below the rounding of the fp32 sums a variance cannot be told from none
    varies = variance > torch.finfo(torch.float32).eps * root.experts * squares
    keep = kept(density, int(varies.sum())) if bool(varies.any()) else 0
    chosen = trim(torch.where(varies, variance, 0.0), keep) if keep else torch.zeros(0, dtype=torch.int64)
    return SparseTensor(statistics.shape, statistics.indices[chosen], merged[chosen])


def sce(root: Root, params: Params) -> Tensor:
    """Σ wδ / Σ w over the experts that agree with the elected sign, w their share of the selected positions' energy."""
    return root["agreeing_mass"] / _divisor(root["agreeing_weight"], True)


def regmean(root: Root, params: Params) -> Tensor:
    """The W with Σ ‖X_i W - X_i W_i‖² least, on δ: (Σ δ_i G̃_i) (Σ G̃_i + c₀ G₀)^-1, in double precision.

    c₀ (`base`) weighs the base as an expert of δ = 0, which holds the merge back where the experts' own inputs say
    little. Its inputs are not measured: G₀ is the diagonal of Σ G̃_i, inputs that are as large and have nothing to do
    with each other. G_i are sums over all tokens of all rows, or means over tokens (`inputs`).

    Where an expert has no Gram matrix of the tensor's inputs: the mean. Directions of the inputs that no expert has
    seen are left at the mean, too: the problem is solved for the distance from it, with the inputs scaled to the same
    variance first, and eigenvalues below fp32 rounding ignored.
    """
    mean_delta = mean(root, params)
    if not root["gram_count"].numel() or int(root["gram_count"]) < root.experts:
        return mean_delta
    # in place and in this order: [in, in] in double precision is the largest thing that a merge holds
    gram, shape = root["gram"].double(), root.statistics.shape
    gram.diagonal().mul_(1 + number(params, "base"))
    start = mean_delta.view(shape).double()
    residual = root["gram_product"].view(shape).double().addmm_(start, gram, alpha=-1)
    seen = gram.diagonal() > 0
    scale = torch.where(seen, gram.diagonal().clamp(min=0).rsqrt(), 0.0)
    gram.mul_(scale).mul_(scale[:, None])
    return start.add_(_solve(gram, residual.mul_(scale), seen).mul_(scale)).float().view(-1)


def _solve(gram: Tensor, right: Tensor, seen: Tensor) -> Tensor:
    """X with X·gram = right (least norm where gram is singular), gram fp64 [n, n] of unit diagonal where `seen`.

    Writes over both arguments.
    """
    smallest = gram.shape[0] * torch.finfo(torch.float32).eps
    diagonal = gram.diagonal()
    diagonal.add_((~seen).double())  # an input that nobody has seen is an equation of its own
    factor, failed = torch.linalg.cholesky_ex(gram)
    if not bool(failed) and float(factor.diagonal().min()) ** 2 > smallest:
        return torch.cholesky_solve(right.T, factor).T
    del factor
    diagonal.sub_((~seen).double())
    values, vectors = torch.linalg.eigh(gram)  # reads one triangle
    right = right @ vectors
    right.mul_(torch.where(values > smallest, 1 / values, 0.0))
    return right @ vectors.T


def spectral_power(root: Root, params: Params) -> Tensor | SparseTensor:
    """λ times Σδ with its singular values s turned into about s^p, their mean kept (`merge.methods.spectral`).

    Vectors and scalars: `vector_lambda` times Σδ, or Σδ / N. With `density` below 1 only a tensor's largest |δ| stay.
    """
    return _spectral(root, params, number(params, "p"))


def iso_c(root: Root, params: Params) -> Tensor | SparseTensor:
    """λ · mean(s) · UVᵀ of Σδ = U diag(s) Vᵀ (Iso-C): the spectral power of p = 0."""
    return _spectral(root, params, 0.0)


def _spectral(root: Root, params: Params, p: float) -> Tensor | SparseTensor:
    shape = root.statistics.shape
    if len(shape) < 2 or not root.statistics.indices.numel():
        return vector(root, params)
    rows = split_rows(root.name, shape, root.fused if params["parts"] == "qkv" else ())
    return dense(root, params, [found.reweighted(p, number(params, "floor")) for found in root.spectra(rows)])


def iso_common(root: Root, params: Params) -> Tensor | SparseTensor:
    """mean(s) · UVᵀ of the leading directions of Σδ that Iso-CTS calls common: all but those that it leaves to experts.

    Their number is that of the published code: what is left of common_share divides into one count for each expert.
    """
    shape = root.statistics.shape
    if len(shape) < 2 or not root.statistics.indices.numel():
        return total(root) / root.experts
    rows = split_rows(root.name, shape)
    options = {**params, "rank_share": even_share(params["rank_share"], root.experts)}
    parts = []
    for found in root.spectra(rows):
        side = found.values.numel()
        parts.append(found.isotropic(side - root.experts * own_count(side, options), NONE).cpu())
    return SparseTensor(shape, root.everywhere, (parts[0] if len(parts) == 1 else torch.cat(parts)).view(-1))


def vector(root: Root, params: Params) -> Tensor:
    """What becomes of vectors and scalars, which have no directions: `vector_lambda` times Σδ, or Σδ / N."""
    own = params["vector_lambda"]
    return total(root) / root.experts if isinstance(own, str) else own * total(root)


def dense(root: Root, params: Params, parts: list[Tensor]) -> SparseTensor:
    """λ times the matrices that lie one below the other in a weight; with `density` below 1 the largest |δ| only.

    Writes over the matrices. Raises MergeError for an overflow.
    """
    shape = root.statistics.shape
    values = (parts[0] if len(parts) == 1 else torch.cat(parts)).cpu().mul_(number(params, "lambda")).view(-1)
    if not bool(torch.isfinite(values).all()):
        raise MergeError("the merged change overflows fp32; lower λ, or raise p or the floor")
    density = number(params, "density")
    if density == 1:
        return SparseTensor(shape, root.everywhere, values.add_(0.0))
    chosen = trim(values, kept(density, values.numel()))
    return SparseTensor(shape, chosen, values[chosen])


def _choose(condition: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """`torch.where` for finite values and counts, without branches: on random signs these cost three times as much."""
    if yes.is_floating_point():
        chosen = condition.to(yes.dtype)
        return yes * chosen + no * (1 - chosen)
    return (yes - no) * condition.to(yes.dtype) + no  # unsigned differences wrap around, and back


def _divisor(counts: Tensor, weighted: bool) -> Tensor:
    """Counts or sums of weights, fp32, and 1 where they are 0: nothing divided by nothing is no change."""
    return counts + (counts == 0).float() if weighted else counts.clamp(min=1).float()
