"""Champions over several runs on real MLflow and S3: each test goes on where the one before it stopped.

Two tasks are answered by one word each, which an expert learns at once and the merge keeps; the answers to a third are
drawn by chance, so that its expert cannot become better than the base.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest

from infra.store.s3 import Store
from tests.e2e.conftest import WORDS, write_tiny_base
from tests.e2e.here import Finished, command
from tests.e2e.test_kinds import write_labelled

CONFIG = Callable[..., dict[str, Any]]
SUITE = "promotion"
STEPS = 24


def write_rows(path: Path, answers: list[str]) -> Path:
    """120 rows, whose answers are drawn from these."""
    rng = random.Random(path.name)
    lines = sorted({" ".join(rng.choices(WORDS, k=5)) for _ in range(200)})[:120]
    path.write_text("".join(json.dumps({"input": line, "target": rng.choice(answers)}) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def config(tiny_config: CONFIG, tmp_path_factory: pytest.TempPathFactory) -> CONFIG:
    """The suite's configuration; keywords replace sections, `train` adds to its section."""
    folder = tmp_path_factory.mktemp("promotion")
    answers = {"in0": ["red"], "in1": ["red"], "chance": ["q", "x", "z", "j", "w", "v"]}
    files = {name: write_rows(folder / f"{name}.jsonl", given) for name, given in answers.items()}

    def make(train: dict[str, Any] | None = None, **sections: Any) -> dict[str, Any]:
        found = tiny_config(SUITE, 0, **sections)
        found["held_in"] = {
            name: {"source": f"jsonl:{file}", "template": "Say it.\n{input}", "metric": "exact_match"}
            for name, file in files.items()
        }
        found["held_out"] = {}
        found["train"] |= {"steps": STEPS, "validate_every": 12} | (train or {})
        found["merge"] = {
            "fan_in": 2,
            "candidates": [{"method": "mean"}],
            "export": {"dtype": "float32"},
        } | sections.get("merge", {})
        found["evaluate"] |= {"few_shot": 0, "serving_dtype": None}
        return found

    return make


@pytest.fixture(scope="module")
def seen() -> dict[str, dict[str, Any]]:
    """Results of the runs so far, by name."""
    return {}


def finished(run: Finished) -> dict[str, Any]:
    """The results of a run that ended well."""
    assert run.code == 0, run.output[-4000:]
    assert run.results is not None
    return run.results


def aliases(task: str, suite: str = SUITE) -> dict[str, int]:
    found = mlflow.MlflowClient().get_registered_model(f"{suite}.{task}").aliases
    return {alias: int(version) for alias, version in found.items()}


def versions(task: str) -> int:
    return len(mlflow.MlflowClient().search_model_versions(f"name = '{SUITE}.{task}'"))


def test_what_beats_the_base_becomes_champion_and_nothing_else_does(
    pipeline: Any, config: CONFIG, seen: dict[str, Any]
) -> None:
    run = pipeline(config())
    results = seen["first"] = finished(run)
    models = results["gate"]["models"]
    for task in ("in0", "merged"):
        assert (models[task]["promoted"], models[task]["champion"], models[task]["opponent"]) == (True, 1, "base")
        assert models[task]["interval"][0] > 0
        assert aliases(task) == {"champion": 1}
    tasks = models["merged"]["tasks"]
    assert set(tasks) == {"in0", "in1", "chance"}
    assert tasks["in1"]["challenger"] >= 0.5 > tasks["in1"]["opponent"]
    refused = models["chance"]
    assert (refused["promoted"], refused["champion"]) == (False, None)
    assert aliases("chance") == {"challenger": 1}
    assert "vs base" in refused["reason"]
    assert refused["reason"].endswith(": not superior")
    assert f"{SUITE}.chance version 1, challenger: {refused['reason']}" in run.output
    assert models["merged-checkpoint"]["promoted"]
    assert aliases("merged-checkpoint") == {"champion": 1}
    client = mlflow.MlflowClient()
    assert f"**Gate**: {refused['reason']}" in client.get_model_version(f"{SUITE}.chance", "1").description
    assert client.get_model_version(f"{SUITE}.merged", "1").tags["factory.gate.run"] == results["run_id"]


def test_what_did_not_change_is_not_compared_again(pipeline: Any, config: CONFIG, seen: dict[str, Any]) -> None:
    run = pipeline(config())
    results = finished(run)
    assert set(results["made"].values()) == {0}, "no score on the gate rows either"
    models = results["gate"]["models"]
    assert {task: row["reason"] for task, row in models.items() if task != "chance"} == {
        "in0": "champion already",
        "in1": "champion already",
        "merged": "champion already",
        "merged-checkpoint": f"made of the champion of {SUITE}.merged",
    }
    assert not any(row["promoted"] or row["interval"] for row in models.values())
    before = seen["first"]
    assert models["chance"]["reason"] == (
        f"not compared again: {before['gate']['models']['chance']['reason']} (run {before['run_id']})"
    )
    assert [versions(task) for task in models] == [1] * len(models)


def test_a_worse_retrained_merge_stays_challenger_and_the_report_says_why(
    pipeline: Any, config: CONFIG, seen: dict[str, Any]
) -> None:
    run = pipeline(config(train={"steps": 1, "validate_every": 1, "learning_rate": 1e-5}))
    results = seen["worse"] = finished(run)
    row = results["gate"]["models"]["merged"]
    assert (row["version"], row["promoted"], row["champion"], row["opponent"]) == (2, False, 1, "champion (version 1)")
    assert row["interval"][1] < 0
    before = seen["first"]["gate"]["models"]["merged"]["tasks"]
    assert {task: pair["opponent"] for task, pair in row["tasks"].items()} == {
        task: pair["challenger"] for task, pair in before.items()
    }, "the champion on the same rows as before"
    assert aliases("merged") == {"champion": 1, "challenger": 2}
    assert aliases("merged-checkpoint") == {"champion": 1, "challenger": 2}
    assert aliases("in0") == {"champion": 1, "challenger": 2}
    report = Store.from_env().get(f"runs/{results['run_id']}/report.md").decode()
    assert f"| {SUITE}.merged | 2 | challenger | 1 | {row['reason']} |" in report
    assert row["reason"] in run.output


def test_a_person_may_promote_it_all_the_same(stack: Any) -> None:
    done = command("promote", SUITE, "--version", "2", "--reason", "to see what happens")
    assert done.code == 0, done.output
    assert f"{SUITE}.merged: version 2 is champion, after version 1" in done.output
    assert f"{SUITE}.merged-checkpoint: version 2 is champion" in done.output
    assert aliases("merged") == {"champion": 2}
    assert aliases("merged-checkpoint") == {"champion": 2}
    listed = command("models", SUITE, "--task", "merged")
    assert listed.code == 0, listed.output
    assert "to see what happens" in listed.output
    refused = command("promote", SUITE, "--version", "7")
    assert refused.code == 2
    assert f"there is no version 7 of '{SUITE}.merged'" in refused.output
    assert "there are no registered models of a suite 'nobody'" in command("models", "nobody").output


def test_a_better_one_is_promoted(pipeline: Any, config: CONFIG, seen: dict[str, Any]) -> None:
    results = seen["better"] = finished(pipeline(config(train={"steps": STEPS + 1})))
    row = results["gate"]["models"]["merged"]
    assert (row["version"], row["promoted"], row["opponent"]) == (3, True, "champion (version 2)")
    assert row["interval"][0] > 0
    assert aliases("merged") == {"champion": 3}
    assert aliases("merged-checkpoint") == {"champion": 3}
    assert not results["gate"]["models"]["in0"]["promoted"], "its champion is still the first one, which is as good"
    assert aliases("in0") == {"champion": 1, "challenger": 3}


def test_a_rollback_lasts(pipeline: Any, config: CONFIG) -> None:
    done = command("rollback", SUITE, "--reason", "it is rude")
    assert done.code == 0, done.output
    assert f"{SUITE}.merged: version 2 is champion again; version 3 is rolled back" in done.output
    assert aliases("merged")["champion"] == aliases("merged-checkpoint")["champion"] == 2
    again = command("rollback", SUITE, "--version", "3")
    assert again.code == 0, again.output
    wrong = command("rollback", SUITE, "--version", "1")
    assert wrong.code == 2
    assert "version 1 of 'promotion.merged' is not its champion; version 2 is" in wrong.output
    assert aliases("merged")["champion"] == aliases("merged-checkpoint")["champion"] == 2
    results = finished(pipeline(config(train={"steps": STEPS + 1})))
    row = results["gate"]["models"]["merged"]
    assert (row["version"], row["promoted"], row["champion"]) == (3, False, 2)
    assert row["reason"].startswith("not compared again: version 3 was rolled back (")
    assert row["reason"].endswith(": it is rude)")
    assert aliases("merged") == {"champion": 2, "challenger": 3}
    assert aliases("merged-checkpoint")["champion"] == 2
    assert command("rollback", SUITE).code == 0
    again = command("rollback", SUITE)
    assert again.code == 2
    assert "is its first champion" in again.output
    assert aliases("merged")["champion"] == aliases("merged-checkpoint")["champion"] == 1


def test_a_champion_of_another_base_is_scored_on_its_own(
    pipeline: Any, config: CONFIG, seen: dict[str, Any], tmp_path: Path
) -> None:
    other = write_tiny_base(tmp_path / "other-base", seed=1)
    sizes = {"train": 64, "validation": 8, "gate": 12, "test": 8}  # rows on which the champion has no scores yet
    results = finished(pipeline(config(splits=sizes) | {"base": f"path:{other}"}))
    assert results["base"]["sha256"] != seen["first"]["base"]["sha256"]
    models = results["gate"]["models"]
    assert models["merged"]["version"] == 4
    for task in ("merged", "in0"):
        assert models[task]["opponent"] == "champion (version 1)"
        assert models[task]["tasks"]["in0"]["opponent"] >= 0.5, "with the base that it was not made on it says nothing"
        left_out = {"merged": 12, "in0": 4}[task]  # former validation rows, for the gate takes more rows now
        assert f"; {left_out} gate rows left out: the champion was trained on them" in models[task]["reason"]


def test_a_champion_that_is_gone_is_left_to_a_person(pipeline: Any, config: CONFIG) -> None:
    store, client = Store.from_env(), mlflow.MlflowClient()
    champion = aliases("merged")["champion"]
    uri = client.get_model_version(f"{SUITE}.merged", str(champion)).tags["factory.adapter_uri"]
    store.delete(uri.removeprefix(store.uri("")))
    merge = {"candidates": [{"method": "task_arithmetic", "params": {"lambda": 0.4}}]}
    results = finished(pipeline(config(merge=merge)))
    assert results["made"]["experts"] == 0
    row = results["gate"]["models"]["merged"]
    assert (row["promoted"], row["champion"]) == (False, champion)
    wanted = f"python -m pipeline promote {SUITE} --version {row['version']}"
    assert row["reason"].startswith(f"not compared: champion (version {champion}) cannot be scored (")
    assert row["reason"].endswith(wanted)
    done = command(*wanted.split()[3:])
    assert done.code == 0, done.output
    assert aliases("merged") == {"champion": row["version"]}
    gone = command("promote", SUITE, "--version", str(champion))
    assert gone.code == 2
    assert "is gone, so it cannot serve" in gone.output


def test_a_classifying_champion_keeps_the_heads_of_its_own_experts(
    pipeline: Any, tiny_config: CONFIG, tmp_path: Path
) -> None:
    suite = "promotion-labels"
    found = tiny_config(suite, 0, objective="classification", held_out={})
    labels = {"two": {"x": "yes", "y": "no"}, "three": {"x": "one", "y": "two", "z": "three"}}
    found["held_in"] = {
        task: {"source": f"jsonl:{write_labelled(tmp_path / f'{suite}-{task}.jsonl', given)}", "metric": "accuracy"}
        for task, given in labels.items()
    }
    found["prompt"]["wrapper"] = "{prompt}"
    found["mask"] = {"modules": "all_linear", "granularity": "element", "density": 0.2}
    found["train"] |= {"steps": 40, "learning_rate": 0.02, "validate_every": 20}
    found["splits"] = {"train": 96, "validation": 8, "gate": 24, "test": 8}
    found["merge"]["candidates"] = [{"method": "mean"}]
    first = finished(pipeline(found))["gate"]["models"]
    assert first["two"]["promoted"]
    done = command("promote", suite, "--version", "1")  # whether the merge beat untrained heads is not the point
    assert done.code == 0, done.output
    found["train"] |= {"steps": 1, "validate_every": 1, "learning_rate": 1e-6}
    worse = finished(pipeline(found))["gate"]["models"]
    for task in ("two", "merged"):
        assert worse[task]["opponent"] == "champion (version 1)"
        assert {name: pair["opponent"] for name, pair in worse[task]["tasks"].items()} == {
            name: pair["challenger"] for name, pair in first[task]["tasks"].items()
        }
    assert not worse["two"]["promoted"]
