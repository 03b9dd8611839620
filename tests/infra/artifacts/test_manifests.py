import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.artifacts.manifests import Manifest, Recipe, canonical_json, find, publish
from infra.errors import StoreError
from infra.store.layout import manifest_name, new_attempt
from infra.store.s3 import Store

RECIPE = Recipe("expert", 1, {"lr": 1e-3, "steps": 10}, ("a" * 64,))
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
)
CONFIGS = st.dictionaries(st.text(), VALUES, max_size=4)


def _same(a: Any, b: Any) -> bool:
    """Equality that tells 1, 1.0, True and -0.0 apart."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return repr(a) == repr(b)


def _shuffled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _shuffled(value[key]) for key in reversed(list(value))}
    return tuple(map(_shuffled, value)) if isinstance(value, list) else value


@given(CONFIGS, CONFIGS)
def test_key_changes_iff_the_configuration_does(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert (Recipe("k", 1, a).key == Recipe("k", 1, b).key) == _same(a, b)
    assert Recipe("k", 1, _shuffled(a)).key == Recipe("k", 1, a).key


@given(st.lists(st.text(), max_size=3), st.lists(st.text(), max_size=3))
def test_key_changes_iff_the_inputs_do(a: list[str], b: list[str]) -> None:
    assert (Recipe("k", 1, {}, tuple(a)).key == Recipe("k", 1, {}, tuple(b)).key) == (a == b)


def test_key_changes_with_kind_and_version_and_is_stable() -> None:
    assert len({RECIPE.key, replace(RECIPE, kind="merge").key, replace(RECIPE, version=2).key}) == 3
    # Golden: a change here makes every stored artifact unfindable.
    assert canonical_json({"b": (1, 2.0, None), "a": "é"}) == '{"a":"é","b":[1,2.0,null]}'.encode()
    assert Recipe("k", 1, {}).key == "1e27d3d248ea0148d371f22873e62d0287f66e8153585a66de8883ff02f14746"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1: 2}, {"a": {1, 2}}, b"bytes", Path("x")])
def test_values_without_a_spelling_are_refused(value: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        canonical_json({"value": value})


def test_manifests_written_before_stay_readable() -> None:
    """Golden: a manifest of the first version, as canonical JSON. What later ones record beside it is not required."""
    key, other = "1" * 64, "3" * 64
    written = (
        '{"config":{"base":"b"},"digest":"d7aab75c1280fdf582f96ff466b33eda0af4c2103c4edc08db05736bd38d26a3",'
        f'"files":{{"adapter":{{"name":"objects/{key}/a/adapter","sha256":"{"2" * 64}","size":7}}}},'
        f'"inputs":{{"{other}":"{"4" * 64}"}},"key":"{key}","kind":"expert",'
        '"meta":{"environment":{"python":"3.11.7","torch":"2.13.0"},"task":"t"},"version":1}'
    ).encode()
    read = Manifest.from_json(written)
    assert (read.key, read.kind, read.version, read.config) == (key, "expert", 1, {"base": "b"})
    assert (read.files["adapter"].size, read.inputs) == (7, {other: "4" * 64})
    assert read.meta == {"environment": {"python": "3.11.7", "torch": "2.13.0"}, "task": "t"}
    assert read.to_json() == written


def _file(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def _objects(store: Store) -> set[str]:
    return set(store.list("objects/"))


def test_publish_and_find(store: Store, tmp_path: Path) -> None:
    inputs = {"a" * 64: "d1"}
    assert find(store, RECIPE.key, inputs) is None
    made, first = publish(store, RECIPE, {"w": _file(tmp_path, "w", b"1")}, inputs, {"seconds": 1.5})
    assert first
    assert find(store, RECIPE.key, inputs) == made
    assert Manifest.from_json(store.get(manifest_name(RECIPE.key))) == made
    assert made.config == dict(RECIPE.config)
    assert made.meta == {"seconds": 1.5}


def test_racing_attempts_leave_one_consistent_artifact(store: Store, tmp_path: Path) -> None:
    def attempt(i: int) -> tuple[Manifest, bool]:
        files = {"w": _file(tmp_path, f"w{i}", b"w%d" % i), "v": _file(tmp_path, f"v{i}", b"v%d" % i)}
        return publish(store, RECIPE, files, {}, {})

    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(attempt, range(6)))
    assert [made for _, made in results].count(True) == 1
    assert len({manifest.digest for manifest, _ in results}) == 1
    winner = find(store, RECIPE.key, {})
    assert winner == results[0][0]
    assert _objects(store) == {ref.name for ref in winner.files.values()}
    w, v = (store.get(winner.files[label].name) for label in "wv")
    assert w[1:] == v[1:]


def test_stale_inputs_are_replaced_and_the_bytes_stay_for_whoever_refers_to_them(store: Store, tmp_path: Path) -> None:
    old, _ = publish(store, RECIPE, {"w": _file(tmp_path, "w", b"old")}, {"i": "d1"}, {})
    assert find(store, RECIPE.key, {"i": "d2"}) is None
    new, made = publish(store, RECIPE, {"w": _file(tmp_path, "w", b"new")}, {"i": "d2"}, {})
    assert made
    assert find(store, RECIPE.key, {"i": "d2"}) == new
    assert find(store, RECIPE.key, {"i": "d1"}) is None
    assert new.digest != old.digest
    assert store.get(old.files["w"].name) == b"old"


@pytest.mark.parametrize("damage", ["missing", "short", "manifest"])
def test_damaged_artifacts_are_absent_and_made_again(store: Store, tmp_path: Path, damage: str) -> None:
    path = _file(tmp_path, "w", b"data")
    old, _ = publish(store, RECIPE, {"w": path}, {}, {})
    if damage == "missing":
        store.delete(old.files["w"].name)
    elif damage == "short":
        store.put(old.files["w"].name, b"dat")
    else:
        store.put(manifest_name(RECIPE.key), b"{")
    assert find(store, RECIPE.key, {}) is None
    new, made = publish(store, RECIPE, {"w": path}, {}, {})
    assert made
    assert find(store, RECIPE.key, {}) == new


def test_failed_publish_leaves_nothing(store: Store, tmp_path: Path) -> None:
    files = {"a": _file(tmp_path, "a", b"a"), "b": tmp_path / "absent"}
    with pytest.raises(StoreError, match="cannot read"):
        publish(store, RECIPE, files, {}, {})
    assert list(store.list()) == []
    with pytest.raises(ValueError, match="label"):
        publish(store, RECIPE, {"../a": tmp_path / "a"}, {}, {})


def test_files_uploaded_before_are_published_once(store: Store, tmp_path: Path) -> None:
    """Several tasks may each have uploaded one; a repeated call (its answer was lost) must not delete them."""
    refs = {}
    for label in ("a", "b"):
        with store.open_write(f"{new_attempt(RECIPE.key)}/{label}") as writer:
            writer.write(label.encode())
            refs[label] = writer.close()
    files = {**refs, "c": _file(tmp_path, "c", b"c")}
    made, first = publish(store, RECIPE, files, {}, {"seconds": 1})
    assert first
    assert [store.get(made.files[label].name) for label in "abc"] == [b"a", b"b", b"c"]
    again, second = publish(store, RECIPE, files, {}, {"seconds": 2})
    assert (again, second) == (made, False)
    assert find(store, RECIPE.key, {}) == made
    assert _objects(store) == {ref.name for ref in made.files.values()}
    other, third = publish(store, RECIPE, refs, {"i": "d"}, {})
    assert third
    assert _objects(store) == {ref.name for ref in made.files.values()}
    assert find(store, RECIPE.key, {"i": "d"}) == other


def test_a_loser_drops_what_it_uploaded_before(store: Store, tmp_path: Path) -> None:
    winner, _ = publish(store, RECIPE, {"w": _file(tmp_path, "w", b"1")}, {}, {})
    ref = store.upload_file(f"{new_attempt(RECIPE.key)}/w", _file(tmp_path, "v", b"2"))
    assert publish(store, RECIPE, {"w": ref}, {}, {}) == (winner, False)
    assert _objects(store) == {winner.files["w"].name}


def test_references_that_are_not_this_artifacts_are_refused(store: Store, tmp_path: Path) -> None:
    path = _file(tmp_path, "w", b"1")
    elsewhere = store.upload_file(f"{new_attempt('0' * 64)}/w", path)
    with pytest.raises(ValueError, match="not in a folder of this artifact"):
        publish(store, RECIPE, {"w": elsewhere}, {}, {})
    gone = store.upload_file(f"{new_attempt(RECIPE.key)}/w", path)
    store.delete(gone.name)
    with pytest.raises(StoreError, match="is not there"):
        publish(store, RECIPE, {"w": gone}, {}, {})
    kept = store.upload_file(f"{new_attempt(RECIPE.key)}/w", path)
    with pytest.raises(StoreError, match="cannot read"):
        publish(store, RECIPE, {"w": kept, "v": tmp_path / "absent"}, {}, {})
    assert store.get(kept.name) == b"1"
    with pytest.raises(ValueError, match="not a recipe key"):
        new_attempt("../x")


def test_hostile_manifests_are_refused(store: Store, tmp_path: Path) -> None:
    made, _ = publish(store, RECIPE, {"w": _file(tmp_path, "w", b"1")}, {}, {})
    body = json.loads(made.to_json())
    body["files"]["w"]["name"] = "elsewhere/precious"
    with pytest.raises(StoreError, match="elsewhere"):
        Manifest.from_json(json.dumps(body).encode())
    body = json.loads(made.to_json()) | {"digest": "0" * 64}
    with pytest.raises(StoreError, match="digest"):
        Manifest.from_json(json.dumps(body).encode())
