"""What is refused before anything is trained, and what a run is expected to take, on a tiny checkpoint."""

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from infra.errors import ConfigError, DataError, FactoryError, MergeError
from infra.store.s3 import Store
from merge.methods.specs import Candidate, plan_reductions
from pipeline.config.candidates import Candidates
from pipeline.config.model import PipelineConfig, WorkerResources
from pipeline.data.tasks import TaskConfig, TaskData, fingerprint
from pipeline.flow.recipes import expert_spec
from pipeline.plan import preflight
from pipeline.plan.check_base import base_tokenizer, check_rows, empty_base
from pipeline.plan.check_refine import RefineNeed, check_refine_room, check_refine_rows
from pipeline.plan.cluster import GIB, ray_options, slots_of
from pipeline.plan.node_memory import NodeNeed, largest_node, node_file
from pipeline.plan.preflight import (
    Cost,
    Prepared,
    check_room,
    check_services,
    measured_flops,
    prepare_inputs,
    upload_inputs,
)
from tests.workers.tiny import WRAPPER, tiny_model, tiny_tokenizer
from workers.base.load import load_model, load_tokenizer
from workers.base.prepare import PreparedBase, prepare_base
from workers.masks.spec import select_supports
from workers.text.prompt import PromptSpec, encode_example
from workers.text.rows import Row, rows_from_jsonl

TASK = {"source": "jsonl:rows.jsonl", "metric": "exact_match", "template": "{input}?"}
PARAMETERS = sum(parameter.numel() for parameter in tiny_model().parameters())


def config(**sections: Any) -> PipelineConfig:
    given: dict[str, Any] = {
        "suite": "mine",
        "base": "path:/nowhere",
        "prompt": {"wrapper": WRAPPER},
        "held_in": {"one": TASK, "two": TASK},
        "train": {"steps": 3, "batch_size": 4, "compute_dtype": "float32"},
        "merge": {"candidates": [{"method": "mean"}]},
    }
    return PipelineConfig.model_validate(given | sections)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> PreparedBase:
    folder = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return prepare_base(f"path:{folder}", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def tasks() -> dict[str, TaskData]:
    def data(name: str, words: int) -> TaskData:
        rows = tuple(Row(str(i), "".join(f"w{(i + j) % 50}" for j in range(words + i % 3)), ("w1",)) for i in range(12))
        splits = {split: rows for split in ("train", "validation", "gate", "test")}
        return TaskData(name, TaskConfig(**TASK), splits, {split: fingerprint(rows) for split in splits})

    return {"one": data("one", 3), "two": data("two", 9)}


def cost_of(chosen: PipelineConfig, base: PreparedBase, tasks: dict[str, TaskData]) -> Cost:
    tokenizer, model = base_tokenizer(chosen, base), empty_base(chosen, base)
    lengths = check_rows(chosen, base, tokenizer, model, tasks, dict.fromkeys(tasks, 1))
    return preflight.expected_cost(chosen, base, tasks, model, lengths)


# -- names --


def test_parts_of_fused_weights_are_looked_up_where_a_candidate_asks(base: PreparedBase) -> None:
    """This base has none; one that interleaves them is refused before training."""
    asking = {"candidates": [{"method": "iso_c", "params": {"parts": "qkv"}}]}
    listed = Candidates((Candidate("iso_c", {"parts": "qkv"}),))
    assert preflight._fused_rows(config(merge=asking), empty_base(config(), base), listed) == {}


def test_an_experiment_registers_nothing_and_exports_nothing() -> None:
    chosen = config(registers=False, seeds=[0, 1])
    assert [inputs.registers for inputs in prepared(chosen).replicates("run")] == [False, False]
    assert [inputs.registers for inputs in prepared(config(seeds=[0, 1])).replicates("run")] == [True, False]
    with pytest.raises(ValueError, match="remove it, or registers=false"):
        config(registers=False, merge={"candidates": [{"method": "mean"}], "export": {}})


def test_names_and_candidates_are_checked_before_any_service() -> None:
    nowhere = Store("bucket", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"'a/b' and 'a:b' would both be registered as 'mine\.a-b'"):
        check_services(config(held_in={"a/b": TASK, "a:b": TASK}), nowhere)
    with pytest.raises(ConfigError, match="merged"):
        check_services(config(held_in={"merged": TASK}), nowhere)
    with pytest.raises(MergeError, match="did you mean"):
        check_services(config(merge={"candidates": [{"method": "men"}]}), nowhere)
    with pytest.raises(ConfigError, match="at least 2 are needed"):
        check_services(config(merge={"candidates": [{"method": "mean"}], "search": {"evaluations": 1}}), nowhere)


# -- sizes --


@pytest.mark.parametrize(
    ("mask", "weights"),
    [
        ({"density": 0.05}, 2 * (2 * 32 * 32 + 2 * 32 * 16)),  # q, k, v and o of two layers
        ({"density": 0.1, "modules": r".*\.(v_proj|up_proj)"}, 2 * (16 * 32 + 48 * 32)),
        ({"density": 0.33, "granularity": "block", "block_size": [16, 8], "modules": r".*_proj"}, None),
        ({"density": 1e-6, "granularity": "block", "block_size": [4, 4], "modules": r".*\.down_proj"}, 2 * 48 * 32),
        ({"density": 1.0, "modules": r"model\.layers\.1\.mlp\.gate_proj"}, 48 * 32),
        ({"density": 0.25, "granularity": "n_m", "group": 8, "modules": "mlp"}, 2 * 3 * 48 * 32),
        ({"density": 0.1, "granularity": "row", "modules": "value_output"}, 2 * (16 * 32 + 32 * 32)),
    ],
)
def test_trained_values_are_counted_as_they_will_be_selected(
    base: PreparedBase, tasks: dict[str, TaskData], mask: dict[str, Any], weights: int | None
) -> None:
    chosen = config(mask=mask)
    cost = cost_of(chosen, base, tasks)
    supports = select_supports(load_model(base.path, torch.float32), expert_spec(chosen, tasks["one"]))
    assert cost.trainable == sum(support.count for support in supports.values())
    assert cost.adapted == sum(support.shape[0] * support.shape[1] for support in supports.values())
    assert weights is None or cost.adapted == weights


def test_a_tied_embedding_is_counted_once(base: PreparedBase, tasks: dict[str, TaskData]) -> None:
    assert cost_of(config(), base, tasks).parameters == PARAMETERS


def test_tokens_are_those_of_the_encoded_rows(base: PreparedBase, tasks: dict[str, TaskData]) -> None:
    chosen = config()
    cost = cost_of(chosen, base, tasks)
    tokenizer, spec = load_tokenizer(base.path), PromptSpec("{input}?", WRAPPER, chosen.prompt.max_input_tokens)
    for name, data in tasks.items():
        lengths = [len(encode_example(tokenizer, spec, row).input_ids) for row in data.splits["train"]]
        assert cost.expert_tokens[name] == round(3 * 4 * sum(lengths) / len(lengths))
    assert cost.expert_tokens["two"] > cost.expert_tokens["one"]
    assert cost_of(config(prompt={"wrapper": WRAPPER, "max_input_tokens": 2}), base, tasks).expert_tokens[
        "two"
    ] == pytest.approx(3 * 4 * 7)  # <s>, two words, "?", </s>, the target and the token that ends it


def test_more_work_costs_more(base: PreparedBase, tasks: dict[str, TaskData]) -> None:
    def cost(**sections: Any) -> Cost:
        return cost_of(config(**sections), base, tasks)

    plain = cost()
    assert plain.worker_bytes > preflight.PROCESS_GIB * GIB + 4 * PARAMETERS
    denser = cost(mask={"density": 0.5})
    assert denser.worker_bytes > plain.worker_bytes
    assert denser.store_bytes > plain.store_bytes
    larger = cost(train={"steps": 3, "batch_size": 64, "compute_dtype": "float32"})
    assert larger.worker_bytes > plain.worker_bytes
    more = cost(merge={"candidates": [{"method": "task_arithmetic", "params": {"lambda": [0.1, 0.2, 0.3]}}]})
    assert more.cache_bytes > plain.cache_bytes
    second = cost(merge={"candidates": [{"method": "mean"}, {"method": "ties", "params": {"density": 0.5}}]})
    assert second.store_bytes - plain.store_bytes > 22 * plain.adapted / 10  # another reduction stores its nodes
    measured = cost(merge={"candidates": [{"method": "mean"}, {"method": "fisher_on_support"}, {"method": "regmean"}]})
    grams = 2 * (4 * 32**2) * 2  # inputs of q, k, v and o in two layers, each of 32
    three = cost(
        merge={"candidates": [{"method": "mean"}, *({"method": "ties", "params": {"density": d}} for d in (0.5, 0.6))]}
    )
    assert measured.store_bytes - three.store_bytes == pytest.approx(2 * (2 * plain.trainable + grams), abs=2)
    longer = cost(train={"steps": 6, "batch_size": 4, "compute_dtype": "float32"})
    assert longer.seconds(2, 1e9) == pytest.approx(2 * plain.seconds(2, 1e9), rel=0.02)
    assert plain.seconds(1, 1e9) == pytest.approx(2 * plain.seconds(2, 1e9))


def test_refining_needs_room_of_its_own(base: PreparedBase, tasks: dict[str, TaskData]) -> None:
    def need(**refine: Any) -> RefineNeed:
        return cost_of(config(refine=refine), base, tasks).mixed["refined"]

    assert cost_of(config(), base, tasks).mixed == {}
    plain, expert = need(), cost_of(config(), base, tasks)
    assert plain.trainable == expert.trainable
    assert plain.worker_bytes > expert.worker_bytes  # adding up holds a whole tensor
    per_batch = 3 * 4  # steps and rows of an expert
    assert plain.step_tokens == pytest.approx(sum(expert.expert_tokens.values()) / per_batch, abs=1)
    assert need(rows_per_task=2).step_tokens == pytest.approx(2 * plain.step_tokens)
    half = {"density": 0.5, "block_size": [8, 8]}
    assert need(support="both", mask=half).trainable == need(mask=half).trainable > plain.trainable
    assert need(mask={"density": 0.5}).worker_bytes > plain.worker_bytes
    dense = cost_of(config(refine={"support": "merge"}, merge={"candidates": [{"method": "iso_c"}]}), base, tasks)
    assert dense.mixed["refined"].trainable == dense.adapted > plain.trainable
    multitask = cost_of(config(yardsticks={"multitask": {}}), base, tasks).mixed["yardsticks"]
    assert multitask.tokens == pytest.approx(sum(expert.expert_tokens.values()), abs=2)
    assert multitask.file_bytes < plain.file_bytes
    with pytest.raises(ConfigError, match="do not divide its shape"):
        need(mask={"granularity": "block", "block_size": [5, 16]})
    stored = cost_of(config(refine={"steps": [1, 2]}), base, tasks).kind_bytes["refined"]
    assert stored == 2 * plain.file_bytes
    few = {
        name: replace(data, splits={**data.splits, "train": data.splits["train"][:8]}) for name, data in tasks.items()
    }
    with pytest.raises(ConfigError, match=r"refine.rows_per_task is 9, but task (one|two) has \d training rows: lower"):
        check_refine_rows(config(refine={"rows_per_task": 9}), few)


def test_teachers_are_costed_by_the_rows_that_they_read(base: PreparedBase, tasks: dict[str, TaskData]) -> None:
    keep = {"tasks": {"kept": {**TASK, "source": "jsonl:kept.jsonl"}}, "rows_per_step": 2}
    three = {**tasks, "kept": replace(tasks["one"], name="kept")}

    def of(**refine: Any) -> Cost:
        return cost_of(config(refine=refine), base, three)

    silent, both = of(steps=[4]), of(steps=[4], teacher="experts", keep=keep)
    assert (silent.teacher_tokens, silent.kind_bytes["teachers"]) == (0, 0)
    step = silent.mixed["refined"].step_tokens  # of one row of each task
    kept = both.mixed["refined"].step_tokens - step
    assert kept > 0
    assert both.teacher_tokens == pytest.approx(4 * (step + kept))
    vocabulary, longest = tiny_model().config.vocab_size, config().prompt.max_target_tokens
    assert both.kind_bytes["teachers"] == 4 * (2 + 2) * longest * (8 * min(64, vocabulary) + 4)
    assert of(steps=[4], teacher="experts").teacher_tokens == pytest.approx(4 * step)
    assert of(steps=[4], keep=keep, top_k=2).kind_bytes["teachers"] == 4 * 2 * longest * 20


def test_rows_that_are_scored_are_not_kept(tasks: dict[str, TaskData]) -> None:
    given = config(refine={"keep": {"tasks": {"kept": {**TASK, "source": "jsonl:kept.jsonl"}}}})
    own = tuple(Row(f"kept {at}", "x", ("y",)) for at in range(9))
    apart = replace(tasks["one"], splits=dict.fromkeys(tasks["one"].splits, own))
    check_refine_rows(given, {**tasks, "kept": apart})
    two = replace(tasks["two"], splits={**tasks["two"].splits, "test": own[:2]})
    with pytest.raises(ConfigError, match=r"refine.keep.tasks: \d+ of their rows are test rows of the task two"):
        check_refine_rows(given, {**tasks, "two": two, "kept": apart})


def test_refining_that_needs_more_than_it_reserves_is_refused() -> None:
    chosen = config(refine={}, resources={"refine": {"memory_gib": 1.5}})
    check_refine_room(chosen, RefineNeed(1, 1.0, 3 * GIB // 2, 1))
    with pytest.raises(ConfigError, match=r"resources.refine.memory_gib is 1\.5 .* need 2\.0 GiB; .*density"):
        check_refine_room(chosen, RefineNeed(1, 1.0, 2 * GIB, 1))
    shared = config(refine={}, resources={"expert": {"memory_gib": 1.5, "gpus": 1}})
    check_refine_room(shared, RefineNeed(1, 1.0, 2 * GIB, 1))


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ({"modules": "nothing_like_this"}, r"'nothing_like_this' matches no .*lm_head.*q_proj"),
        ({"modules": r"q_proj"}, r"matches no whole name"),
        ({"granularity": "block", "block_size": [5, 16]}, r"q_proj.*5x16 do not divide its shape 32x32"),
        (
            {"granularity": "block", "block_size": [32, 16], "modules": r".*\.(o_proj|k_proj)"},
            r"layers\.0\.self_attn\.k_proj.*32x16 do not divide its shape 16x32.*element",
        ),
    ],
)
def test_a_mask_that_does_not_fit_the_base_is_refused(
    base: PreparedBase, tasks: dict[str, TaskData], mask: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        cost_of(config(mask=mask), base, tasks)


def test_a_tied_weight_is_refused_before_training(base: PreparedBase, tasks: dict[str, TaskData]) -> None:
    chosen = config(mask={"modules": "lm_head"})
    with pytest.raises(ConfigError, match="tied"):
        select_supports(load_model(base.path, torch.float32), expert_spec(chosen, tasks["one"]))
    with pytest.raises(ConfigError, match="tied"):
        cost_of(chosen, base, tasks)


# -- merge nodes --

WIDE = {"small.weight": (64, 64), "wide.weight": (256, 1024), "tall.weight": (2048, 256)}


def need(*methods: str, union: float = 1.0, experts: int = 4) -> NodeNeed:
    return largest_node(plan_reductions([Candidate(method) for method in methods], experts), WIDE, experts, union)


def test_a_node_needs_what_its_largest_tensor_takes() -> None:
    mean = need("mean")
    assert (mean.tensor, mean.shape, mean.methods) == ("tall.weight", (2048, 256), ("mean",))
    assert 50 < mean.bytes / 2**19 < 110  # about 60 bytes a position were measured
    assert 125 < need("mean", "overlap_mean", "ties", "magmax").bytes / 2**19 < 200  # about 132
    assert need("mean", union=0.2).bytes < mean.bytes
    assert need("ties", experts=300).bytes > need("ties").bytes  # counts of 4 bytes
    regmean = need("mean", "regmean", union=0.1)
    assert (regmean.tensor, regmean.methods) == ("wide.weight", ("regmean",))
    assert regmean.bytes > 40 * 1024**2


def test_singular_vectors_need_memory() -> None:
    plain, matrix = need("task_arithmetic"), need("spectral_power")
    assert matrix.bytes > plain.bytes + 24 * matrix.shape[0] * matrix.shape[1]


def test_matrices_of_each_expert_need_memory_and_room() -> None:
    """Whatever the experts' supports: nodes hold no positions. WUDI's is largest where inputs are many."""
    for method in ("wudi", "tsv_m", "iso_cts", "svc", "knots"):
        assert need(method).bytes > need("spectral_power").bytes
        first_sums = method in ("iso_cts", "svc")  # in a round before
        assert need(method, union=0.1).bytes == need(method).bytes or first_sums
    assert need("wudi").tensor == "wide.weight"
    assert need("wudi", experts=40).bytes == need("wudi").bytes
    many = Candidate("tsv_m", {"rank_share": 0.5})
    few, lots = (largest_node(plan_reductions([many], n), WIDE, n, 1.0).bytes for n in (2, 40))
    assert lots > few  # more directions than a weight has
    own, directions = (plan_reductions([Candidate(method)], 4)[0].spec for method in ("wudi", "tsv_m"))
    assert node_file(own, WIDE, 4, 0.1) == 4 * sum(a * b + b * b for a, b in WIDE.values())
    assert node_file(directions, WIDE, 4, 0.1) == 4 * sum(4 * (min(a, b) // 4) * (2 + a + b) for a, b in WIDE.values())
    (sums,) = plan_reductions([Candidate("mean")])
    assert node_file(sums.spec, WIDE, 4, 0.1) == pytest.approx(1.1 * sum(a * b for a, b in WIDE.values()))


def test_a_node_that_needs_more_than_it_reserves_is_refused_before_training(
    base: PreparedBase, tasks: dict[str, TaskData]
) -> None:
    candidates = {"candidates": [{"method": "mean"}, {"method": "regmean"}]}
    room = {"node": {"memory_gib": preflight.PROCESS_GIB}}
    with pytest.raises(ConfigError) as caught:
        cost_of(config(merge=candidates, resources=room, mask={"modules": "mlp"}), base, tasks)
    for part in ("memory_gib is 0.9, but merging model.layers.0.mlp.down_proj.weight [32, 48] by regmean", "1 GiB"):
        assert part in str(caught.value)
    cost_of(config(merge=candidates, resources={"node": {"memory_gib": 1}}), base, tasks)


# -- room --

SMALL = Cost(100, 1000, 10_000, {"one": 1000}, GIB, {"merges": GIB}, 1)


def cost(**changes: int) -> Cost:
    return Cost(**{**vars(SMALL), **changes})


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FACTORY_CACHE", str(tmp_path / "node-cache"))


def test_an_expert_that_needs_more_than_it_reserves_is_refused() -> None:
    chosen = config(resources={"expert": {"memory_gib": 1.5}})
    check_room(chosen, cost(worker_bytes=3 * GIB // 2))
    with pytest.raises(ConfigError, match=r"resources.expert.memory_gib is 1\.5, .* need 2\.0 GiB; .*batch_size"):
        check_room(chosen, cost(worker_bytes=2 * GIB))


def test_memory_of_a_gpu_is_not_main_memory() -> None:
    check_room(config(resources={"expert": {"memory_gib": 1.5, "gpus": 0.5}}), cost(worker_bytes=9 * GIB))


def test_a_disk_that_is_too_full_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FactoryError, match=r"node-cache: .* GiB free, 1048576\.0 GiB expected; .*FACTORY_CACHE"):
        check_room(config(), cost(cache_bytes=2**50))


# -- cluster --


def nodes(*resources: dict[str, float]) -> list[dict[str, Any]]:
    return [{"Alive": True, "Resources": each} for each in resources]


@pytest.mark.parametrize(
    ("cluster", "asked", "expected"),
    [
        ({"CPU": 8.0, "memory": 64.0 * GIB}, {"cpus": 1, "memory_gib": 3}, 8),
        ({"CPU": 8.0, "memory": 10.0 * GIB}, {"cpus": 1, "memory_gib": 3}, 3),
        ({"CPU": 7.0, "memory": 64.0 * GIB}, {"cpus": 2, "memory_gib": 3}, 3),
        ({"CPU": 2.0, "memory": 64.0 * GIB}, {"cpus": 0.5, "memory_gib": 3}, 4),
        ({"CPU": 64.0, "GPU": 2.0, "memory": 640.0 * GIB}, {"cpus": 1, "gpus": 0.25, "memory_gib": 3}, 8),
        ({"CPU": 64.0, "memory": 640.0 * GIB}, {"cpus": 1, "gpus": 1, "memory_gib": 3}, 0),
        ({"CPU": 1.0, "memory": 64.0 * GIB}, {"cpus": 2, "memory_gib": 3}, 0),
        ({"CPU": 8.0, "memory": 2.0 * GIB}, {"cpus": 1, "memory_gib": 3}, 0),
        ({"CPU": 0.0, "memory": 12.0 * GIB}, {"cpus": 0, "memory_gib": 3}, 4),
        ({}, {"cpus": 1, "memory_gib": 3}, 0),
    ],
)
def test_slots_are_what_the_scarcest_resource_allows(
    cluster: dict[str, float], asked: dict[str, float], expected: int
) -> None:
    assert slots_of(nodes(cluster), WorkerResources(**asked)) == expected


@pytest.mark.parametrize("share", [0.1, 0.2, 0.05])
def test_a_tenth_or_a_fifth_of_a_gpu_fits_ten_or_five_times(share: float) -> None:
    asked = WorkerResources(cpus=1, gpus=share, memory_gib=1)
    assert slots_of(nodes({"CPU": 64.0, "GPU": 1.0, "memory": 640.0 * GIB}), asked) == round(1 / share)


def test_options_for_ray() -> None:
    asked = WorkerResources(cpus=2, gpus=0.5, memory_gib=1.5)
    options = {"num_cpus": 2, "num_gpus": 0.5, "memory": 3 * GIB // 2, "scheduling_strategy": "SPREAD"}
    assert ray_options(asked) == options
    assert ray_options(asked, 0) == {**options, "max_retries": 0}


def prepared(chosen: PipelineConfig) -> Prepared:
    nowhere = Store("bucket", "http://127.0.0.1:9")
    return Prepared(
        chosen, nowhere, PreparedBase(Path("/nowhere"), "tiny", "b" * 64, "mit"), {}, {}, Candidates(()), SMALL
    )


def test_workers_are_counted_node_by_node() -> None:
    half = {"CPU": 3.0, "memory": 64.0 * GIB}
    assert slots_of(nodes(half, half), WorkerResources(cpus=2, memory_gib=3)) == 2  # not 3, as six CPUs would suggest
    assert slots_of(nodes(half, half), WorkerResources(cpus=4, memory_gib=3)) == 0
    dead = [{"Alive": False, "Resources": half}]
    assert slots_of(dead, WorkerResources(cpus=1, memory_gib=3)) == 0


@pytest.mark.parametrize("kind", ["expert", "evaluator", "node"])
def test_a_worker_that_fits_on_no_node_is_refused(kind: str) -> None:
    chosen = config(resources={kind: {"cpus": 4, "gpus": 0.5, "memory_gib": 3}})
    cluster = nodes({"CPU": 2.0, "memory": 8.0 * GIB}, {"CPU": 2.0, "memory": 8.0 * GIB})
    with pytest.raises(ConfigError) as caught:
        prepared(chosen).check_cluster(cluster, Console(file=StringIO()))
    for part in (f"resources.{kind} asks for 4 CPUs, 0.5 GPUs and 3 GiB", "the largest: 2 CPUs, 0 GPUs, 8.0 GiB"):
        assert part in str(caught.value)


def test_what_a_run_is_expected_to_take_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "measured_flops", lambda: 1e9)
    out = StringIO()
    cluster = nodes({"CPU": 2.0, "memory": 64.0 * GIB})
    assert prepared(config()).check_cluster(cluster, Console(file=out, soft_wrap=True)) == 2
    text = out.getvalue()
    for part in ("on 2 slots (at 1 GFLOP/s a slot)", "1.0 GiB memory an expert", "1.0 GiB in the object store",
                 "100 trained values an expert (10.0% of the adapted modules)"):  # fmt: skip
        assert part in text


def test_the_speed_is_measured_with_one_thread_and_the_threads_are_put_back() -> None:
    threads = torch.get_num_threads()
    assert measured_flops() > 1e6
    assert torch.get_num_threads() == threads


# -- inputs --


def test_lost_rows_are_said_and_refused_above_what_is_tolerated(base: PreparedBase, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    data = [{"input": f"w{i} w{i // 9} w{i % 7} w2 w3", "target": "" if i == 7 else "w1w2w3"} for i in range(60)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in data))
    given: dict[str, Any] = {
        "base": f"path:{base.path}",
        "held_in": {"one": {**TASK, "source": f"jsonl:{rows}"}},
        "splits": {"train": 16, "validation": 4, "gate": 8, "test": 4},
    }

    def prepare(**more: Any) -> str:
        out = StringIO()
        prepare_inputs(config(**given | more), Store("bucket", "http://127.0.0.1:9"), Console(file=out, soft_wrap=True))
        return out.getvalue()

    with pytest.raises(DataError, match=r"task one: 1\.7% of its 60 rows would be dropped"):
        prepare()
    assert "one: 60 rows; dropped: 1 with a blank target\n" in prepare(data={"tolerate": {"dropped": 0.02}})
    short = {"prompt": {"wrapper": WRAPPER, "max_input_tokens": 4, "max_target_tokens": 3}}
    with pytest.raises(DataError, match=r"would be cut: 32 inputs lose their beginning, 20 targets their end"):
        prepare(data={"tolerate": {"dropped": 0.02}}, **short)


def test_inputs_are_prepared_without_a_store_and_uploaded_once(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "tiny-llama"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"input": f"w{i} w{i // 9}", "target": "w1"}) + "\n" for i in range(60)))
    chosen = config(
        base=f"path:{folder}",
        held_in={"one": {**TASK, "source": f"jsonl:{rows}"}},
        splits={"train": 16, "validation": 4, "gate": 8, "test": 4},
    )
    ready = prepare_inputs(chosen, Store("bucket", "http://127.0.0.1:9"), Console(file=StringIO()))
    ready = replace(ready, store=store)
    assert list(store.list()) == []
    upload_inputs(ready)
    data = ready.tasks["one"]
    names = {data.object_name(split) for split in data.splits}
    stored = set(store.list())
    assert len(names) == 4
    assert names < stored
    assert f"bases/{ready.base.sha256}/index.json" in stored
    for split in data.splits:
        assert rows_from_jsonl(store.get(data.object_name(split))) == list(data.splits[split])
    lost, kept = sorted(names)[:2]
    store.delete(lost)
    store.put(kept, b"as it was")
    upload_inputs(ready)
    assert set(store.list()) == stored
    assert store.get(kept) == b"as it was"
