"""What prompts of a registered merge stand in: what its sources say, else the base's own."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from infra.artifacts.manifests import Manifest
from infra.errors import BaseModelError, ConfigError
from infra.registry.versions import Version
from merge.by_hand import prompts
from merge.by_hand.prompts import find_wrapper
from merge.by_hand.sources import Place
from tests.e2e.conftest import write_tiny_base
from workers.base.prepare import PreparedBase, prepare_base

OLD, NEW = "<|user|>{prompt}", "Q: {prompt}\nA:"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def base(model: Path, tmp_path_factory: pytest.TempPathFactory) -> PreparedBase:
    return prepare_base(f"path:{model}", tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three versions: of another merge, of one whose files are gone, of one that is told nothing of prompts."""
    told: dict[str, dict[str, Any]] = {"1": {"prompt_wrapper": NEW}, "2": {}, "3": {"device": "cpu"}}
    monkeypatch.setattr(prompts, "find_version", lambda name, number: Version(name, number, {}, source=str(number)))
    monkeypatch.setattr(prompts, "told", told.__getitem__)
    monkeypatch.setattr(prompts, "registered_as", lambda key, digest: "models:/merges/1" if key == "known" else None)


def expert(wrapper: str) -> Place:
    """The artifact of an expert that the pipeline trained."""
    return stored("e", {"prompt": {"wrapper": wrapper, "template": "{input}"}})


def stored(key: str, config: dict[str, Any], lineage: str | None = None) -> Place:
    return Place("s3://…", "adapter", name="a", manifest=Manifest(key, "any", 1, config, {}, {}), lineage=lineage)


FILE = Place("a.safetensors", "adapter", Path("a.safetensors"))
MERGE = Place("models:/merges/1", "checkpoint", name="a", lineage="models:/merges/1")


@pytest.mark.parametrize(
    ("places", "wrapper"),
    [
        ([expert(OLD), expert(OLD)], OLD),
        ([FILE, expert(OLD)], OLD),
        ([MERGE, expert(NEW), FILE], NEW),
        ([stored("known", {"method": "mean"})], NEW),
    ],
    ids=["experts", "files do not say", "a registered merge", "a merge by its artifact"],
)
def test_it_is_what_the_sources_say(base: PreparedBase, places: list[Place], wrapper: str) -> None:
    assert find_wrapper({str(at): place for at, place in enumerate(places)}, base) == wrapper


@pytest.mark.parametrize("other", [MERGE, expert(NEW)], ids=["registered", "stored"])
def test_sources_that_differ_are_refused(base: PreparedBase, other: Place) -> None:
    with pytest.raises(
        ConfigError, match=r"prompts of expert .*'<\|user\|>\{prompt\}'.*'Q: \{prompt\}.*leave out --reg"
    ):
        find_wrapper({"a": FILE, "b": expert(OLD), "c": other}, base)


@pytest.mark.parametrize(
    "silent",
    [FILE, stored("new", {}), *(Place("v", "adapter", name="a", lineage=f"models:/merges/{at}") for at in (2, 3))],
    ids=["a file", "a merge that is not registered", "a version without files", "a version that is not told"],
)
def test_where_none_says_it_is_the_base_s_own(base: PreparedBase, silent: Place) -> None:
    assert find_wrapper({"a": silent}, base) == "{prompt}\n"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}[{{ m['content'] }}]{% endfor %}", "[{prompt}]"),
        ("{{ raise_exception('no') }}", None),
    ],
)
def test_the_base_s_chat_template(tmp_path: Path, model: Path, template: str, said: str | None) -> None:
    shutil.copytree(model, tmp_path / "model")
    file = tmp_path / "model" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    base = prepare_base(f"path:{tmp_path / 'model'}", tmp_path / "cache")
    if said:
        assert find_wrapper({"a": FILE}, base) == said
    else:
        with pytest.raises(ConfigError, match=r"--register: no expert says .* chat template fails"):
            find_wrapper({"a": FILE}, base)


def test_a_base_that_nothing_can_be_asked_of(base: PreparedBase, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise BaseModelError(f"base {path}: its tokenizer has no eos token")

    monkeypatch.setattr(prompts, "load_tokenizer", refuse)
    with pytest.raises(BaseModelError, match=rf"--register: no expert says .* and base {base.name}: its tokenizer"):
        find_wrapper({"a": FILE}, base)
