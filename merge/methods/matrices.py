"""Lowering of methods that need more of each expert than Σδ, of weights as matrices.

They keep no positions of a weight, only matrices; what lies in a weight one below the other (the experts of a mixture)
is a matrix each, a convolution is the matrix [out, in · height · width]. The merged δ is dense. Vectors and scalars are
merged as by task arithmetic, as in `merge.methods.spectral`. What follows `lambda` and `density` is found once for all
candidates of a root.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from infra.errors import MergeError
from merge.methods.directions import NONE, common_directions, in_order, leading, orthogonal, vectors_of
from merge.methods.lowering import Root, dense, vector
from merge.methods.parameters import Params, even_share, number
from merge.methods.sparsify import kept, trim
from merge.methods.spectral import stacked
from merge.methods.statistic_table import bases, finite
from workers.adapters.support import SparseTensor


def wudi(root: Root, params: Params) -> Tensor | SparseTensor:
    """λ (Σ δG) (Σ G + ridge · mean(diag Σ G) · I)⁻¹ with G = δᵀδ / ‖δ‖²: the W where Σ ‖(W - δ) δᵀ‖² / ‖δ‖² is least.

    That is WUDI's objective (Cheng et al., arXiv 2503.08099), which the paper descends by gradient and here is solved:
    RegMean with each expert's own δ in place of data. Of a weight [out, in] a node carries out · in + in² numbers of
    4 bytes, whatever the number of experts; the solution takes some more [in, in] in double precision. The smaller
    side does not help where in is the larger one: the rows of all experts together, N · out, would have to be fewer
    than in, and they cannot be added up.

    What rounding of the fp32 sums adds is about 3e-8 · in / (ridge · N · rank of δ) of the result: hence a lower bound
    of the ridge.
    """
    if len(root.statistics.shape) < 2:
        return vector(root, params)
    ridge = number(params, "ridge")
    return _dense(root, params, root.once(("wudi", ridge), lambda: _regressions(root, ridge)))


def tsv_m(root: Root, params: Params) -> Tensor | SparseTensor:
    """λ Σ s u⊥ v⊥ᵀ over the leading directions of every expert, made orthogonal (TSV-M, Gargiulo et al.,
    arXiv 2412.00081).

    Each expert's δ = U diag(s) Vᵀ brings its r = max(1, ⌊rank_share · min(out, in)⌋) largest directions; the share is
    1/N as published (`even`), or a number, with which a node does not depend on how many experts there are in all. The
    left vectors of all together are replaced by the nearest orthonormal ones, and so are the right ones. A node carries
    4 · (2 + out + in) bytes a direction.
    """
    if len(root.statistics.shape) < 2:
        return vector(root, params)
    return _dense(root, params, root.once("tsv_m", lambda: _weighed(root)))


def iso_cts(root: Root, params: Params) -> Tensor | SparseTensor:
    """λ · mean(s) · U⊥V⊥ᵀ of the common directions of Σδ and of each expert's own outside of them (Iso-CTS, Marczak et
    al., arXiv 2502.04959).

    The common ones are the leading `common_share` of Σδ, which the earlier round finds; the rest of min(out, in) is
    divided among the experts, each of which brings the leading directions of δ - U Uᵀ δ, U the common left ones. All
    are made orthogonal as in TSV-M, and weigh the same: the sum of their singular values over min(out, in). A node
    carries what TSV-M's does, for fewer directions.
    """
    if len(root.statistics.shape) < 2:
        return vector(root, params)
    return _dense(root, params, root.once("iso_cts", lambda: _isotropic(root)))


def svc(root: Root, params: Params) -> Tensor | SparseTensor:
    """λ Σ_r γ_r σ_r u_r v_rᵀ of Σδ = Σ_r σ_r u_r v_rᵀ, with γ_r = N / Σ_i max(α, s_rⁱ) and s_rⁱ = σ_r u_rᵀδ_i v_r /
    ‖u_rᵀδ_i‖² (singular value calibration, Li et al., arXiv 2602.05536, of task arithmetic with a scale of 1).

    s_rⁱ is how much of expert i's own output along u_r the sum has; above 1 a direction is counted several times. α is
    1/N as published (`even`), where the authors start from 0.3 Σδ: of that the result is this one's of α / 0.3. With
    α ≥ 1 directions are only turned down. Formula and α as FusionBench and the authors' second version have them;
    their first one took the mean before the maximum, and only where all s_rⁱ are positive. Here an expert whose part
    in a direction is rounding (a millionth of its δ) has s = 0, as one without the tensor.

    A node carries 4 · min(out, in) bytes an expert. All lifts find the singular vectors of Σδ, once a node and tensor.
    """
    if len(root.statistics.shape) < 2:
        return vector(root, params)
    alpha = even_share(params["alpha"], root.experts)
    return _dense(root, params, root.once(("svc", alpha), lambda: _calibrated(root, alpha)))


def knots(root: Root, params: Params) -> Tensor | SparseTensor:
    """λ U · TIES(Uᵀδ_1, …, Uᵀδ_N), U the left singular vectors of [δ_1 … δ_N] side by side (KnOTS, Stoica et al.,
    arXiv 2410.19735): experts of low rank are elected on outputs that they share, not on the weight's own.

    Of each expert come its `rank` largest directions at most, which is all of a LoRA of no higher rank. `trim` is the
    share of an expert's values Uᵀδ_i that stay, of each weight by itself (of all weights together as published);
    values below a millionth of its largest are rounding, and none. KnOTS with a mean in place of TIES is the mean:
    U Uᵀδ_i = δ_i. A node carries 4 · (2 + out + in) bytes a direction.
    """
    if len(root.statistics.shape) < 2:
        return vector(root, params)
    share = number(params, "trim")
    return _dense(root, params, root.once(("knots", share), lambda: _aligned(root, share)))


def _aligned(root: Root, share: float) -> list[Tensor]:
    rows = root["factors"]
    if not finite(rows):
        raise MergeError("the experts' directions are not finite; look for a diverged expert")
    starts = [*(rows[:, 0] < 0).nonzero().view(-1).tolist(), len(rows)] if rows.numel() else [0]
    experts = [rows[first + 1 : last] for first, last in pairwise(starts)]
    experts.sort(key=lambda own: own.numpy().tobytes())  # the order of experts is seen in no sum
    count, height, _ = stacked(root.name, root.statistics.shape)
    return [_elected([vectors_of(own, at, height) for own in experts], share) for at in range(count) if experts]


def _elected(experts: list[tuple[Tensor, Tensor, Tensor]], share: float) -> Tensor:
    """Of one matrix, from singular values [k], left [k, rows] and right vectors [k, columns] of each expert."""
    outputs = torch.cat([left * values[:, None] for values, left, _ in experts])
    columns = experts[0][2].shape[1]
    if not len(outputs):
        return torch.zeros(outputs.shape[1], columns)
    _, basis, _ = vectors_of(leading(outputs.T.float(), min(outputs.shape)), 0, outputs.shape[1])
    mass, counts = torch.zeros(2, 2, len(basis), columns, dtype=torch.float64)
    for values, left, right in experts:
        own = ((basis @ left.T) * values) @ right
        own[own.abs() <= NONE * own.abs().max()] = 0.0
        chosen = trim(own.view(-1), kept(share, own.numel()))
        thin = torch.zeros_like(own).view(-1).index_copy_(0, chosen, own.view(-1)[chosen]).view(own.shape)
        for at, part in enumerate((thin.clamp(min=0), thin.clamp(max=0))):
            mass[at] += part
            counts[at] += part != 0
    at = (mass.sum(0) < 0).long()[None]
    merged = mass.gather(0, at)[0] / counts.gather(0, at)[0].clamp(min=1)
    return (basis.T @ merged).float()


def _calibrated(root: Root, alpha: float) -> list[Tensor]:
    amplified = root["amplified"]
    if root.reference is None or not amplified.numel():
        return []
    if not finite(amplified):
        raise MergeError("the sum of the experts' changes overflows fp32; look for a diverged expert")
    count, height, width = stacked(root.name, root.statistics.shape)
    # sorted, so that the order of experts cannot be seen in the sum
    gains = amplified.double().clamp(min=alpha).sort(dim=0).values.sum(0) + alpha * (root.experts - len(amplified))
    found = []
    of_each = gains.reciprocal_().mul_(root.experts).view(count, min(height, width))
    for gain, (values, left, right) in zip(of_each, bases(root.reference, root.name, root.once), strict=True):
        found.append(((left.T * (values * gain[: len(values)])) @ right).float())
    return found


def _regressions(root: Root, ridge: float) -> list[Tensor]:
    found = []
    for both in root["own_regression"]:
        columns = both.shape[1]
        if not finite(both):
            raise MergeError("the sum of the experts' changes overflows fp32; look for a diverged expert")
        product, gram = both.to(root.device).double().split([both.shape[0] - columns, columns])
        load = ridge * float(gram.diagonal().mean())
        if not load:  # all δ are 0
            found.append(torch.zeros(product.shape))
            continue
        gram.diagonal().add_(load)
        factor = torch.linalg.cholesky(gram)
        found.append(torch.cholesky_solve(product.T, factor).T.float().cpu())
    return found


def _weighed(root: Root) -> list[Tensor]:
    found = []
    for values, left, right in _directions(root, "directions"):
        found.append(((orthogonal(left) * values[:, None]).T @ orthogonal(right)).float().cpu())
    return found


def _isotropic(root: Root) -> list[Tensor]:
    count, height, width = stacked(root.name, root.statistics.shape)
    common = torch.zeros(root.statistics.numel)
    if root.reference is not None:
        common.index_copy_(0, root.reference.indices, root.reference.values)
    found = []
    own = _directions(root, "own_directions")
    for isotropic, (values, left, right) in zip(common.view(count, height, width), own, strict=True):
        scale, shared_left, shared_right = common_directions(isotropic.to(root.device))
        total = float(values.sum()) + scale * len(shared_left)
        left, right = torch.cat([left, shared_left]), torch.cat([right, shared_right])
        found.append((total / min(height, width) * orthogonal(left).T @ orthogonal(right)).float().cpu())
    return found


def _directions(root: Root, name: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Singular values fp64 [k] and vectors [k, rows] and [k, columns] of each matrix of the tensor."""
    count, height, width = stacked(root.name, root.statistics.shape)
    rows = root[name]
    if not finite(rows):
        raise MergeError("the experts' directions are not finite; look for a diverged expert")
    rows = in_order(rows).to(root.device) if rows.numel() else rows.new_zeros(0, 2 + height + width)
    return [vectors_of(rows, which, height) for which in range(count)]


def _dense(root: Root, params: Params, parts: list[Tensor]) -> SparseTensor:
    """As `dense`, of matrices that other candidates read too; nothing where there are none."""
    if not parts:
        return SparseTensor(root.statistics.shape, torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    return dense(root, params, [part.clone() for part in parts])
