"""Everything that can be refused is refused here, before any training; then what a run is expected to cost.

Order: what fails fastest first. Services (S3 with conditional writes, MLflow), names, merge candidates, data and
splits, base, modules and blocks, then disk, memory and cluster.
"""

import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rich.console import Console

from infra.errors import ConfigError, FactoryError
from infra.registry import runs
from infra.store.layout import base_file
from infra.store.s3 import Store
from merge.methods.catalogue import METHODS
from merge.methods.specs import Reduction, plan_reductions
from merge.tree.reduce import Fused
from pipeline.config.candidates import Candidates, list_candidates, merge_plan
from pipeline.config.expert_kinds import EXPERT_KINDS
from pipeline.config.model import GIB, PipelineConfig
from pipeline.data.counting import check_shares, rows_lines, with_cuts
from pipeline.data.tasks import TaskData, learned_elsewhere, load_tasks
from pipeline.flow.recipes import expert_rows, multitask_refining, train_spec
from pipeline.flow.registration import CHECKPOINT, MERGED
from pipeline.flow.steps import REFINED, YARDSTICKS
from pipeline.plan.check_base import base_tokenizer, check_adapted, check_rows, empty_base, settle_prompt
from pipeline.plan.check_refine import (
    RefineNeed,
    check_refine_room,
    check_refine_rows,
    refine_need,
    refined_count,
    teachers_cost,
)
from pipeline.plan.cluster import slots_of
from pipeline.plan.figures import given, needed, there_is
from pipeline.plan.node_memory import largest_node, node_file
from pipeline.plan.waiting import missing
from pipeline.records.outcome import Inputs
from workers.base.cache import cache_dir
from workers.base.modules import find_targets, stacked_rows
from workers.base.prepare import PreparedBase, prepare_base, upload_base
from workers.measuring.catalogue import MEASUREMENTS
from workers.tensors.checkpoint import WEIGHTS
from workers.text.prompt import target_token_cap
from workers.training.objectives import CHUNK_LOGITS

PROCESS_GIB = 0.9
"""Resident size of a worker with torch and transformers imported, measured, before it loads a base."""


def check_services(config: PipelineConfig, store: Store) -> None:
    """Names, candidates, object store and MLflow: cheap checks that need no data."""
    check_names(config)
    store.check()
    runs.check()


def check_names(config: PipelineConfig) -> None:
    """Names of tasks and models, and merge candidates: what needs no service."""
    runs.model_names(config.suite, [*config.held_in, MERGED, CHECKPOINT])
    list_candidates(config)


@dataclass(frozen=True)
class Cost:
    """What a run is expected to take if nothing can be reused."""

    trainable: int
    """Trained values per expert."""
    adapted: int
    """Weights in the adapted modules."""
    parameters: int
    expert_tokens: dict[str, int]
    worker_bytes: int
    kind_bytes: Mapping[str, int]
    """Bytes in the object store by kind of artifact, and of the base."""
    cache_bytes: int
    mixed: Mapping[str, RefineNeed] = field(default_factory=dict)
    """Of one training on rows of all tasks, by kind of artifact."""
    whole_bytes: int = 0
    """Of an expert of the last of several rounds, beside what it changes."""
    teacher_tokens: float = 0.0
    """That all teachers together read."""

    def expert_bytes(self, number: int, rounds: int) -> float:
        """Of one expert of a round, in the object store."""
        experts = len(self.expert_tokens)
        change = (self.kind_bytes["experts"] - experts * self.whole_bytes) / (experts * rounds)
        return change + (self.whole_bytes if number == rounds else 0)

    @property
    def store_bytes(self) -> int:
        """Bytes in the object store."""
        return sum(self.kind_bytes.values())

    def seconds(self, slots: int, flops: float) -> float:
        """Training time: forward, input gradient and, for the adapted share, weight gradient; 2 flops a weight each."""
        share = 2 + self.adapted / self.parameters
        return 2 * self.parameters * share * sum(self.expert_tokens.values()) / flops / slots


@dataclass(frozen=True)
class Prepared:
    """Checked inputs of a run, complete but for the run's id."""

    config: PipelineConfig
    store: Store
    base: PreparedBase
    tasks: dict[str, TaskData]
    max_new_tokens: dict[str, int]
    candidates: Candidates
    cost: Cost
    fused: Fused = field(default_factory=dict)

    def inputs(self, run_id: str) -> Inputs:
        return Inputs(
            config=self.config,
            store=self.store,
            base=self.base,
            base_weights=base_file(self.base.sha256, WEIGHTS),
            tasks=self.tasks,
            max_new_tokens=self.max_new_tokens,
            candidates=self.candidates,
            run_id=run_id,
            fused=self.fused,
            registers=self.config.registers,
        )

    def replicates(self, run_id: str) -> list[Inputs]:
        """Inputs for each seed: the same rows, other masks, batches and heads. Only the first one's models register, if
        any do."""
        first = self.inputs(run_id)
        return [
            replace(
                first, config=self.config.model_copy(update={"seed": seed}), registers=number == 0 and first.registers
            )
            for number, seed in enumerate(self.config.seeds or [self.config.seed])
        ]

    def parameters(self) -> dict[str, Any]:
        """Parameters of the parent run in MLflow."""
        config = self.config
        return {
            "base": self.base.name,
            "base_sha256": self.base.sha256,
            "held_in": len(config.held_in),
            "held_out": len(config.held_out),
            "seed": config.seed,
            "seeds": config.seeds,
            "objective": config.objective,
            "expert": config.expert,
            "fan_in": config.merge.fan_in,
            **{
                f"{section}.{name}": value
                for section in dict.fromkeys(["mask", EXPERT_KINDS[config.expert].section, "train"])
                for name, value in getattr(config, section).model_dump().items()
            },
            **{
                f"rounds.{name}": value
                for name, value in (config.rounds.model_dump() if config.rounds.count > 1 else {}).items()
            },
            **{
                f"refine.{name}": value for name, value in (config.refine.model_dump() if config.refine else {}).items()
            },
        }

    def check_cluster(self, nodes: list[dict[str, Any]], console: Console) -> int:
        """Experts that run at a time; prints what the run is expected to take.

        Raises ConfigError if a kind of worker fits on no node: Ray would let it wait for ever.
        """
        if (lacking := missing(self.config.resources, nodes)) is not None:
            raise ConfigError(f"{lacking}. Lower the request or add nodes.")
        slots = slots_of(nodes, self.config.resources.expert)
        cost, flops = self.cost, measured_flops()
        console.print(
            f"expected if nothing can be reused: training {cost.seconds(slots, flops) / 60:.0f} min on {slots} slots "
            f"(at {flops / 1e9:.0f} GFLOP/s a slot), {cost.worker_bytes / GIB:.1f} GiB memory an expert, "
            f"{cost.store_bytes / GIB:.1f} GiB in the object store, {cost.cache_bytes / GIB:.1f} GiB cache a node; "
            f"{cost.trainable:,} trained values an expert ({cost.trainable / cost.adapted:.1%} of the adapted modules)",
            highlight=False,
        )
        return slots


def prepare_inputs(config: PipelineConfig, store: Store, console: Console) -> Prepared:
    """Load base and tasks and check them against the configuration. Writes to the local cache only."""
    cache = cache_dir()
    console.print(f"base {config.base}", highlight=False)
    base = prepare_base(config.base, cache)
    tokenizer = base_tokenizer(config, base)
    config = settle_prompt(config, base, tokenizer, console)
    console.print(f"{len(config.held_in)} held-in and {len(config.held_out)} held-out tasks", highlight=False)
    tasks = _load_tasks(config, tokenizer, console)
    check_refine_rows(config, tasks)
    for name, count in learned_elsewhere({name: tasks[name] for name in config.scored}, config.held_in).items():
        text = f"{count} of its {len(tasks[name].splits['test'])} test rows are training rows of another held-in task"
        console.print(f"warning: {name}: {text}, so a merge knows them", style="yellow", highlight=False, markup=False)
    model = empty_base(config, base)
    find_targets(model, config.mask.modules)
    caps = dict.fromkeys(tasks, 1)
    if config.objective == "language_modelling":
        limit = config.prompt.max_target_tokens
        caps = {
            name: min(limit, data.config.max_new_tokens or target_token_cap(tokenizer, data.splits["train"]))
            for name, data in tasks.items()
        }
    lengths = check_rows(config, base, tokenizer, model, tasks, caps)
    cost = expected_cost(config, base, tasks, model, lengths)
    check_room(config, cost)
    listed = list_candidates(config, {name: len(tasks[name].splits["train"]) for name in config.held_in})
    console.print(merge_plan(config, listed), highlight=False, markup=False)
    return Prepared(config, store, base, tasks, caps, listed, cost, _fused_rows(config, model, listed))


def _load_tasks(config: PipelineConfig, tokenizer: Any, console: Console) -> dict[str, TaskData]:
    """The tasks' rows; says what is lost of them. DataError if that is more than the configuration tolerates."""
    read = load_tasks(
        {**config.held_in, **config.held_out, **config.kept}, cache_dir(), config.splits.model_dump(), config.seed
    )
    classifies, limits = config.objective == "classification", config.prompt
    target_tokens = None if classifies else limits.max_target_tokens
    tasks = with_cuts(read, {**config.held_in, **config.kept}, tokenizer, limits.max_input_tokens, target_tokens)
    for line in rows_lines(tasks):
        console.print(line, highlight=False, markup=False)
    check_shares(tasks, config.data.tolerate.dropped, config.data.tolerate.cut)
    return tasks


def _fused_rows(config: PipelineConfig, model: Any, listed: Candidates) -> dict[str, tuple[int, int, int]]:
    """Where query, key and value lie in fused weights, if a candidate asks. Raises ConfigError where nobody can say."""
    if not any(candidate.splits_fused for candidate in (*listed.all, listed.between) if candidate):
        return {}
    targets = find_targets(model, config.mask.modules)
    return stacked_rows(model.config, {f"{name}.weight": tuple(t.module.weight.shape) for name, t in targets.items()})


def upload_inputs(prepared: Prepared) -> None:
    """Put base and rows into the object store, where workers read them; what is there is not sent again."""
    store = prepared.store
    upload_base(store, prepared.base)

    def upload(part: tuple[TaskData, str]) -> None:
        data, split = part
        if store.head(data.object_name(split)) is None:
            store.put_if_absent(data.object_name(split), data.to_jsonl(split))

    with ThreadPoolExecutor(max_workers=8) as pool:
        list(pool.map(upload, [(data, split) for data in prepared.tasks.values() for split in data.splits]))


def expected_cost(
    config: PipelineConfig,
    base: PreparedBase,
    tasks: Mapping[str, TaskData],
    model: Any,
    lengths: Mapping[str, Sequence[int]],
) -> Cost:
    """Sizes and tokens of a run: of the base without values, `model`, and of training examples of these `lengths` in
    tokens, by task. Raises ConfigError if modules, blocks or labels do not fit the base."""
    classifies = config.objective == "classification"
    if not classifies:
        check_adapted(base, find_targets(model, config.mask.modules))
    trainable, adapted, state_bytes = _trained(config, model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tokens, means, longest = {}, {}, 0
    for name in (*config.held_in, *config.kept):
        means[name] = sum(lengths[name]) / len(lengths[name])
        longest = max(longest, *lengths[name])
    for name in config.held_in:
        train_spec(config, tasks[name])  # refuses too few steps for the rounds
        tokens[name] = round(expert_rows(config, tasks[name]) * means[name])
    width = torch.finfo(getattr(torch, config.train.compute_dtype)).bits // 8
    hidden, inner, layers = _sizes(model)
    one_layer = 8 * hidden + 4 * inner
    saved = layers * hidden + one_layer if config.train.gradient_checkpointing else layers * one_layer
    rows = min(config.train.micro_batch_size or config.train.batch_size, config.train.batch_size)

    def activations(width: int) -> int:
        return rows * longest * saved * width + (0 if classifies else 2 * 4 * CHUNK_LOGITS)

    worker = PROCESS_GIB * GIB + parameters * width + state_bytes + activations(width)
    everywhere = EXPERT_KINDS[config.expert].everywhere
    union = adapted * (1 if everywhere else 1 - (1 - config.mask.density) ** len(config.held_in))
    found, rounds = list_candidates(config), config.rounds.count
    listed = (*found.all, *([found.between] if found.between else []))
    reductions = plan_reductions(found.all, len(config.held_in))
    between = plan_reductions([found.between], len(config.held_in)) if found.between else ()
    check_node_memory(config, (*reductions, *between), model)
    shapes = adapted_shapes(config, model)
    kinds = {reduction.spec.measurement for reduction in reductions} - {None}
    measured = [MEASUREMENTS[str(kind)].needed(shapes, trainable) for kind in kinds]
    for each in measured:  # one row at a time, in fp32
        worker = max(worker, PROCESS_GIB * GIB + parameters * 4 + each.memory + longest * saved * 4)
    sizes = [adapted if METHODS[candidate.method].matrix else union for candidate in listed]
    merges, whole_bytes = 4.2 * sum(sizes), 0
    trees = (*reductions, *(rounds - 1) * between)
    nodes = sum(node_file(each.spec, shapes, len(config.held_in), union / adapted) for each in trees)
    if rounds > 1:  # every merge of a later round is stored twice, and the last experts once more with their start
        merges += 4.2 * (len(listed) * adapted + (rounds - 2) * (sizes[-1] + adapted))
        whole_bytes = adapted * (torch.finfo(getattr(torch, config.train.value_dtype)).bits // 8)
        worker = max(worker, PROCESS_GIB * GIB + parameters * width + max(adapted * width, 4 * trainable + whole_bytes))
    stored = {
        "base": parameters * 2,
        "experts": len(config.held_in) * (trainable * 3.2 * rounds + whole_bytes),
        "importances": len(config.held_in) * sum(each.file for each in measured),
        "merge_nodes": 2 * nodes,
        "merges": merges,
        "checkpoints": parameters * 4 if config.merge.export else 0,
        "routers": len(config.held_in) * _sizes(model)[0] * 4 if config.yardsticks.routed else 0,
    }
    mixed = {}
    vocabulary = model.get_input_embeddings().weight.shape[0]
    asked, stored["teachers"] = teachers_cost(config, tasks, means, vocabulary)
    dense = everywhere or rounds > 1 or any(METHODS[candidate.method].matrix for candidate in listed)
    for kind, refine, changed, count in (
        (REFINED, config.refine, adapted if dense else round(union), refined_count(config)),
        (YARDSTICKS, multitask_refining(config, tasks), 0, 1),
    ):
        if refine is not None:
            mixed[kind] = refine_need(config, refine, model, means, changed, PROCESS_GIB * GIB, activations)
            stored[kind] = mixed[kind].file_bytes * count
    kind_bytes = {kind: int(size) for kind, size in stored.items()}
    cache_bytes = parameters * (2 + width) + merges
    return Cost(
        trainable,
        adapted,
        parameters,
        tokens,
        int(worker),
        kind_bytes,
        int(cache_bytes),
        mixed,
        int(whole_bytes),
        asked,
    )


def _sizes(model: Any) -> tuple[int, int, int]:
    """Width, inner width of an MLP and number of layers, as the configuration says; else guessed from the embedding."""
    config = model.config
    hidden = getattr(config, "hidden_size", None) or model.get_input_embeddings().weight.shape[1]
    inner = getattr(config, "intermediate_size", None)
    layers = getattr(config, "num_hidden_layers", None) or 1
    return hidden, inner if isinstance(inner, int) else 4 * hidden, layers


def _trained(config: PipelineConfig, model: Any) -> tuple[int, int, int]:
    """Trained values of an expert, weights in its modules, and bytes of its training state."""
    kind, modules = EXPERT_KINDS[config.expert], config.mask.modules
    for name, target in find_targets(model, modules).items():
        module = type(target.module)
        if kind.in_place and module.forward is not torch.nn.Linear.forward:
            raise ConfigError(
                f"{name} is a {module.__name__} with a forward of its own: only plain linear modules are trained in "
                "place; narrow mask.modules, or take expert=lora"
            )
        if config.objective == "classification" and not name.startswith(f"{model.base_model_prefix}."):
            raise ConfigError(f"mask.modules {modules!r} matches {name}: the head is trained in full; narrow it")
    size = kind.size(model, config)
    copies = 1 + bool(config.train.checkpoint_every)  # of values and positions: the best, and a state while it is saved
    return size.trainable, size.adapted, size.trainable * (size.per_value + 4 * copies) + size.beside


def adapted_shapes(config: PipelineConfig, model: Any) -> dict[str, tuple[int, int]]:
    """[out, in] of each weight that experts change, by name."""
    weights = {f"{name}.weight": t.module.weight for name, t in find_targets(model, config.mask.modules).items()}
    return {name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()}


def check_node_memory(config: PipelineConfig, reductions: Sequence[Reduction], model: Any) -> None:
    """Raises ConfigError if a merge node needs more memory than it reserves."""
    mask, experts = config.mask, len(config.held_in)
    union = 1.0
    if not EXPERT_KINDS[config.expert].everywhere and mask.budget == "tensor":  # a global budget may fill a tensor
        union = mask.density if mask.shared else 1 - (1 - mask.density) ** experts
    need = largest_node(reductions, adapted_shapes(config, model), experts, union)
    expected, reserved = need.bytes / GIB + PROCESS_GIB, config.resources.node.memory_gib
    if expected > reserved:
        raise ConfigError(
            f"resources.node.memory_gib is {given(reserved)}, but merging {need.tensor} {list(need.shape)} by "
            f"{', '.join(need.methods)} is expected to need {needed(expected).removesuffix('.0')} GiB; raise it "
            "to that, or leave out what needs most"
        )


def check_room(config: PipelineConfig, cost: Cost) -> None:
    """Raises ConfigError if an expert needs more memory than it reserves or this machine's disk is too full."""
    reserved = config.resources.expert.memory_gib * GIB
    if config.resources.expert.gpus == 0 and cost.worker_bytes > reserved:
        raise ConfigError(
            f"resources.expert.memory_gib is {given(config.resources.expert.memory_gib)}, but an expert is expected to "
            f"need {needed(cost.worker_bytes / GIB)} GiB; raise it to that, or lower train.batch_size or "
            "prompt.max_input_tokens"
        )
    for need in cost.mixed.values():
        check_refine_room(config, need)
    free = shutil.disk_usage(cache_dir()).free
    if free < cost.cache_bytes:
        raise FactoryError(
            f"{cache_dir()}: {there_is(free / GIB)} GiB free, {needed(cost.cache_bytes / GIB)} GiB expected; free some "
            "space or set FACTORY_CACHE to another disk"
        )


def measured_flops() -> float:
    """Multiply-adds of this machine with one thread in float32, x 2, per second; a tenth of a second of work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        left, right = torch.randn(512, 576), torch.randn(576, 1536)
        left @ right
        start, rounds = time.perf_counter(), 0
        while time.perf_counter() - start < 0.1:
            left @ right
            rounds += 1
        return 2 * 512 * 576 * 1536 * rounds / (time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
