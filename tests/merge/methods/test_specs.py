"""Candidates and their weights, the reductions they share, rounds, and what is refused before a tensor is read."""

import pickle
import re

import pytest

from infra.errors import MergeError
from merge.methods.catalogue import METHODS
from merge.methods.parameters import Choice, Number
from merge.methods.specs import (
    Candidate,
    LiftSpec,
    candidate_lift,
    check_candidate,
    check_served,
    describe_plan,
    plan_reductions,
)

SIGNED = ("negative_count", "negative_mass", "positive_count", "positive_mass")


def lifts(*candidates: Candidate) -> list[tuple[str, ...]]:
    return [r.spec.statistics for r in plan_reductions(candidates)]


# Candidates


def test_candidates_are_canonical_hashable_and_picklable():
    a = Candidate("ties", {"density": 1, "lambda": 1})
    assert a == Candidate("ties")
    assert hash(a) == hash(Candidate("ties"))
    assert a.to_json() == '{"method":"ties","params":{"density":1.0,"density_of":"support","lambda":1.0}}'
    assert Candidate.from_dict(a.to_dict()) == a
    assert Candidate.from_dict({"method": "mean"}) == Candidate("mean")
    assert pickle.loads(pickle.dumps(a)) == a
    assert Candidate("ties", {"lambda": 0.5}) != a
    assert all(Candidate(method) for method in METHODS)


def test_weights_are_part_of_a_candidate_but_not_of_its_recipe():
    a = Candidate("ties", {}, {"b": 1, "a": 0.5})
    assert a == Candidate("ties", {}, {"a": 0.5, "b": 1.0})
    assert a != Candidate("ties")
    assert len({a, Candidate("ties"), Candidate("ties", {}, {"a": 0.5, "b": 2})}) == 3
    assert a.to_dict() == a.recipe() | {"weights": {"a": 0.5, "b": 1.0}}
    assert a.recipe() == Candidate("ties").recipe()
    assert Candidate.from_dict(a.to_dict()) == a
    assert pickle.loads(pickle.dumps(a)) == a


def test_candidates_read_well():
    assert str(Candidate("mean")) == "mean"
    assert str(Candidate("dare_linear", {"seed": 3})) == "dare_linear(lambda=0.4, density=0.5, seed=3)"
    assert str(Candidate("overlap_mean", {}, {"a": 0.5, "b": 1})) == "overlap_mean(weights a:0.5 b:1)"
    many = [Candidate("overlap_mean", {}, {f"e{i}": i + extra for i in range(100)}) for extra in (0, 1)]
    assert all(re.fullmatch(r"overlap_mean\(weights #[0-9a-f]{8} of 100 experts\)", str(c)) for c in many)
    assert str(many[0]) != str(many[1])


@pytest.mark.parametrize(
    ("method", "params", "message"),
    [
        ("tie", {}, "unknown merge method 'tie'; did you mean 'ties'"),
        ("slerp-x", {}, "Accepted: mean, weighted_mean, overlap_mean"),
        ("ties", {"lamda": 1}, "no parameter 'lamda'; did you mean 'lambda'"),
        ("mean", {"lambda": 1}, "Accepted: none"),
        ("ties", {"density": 0}, "above 0 to 1"),
        ("ties", {"density": 1.5}, "above 0 to 1"),
        ("ties", {"lambda": float("nan")}, "accepted: a number"),
        ("ties", {"lambda": "big"}, "accepted: a number"),
        ("ties", {"lambda": True}, "accepted: a number"),
        ("ties", {"density_of": "model"}, "accepted: support, tensor"),
        ("ties", {"density_of": 1}, "accepted: support, tensor"),
        ("dare_ties", {"seed": 0.5}, "accepted: a whole number from 0"),
        ("consensus", {"at_least": 0}, "accepted: a whole number from 1"),
        ("della", {"density": 0.05}, "keep probabilities density ± epsilon = -0.05 to 0.15"),
        ("della_linear", {"density": 0.95}, "must lie above 0 and at most at 1"),
    ],
)
def test_bad_candidates_are_refused(method, params, message):
    with pytest.raises(MergeError, match=message):
        Candidate(method, params)


def test_unknown_keys_of_a_candidate_are_refused():
    for data in ({"method": "ties", "lambda": 1}, {"params": {}}, {"method": "ties", "weights": [1, 2]}):
        with pytest.raises(MergeError, match="method, params, weights"):
            Candidate.from_dict(data)


def test_an_error_never_offers_an_internal_method():
    with pytest.raises(MergeError) as error:
        Candidate("sce_select")
    assert "sce_selection" not in str(error.value)


# Weights


@pytest.mark.parametrize(
    ("method", "weights", "message"),
    [
        ("mean", {"a": 1}, "'mean' takes no weights; methods that do: weighted_mean, overlap_mean"),
        ("consensus", {"a": 1}, "takes no weights"),
        ("ties", {"a": -1}, "weight of expert 'a' .* is -1; accepted: a finite number from 0"),
        ("weighted_mean", {"a": 2, "b": -1}, "expert 'b'"),
        ("task_arithmetic", {"a": float("inf")}, "accepted: a finite number"),
        ("task_arithmetic", {"a": "1"}, "accepted: a finite number"),
        ("task_arithmetic", {"a": True}, "accepted: a finite number"),
    ],
)
def test_weights_that_a_method_cannot_take_are_refused(method, weights, message):
    with pytest.raises(MergeError, match=message):
        Candidate(method, {}, weights)


@pytest.mark.parametrize(
    ("method", "weights", "message"),
    [
        ("weighted_mean", None, "weights of merge method 'weighted_mean' are missing: give one for each of a, b"),
        ("weighted_mean", {"a": 0.5, "b": 0.4}, "sum to 0.9; accepted: 1"),
        ("weighted_mean", {"a": 0.5, "b": 0.50001}, "accepted: 1"),
        ("weighted_mean", {"a": 1.0}, "lack b"),
        ("ties", {"a": 1, "b": 1, "aa": 1}, "name 'aa', which is not merged; did you mean 'a'"),
        ("overlap_mean", {"a": 0, "b": 0}, "all 0"),
    ],
)
def test_weights_that_do_not_fit_the_experts_are_refused(method, weights, message):
    with pytest.raises(MergeError, match=message):
        check_candidate(Candidate(method, {}, weights), ["b", "a"])


def test_more_agreeing_experts_than_there_are_is_refused():
    for method in ("consensus", "consensus_ties"):
        check_candidate(Candidate(method, {"at_least": 3}), ["a", "b", "c"])
        with pytest.raises(MergeError, match=r"'at_least' .* is 4, but 3 experts can agree at most: .* 1 to 3"):
            check_candidate(Candidate(method, {"at_least": 4}), ["a", "b", "c"])
    with pytest.raises(MergeError, match="is 2, but 1 expert can agree"):
        check_candidate(Candidate("consensus"), ["a"])


def test_required_weights_are_missed_by_the_plan_as_well():
    with pytest.raises(MergeError, match="'weighted_mean' needs a weight for each expert"):
        plan_reductions([Candidate("weighted_mean")])


def test_weights_that_fit():
    check_candidate(Candidate("mean"), ["a"])
    check_candidate(Candidate("ties"), ["a"])
    check_candidate(Candidate("weighted_mean", {}, {"a": 0.3, "b": 0.7 + 5e-7}), ["b", "a"])
    check_candidate(Candidate("task_arithmetic", {}, {"a": -1, "b": 5}), ["b", "a"])


# Reductions


def test_methods_that_trim_nothing_share_one_reduction():
    candidates = [
        Candidate("mean"),
        Candidate("overlap_mean"),
        Candidate("task_arithmetic", {"lambda": 0.75}),
        Candidate("task_arithmetic"),
        Candidate("ties", {"lambda": 1.5}),
        Candidate("ties", {"density_of": "tensor"}),
        Candidate("dare_ties", {"density": 1, "seed": 4}),
        Candidate("della_linear", {"density": 1}),
        Candidate("breadcrumbs", {"density": 1}),
        Candidate("magmax"),
        Candidate("emr"),
        Candidate("tall"),
    ]
    (one,) = plan_reductions(candidates)
    assert one.candidates == tuple(candidates)
    assert one.round == 1
    assert set(one.spec.statistics) == {*SIGNED, "sum", "zero_count", "positive_max", "negative_max"}
    assert (one.spec.sparsify, one.spec.options, one.spec.weighted) == ("none", (), False)


def test_each_density_seed_and_weight_vector_is_another_reduction():
    candidates = [
        Candidate("ties", {"density": 0.3}),
        Candidate("ties", {"density": 0.3, "lambda": 0.5}),
        Candidate("ties", {"density": 0.3, "density_of": "tensor"}),
        Candidate("ties", {"density": 0.2}),
        Candidate("dare_ties", {"seed": 1}),
        Candidate("dare_linear", {"seed": 1}),
        Candidate("dare_ties", {"seed": 2}),
        Candidate("della", {"seed": 2}),
        Candidate("breadcrumbs"),
        Candidate("breadcrumbs_ties"),
        Candidate("breadcrumbs", {"gamma": 0.1}),
        Candidate("ties", {}, {"a": 1, "b": 2}),
        Candidate("overlap_mean", {}, {"a": 1, "b": 2}),
        Candidate("ties", {}, {"a": 1, "b": 3}),
    ]
    plan = plan_reductions(candidates)
    assert [[candidates.index(c) for c in r.candidates] for r in plan] == [
        [0, 1],
        [2],
        [3],
        [4, 5],
        [6],
        [7],
        [8, 9],
        [10],
        [11, 12],
        [13],
    ]
    assert plan[8].spec.weight_of("b") == 2
    assert plan[0].spec.option("density") == 0.3


def test_a_reduction_holds_no_more_than_its_candidates_read():
    mean, ties = Candidate("mean"), Candidate("ties")
    assert lifts(mean, Candidate("task_arithmetic")) == [("sum",)]
    assert lifts(mean, Candidate("overlap_mean")) == [("count", "sum")]
    assert lifts(ties, mean) == [(*SIGNED, "sum")]
    assert lifts(ties, Candidate("overlap_mean")) == [(*SIGNED, "sum", "zero_count")]
    weights = {"a": 0.1, "b": 0.2}  # sums of weights are rounded: a count is then not the sum of three
    assert lifts(Candidate("ties", {}, weights), Candidate("overlap_mean", {}, weights)) == [("count", *SIGNED, "sum")]
    assert lifts(Candidate("magmax")) == [("negative_max", "positive_max")]
    assert [r.candidates for r in plan_reductions([mean, mean])] == [(mean,)]


def test_nothing_waits_for_importance_that_it_does_not_read():
    plan = plan_reductions([Candidate("mean"), Candidate("fisher_on_support"), Candidate("regmean")])
    assert [r.spec.measurement for r in plan] == [None, "fisher", "gram"]
    assert plan[2].spec.statistics == ("gram", "gram_count", "gram_product", "sum")


def test_later_rounds_read_a_candidate_of_an_earlier_one():
    sce, consensus = Candidate("sce", {"density": 0.5}), Candidate("consensus", {"lambda": 1})
    ties = Candidate("consensus_ties", {"density": 0.2})
    assert (sce.rounds, Candidate("mean").rounds) == (2, 1)
    plan = plan_reductions([sce, consensus, Candidate("mean"), ties])
    summed = Candidate("task_arithmetic", {"lambda": 1})
    assert [r.round for r in plan] == [1, 1, 2, 2, 2]
    assert set(plan[0].candidates) == {Candidate("sce_selection", {"density": 0.5}), summed, Candidate("mean")}
    assert plan[1].candidates == (Candidate("ties_sum", {"density": 0.2}),)
    assert [(r.candidates, r.spec.reference) for r in plan[2:]] == [
        ((sce,), sce.reference),
        ((consensus,), summed),
        ((ties,), Candidate("ties_sum", {"density": 0.2})),
    ]
    assert lifts(Candidate("consensus"), Candidate("consensus", {"at_least": 3})) == [("sum",), ("agreement_count",)]


def test_every_reference_is_a_method_of_fewer_rounds_and_only_internal_ones_serve_nobody_else():
    for name, method in METHODS.items():
        candidate = Candidate(name)
        if method.reference:
            assert candidate.reference.rounds == candidate.rounds - 1
            assert method.weights is None
        if method.internal:
            assert any(Candidate(n).reference and Candidate(n).reference.method == name for n in METHODS)


def test_the_plan_in_words():
    assert describe_plan(plan_reductions([Candidate("mean")])).startswith(
        "1 reduction, 1 round:\n  round 1: sum [none]"
    )
    text = describe_plan(plan_reductions([Candidate("ties", {"density": 0.5}), Candidate("consensus")]))
    assert text.startswith("3 reductions, 2 rounds:")
    assert "trim(density=0.5, density_of=support)" in text
    assert "after task_arithmetic(lambda=1)" in text
    assert text.endswith("later rounds re-lift every expert when one of them changes")


def test_a_candidate_is_lowered_from_its_own_reduction_or_a_larger_one_only():
    candidates = [Candidate("mean"), Candidate("overlap_mean"), Candidate("ties"), Candidate("ties", {"density": 0.5})]
    plan = plan_reductions(candidates)
    for reduction in plan:
        for candidate in reduction.candidates:
            check_served(candidate, reduction.spec)
            check_served(candidate, candidate_lift(candidate))
    for candidate, spec in (
        (candidates[3], plan[0].spec),
        (candidates[2], candidate_lift(candidates[0])),
        (candidates[1], candidate_lift(candidates[2])),
        (Candidate("ties", {}, {"a": 1}), plan[0].spec),
        (Candidate("consensus", {"threshold": 0.3}), candidate_lift(Candidate("consensus"))),
    ):
        with pytest.raises(MergeError, match="cannot be lowered from the reduction"):
            check_served(candidate, spec)


# Lifts


def test_a_recipe_leaves_out_weights_and_reference_and_comes_back():
    for candidate in (Candidate("dare_ties", {"seed": 5}), Candidate("sce"), Candidate("ties", {}, {"a": 1.0})):
        spec = candidate_lift(candidate)
        back = LiftSpec.from_recipe(spec.recipe())
        assert back.recipe() == spec.recipe()
        assert back.weighted == spec.weighted
        assert back.reference is None
    weights = [candidate_lift(Candidate("ties", {}, {"a": w})) for w in (1.0, 2.0)]
    assert weights[0] != weights[1]
    assert weights[0].recipe() == weights[1].recipe() != candidate_lift(Candidate("ties")).recipe()
    assert hash(candidate_lift(Candidate("sce"))) == hash(candidate_lift(Candidate("sce")))


def test_weights_are_found_by_name():
    spec = candidate_lift(Candidate("ties", {}, {"a": 0.5, "b": 2}))
    assert (spec.weight_of("a"), spec.weight_of("b")) == (0.5, 2.0)
    assert candidate_lift(Candidate("ties")).weight_of("anyone") == 1.0
    with pytest.raises(MergeError, match="expert 'c' has no weight"):
        spec.weight_of("c")
    with pytest.raises(MergeError, match="sets no option 'density'"):
        spec.option("density")


GOOD = {"statistics": ["sum"], "sparsify": "none", "options": {}, "weighted": False}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"statistics": "sum"}, "not a description"),
        ({"statistics": [1]}, "not a description"),
        ({"statistics": [["sum"]]}, "not a description"),
        ({"statistics": ["counts"]}, "did you mean 'count'"),
        ({"statistics": []}, "distinct"),
        ({"statistics": ["sum", "sum"]}, "distinct"),
        ({"sparsify": "prune"}, "accepted: none, trim, drop, magprune, breadcrumbs"),
        ({"sparsify": []}, "accepted: none"),
        ({"options": {"density": 0}}, "option 'density' of a reduction is 0"),
        ({"options": {"densities": 0.5}}, "did you mean 'density'"),
        ({"options": []}, "not a description"),
        ({"weighted": 1}, "not a description"),
        ({"more": 1}, "not a description"),
    ],
)
def test_bad_descriptions_of_a_reduction_are_refused(change, message):
    assert LiftSpec.from_recipe(GOOD) == LiftSpec(("sum",))
    with pytest.raises(MergeError, match=message):
        LiftSpec.from_recipe(GOOD | change)
    for data in ({}, [], None, {"statistics": ["sum"]}):
        with pytest.raises(MergeError, match="not a description"):
            LiftSpec.from_recipe(data)


def test_parameters_say_what_they_accept():
    assert Number(1, 0, 2).accepted == "a number above 0 to 2"
    assert Number(1, 0, 2, low_allowed=True, integer=True).accepted == "a whole number from 0 to 2"
    assert Choice("a", ("a", "b")).accepted == "a, b"
    assert Number(1, 0, 2, integer=True).check("x", 2) == 2.0
    for bad in (1.5, 3, float("inf"), None):
        with pytest.raises(MergeError, match="x is"):
            Number(1, 0, 2, integer=True).check("x", bad)
