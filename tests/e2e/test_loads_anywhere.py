"""What a run leaves behind stands on its own: manifests that say where everything comes from, and registered models
that load where there is neither this project nor its cache, and answer what the evaluation actors scored."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlflow
import pytest

from infra.artifacts.manifests import Manifest
from infra.environment import ROOT, git_commit
from infra.store.admin import list_objects
from infra.store.layout import rows_name
from infra.store.s3 import Store
from workers.scoring.metrics import text_metric
from workers.text.rows import Row, load_rows

CONFIG = Callable[..., dict[str, Any]]
MARGIN = 1 / 24
"""Difference of a task's score between two batch sizes, at most: one of 24 rows (sums are rounded otherwise)."""
ELSEWHERE = """
import importlib.util, json, sys
assert importlib.util.find_spec("infra") is None and importlib.util.find_spec("workers") is None
import mlflow
answers = []
for uri, config, rows in json.load(open(sys.argv[1])):
    answers.append(list(mlflow.pyfunc.load_model(uri, model_config=config).predict(rows)))
code = {name: module.__path__[0] for name, module in sys.modules.items() if name.startswith("expert_factory_")
        and hasattr(module, "__path__")}
assert code and not {"infra", "workers"} & set(sys.modules)
with open(sys.argv[2], "w") as out:
    json.dump({"answers": answers, "code": sorted(code.values())}, out)
"""


def write_rows(path: Path, kind: str, rows: int = 160) -> str:
    """Letters; the answer is the last of them: as free text, as one of four options, or as a label."""
    rng = random.Random(path.name)
    lines: dict[str, dict[str, Any]] = {}
    while len(lines) < rows:
        letters = rng.choices("abcd", k=rng.randint(4, 20))
        text = " ".join(letters)
        lines[text] = {"input": text, "target": letters[-1]}
        if kind == "choice":
            lines[text]["options"] = rng.sample("abcd", 4)
    path.write_text("".join(json.dumps(lines[text]) + "\n" for text in sorted(lines)))
    return f"jsonl:{path}"


def manifests() -> dict[str, Manifest]:
    """Every manifest in the store by key."""
    store = Store.from_env()
    found = [Manifest.from_json(store.get(each.name)) for each in list_objects(store, "artifacts/")]
    return {manifest.key: manifest for manifest in found}


@pytest.fixture(scope="module")
def elsewhere(stack: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Loads models and predicts in a process with an empty folder, a home of its own and the services' variables."""

    def predict(asked: list[tuple[str, dict[str, Any], list[Any]]]) -> Any:
        folder, home = tmp_path_factory.mktemp("empty"), tmp_path_factory.mktemp("home")
        (home / "asked.json").write_text(json.dumps(asked))
        names = ("MLFLOW_TRACKING_URI", "FACTORY_S3_ENDPOINT", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
        services = {name: os.environ[name] for name in names}
        done = subprocess.run(
            [sys.executable, "-c", ELSEWHERE, str(home / "asked.json"), str(home / "answers.json")],
            cwd=folder, env={"PATH": os.defpath, "HOME": str(home), "OMP_NUM_THREADS": "1", **services},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-4000:]
        assert list(home.glob(".cache/expert-factory/bases/*/model.safetensors"))  # fetched, not found
        return json.loads((home / "answers.json").read_text())

    return predict


def evaluated(made: dict[str, Manifest], digest: str, task: str) -> tuple[list[Row], list[str], Manifest]:
    """The test rows of a task, what the evaluation actor answered with the model of this digest, and its manifest."""
    (found,) = [
        each for each in made.values()
        if each.kind == "evaluation" and each.config["model"] == digest and each.config["weights_dtype"] == "float32"
        and (each.meta["task"], each.meta["split"]) == (task, "test")
    ]  # fmt: skip
    store = Store.from_env()
    rows = load_rows(store, rows_name(found.config["rows"]))
    lines = [json.loads(line) for line in store.get(found.files["rows"].name).decode().splitlines()]
    assert [line["id"] for line in lines] == [row.id for row in rows]
    return rows, [line["output"] for line in lines], found


def as_inputs(rows: Sequence[Row], task: str) -> list[dict[str, Any]]:
    given = [{"input": row.input, "task": task, "options": list(row.options or ())} for row in rows]
    return [{name: value for name, value in each.items() if value} for each in given]


def version_of(name: str, digest: str) -> str:
    """URI of the registered version with these bytes."""
    (found,) = mlflow.MlflowClient().search_model_versions(f"name='{name}' and tags.`factory.digest`='{digest}'")
    return f"models:/{name}/{found.version}"


@pytest.fixture(scope="module")
def shared() -> dict[str, Any]:
    """What the first test made, for the next one."""
    return {}


def test_language_models_answer_elsewhere_as_they_were_scored(
    pipeline: Any, tiny_config: CONFIG, elsewhere: Any, tmp_path: Path, shared: dict[str, Any]
) -> None:
    tasks = {
        "last": {"source": write_rows(tmp_path / "last.jsonl", "text"), "metric": "rouge_l", "max_new_tokens": 6,
                 "template": "Which is last?\n{input}", "license": "cc0-1.0"},
        "choice": {"source": write_rows(tmp_path / "choice.jsonl", "choice"), "metric": "choice_accuracy",
                   "template": "{input}\nOne of {options}?", "length_normalised": True},
        "again": {"source": write_rows(tmp_path / "again.jsonl", "text"), "metric": "exact_match", "license": "mit"},
    }  # fmt: skip
    config = tiny_config(
        "anywhere", held_in=3,
        splits={"train": 64, "validation": 8, "gate": 8, "test": 24},
        mask={"criterion": "connection_sensitivity", "granularity": "element", "density": 0.2, "shared": True,
              "modules": r".*\.(v_proj|o_proj|up_proj)"},
        merge={"fan_in": 2, "export": {}, "candidates": [
            {"method": "mean"}, {"method": "fisher_on_support"}, {"method": "emr"},
        ]},
    ) | {"held_in": tasks, "held_out": {}}  # fmt: skip
    config["train"]["learning_rate"] = 0.004  # answers still differ from row to row
    config["evaluate"] = {"few_shot": 0, "batch_size": 5, "serving_dtype": None}
    config["prompt"]["max_input_tokens"] = 24  # some inputs are longer
    config["data"] = {"tolerate": {"cut": 0.5}}
    before = set(manifests())
    finished = pipeline(config, submit=True, timeout=900)
    assert finished.code == 0, finished.output[-4000:]
    results = finished.results
    assert results is not None
    store = Store.from_env()
    assert json.loads(store.get(f"runs/{results['run_id']}/results.json")) == results
    shared["made"] = made = {key: each for key, each in manifests().items() if key not in before}
    shared |= {"results": results, "config": config}

    digests = {f"anywhere.{task}": (row["expert_digest"], [task]) for task, row in results["held_in"].items()}
    digests["anywhere.merged"] = (results["chosen"]["digest"], list(tasks))
    asked, expected, scored = [], [], []
    for name, (digest, of) in digests.items():
        uri, everything, outputs = version_of(name, digest), [], []
        for task in of:
            rows, answers, evaluation = evaluated(made, digest, task)
            assert evaluation.meta["batch_size"] == 5
            everything, outputs = everything + as_inputs(rows, task), outputs + answers
            scored.append((len(asked), slice(len(outputs) - len(rows), len(outputs)), rows, evaluation))
        asked += [(uri, {}, everything), (uri, {"batch_size": 3}, everything)]
        expected += [outputs, outputs]
    rows, answers, _ = evaluated(made, digests["anywhere.again"][0], "again")
    asked.append((version_of("anywhere.again", digests["anywhere.again"][0]), {}, [row.input for row in rows]))
    expected.append(answers)  # an expert knows its task, and its template is the bare input
    found = elsewhere(asked)
    assert not [path for path in found["code"] if Path(path).is_relative_to(ROOT)]  # the code came with the models
    for at in (*range(0, len(asked) - 1, 2), len(asked) - 1):
        assert found["answers"][at] == expected[at], asked[at][0]
    assert min(len(set(outputs)) for outputs in expected) > 1, expected  # not one answer for all
    for at, part, rows, evaluation in scored:
        metric = evaluation.meta["metric"]
        score = text_metric("exact_match" if metric == "choice_accuracy" else metric)
        smaller = [score(text, row.targets) for text, row in zip(found["answers"][at + 1][part], rows, strict=True)]
        assert sum(smaller) / len(rows) == pytest.approx(evaluation.meta["score"], abs=MARGIN)


def test_every_manifest_says_where_it_comes_from(shared: dict[str, Any]) -> None:
    made: dict[str, Manifest] = shared["made"]
    kinds = {"support", "expert", "fisher", "node", "merged", "task_mask", "checkpoint", "evaluation"}
    assert kinds <= {each.kind for each in made.values()}
    commit = git_commit(ROOT)
    for each in made.values():
        said = each.meta["environment"]
        assert {"python", "torch", "transformers", "ray", "mlflow", "machine", "host"} <= set(said), each.kind
        assert (said["device"], len(said["ray_node"]), len(said["source_sha256"])) == ("cpu", 56, 64), each.kind
        assert said.get("git_commit", "")[:40] == commit[:40], each.kind
    experts = {each.meta["task"]: each.meta for each in made.values() if each.kind == "expert"}
    assert {task: meta["data"]["license"] for task, meta in experts.items()} == {
        "last": "cc0-1.0", "choice": "not stated", "again": "mit",
    }  # fmt: skip
    assert experts["last"]["data"]["source"].startswith("jsonl:")
    assert {meta["base"]["license"] for meta in experts.values()} == {"unknown"}  # the folder has no card
    wanted = {"base": ["unknown"], "data": ["cc0-1.0", "mit", "not stated"]}
    assert {json.dumps(each.meta["licenses"]) for each in made.values() if each.kind in ("merged", "checkpoint")} == {
        json.dumps(wanted)
    }
    assert not [each.key for each in made.values() if "license" in json.dumps(each.config)]  # in no key
    client, row = mlflow.MlflowClient(), shared["results"]["held_in"]["last"]
    merged, expert = (client.get_model_version(f"anywhere.{name}", "1").description for name in ("merged", "last"))
    assert "licences: cc0-1.0 (`last`), not stated (`choice`), mit (`again`)" in merged
    assert f"expert {row['expert']:.3f} [" in expert
    assert f"base {row['base']:.3f} [" in expert


def test_a_run_without_ray_goes_on_from_one_on_ray(pipeline: Any, shared: dict[str, Any]) -> None:
    before = shared["results"]
    finished = pipeline(shared["config"])
    assert finished.code == 0, finished.output[-4000:]
    assert finished.results is not None
    assert set(finished.results["made"].values()) == {0}
    assert finished.results["held_in"] == before["held_in"]
    assert finished.results["summary"] == before["summary"]


def test_classifiers_answer_elsewhere_as_they_were_scored(
    pipeline: Any, tiny_config: CONFIG, elsewhere: Any, tmp_path: Path
) -> None:
    files = {name: write_rows(tmp_path / f"{name}.jsonl", "label") for name in ("one", "two")}
    config = tiny_config("anylabels", 2, objective="classification", held_out={})
    config["held_in"] = {name: {"source": file, "metric": "f1"} for name, file in files.items()}
    config["prompt"]["wrapper"] = "{prompt}"
    config["merge"]["candidates"] = [{"method": "mean"}]
    config["evaluate"] = {"batch_size": 5}
    config["splits"] = {"train": 64, "validation": 8, "gate": 8, "test": 24}
    finished = pipeline(config)
    assert finished.code == 0, finished.output[-4000:]
    results = finished.results
    assert results is not None
    made = manifests()
    expert, merged = results["held_in"]["one"]["expert_digest"], results["chosen"]["digest"]
    rows, alone, _ = evaluated(made, expert, "one")
    asked = [(version_of("anylabels.one", expert), {}, [row.input for row in rows])]
    table, together = [], []
    for task in ("two", "one"):
        rows, answers, _ = evaluated(made, merged, task)
        table, together = table + as_inputs(rows, task), together + answers
    asked.append((version_of("anylabels.merged", merged), {}, table))
    assert elsewhere(asked)["answers"] == [alone, together]
    assert min(len(set(alone)), len(set(together))) > 1
