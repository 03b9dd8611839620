"""The table of merge methods, and `lower`: from a root's statistics to the merged δ.

A method is a pair of small pure functions: what its lift does to one expert (`merge.methods.lift` computes it,
`merge.methods.sparsify` trims and drops) and how the joined statistics are lowered (`merge.methods.lowering` has one
function a method). A method of two rounds names another method as its `reference`: the merged δ of that one is read by
the lift and the lower of this one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from infra.errors import MergeError
from merge.methods import lowering, matrices
from merge.methods.lowering import Root
from merge.methods.parameters import EVEN, Choice, Number, Params, Value, number
from merge.methods.statistic_table import MAX_EXPERTS
from workers.adapters.reader import AdapterReader
from workers.adapters.support import SparseTensor

if TYPE_CHECKING:
    from merge.methods.specs import Candidate

LOWER_VERSION = 3
"""Part of the key of every merged adapter: raise it when the same statistics give another δ."""

Sparsify = Literal["none", "trim", "drop", "magprune", "breadcrumbs"]
Options = tuple[tuple[str, Value], ...]
Lower = Callable[[Root, Params], Tensor | SparseTensor]
LiftRule = Callable[[Params], tuple[Sparsify, Options]]


@dataclass(frozen=True)
class AtHand:
    """What a method that runs a model is given: the model at W + δ of its reference in fp32; of each task the summed
    cross-entropy of every training row by itself; and the reference's δ."""

    model: nn.Module
    losses: Sequence[Sequence[Callable[[], Tensor]]]
    reference: AdapterReader


ByModel = Callable[[AtHand, Params], Iterable[tuple[str, SparseTensor]]]
"""The merged δ of each tensor, fp32, in the order of their names: tensors of the reference, in its shapes."""


def _plain(params: Params) -> tuple[Sparsify, Options]:
    """The lift of methods that read every stored value as it is."""
    return "none", ()


@dataclass(frozen=True)
class Method:
    """A merge method.

    `paper` cites it; `params` are its parameters; `needs` are the statistics that `lower` reads ("count" may be derived
    from those by sign, see `merge.methods.lowering`); `lift` says how an expert's values are thinned out before they
    become statistics, and with which options (only those that change something).
    `weights` of experts: not taken (None), any numbers, non-negative ones, or a convex combination.
    `reference`: the method and parameters whose merged δ the lift and the lower read (one round more).
    `per_task`: the merged δ needs the task's mask at inference. `internal`: only a reference of other methods.
    `matrix`: the merged δ is made of each weight as a matrix, and dense.
    `by_model`: the merged δ is made by running a model, from the merge that is its `reference`; it has neither `needs`
    nor `lower`, and only a run of the pipeline, which has the tasks' rows, can make it.
    """

    paper: str
    needs: tuple[str, ...] = ()
    lower: Lower | None = None
    params: Mapping[str, Number | Choice] = field(default_factory=dict)
    lift: LiftRule = _plain
    weights: Literal["convex", "non_negative", "any"] | None = None
    weights_required: bool = False
    reference: Callable[[Params], tuple[str, Params]] | None = None
    check: Callable[[Params], str | None] | None = None
    """What is wrong with parameters that are each in range, if anything."""
    per_task: bool = False
    internal: bool = False
    matrix: bool = False
    by_model: ByModel | None = None


def lower(root: Root, candidate: Candidate) -> SparseTensor:
    """The merged δ of one tensor, fp32: on the union support, a part of it (where the method selects positions) or
    everywhere (where it makes a matrix of it).

    Raises MergeError for a δ that is not finite, where the method does not leave that to whoever writes it.
    """
    method = METHODS[candidate.method]
    if method.lower is None:
        raise MergeError(f"{candidate} is not made of statistics")
    result = method.lower(root, candidate.params)
    if isinstance(result, SparseTensor):
        return result
    return SparseTensor(root.statistics.shape, root.statistics.indices, result)


def _trim(params: Params) -> tuple[Sparsify, Options]:
    return _thin("trim", params, "density", "density_of")


def _drop(params: Params) -> tuple[Sparsify, Options]:
    return _thin("drop", params, "density", "seed")


def _magprune(params: Params) -> tuple[Sparsify, Options]:
    return _thin("magprune", params, "density", "epsilon", "seed")


def _breadcrumbs(params: Params) -> tuple[Sparsify, Options]:
    return _thin("breadcrumbs", params, "density", "density_of", "gamma")


def _thin(how: Sparsify, params: Params, *options: str) -> tuple[Sparsify, Options]:
    # density 1 keeps everything and so shares the plain reduction
    return ("none", ()) if params["density"] == 1 else (how, tuple((name, params[name]) for name in options))


def _threshold(params: Params) -> tuple[Sparsify, Options]:
    return "none", (("threshold", params["threshold"]),)


def _off_diagonal(params: Params) -> tuple[Sparsify, Options]:
    inputs = () if params["inputs"] == "rows" else (("inputs", params["inputs"]),)
    return "none", (("off_diagonal", params["off_diagonal"]), *inputs)


def _trim_own(params: Params) -> tuple[Sparsify, Options]:
    """The largest of each expert's own values, where `density` is the merge's."""
    return _trim({"density": params["trim"], "density_of": "support"})


def _rank_share(params: Params) -> tuple[Sparsify, Options]:
    how, options = _trim_own(params)
    return how, (*options, ("rank_share", params["rank_share"]))


def _rank(params: Params) -> tuple[Sparsify, Options]:
    return "none", (("rank", params["rank"]),)


def _common_share(params: Params) -> tuple[Sparsify, Options]:
    how, options = _rank_share(params)
    return how, (*options, ("common_share", params["common_share"]))


def _window_fits(params: Params) -> str | None:
    density, epsilon = number(params, "density"), number(params, "epsilon")
    if density == 1 or (density - epsilon > 0 and density + epsilon <= 1):
        return None
    return (
        f"keep probabilities density ± epsilon = {density - epsilon:g} to {density + epsilon:g} must lie above 0 and "
        "at most at 1"
    )


def _scale(default: float) -> Number:
    return Number(default, 0, 10)


_DENSITY = Number(1, 0, 1)
_DENSITY_OF = Choice("support", ("support", "tensor"))
_KEPT = Number(0.5, 0, 1)
_SEED = Number(0, 0, 2**53, low_allowed=True, integer=True)
_THRESHOLD = Number(0.4, 0, 10)
_AT_LEAST = Number(2, 1, MAX_EXPERTS, low_allowed=True, integer=True)
_TRIMMED: Mapping[str, Number | Choice] = {"density": _DENSITY, "density_of": _DENSITY_OF}
_DROPPED: Mapping[str, Number | Choice] = {"density": _KEPT, "seed": _SEED}
_PRUNED: Mapping[str, Number | Choice] = {
    "density": _KEPT,
    "epsilon": Number(0.1, 0, 1, low_allowed=True),
    "seed": _SEED,
}
_CRUMBS: Mapping[str, Number | Choice] = {
    "density": Number(0.9, 0, 1),
    "gamma": Number(0.01, 0, 1, low_allowed=True),
    "density_of": _DENSITY_OF,
}
_SPECTRAL: Mapping[str, Number | Choice] = {
    "density": _DENSITY,
    "parts": Choice("stored", ("stored", "qkv")),
    "vector_lambda": Number("mean", 0, 10, word="mean"),
    "trim": replace(_DENSITY, later=True),
}
_MATRIX: Mapping[str, Number | Choice] = {
    "trim": _DENSITY,
    "density": _DENSITY,
    "vector_lambda": Number("mean", 0, 10, word="mean"),
}
_RANK_SHARE = Number(EVEN, 0, 1, word=EVEN)
_COMMON: Mapping[str, Number | Choice] = {
    "common_share": Number(0.8, 0, 1),
    "rank_share": _RANK_SHARE,
    "trim": _DENSITY,
}
_SIGNED = ("positive_mass", "negative_mass", "positive_count", "negative_count")

_SOUP = "Wortsman et al., Model soups, arXiv 2203.05482"
_ARITHMETIC = "Ilharco et al., Editing models with task arithmetic, arXiv 2212.04089"
_TIES = "Yadav et al., TIES-Merging, arXiv 2306.01708"
_DARE = "Yu et al., Language models are Super Mario (DARE), arXiv 2311.03099"
_DELLA = "Deep et al., DELLA-Merging, arXiv 2406.11617"
_BREADCRUMBS = "Davari and Belilovsky, Model Breadcrumbs, arXiv 2312.06795"
_TALL = "Wang et al., Localizing task information for improved model merging (TALL masks), arXiv 2405.07813"
_ISO = "Marczak et al., No task left behind: isotropic model merging (Iso-C), arXiv 2502.04959"
_ISO_CTS = "Marczak et al., No task left behind: isotropic model merging (Iso-CTS), arXiv 2502.04959"
_TSV = "Gargiulo et al., Task singular vectors: reducing task interference in model merging (TSV-M), arXiv 2412.00081"
_SVC = "Li et al., When shared knowledge hurts: spectral over-accumulation in model merging (SVC), arXiv 2602.05536"
_KNOTS = "Stoica et al., Model merging with SVD to tie the KnOTS, arXiv 2410.19735"
_WUDI = "Cheng et al., Whoever started the interference should end it (WUDI), arXiv 2503.08099"
_SCE = "Wan et al., FuseChat (select, calculate, erase), arXiv 2408.07990"


def _linear(paper: str, params: Mapping[str, Number | Choice], lift: LiftRule = _plain) -> Method:
    """λ times the (weighted) sum of the experts after their lift."""
    return Method(paper, ("sum",), lowering.scaled_sum, {"lambda": _scale(0.4), **params}, lift, weights="any")


def _elected(paper: str, params: Mapping[str, Number | Choice], lift: LiftRule) -> Method:
    """λ times the mean of the values that agree with the elected sign, after the lift."""
    scale = {"lambda": _scale(1)}
    return Method(paper, _SIGNED, lowering.ties, {**scale, **params}, lift, weights="non_negative")


METHODS: dict[str, Method] = {
    "mean": Method(f"{_SOUP} (uniform soup)", ("sum",), lowering.mean),
    "weighted_mean": Method(
        f"{_SOUP} (weighted average)", ("sum",), lowering.total_delta, weights="convex", weights_required=True
    ),
    "overlap_mean": Method(
        f"{_SOUP}, over the experts whose support holds a position",
        ("sum", "count"),
        lowering.overlap_mean,
        weights="non_negative",
    ),
    "task_arithmetic": _linear(_ARITHMETIC, {}),
    "ties": _elected(_TIES, _TRIMMED, _trim),
    "dare_linear": _linear(f"{_DARE}, with task arithmetic", _DROPPED, _drop),
    "dare_ties": _elected(f"{_DARE}, with TIES", _DROPPED, _drop),
    "della": replace(_elected(_DELLA, _PRUNED, _magprune), check=_window_fits),
    "della_linear": replace(_linear(f"{_DELLA}, without election", _PRUNED, _magprune), check=_window_fits),
    "breadcrumbs": _linear(_BREADCRUMBS, _CRUMBS, _breadcrumbs),
    "breadcrumbs_ties": _elected(f"{_BREADCRUMBS}, with TIES", _CRUMBS, _breadcrumbs),
    "magmax": Method(
        "Marczak et al., MagMax, arXiv 2407.06322",
        ("positive_max", "negative_max"),
        lowering.magmax,
        {"lambda": _scale(1)},
    ),
    "spectral_power": Method(
        f"of this project: the singular values of Σδ to the power p; {_ISO} is p = 0, task arithmetic p = 1",
        ("sum",),
        lowering.spectral_power,
        {"p": Number(-0.75, -4, 4, low_allowed=True), "lambda": _scale(1), "floor": Number(0.03, 0, 1), **_SPECTRAL},
        _trim_own,
        weights="any",
        matrix=True,
    ),
    "iso_c": Method(
        _ISO,
        ("sum",),
        lowering.iso_c,
        {"lambda": _scale(0.45), "floor": Number(0.001, 0, 1), **_SPECTRAL},
        _trim_own,
        weights="any",
        matrix=True,
    ),
    "wudi": Method(
        f"{_WUDI}; its objective solved, not descended",
        ("sum", "own_regression"),
        matrices.wudi,
        {"lambda": _scale(1), "ridge": Number(0.001, 1e-4, 1, low_allowed=True), **_MATRIX},
        _trim_own,
        weights="any",
        matrix=True,
    ),
    "tsv_m": Method(
        _TSV,
        ("sum", "directions"),
        matrices.tsv_m,
        {"lambda": _scale(1), "rank_share": _RANK_SHARE, **_MATRIX},
        _rank_share,
        weights="any",
        matrix=True,
    ),
    "iso_common": Method(
        f"{_ISO_CTS}: the common directions",
        ("sum",),
        lowering.iso_common,
        _COMMON,
        _trim_own,
        internal=True,
        matrix=True,
    ),
    "iso_cts": Method(
        _ISO_CTS,
        ("sum", "own_directions"),
        matrices.iso_cts,
        {"lambda": _scale(0.45), **_COMMON, **_MATRIX},
        _common_share,
        reference=lambda params: ("iso_common", {name: params[name] for name in _COMMON}),
        matrix=True,
    ),
    "knots": Method(
        f"{_KNOTS}, with TIES",
        ("sum", "factors"),
        matrices.knots,
        {"lambda": _scale(1), "rank": Number(64, 1, 2**16, low_allowed=True, integer=True), **_MATRIX},
        _rank,
        matrix=True,
    ),
    "trimmed_sum": Method(
        f"{_ARITHMETIC}: the sum", ("sum",), lowering.total_delta, {"trim": _DENSITY}, _trim_own, internal=True
    ),
    "svc": Method(
        f"{_SVC}, of task arithmetic",
        ("sum", "amplified"),
        matrices.svc,
        {"lambda": _scale(1), "alpha": Number(EVEN, 0, 10, word=EVEN), **_MATRIX},
        _trim_own,
        reference=lambda params: ("trimmed_sum", {"trim": params["trim"]}),
        matrix=True,
    ),
    "consensus": Method(
        f"{_TALL}, consensus merging of task arithmetic",
        ("agreement_count",),
        lowering.consensus,
        {"lambda": _scale(0.4), "threshold": _THRESHOLD, "at_least": _AT_LEAST},
        _threshold,
        reference=lambda params: ("task_arithmetic", {"lambda": 1.0}),
    ),
    "consensus_ties": Method(
        f"{_TALL}, consensus merging of TIES (whose elected values are summed, not averaged)",
        ("agreement_count",),
        lowering.consensus,
        {"lambda": _scale(0.4), "threshold": _THRESHOLD, "at_least": _AT_LEAST, "density": _DENSITY},
        _threshold,
        reference=lambda params: ("ties_sum", {"density": params["density"]}),
    ),
    "ties_sum": Method(f"{_TIES}: the elected values' sum", _SIGNED, lowering.ties_sum, _TRIMMED, _trim, internal=True),
    "fisher_on_support": Method(
        "Matena and Raffel, Merging models with Fisher-weighted averaging, arXiv 2111.09832; a variant: the base "
        "outside an expert's support carries no mass",
        ("fisher_mass", "fisher"),
        lowering.fisher_mean,
        weights="non_negative",
    ),
    "regmean": Method(
        "Jin et al., Dataless knowledge fusion by merging weights of language models (RegMean), arXiv 2212.09849",
        ("sum", "gram_product", "gram", "gram_count"),
        lowering.regmean,
        {
            "off_diagonal": Number(0.9, 0, 1, low_allowed=True),
            "inputs": Choice("rows", ("rows", "tokens", "answers"), later=True),
            "base": Number(0, 0, 100, low_allowed=True, later=True),
        },
        _off_diagonal,
    ),
    "sce_selection": Method(
        f"{_SCE}: the selection", ("sum", "square_sum"), lowering.sce_selection, {"density": _DENSITY}, internal=True
    ),
    "sce": Method(
        _SCE,
        ("agreeing_mass", "agreeing_weight"),
        lowering.sce,
        {"density": _DENSITY},
        reference=lambda params: ("sce_selection", {"density": params["density"]}),
    ),
    "emr": Method(
        "Huang et al., EMR-Merging, arXiv 2405.17461",
        ("sum", "positive_max", "negative_max"),
        lowering.elect,
        per_task=True,
    ),
    "tall": Method(
        f"{_TALL}, one mask a task", ("sum",), lowering.total_delta, {"threshold": _THRESHOLD}, per_task=True
    ),
}
"""All methods by name. Defaults without a validation set as in the papers, TIES': λ 0.4 for sums, 1 where signs are
elected. Nothing is trimmed by default (a support is sparse already), so that most methods share one reduction.

SCE takes two rounds, not three: an expert's weight depends on itself and the selection only."""
