"""What a base's identity covers, and what it does not."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.workers import tiny
from tests.workers.base.test_prepare import Objects
from workers.base import identity
from workers.base.identity import base_identity, contents_identity, is_identified, settings_digest
from workers.base.prepare import fetch_base, prepare_base, upload_base

SHIPPED = "aaa180458c18b3b2ca20c61dda99c6078cb58b5e69844b3e22aaeba2a8dc1955"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tiny") / "m"
    tiny.tiny_model().save_pretrained(made)
    tiny.tiny_tokenizer().save_pretrained(made)
    return made


@pytest.fixture
def changed(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder, tmp_path / "m")
    return tmp_path / "m"


def write(file: Path, **fields: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


MATTERS = {
    "config.json": {
        "rms_norm_eps": 0.5, "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}, "hidden_act": "relu",
        "attention_bias": True, "eos_token_id": 7, "sliding_window": 4, "a_field_of_tomorrow": 1,
    },
    "generation_config.json": {"eos_token_id": [2, 40], "repetition_penalty": 1.2, "max_length": 5},
}  # fmt: skip
BOOKKEEPING = {
    "config.json": {"transformers_version": "9", "_name_or_path": "x", "torch_dtype": "float16", "use_cache": False},
    "generation_config.json": {"transformers_version": "9", "temperature": 0.7, "do_sample": True, "top_p": 0.9},
}


@pytest.mark.parametrize(("file", "field"), [(file, field) for file, fields in MATTERS.items() for field in fields])
def test_what_changes_the_outputs_changes_the_identity(file: str, field: str, changed: Path) -> None:
    before = base_identity(changed)
    write(changed / file, **{field: MATTERS[file][field]})
    assert base_identity(changed) != before
    assert contents_identity(changed) == contents_identity(changed.parent / "m")


@pytest.mark.parametrize("file", BOOKKEEPING)
def test_bookkeeping_does_not(file: str, changed: Path) -> None:
    before = base_identity(changed)
    write(changed / file, **BOOKKEEPING[file])
    text = json.loads((changed / file).read_text())
    (changed / file).write_text(json.dumps(dict(reversed(text.items())), indent=7))
    assert base_identity(changed) == before


values = st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False) | st.text(max_size=3)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15, deadline=None)
@given(st.dictionaries(st.text(st.characters(categories=["Ll"]), min_size=1, max_size=3), values, max_size=4), values)
def test_settings_are_equal_if_their_fields_are(tmp_path: Path, fields: dict[str, object], other: object) -> None:
    def digest(config: dict[str, object]) -> str:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return settings_digest(tmp_path)

    assert digest(fields) == digest(dict(reversed(fields.items())))
    assert digest({**fields, "zzzz": other}) != digest(fields)


def test_the_base_of_a_changed_folder_is_the_changed_one(changed: Path, tmp_path: Path) -> None:
    """Not the first folder with these weights that was cached."""
    cache = tmp_path / "cache"
    one = prepare_base(f"path:{changed}", cache)
    write(changed / "config.json", rms_norm_eps=0.5)
    two = prepare_base(f"path:{changed}", cache)
    write(changed / "generation_config.json", eos_token_id=[2, 40])
    three = prepare_base(f"path:{changed}", cache)
    assert len({one.sha256, two.sha256, three.sha256}) == 3
    assert json.loads((two.path / "config.json").read_text())["rms_norm_eps"] == 0.5
    assert json.loads((three.path / "generation_config.json").read_text())["eos_token_id"] == [2, 40]
    assert json.loads((one.path / "config.json").read_text())["rms_norm_eps"] != 0.5


def test_a_pinned_base_keeps_its_earlier_identity_with_its_own_settings_only(
    changed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = contents_identity(changed)
    assert base_identity(changed) != contents
    monkeypatch.setattr(identity, "_WITHOUT_SETTINGS", {contents: settings_digest(changed)})
    assert base_identity(changed) == contents
    write(changed / "config.json", rms_norm_eps=0.5)
    assert base_identity(changed) != contents
    assert contents_identity(changed) == contents


def test_the_shipped_base_is_pinned() -> None:
    assert set(identity._WITHOUT_SETTINGS) == {SHIPPED}


def test_a_stored_base_is_found_by_its_earlier_identity(changed: Path, tmp_path: Path) -> None:
    """Models that were registered before settings were part of it refer to that."""
    prepared = prepare_base(f"path:{changed}", tmp_path / "cache")
    earlier, store = contents_identity(prepared.path), Objects()
    upload_base(store, prepared)
    store.data = {name.replace(prepared.sha256, earlier): data for name, data in store.data.items()}
    path = fetch_base(store, earlier, tmp_path / "node")
    assert path.name == earlier
    assert is_identified(path, earlier)
    assert is_identified(path, prepared.sha256)
    assert not is_identified(path, "0" * 64)
