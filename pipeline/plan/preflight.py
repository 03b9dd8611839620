"""Everything that can be refused is refused here, before any training; then what a run is expected to cost.

Order: what fails fastest first. Services (S3 with conditional writes, MLflow), names, merge candidates, data and
splits, base, modules and blocks, then disk, memory and cluster.
"""

import math
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import init_empty_weights
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from infra.errors import ConfigError, FactoryError
from infra.registry import runs as registry
from infra.store.s3 import Store
from merge.methods.catalogue import METHODS
from merge.methods.specs import Reduction, plan_reductions
from merge.tree.reduce import Fused
from pipeline.config.candidates import Candidates, list_candidates, merge_plan
from pipeline.config.model import GIB, PipelineConfig
from pipeline.data.counting import check_shares, rows_lines, with_cuts
from pipeline.data.tasks import TaskData, learned_elsewhere, load_tasks
from pipeline.flow.recipes import expert_spec, prompt_spec, shares_scored_support, train_spec
from pipeline.flow.registration import CHECKPOINT, MERGED
from pipeline.plan.cluster import slots_of
from pipeline.plan.node_memory import largest_node
from pipeline.records.outcome import Inputs
from workers.adapters.tensor_file import WEIGHTS
from workers.base.cache import cache_dir
from workers.base.load import load_classifier_tokenizer, load_tokenizer
from workers.base.modules import find_targets, stacked_rows
from workers.base.prepare import PreparedBase, prepare_base, upload_base
from workers.jobs.importance import GRAM_BYTES
from workers.masks.spec import MaskSpec, accumulator_bytes, trainable_elements, unit_of
from workers.scoring.classification import encode_labelled
from workers.text.prompt import encode_examples, target_token_cap
from workers.training.kinds import LoraSpec, check_whole
from workers.training.objectives import CHUNK_LOGITS

PROCESS_GIB = 0.9
"""Resident size of a worker with torch and transformers imported, measured, before it loads a base."""
BYTES_PER_VALUE = {"element": 24, "block": 20, "lora": 16}
"""Training state per trained value: value, gradient, two moments; in place the original too; for elements the index."""


def check_services(config: PipelineConfig, store: Store) -> None:
    """Names, candidates, object store and MLflow: cheap checks that need no data."""
    check_names(config)
    store.check()
    registry.check()


def check_names(config: PipelineConfig) -> None:
    """Names of tasks and models, and merge candidates: what needs no service."""
    registry.model_names(config.suite, [*config.held_in, MERGED, CHECKPOINT])
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
            base_weights=f"bases/{self.base.sha256}/{WEIGHTS}",
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
            **{f"mask.{name}": value for name, value in config.mask.model_dump().items()},
            **(
                {f"lora.{name}": value for name, value in config.lora.model_dump().items()}
                if config.expert == "lora"
                else {}
            ),
            **{f"train.{name}": value for name, value in config.train.model_dump().items()},
        }

    def check_cluster(self, nodes: list[dict[str, Any]], console: Console) -> int:
        """Experts that run at a time; prints what the run is expected to take.

        Raises ConfigError if a kind of worker fits on no node: Ray would let it wait for ever.
        """
        asked = self.config.resources
        kinds = {"expert": asked.expert, "evaluator": asked.evaluator, "node": asked.node}
        fitting = {kind: slots_of(nodes, resources) for kind, resources in kinds.items()}
        for kind, resources in kinds.items():
            if fitting[kind] < 1:
                largest = max((node["Resources"] for node in nodes if node["Alive"]), key=lambda r: r.get("CPU", 0))
                raise ConfigError(
                    f"resources.{kind} asks for {resources.cpus:g} CPUs, {resources.gpus:g} GPUs and "
                    f"{resources.memory_gib:g} GiB; no node of the Ray cluster has that (the largest: "
                    f"{largest.get('CPU', 0):g} CPUs, {largest.get('GPU', 0):g} GPUs, "
                    f"{largest.get('memory', 0) / GIB:.1f} GiB). Lower the request or add nodes."
                )
        slots = fitting["expert"]
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
    console.print(f"{len(config.held_in)} held-in and {len(config.held_out)} held-out tasks", highlight=False)
    tasks = _load_tasks(config, base, console)
    for name, count in learned_elsewhere(tasks, config.held_in).items():
        text = f"{count} of its {len(tasks[name].splits['test'])} test rows are training rows of another held-in task"
        console.print(f"warning: {name}: {text}, so a merge knows them", style="yellow", highlight=False, markup=False)
    cost = expected_cost(config, base, tasks)
    check_room(config, cost)
    caps = dict.fromkeys(tasks, 1)
    if config.objective == "language_modelling":
        tokenizer, limit = load_tokenizer(base.path), config.prompt.max_target_tokens
        caps = {
            name: min(limit, data.config.max_new_tokens or target_token_cap(tokenizer, data.splits["train"]))
            for name, data in tasks.items()
        }
    listed = list_candidates(config, {name: len(tasks[name].splits["train"]) for name in config.held_in})
    console.print(merge_plan(config, listed), highlight=False, markup=False)
    return Prepared(config, store, base, tasks, caps, listed, cost, _fused_rows(config, base, listed))


def _load_tasks(config: PipelineConfig, base: PreparedBase, console: Console) -> dict[str, TaskData]:
    """The tasks' rows; says what is lost of them. DataError if that is more than the configuration tolerates."""
    read = load_tasks({**config.held_in, **config.held_out}, cache_dir(), config.splits.model_dump(), config.seed)
    classifies, limits = config.objective == "classification", config.prompt
    tokenizer = load_classifier_tokenizer(base.path) if classifies else load_tokenizer(base.path)
    target_tokens = None if classifies else limits.max_target_tokens
    tasks = with_cuts(read, config.held_in, tokenizer, limits.max_input_tokens, target_tokens)
    for line in rows_lines(tasks):
        console.print(line, highlight=False, markup=False)
    check_shares(tasks, config.data.tolerate.dropped, config.data.tolerate.cut)
    return tasks


def _fused_rows(config: PipelineConfig, base: PreparedBase, listed: Candidates) -> dict[str, tuple[int, int, int]]:
    """Where query, key and value lie in fused weights, if a candidate asks. Raises ConfigError where nobody can say."""
    if not any(candidate.splits_fused for candidate in listed.all):
        return {}
    structure = AutoConfig.from_pretrained(base.path, trust_remote_code=False, local_files_only=True)
    targets = find_targets(_empty_model(structure, config.objective == "classification"), config.mask.modules)
    return stacked_rows(structure, {f"{name}.weight": tuple(t.module.weight.shape) for name, t in targets.items()})


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


def expected_cost(config: PipelineConfig, base: PreparedBase, tasks: dict[str, TaskData]) -> Cost:
    """Sizes and tokens of a run. Raises ConfigError if modules, blocks or labels do not fit the base."""
    classifies = config.objective == "classification"
    structure = AutoConfig.from_pretrained(base.path, trust_remote_code=False, local_files_only=True)
    model = _empty_model(structure, classifies)
    trainable, adapted, state_bytes = _trained(config, model, tasks[next(iter(config.held_in))])
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tokenizer = load_classifier_tokenizer(base.path) if classifies else load_tokenizer(base.path)
    tokens, longest = {}, 0
    for name in config.held_in:
        data, prompt, limit = tasks[name], prompt_spec(config, tasks[name]), config.prompt.max_target_tokens
        if classifies:
            lengths = [
                len(encode_labelled(tokenizer, prompt, row, data.labels).input_ids) for row in data.splits["train"]
            ]
        else:
            examples = encode_examples(tokenizer, prompt, data.splits["train"], limit)
            lengths = [len(example.input_ids) for example in examples]
        train = train_spec(config, data)
        tokens[name] = round(train.steps * train.batch_size * sum(lengths) / len(lengths))
        longest = max(longest, *lengths)
    width = torch.finfo(getattr(torch, config.train.compute_dtype)).bits // 8
    hidden, inner = structure.hidden_size, getattr(structure, "intermediate_size", 4 * structure.hidden_size)
    layers = structure.num_hidden_layers
    one_layer = 8 * hidden + 4 * inner
    saved = layers * hidden + one_layer if config.train.gradient_checkpointing else layers * one_layer
    rows = min(config.train.micro_batch_size or config.train.batch_size, config.train.batch_size)
    activations = rows * longest * saved * width + (0 if classifies else 2 * 4 * CHUNK_LOGITS)
    worker = PROCESS_GIB * GIB + parameters * width + state_bytes + activations
    dense = config.expert != "sparse"
    union = adapted * (1 if dense else 1 - (1 - config.mask.density) ** len(config.held_in))
    listed = list_candidates(config).all
    reductions = plan_reductions(listed)
    check_node_memory(config, reductions, model)
    extras = {reduction.spec.extra for reduction in reductions}
    measuring, measured = _importance_bytes(config, model, trainable, extras)
    if measured:  # one row at a time, in fp32
        worker = max(worker, PROCESS_GIB * GIB + parameters * 4 + measuring + longest * saved * 4)
    merges = 4.2 * sum(adapted if METHODS[candidate.method].matrix else union for candidate in listed)
    stored = {
        "base": parameters * 2,
        "experts": len(config.held_in) * trainable * 3.2,
        "importances": len(config.held_in) * measured,
        "merge_nodes": union * 2 * 11 * len(reductions),
        "merges": merges,
        "checkpoints": parameters * 4 if config.merge.export else 0,
    }
    kind_bytes = {kind: int(size) for kind, size in stored.items()}
    cache_bytes = parameters * (2 + width) + merges
    return Cost(trainable, adapted, parameters, tokens, int(worker), kind_bytes, int(cache_bytes))


def _empty_model(structure: Any, classifies: bool) -> Any:
    """The base's modules without weights."""
    kind = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
    try:
        with init_empty_weights():
            model = kind.from_config(structure, trust_remote_code=False)
    except ValueError as error:
        what = "classifier" if classifies else "causal language model"
        raise ConfigError(f"base: transformers has no {what} of its kind ({error})") from error
    model.tie_weights()  # out here: inside, tied parameters would become two
    return model


def _trained(config: PipelineConfig, model: Any, data: TaskData) -> tuple[int, int, int]:
    """Trained values of an expert, weights in its modules, and bytes of its training state."""
    spec, train = expert_spec(config, data), config.train
    targets = find_targets(model, spec.modules)
    for name, target in targets.items():
        kind = type(target.module)
        if config.expert != "lora" and kind.forward is not torch.nn.Linear.forward:
            raise ConfigError(
                f"{name} is a {kind.__name__} with a forward of its own: only plain linear modules are trained in "
                "place; narrow mask.modules, or take expert=lora"
            )
        if config.objective == "classification" and not name.startswith(f"{model.base_model_prefix}."):
            raise ConfigError(f"mask.modules {spec.modules!r} matches {name}: the head is trained in full; narrow it")
    copies = 1 + bool(train.checkpoint_every)  # of values and positions: the best ones, and a state while it is saved
    if isinstance(spec, MaskSpec):
        trainable, adapted = trainable_elements(model, spec)
        per_value = BYTES_PER_VALUE["element" if unit_of(spec, (1, 1)) is None else "block"] + 4 * copies
        selecting = 4 * adapted if shares_scored_support(config) else accumulator_bytes(model, spec)
        return trainable, adapted, trainable * per_value + selecting
    adapted = sum(target.shape[0] * target.shape[1] for target in targets.values())
    if isinstance(spec, LoraSpec):
        for name, target in targets.items():
            check_whole(name, target, spec.modules)
        trainable = sum(spec.rank * sum(target.module.weight.shape) for target in targets.values())
        return trainable, adapted, trainable * (BYTES_PER_VALUE["lora"] + 4 * copies)
    return adapted, adapted, adapted * (BYTES_PER_VALUE["block"] + 4 * copies)


def _importance_bytes(
    config: PipelineConfig, model: Any, trainable: int, extras: Collection[str | None]
) -> tuple[int, int]:
    """Bytes of the sums while an expert's Fisher or Gram matrices are measured, and of their files. At most: weights
    that share an input share a Gram matrix."""
    squares = 0
    if "gram" in extras:
        squares = sum(t.module.weight.shape[1] ** 2 for t in find_targets(model, config.mask.modules).values())
    fisher = trainable if "fisher" in extras else 0
    return max(8 * fisher, min(8 * squares, GRAM_BYTES)), 2 * fisher + 2 * squares


def check_node_memory(config: PipelineConfig, reductions: Sequence[Reduction], model: Any) -> None:
    """Raises ConfigError if a merge node needs more memory than it reserves."""
    mask, experts = config.mask, len(config.held_in)
    union = 1.0
    if config.expert == "sparse" and mask.budget == "tensor":  # a global budget may fill a tensor
        union = mask.density if mask.shared else 1 - (1 - mask.density) ** experts
    targets = find_targets(model, mask.modules)
    weights = {f"{name}.weight": target.module.weight for name, target in targets.items()}
    shapes = {name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()}
    need = largest_node(reductions, shapes, experts, union)
    needed, reserved = need.bytes / GIB + PROCESS_GIB, config.resources.node.memory_gib
    if needed > reserved:
        raise ConfigError(
            f"resources.node.memory_gib is {reserved:g}, but merging {need.tensor} {list(need.shape)} by "
            f"{', '.join(need.methods)} is expected to need {math.ceil(needed * 10) / 10:g} GiB; raise it to that, or "
            "leave out what needs most"
        )


def check_room(config: PipelineConfig, cost: Cost) -> None:
    """Raises ConfigError if an expert needs more memory than it reserves or this machine's disk is too full."""
    reserved = config.resources.expert.memory_gib * GIB
    if config.resources.expert.gpus == 0 and cost.worker_bytes > reserved:
        raise ConfigError(
            f"resources.expert.memory_gib is {config.resources.expert.memory_gib:g}, but an expert is expected to need "
            f"{cost.worker_bytes / GIB:.1f} GiB; raise it, or lower train.batch_size or prompt.max_input_tokens"
        )
    free = shutil.disk_usage(cache_dir()).free
    if free < cost.cache_bytes:
        raise FactoryError(
            f"{cache_dir()}: {free / GIB:.1f} GiB free, {cost.cache_bytes / GIB:.1f} GiB expected; free some space "
            "or set FACTORY_CACHE to another disk"
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
