"""The configuration of a run: one YAML file, any field of which can be overridden on the command line.

Every section is a frozen pydantic model that refuses unknown keys, so a misspelt field fails before anything starts.
`load_config` reads a file, applies `dotted.key=value` overrides (`pipeline.config.document`) and turns pydantic's
errors into one message that names the file, the field, what was found and what is accepted.
Not covered: where services are (environment variables, see `infra/store/s3.py` and `infra/registry/runs.py`).
"""

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from infra.errors import ConfigError, DataError
from merge.tree.trie import DEFAULT_FAN_IN
from pipeline.config.document import overridden, read_yaml, write_yaml
from pipeline.config.errors import explain
from pipeline.config.mask import MaskConfig
from pipeline.config.refine import RefineConfig, YardsticksConfig
from pipeline.config.resources import GIB, ResourcesConfig, WorkerResources
from pipeline.config.rounds import CandidateConfig, RoundsConfig
from pipeline.config.section import DType, Section
from pipeline.data.encoding import text_of
from pipeline.data.fields import LONGEST_NAME, Name, Natural, Number, Positive, Whole
from pipeline.data.tasks import LEAST_GATE, TaskConfig
from pipeline.data.tolerance import DataConfig
from workers.scoring.metrics import CLASSIFICATION_METRICS, METRICS
from workers.text.prompt import ANSWER, DEFAULT_TARGET_TOKENS
from workers.text.wrapper import AUTO

_REPOSITORY = re.compile(r"[\w.-]+(?:/[\w.-]+)?(?:@[^@\s]+)?")
"""A model of a hub, perhaps at a revision."""

__all__ = ["GIB", "PipelineConfig", "ResourcesConfig", "WorkerResources", "dump_config", "load_config"]


class PromptConfig(Section):
    """How a task's text becomes the model's input."""

    wrapper: str = AUTO
    """Text around every prompt; `{prompt}` stands for the filled-in task template. No system prompt is added. An answer
    ends with eos, or with what follows `{answer}` at the end of this text. `auto`: the base's own chat template, with
    its end of an answer; without one, the text and a newline; for classification, the text alone."""
    max_input_tokens: Positive = 96
    """Longer inputs lose tokens on the left (the end of a question matters more than its beginning)."""
    max_target_tokens: Positive = DEFAULT_TARGET_TOKENS
    """Longer targets are cut in training; generation never exceeds this."""

    @field_validator("wrapper")
    @classmethod
    def _has_placeholder(cls, value: str) -> str:
        before, _, end = value.partition(ANSWER)
        if value != AUTO and (before.count("{prompt}") != 1 or "{prompt}" in end or ANSWER in end):
            raise ValueError(
                "must contain {prompt} exactly once, perhaps {answer} and the end of an answer behind it, or be auto"
            )
        if found := [field for field in ("{input}", "{options}") if field in value]:
            raise ValueError(f"{found[0]} belongs into a task's template, which stands where {{prompt}} is")
        return value


class SplitsConfig(Section):
    """Rows per task; a task with fewer training rows than `train` uses what it has."""

    train: Positive = 512
    """Most training rows a task contributes."""
    validation: Positive = 24
    """Rows that choose the best values, the merge method and its parameters."""
    gate: Annotated[Whole, Field(ge=LEAST_GATE)] = 24
    """Rows on which a new version and the champion are compared; used for nothing else."""
    test: Positive = 48
    """Rows that are only reported, never used for a choice."""


class LoraConfig(Section):
    """Low-rank experts (`expert: lora`), in the modules of `mask.modules`, through PEFT."""

    rank: Positive = 16
    """Rank of the factors."""
    alpha: Positive = 32
    """The change is alpha / rank * B A."""
    dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    """Share of a layer's inputs that is dropped in training."""


class TrainConfig(Section):
    """How an expert is trained. Give either `steps` or `epochs`."""

    steps: Positive | None = None
    """Optimizer steps, at most."""
    epochs: Annotated[Number, Field(gt=0)] | None = None
    """Passes over the training rows, at most."""
    batch_size: Positive = 16
    """Rows per optimizer step."""
    micro_batch_size: Positive | None = None
    """Rows per forward pass; gradients accumulate to those of the batch. Null: the whole batch at once."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them: less memory, more time, the same numbers."""
    deterministic: bool = False
    """Only algorithms that give the same bits every time, on GPUs too, where they are slower (torch's
    `use_deterministic_algorithms`). On the CPU results are the same either way."""
    learning_rate: Annotated[Number, Field(gt=0)] | None = None
    """Peak learning rate of AdamW; null: the kind's default (`pipeline/flow/recipes.py`)."""
    weight_decay: Annotated[Number, Field(ge=0)] = 0.0
    """Decoupled weight decay, applied to the change and not to the weight."""
    warmup_ratio: Annotated[Number, Field(ge=0, lt=1)] = 0.06
    """Share of the steps in which the learning rate rises."""
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    """Shape of the learning rate after the warm-up (names of transformers' schedulers)."""
    clip_norm: Annotated[Number, Field(gt=0)] = 1.0
    """Largest L2 norm of the gradient of the trained values."""
    validate_every: Positive | None = None
    """Steps between validation losses; null: only after the last step. The best values seen are kept."""
    patience: Positive | None = None
    """Validations without a better loss after which training ends early; null: never."""
    checkpoint_every: Positive | None = None
    """Steps between two states saved to the object store, from which a lost worker's expert goes on; null: none."""
    compute_dtype: DType = "bfloat16"
    """Type of the weights and activations in training. Trained values are always float32."""
    value_dtype: DType = "bfloat16"
    """Type of the values in the adapter file."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        if self.patience and not self.validate_every:
            raise ValueError("patience counts validations: give validate_every as well")
        if self.micro_batch_size and self.micro_batch_size > self.batch_size:
            raise ValueError("micro_batch_size is the part of a batch that runs at a time: at most batch_size")
        return self


class SearchConfig(Section):
    """How the best candidate is found: successive halving over the held-in tasks (`pipeline/config/search.py`)."""

    evaluations: Positive | None = None
    """Budget: most scores of one candidate on the validation split of one task. Candidates that do worse on the first
    tasks are dropped. Null: every candidate is scored on every task. Methods that need the task at inference are never
    chosen and not counted."""


class ExportConfig(Section):
    """The chosen merge as a full checkpoint."""

    dtype: DType = "bfloat16"
    """Type of its floating-point tensors, adapted or not."""
    shard_gib: Annotated[Number, Field(gt=0)] = 5.0
    """Size of its files in GiB, at most (but for a single larger tensor)."""


class MergeConfig(Section):
    """How the experts become one model."""

    fan_in: Literal[2, 4, 8, 16] = DEFAULT_FAN_IN
    """Radix of the merge tree: most children of a node."""
    candidates: Annotated[list[CandidateConfig], Field(min_length=1)] = Field(
        default_factory=lambda: [
            CandidateConfig(method="mean"),
            CandidateConfig(method="ties"),
            CandidateConfig(method="iso_c", params={"lambda": [0.45, 0.9]}),
            CandidateConfig(method="spectral_power", params={"p": -0.75, "lambda": [0.8, 1, 1.5], "floor": 0.01}),
        ]
    )
    """Methods tried; the one with the best mean validation score is chosen, ties to the earlier. The default has one or
    two of each family: few experts are best averaged, many by their singular values."""
    search: SearchConfig = SearchConfig()
    """How many scores the choice may take."""
    importance_rows: Positive = 256
    """Training rows on which Fisher and Gram matrices are measured, for the methods that need them; at most all."""
    export: ExportConfig | None = None
    """Also store the chosen merge as a full checkpoint; null: as an adapter only."""


class EvaluateConfig(Section):
    """How models are scored."""

    compute_dtype: DType = "float32"
    """Type of weights and activations while scoring (a merged change often vanishes in bfloat16)."""
    serving_dtype: DType | None = "bfloat16"
    """The chosen merge is scored a second time with its weights rounded to this type; null skips it."""
    batch_size: Positive = 24
    """Rows per forward pass."""
    few_shot: Annotated[Whole, Field(ge=0, le=32)] = 4
    """Training examples shown to the few-shot base, which is reported beside; 0 skips it. Language modelling only."""


class GateConfig(Section):
    """When a new version of an expert or of the merge becomes champion: scores on the gate rows are compared
    (`pipeline/gate/rule.py`). None of this is part of a key."""

    rule: Literal["superior", "not_worse"] = "superior"
    """superior: better by more than the margin; not_worse: worse by no more than the margin. Both with confidence."""
    margin: Annotated[Number, Field(ge=0, le=1)] = 0.0
    """Difference of mean scores (0-1) that matters."""
    confidence: Annotated[Number, Field(ge=0.5, lt=1)] = 0.95
    """Of the two-sided interval of the difference, whose lower end decides."""
    resamples: Annotated[Whole, Field(ge=1000, le=1_000_000)] = 10_000
    """Draws of the bootstrap."""
    seed: Natural = 0
    """Of the draws: the same scores always get the same decision."""


class PipelineConfig(Section):
    """A run: the base, the tasks, and everything done with them."""

    suite: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=128)]
    """Name of the set of tasks; prefix of registered model names and name of the MLflow experiment."""
    base: str
    """`pypi:SmolLM2-135M-Instruct`, `path:<folder>` or `hub:<repository>[@revision]`."""
    seed: Natural = 0
    """Seed of splits, masks, batch order, factors and heads."""
    seeds: Annotated[list[Natural], Field(min_length=1)] | None = None
    """Train, merge and score once for each of these instead of `seed`, on the same splits; results give mean and
    standard deviation. The first one's models are registered."""
    objective: Literal["language_modelling", "classification"] = "language_modelling"
    """`classification` puts a head on the base, trained in full and kept by each expert; targets are labels."""
    expert: Literal["sparse", "lora", "full"] = "sparse"
    """What an expert changes: a share of the adapted weights, low-rank factors beside them, or all of them."""
    prompt: PromptConfig = PromptConfig()
    """Prompt and length limits."""
    splits: SplitsConfig = SplitsConfig()
    """Rows per split."""
    data: DataConfig = DataConfig()
    """What is asked of the tasks' data."""
    held_in: Annotated[dict[Name, TaskConfig], Field(min_length=1)]
    """Tasks that get an expert."""
    held_out: dict[Name, TaskConfig] = Field(default_factory=dict)
    """Tasks that are only scored."""
    mask: MaskConfig = MaskConfig()
    """Which weights experts change."""
    lora: LoraConfig = LoraConfig()
    """Low-rank experts."""
    train: TrainConfig
    """How experts are trained."""
    rounds: RoundsConfig = RoundsConfig()
    """In how many rounds, with merges between them."""
    merge: MergeConfig = MergeConfig()
    """How experts are merged."""
    refine: RefineConfig | None = None
    """A few steps on rows of all held-in tasks from the best merges; null: merges are taken as they are."""
    yardsticks: YardsticksConfig = YardsticksConfig()
    """What the merge is held against in the report."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """How models are scored."""
    gate: GateConfig = GateConfig()
    """When a new version takes the champion's place."""
    registers: bool = True
    """Register experts and merge in MLflow and judge them at the gate. False: an experiment, logged and reported, that
    leaves the registry and its champions alone."""
    resources: ResourcesConfig = ResourcesConfig()
    """What workers may use."""

    @property
    def asking(self) -> RefineConfig | None:
        """The section `refine`, if teachers are asked."""
        return self.refine if self.refine is not None and self.refine.asks else None

    @property
    def scored(self) -> list[str]:
        """Held-in and held-out tasks."""
        return [*self.held_in, *self.held_out]

    @property
    def kept(self) -> dict[str, TaskConfig]:
        """Tasks on which refining holds on to the base."""
        return self.refine.keep.tasks if self.refine is not None and self.refine.keep is not None else {}

    @field_validator("base")
    @classmethod
    def _known_base(cls, value: str) -> str:
        kind, _, name = value.partition(":")
        if (
            kind not in ("pypi", "path", "hub")
            or not name.strip()
            or (kind == "hub" and not _REPOSITORY.fullmatch(name))
        ):
            raise ValueError(f"{value!r} is no base; accepted: pypi:<name>, path:<folder>, hub:<repository>[@revision]")
        return value

    @model_validator(mode="after")
    def _names_can_be_registered(self) -> Self:
        for name in self.held_in:
            if (length := len(f"{self.suite}.{name}")) > LONGEST_NAME:
                raise ValueError(
                    f"<suite>.<task> of the task {name[:40]}… has {length} characters; a registered model's name has "
                    f"at most {LONGEST_NAME}"
                )
        return self

    @model_validator(mode="after")
    def _exports_what_is_registered(self) -> Self:
        if self.merge.export and not self.registers:
            raise ValueError("merge.export stores a checkpoint that is registered: remove it, or registers=false")
        return self

    @model_validator(mode="after")
    def _tasks_are_apart(self) -> Self:
        if both := sorted(set(self.held_in) & set(self.held_out)):
            raise ValueError(f"tasks named both in held_in and in held_out: {', '.join(both)}")
        for name, task in self.kept.items():
            where = f"refine.keep.tasks.{name}"
            if name in self.held_in or name in self.held_out:
                raise ValueError(f"{where}: a task of that name is held in or out; give it another")
            for other, own in self.held_in.items():
                if (task.source, task.split, task.where) == (own.source, own.split, own.where):
                    raise ValueError(f"{where} has the rows of the held-in task {other}, which is to change: remove it")
        return self

    @model_validator(mode="after")
    def _tasks_suit_the_objective(self) -> Self:
        accepted = CLASSIFICATION_METRICS if self.objective == "classification" else METRICS
        for name, task in {**self.held_in, **self.held_out, **self.kept}.items():
            if task.metric not in accepted:
                raise ValueError(f"task {name} has metric {task.metric}; {self.objective} takes {', '.join(accepted)}")
            if task.labels is not None and self.objective != "classification":
                raise ValueError(f"task {name} has labels, which only objective=classification uses; remove them")
        if self.objective == "classification" and self.held_out:
            raise ValueError(
                "held-out tasks have no trained head, so a classification run cannot score them; remove held_out"
            )
        return self

    @model_validator(mode="after")
    def _can_mix_tasks(self) -> Self:
        if self.yardsticks.few_shot_merge and (self.objective == "classification" or not self.evaluate.few_shot):
            raise ValueError(
                "yardsticks.few_shot_merge shows the merge the examples of evaluate.few_shot, of which this run has "
                "none: remove it, or raise evaluate.few_shot of a language model"
            )
        if self.objective == "classification" and self.yardsticks.routed is not None:
            raise ValueError(
                "yardsticks.routed has experts answer rows of any task, but in a classification every task has a head "
                "of its own: remove yardsticks.routed"
            )
        for name, section in (("refine", self.refine), ("yardsticks.multitask", self.yardsticks.multitask)):
            if section is None:
                continue
            if self.objective == "classification":
                raise ValueError(
                    f"{name} trains one model on rows of all tasks, but in a classification every task has a head of "
                    f"its own: remove {name}"
                )
            if section.rows_per_task > self.splits.train:
                raise ValueError(
                    f"{name}.rows_per_task is more than a task's training rows (splits.train): at most "
                    f"{self.splits.train}"
                )
        return self

    @model_validator(mode="after")
    def _rounds_fit(self) -> Self:
        rounds, mask = self.rounds, self.mask
        if rounds.count == 1:
            return self
        if self.objective == "classification":
            raise ValueError("rounds: in a classification every task has a head, which no merge has: remove rounds")
        if self.train.steps and self.train.steps < rounds.count:
            raise ValueError(f"rounds.count is {rounds.count}, more than train.steps ({self.train.steps}): lower it")
        if rounds.support == "kept" and (self.expert != "sparse" or mask.reselect_every):
            raise ValueError("rounds.support=kept is for sparse experts that choose their positions once: remove it")
        if rounds.support == "fresh" and mask.shared and mask.spec(0).needs_data:
            raise ValueError(f"mask.shared is scored by {mask.criterion} once, at the base: give rounds.support=kept")
        return self

    @model_validator(mode="after")
    def _masks_fit(self) -> Self:
        mask = self.mask
        if self.seeds is not None and len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: every seed once")
        if mask.shared and self.expert != "sparse":
            raise ValueError(f"mask.shared is for sparse experts, not for expert={self.expert}")
        if mask.shared and mask.reselect_every:
            raise ValueError("mask.shared keeps one support for all: remove mask.reselect_every")
        if mask.shared and self.objective == "classification" and mask.criterion not in ("random", "magnitude"):
            raise ValueError("tasks with heads of their own share a support only by random or magnitude")
        return self


def load_config(path: str | Path, overrides: list[str] | None = None) -> PipelineConfig:
    """Read a configuration file and apply overrides of the form `section.field=value`. Texts are literal.

    Raises:
        ConfigError: the file is missing or not YAML, an override is malformed, or a field is unknown, mistyped or out
            of range; the message lists every such field.
    """
    path = Path(path)
    if not path.is_file():
        known = sorted(str(p) for p in (Path(__file__).resolve().parents[1] / "configs").glob("*.yaml"))
        raise ConfigError(f"{path}: no such configuration file (shipped: {', '.join(known)})")
    try:
        text = text_of(path.read_bytes(), str(path))
    except (OSError, DataError) as error:
        raise ConfigError(f"{path}: {error.strerror}" if isinstance(error, OSError) else str(error)) from error
    data = read_yaml(text, str(path))
    if data is not None and not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, found {type(data).__name__}")
    for override in overrides or []:
        data = overridden(data, override)
    try:
        return PipelineConfig.model_validate(data or {})
    except ValidationError as error:
        raise ConfigError("\n".join([f"{path}:", *(f"  {line}" for line in explain(PipelineConfig, error))])) from error


def dump_config(config: PipelineConfig) -> str:
    """The resolved configuration as YAML that `load_config` reads back as the same one."""
    return write_yaml(config.model_dump(mode="json"))
