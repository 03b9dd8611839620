"""The keys that a run will use, as far as they are known before anything is made. Pure: no service is asked.

Known: the shared support, experts, Fisher and Gram artifacts, inner merge nodes, merges, task masks, and the scores of
the base. Not known: whatever is keyed by the bytes of what is made, so scores of experts and merges, and the full
checkpoint. Whether a thing exists, and so what a run would do, is `pipeline.forecast`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from infra.artifacts import Recipe
from merge.keys import merged_recipe, root_key, task_mask_recipe, tree_recipes
from merge.methods import METHODS
from merge.specs import Candidate, Reduction, candidate_lift, plan_reductions
from merge.tree import Node, build_tree
from pipeline import jobs, recipes
from pipeline.outcome import Inputs


@dataclass(frozen=True)
class Planned:
    """Recipes of everything whose key is known beforehand."""

    support: Recipe | None
    """Of the shared support, if experts share a scored one."""
    experts: Mapping[str, Recipe]
    importances: Mapping[tuple[str, str], Recipe]
    """By kind (fisher, gram) and task."""
    nodes: tuple[Recipe, ...]
    """Inner nodes of every reduction; a root is stored as its merges."""
    merges: Mapping[Candidate, Recipe]
    """Those that only a later round reads included."""
    masks: Mapping[tuple[Candidate, str], Recipe]
    base_scores: tuple[Recipe, ...]

    def recipes(self) -> Iterator[Recipe]:
        """All of them."""
        if self.support:
            yield self.support
        yield from self.experts.values()
        yield from self.importances.values()
        yield from self.nodes
        yield from self.merges.values()
        yield from self.masks.values()
        yield from self.base_scores


def planned_keys(inputs: Inputs) -> frozenset[str]:
    """Every key that a run of these inputs uses or makes and that is known before it starts."""
    return frozenset(recipe.key for recipe in plan_recipes(inputs).recipes())


def plan_recipes(inputs: Inputs) -> Planned:
    """Recipes of what a run of these inputs uses or makes, as far as they are known before it starts."""
    config, base = inputs.config, inputs.base.sha256
    support = None
    if recipes.shares_scored_support(config):
        support = recipes.support_recipe(config, base, inputs.tasks)
    shared = support.key if support else None
    experts = {task: recipes.expert_recipe(config, base, inputs.tasks[task], shared) for task in config.held_in}
    keys = {task: recipe.key for task, recipe in experts.items()}
    reductions = plan_reductions(inputs.candidates.all)
    importances: dict[tuple[str, str], Recipe] = {
        (kind, task): recipes.importance_recipe(config, kind, key, inputs.tasks[task])
        for kind in sorted({reduction.spec.extra for reduction in reductions if reduction.spec.extra})
        for task, key in keys.items()
    }
    extras = {place: recipe.key for place, recipe in importances.items()}
    nodes, merges = _merging(reductions, build_tree(list(config.held_in), config.merge.fan_in), keys, extras)
    masks = {
        (candidate, task): task_mask_recipe(candidate, recipe.key, key)
        for candidate, recipe in merges.items()
        if METHODS[candidate.method].per_task
        for task, key in keys.items()
    }
    base_scores = tuple(
        jobs.evaluation_job(inputs, model, "test", task, None, None, few_shot).recipe
        for model, few_shot in jobs.base_models(config)
        for task in [*config.held_in, *config.held_out]
    )
    return Planned(support, experts, importances, tuple(nodes.values()), merges, masks, base_scores)


def _merging(
    reductions: tuple[Reduction, ...], tree: Node, experts: Mapping[str, str], extras: Mapping[tuple[str, str], str]
) -> tuple[dict[str, Recipe], dict[Candidate, Recipe]]:
    """Inner nodes by key, and merges. Reductions come by round, so what a later one reads has its key already."""
    nodes: dict[str, Recipe] = {}
    merges: dict[Candidate, Recipe] = {}
    for reduction in reductions:
        read = {task: key for (kind, task), key in extras.items() if kind == reduction.spec.extra}
        reference = merges[reduction.spec.reference].key if reduction.spec.reference else None
        *inner, _ = tree_recipes(reduction.spec, tree, experts, read, reference).values()
        nodes |= {recipe.key: recipe for recipe in inner}
        lifts = {candidate_lift(candidate) for candidate in reduction.candidates}
        roots = {lift: root_key(lift, tree, experts, read, reference) for lift in lifts}
        merges |= {c: merged_recipe(c, roots[candidate_lift(c)]) for c in reduction.candidates}
    return nodes, merges
