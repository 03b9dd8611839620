"""Experts for tests, and every merge method once more as a dense reference: plain Python in double precision."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from merge.methods.sparsify import uniform
from merge.methods.specs import Candidate
from workers.adapters.support import SparseTensor

SHAPE = (5, 8)
NUMEL = 40
Rows = list[list[float]]


@dataclass(frozen=True)
class Expert:
    tensor: SparseTensor
    fisher: Tensor
    gram: Tensor | None

    @property
    def dense(self) -> list[float]:
        return torch.zeros(NUMEL).index_copy_(0, self.tensor.indices, self.tensor.values).tolist()

    @property
    def held(self) -> set[int]:
        return set(self.tensor.indices.tolist())


Experts = dict[str, Expert]
Reference = Callable[[Experts, Candidate], list[float]]
Rule = Callable[[str, Expert, Candidate], list[float]]
"""One expert thinned out, as a dense row."""
Then = Callable[[Rows, list[float], float], list[float]]
"""Dense rows, weights and λ to the merged row."""


def make_experts(seed: int, n: int, per_expert: int, full: bool = False) -> Experts:
    """Dyadic values, zeros and equal magnitudes among them; `full`: every other expert holds every position."""
    g = torch.Generator().manual_seed(seed)
    made = {}
    for number in range(n):
        count = NUMEL if full and number % 2 == 0 else per_expert
        indices = torch.randperm(NUMEL, generator=g)[:count].sort().values
        values = torch.randint(-16, 17, (count,), generator=g) / 64
        fisher = torch.randint(1, 17, (count,), generator=g) / 8
        inputs = torch.randint(-2, 3, (12, SHAPE[1]), generator=g).float()
        inputs[:, 3] = 0  # an input that is never seen
        made[f"e{number}"] = Expert(SparseTensor(SHAPE, indices, values), fisher, inputs.T @ inputs)
    return made


def columns(rows: Rows) -> Rows:
    return [list(column) for column in zip(*rows, strict=True)]


def weight_list(experts: Experts, c: Candidate) -> list[float]:
    return [c.weights[name] if c.weights else 1.0 for name in experts]


def rows_of(experts: Experts) -> Rows:
    return [e.dense for e in experts.values()]


def linear(rows: Rows, weights: list[float], scale: float) -> list[float]:
    return [scale * sum(w * v for w, v in zip(weights, column, strict=True)) for column in columns(rows)]


def elected_mean(rows: Rows, weights: list[float], scale: float) -> list[float]:
    out = []
    for column in columns(rows):
        pairs = list(zip(weights, column, strict=True))
        sign = 1 if sum(w * v for w, v in pairs) >= 0 else -1
        agreeing = [(w, v) for w, v in pairs if v * sign > 0]
        share = sum(w for w, _ in agreeing)
        out.append(scale * sum(w * v for w, v in agreeing) / share if share else 0.0)
    return out


def elected_sum(rows: Rows, weights: list[float], scale: float) -> list[float]:
    out = []
    for column in columns(rows):
        sign = 1 if sum(column) >= 0 else -1
        out.append(scale * sum(v for v in column if v * sign > 0))
    return out


def by_magnitude(e: Expert) -> list[int]:
    """Positions, largest first, equal ones by position."""
    values = e.dense
    return sorted(e.held, key=lambda i: (-abs(values[i]), i))


def only(e: Expert, kept: dict[int, float]) -> list[float]:
    values = e.dense
    return [values[i] * kept.get(i, 0.0) for i in range(NUMEL)]


def size_of(e: Expert, c: Candidate) -> int:
    return NUMEL if c.params.get("density_of") == "tensor" else len(e.held)


def trimmed(name: str, e: Expert, c: Candidate) -> list[float]:
    return only(e, dict.fromkeys(by_magnitude(e)[: max(1, int(c.params["density"] * size_of(e, c)))], 1.0))


def crumbs(name: str, e: Expert, c: Candidate) -> list[float]:
    size = size_of(e, c)
    keep = max(1, int(c.params["density"] * size))
    top = min(int(c.params["gamma"] * size), size - keep)
    return only(e, dict.fromkeys(by_magnitude(e)[top : top + keep], 1.0))


def dropped(name: str, e: Expert, c: Candidate) -> list[float]:
    p = c.params["density"]
    draws = uniform(int(c.params["seed"]), name, "w", len(e.held)).tolist()
    return only(e, {i: 1 / p for i, u in zip(sorted(e.held), draws, strict=True) if u < p})


def pruned(name: str, e: Expert, c: Candidate) -> list[float]:
    draws = dict(zip(sorted(e.held), uniform(int(c.params["seed"]), name, "w", len(e.held)).tolist(), strict=True))
    values, kept = e.dense, {}
    for row in range(SHAPE[0]):
        ranked = sorted((i for i in e.held if i // SHAPE[1] == row), key=lambda i: (abs(values[i]), i))
        for rank, i in enumerate(ranked):
            share = rank / (len(ranked) - 1) if len(ranked) > 1 else 0.5
            p = c.params["density"] - c.params["epsilon"] + 2 * c.params["epsilon"] * share
            if draws[i] < p:
                kept[i] = 1 / p
    return only(e, kept)


def thinned(rule: Rule, then: Then) -> Reference:
    """A reference that thins every expert out and then merges; density 1 keeps everything."""

    def reference(experts: Experts, c: Candidate) -> list[float]:
        keep_all = c.params["density"] == 1
        rows = [e.dense if keep_all else rule(name, e, c) for name, e in experts.items()]
        return then(rows, weight_list(experts, c), c.params.get("lambda", 1.0))

    return reference


def overlap(experts: Experts, c: Candidate) -> list[float]:
    out = []
    for i in range(NUMEL):
        held = [(w, e.dense[i]) for w, e in zip(weight_list(experts, c), experts.values(), strict=True) if i in e.held]
        share = sum(w for w, _ in held)
        out.append(sum(w * v for w, v in held) / share if share else 0.0)
    return out


def largest(experts: Experts, c: Candidate) -> list[float]:
    return [c.params["lambda"] * max(column, key=lambda v: (abs(v), v)) for column in columns(rows_of(experts))]


def elected_largest(experts: Experts, c: Candidate) -> list[float]:
    out = []
    for column in columns(rows_of(experts)):
        sign = 1 if sum(column) >= 0 else -1
        out.append(sign * max((abs(v) for v in column if v * sign > 0), default=0.0))
    return out


def agreed(experts: Experts, c: Candidate) -> list[float]:
    ones = [1.0] * len(experts)
    merged = linear(rows_of(experts), ones, 1.0)
    if c.method == "consensus_ties":
        merged = elected_sum([trimmed(n, e, c) for n, e in experts.items()], ones, 1.0)
    out = []
    for i, target in enumerate(merged):
        votes = sum(
            i in e.held and abs(e.dense[i]) >= c.params["threshold"] * abs(target - e.dense[i])
            for e in experts.values()
        )
        out.append(c.params["lambda"] * target if votes >= c.params["at_least"] else 0.0)
    return out


def fisher_average(experts: Experts, c: Candidate) -> list[float]:
    above, below = [0.0] * NUMEL, [0.0] * NUMEL
    for w, e in zip(weight_list(experts, c), experts.values(), strict=True):
        for i, f in zip(e.tensor.indices.tolist(), e.fisher.tolist(), strict=True):
            above[i] += w * f * e.dense[i]
            below[i] += w * f
    return [a / b if b else 0.0 for a, b in zip(above, below, strict=True)]


def regression(experts: Experts, c: Candidate) -> list[float]:
    """The normal equations, with a pseudo-inverse; inputs that nobody has seen keep the mean."""
    mean = torch.tensor(linear(rows_of(experts), [1.0] * len(experts), 1 / len(experts)), dtype=torch.float64)
    if any(e.gram is None for e in experts.values()):
        return mean.tolist()
    left, right = torch.zeros(SHAPE, dtype=torch.float64), torch.zeros(SHAPE[1], SHAPE[1], dtype=torch.float64)
    for e in experts.values():
        diagonal = torch.diag(e.gram.diagonal())
        gram = (c.params["off_diagonal"] * e.gram + (1 - c.params["off_diagonal"]) * diagonal).double()
        left += torch.tensor(e.dense, dtype=torch.float64).view(SHAPE) @ gram
        right += gram
    right += c.params["base"] * torch.diag(right.diagonal())
    solved = left @ torch.linalg.pinv(right, rtol=1e-9, hermitian=True)
    unseen = right.diagonal() == 0
    solved[:, unseen] = mean.view(SHAPE)[:, unseen]
    return solved.view(-1).tolist()


def select(experts: Experts, c: Candidate) -> set[int]:
    n = len(experts)
    if c.params["density"] == 1 or n == 1:
        return set().union(*(e.held for e in experts.values()))
    variance = [n * sum(v * v for v in column) - sum(column) ** 2 for column in columns(rows_of(experts))]
    varying = sorted((i for i in range(NUMEL) if variance[i] > 0), key=lambda i: (-variance[i], i))
    return set(varying[: max(1, int(c.params["density"] * len(varying)))] if varying else [])


def selected_sum(experts: Experts, c: Candidate) -> list[float]:
    chosen = select(experts, c)
    return [sum(column) if i in chosen else 0.0 for i, column in enumerate(columns(rows_of(experts)))]


def sce(experts: Experts, c: Candidate) -> list[float]:
    chosen = select(experts, c)
    rows = [[v if i in chosen else 0.0 for i, v in enumerate(row)] for row in rows_of(experts)]
    energy = [sum(v * v for v in row) / NUMEL for row in rows]
    weights = [e / (sum(energy) or 1.0) for e in energy]
    out = []
    for column in columns(rows):
        sign = 1 if sum(column) >= 0 else -1  # elected without the weights
        agreeing = [(w, v) for w, v in zip(weights, column, strict=True) if v * sign > 0]
        share = sum(w for w, _ in agreeing)
        out.append(sum(w * v for w, v in agreeing) / share if share else 0.0)
    return out


def spectral(experts: Experts, c: Candidate) -> list[float]:
    """The formula on a singular value decomposition, in double precision."""
    total = linear(rows_of(experts), weight_list(experts, c), 1.0)
    u, s, v = torch.linalg.svd(torch.tensor(total, dtype=torch.float64).view(SHAPE), full_matrices=False)
    if not s[0]:
        return total
    q = s * (s / s[0]).clamp(min=c.params["floor"]) ** (c.params.get("p", 0.0) - 1)
    return (c.params["lambda"] * s.mean() / q.mean() * u @ torch.diag(q) @ v).view(-1).tolist()


def deltas(experts: Experts, c: Candidate) -> list[Tensor]:
    """Each expert's δ as a matrix, times its weight."""
    rows = zip(weight_list(experts, c), rows_of(experts), strict=True)
    return [w * torch.tensor(row, dtype=torch.float64).view(SHAPE) for w, row in rows]


def least_interference(experts: Experts, c: Candidate) -> list[float]:
    """WUDI's least squares, by its normal equations with a ridge."""
    above, below = torch.zeros(SHAPE, dtype=torch.float64), torch.zeros(SHAPE[1], SHAPE[1], dtype=torch.float64)
    for delta in deltas(experts, c):
        gram = delta.T @ delta / (delta.square().sum() or 1.0)
        above, below = above + delta @ gram, below + gram
    if not below.any():
        return [0.0] * NUMEL
    below = below + c.params["ridge"] * below.diagonal().mean() * torch.eye(SHAPE[1])
    return (c.params["lambda"] * above @ torch.linalg.inv(below)).view(-1).tolist()


def svd(matrix: Tensor, of: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """U, s and Vᵀ without directions of no length, beside the longest or beside what the matrix is the rest `of`."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    held = s > 1e-6 * ((s[0] if of is None else of.norm()) or 1.0)
    return u[:, held], s[held], v[held]


def procrustes(vectors: Tensor) -> Tensor:
    """The nearest orthonormal columns; of dependent ones, those on what they span."""
    u, s, v = torch.linalg.svd(vectors, full_matrices=False)
    held = s > 1e-6 * (s[0] if len(s) else 1.0)
    return u[:, held] @ v[held]


def task_singular_vectors(experts: Experts, c: Candidate) -> list[float]:
    """TSV-M as FusionBench computes it: the leading 1/N of each expert's directions, whitened by Procrustes."""
    share = 1 / len(experts) if c.params["rank_share"] == "even" else c.params["rank_share"]
    keep = max(1, int(min(SHAPE) * share))
    parts = [svd(delta) for delta in deltas(experts, c)]
    u = procrustes(torch.cat([u[:, :keep] for u, _, _ in parts], 1))
    s = torch.cat([s[:keep] for _, s, _ in parts])
    v = procrustes(torch.cat([v[:keep] for _, _, v in parts]).T).T
    return (c.params["lambda"] * u @ torch.diag(s) @ v).view(-1).tolist()


def common_space(experts: Experts, c: Candidate) -> tuple[Tensor, Tensor, Tensor, int]:
    """Iso-CTS' leading directions of Σδ, and how many it leaves to each expert; as FusionBench computes them."""
    side, n = min(SHAPE), len(experts)
    own = round((side - int(side * c.params["common_share"])) / n)
    u, s, v = svd(sum(deltas(experts, c)))
    common = max(0, side - own * n)
    return u[:, :common], s[:common], v[:common], own


def isotropic_common(experts: Experts, c: Candidate) -> list[float]:
    u, s, v, _ = common_space(experts, c)
    return (u @ v * (s.mean() if len(s) else 0.0)).view(-1).tolist()


def isotropic_common_and_own(experts: Experts, c: Candidate) -> list[float]:
    u, s, v, own = common_space(experts, c)
    parts = [svd(delta - u @ u.T @ delta, delta) for delta in deltas(experts, c)]
    left = procrustes(torch.cat([*(p[0][:, :own] for p in parts), u], 1))
    right = procrustes(torch.cat([*(p[2][:own] for p in parts), v]).T).T
    mean = torch.cat([*(p[1][:own] for p in parts), s]).sum() / min(SHAPE)
    return (c.params["lambda"] * mean * left @ right).view(-1).tolist()


def calibrated(experts: Experts, c: Candidate) -> list[float]:
    """Singular value calibration of Σδ, by its formula."""
    parts = deltas(experts, c)
    alpha = 1 / len(parts) if c.params["alpha"] == "even" else c.params["alpha"]
    u, s, v = svd(sum(parts))
    above = torch.zeros(len(s), dtype=torch.float64)
    for delta in parts:
        own = u.T @ delta
        squares = own.square().sum(1)
        some = squares.sqrt() > 1e-6 * delta.norm()
        shared = (own * (s[:, None] * v)).sum(1) / squares.where(some, 1.0)
        above += shared.where(some, 0.0).clamp(min=alpha)
    return (c.params["lambda"] * (u * (s * len(parts) / above)) @ v).view(-1).tolist()


def tied_knots(experts: Experts, c: Candidate) -> list[float]:
    """TIES on the outputs along the left singular vectors of all changes side by side, as the authors' code does."""
    parts = deltas(experts, c)
    cut = []
    for delta in parts:
        u, s, v = svd(delta)
        rank = int(c.params["rank"])
        cut.append((u[:, :rank] * s[:rank]) @ v[:rank])
    basis, _, _ = svd(torch.cat(cut, 1))
    rows = []
    for delta in cut:
        own = basis.T @ delta
        own[own.abs() <= 1e-6 * own.abs().max()] = 0
        flat = own.reshape(-1)
        rest = flat.abs().argsort(descending=True, stable=True)[max(1, int(c.params["trim"] * flat.numel())) :]
        flat[rest] = 0
        rows.append(flat)
    stack = torch.stack(rows)
    sign = torch.where(stack.sum(0) >= 0, 1.0, -1.0)
    agree = (stack * sign > 0).double()
    merged = (stack * agree).sum(0) / agree.sum(0).clamp(min=1)
    return (c.params["lambda"] * basis @ merged.view(basis.shape[1], -1)).reshape(-1).tolist()


def trimmed_first(then: Reference) -> Reference:
    """Each expert's own values thinned out to the share `trim` of the largest first."""

    def reference(experts: Experts, c: Candidate) -> list[float]:
        kept = {}
        for name, e in experts.items():
            share = by_magnitude(e)[: max(1, int(c.params["trim"] * len(e.held)))]
            at = torch.tensor(sorted(share if c.params["trim"] < 1 else e.held), dtype=torch.int64)
            values = torch.tensor(e.dense)[at]
            kept[name] = Expert(SparseTensor(SHAPE, at, values), e.fisher, e.gram)
        return then(kept, c)

    return reference


def scaled(experts: Experts, c: Candidate) -> list[float]:
    return linear(rows_of(experts), weight_list(experts, c), c.params.get("lambda", 1.0))


REFERENCES: dict[str, Reference] = {
    "mean": lambda experts, c: linear(rows_of(experts), [1.0] * len(experts), 1 / len(experts)),
    "weighted_mean": scaled,
    "overlap_mean": overlap,
    "task_arithmetic": scaled,
    "ties": thinned(trimmed, elected_mean),
    "dare_linear": thinned(dropped, linear),
    "dare_ties": thinned(dropped, elected_mean),
    "della": thinned(pruned, elected_mean),
    "della_linear": thinned(pruned, linear),
    "breadcrumbs": thinned(crumbs, linear),
    "breadcrumbs_ties": thinned(crumbs, elected_mean),
    "magmax": largest,
    "consensus": agreed,
    "consensus_ties": agreed,
    "ties_sum": thinned(trimmed, elected_sum),
    "fisher_on_support": fisher_average,
    "regmean": regression,
    "sce_selection": selected_sum,
    "sce": sce,
    "emr": elected_largest,
    "tall": scaled,
    "spectral_power": trimmed_first(spectral),
    "iso_c": trimmed_first(spectral),
    "wudi": trimmed_first(least_interference),
    "tsv_m": trimmed_first(task_singular_vectors),
    "iso_common": trimmed_first(isotropic_common),
    "trimmed_sum": trimmed_first(scaled),
    "knots": tied_knots,
    "svc": trimmed_first(calibrated),
    "iso_cts": trimmed_first(isotropic_common_and_own),
}
