"""Names in the store: what is named is recognised, and nobody else spells a name."""

import ast
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.store import layout

ROOT = Path(__file__).parents[3]
KEY, OTHER = "a" * 64, "b" * 64
HASHES = st.text("0123456789abcdef", min_size=64, max_size=64)
PARTS = st.text(st.characters(codec="ascii", exclude_characters="/\n"), min_size=1, max_size=8)


def test_names() -> None:
    """Stores that exist hold these."""
    assert layout.manifest_name(KEY) == f"artifacts/{KEY}.json"
    assert re.fullmatch(f"objects/{KEY}/[0-9a-f]{{32}}", layout.new_attempt(KEY))
    assert layout.base_file(KEY, "config.json") == f"bases/{KEY}/config.json"
    assert layout.base_index(KEY) == f"bases/{KEY}/index.json"
    assert layout.rows_name(KEY) == f"data/{KEY}.jsonl"
    assert (layout.run_file("r"), layout.run_file("r", layout.RESULTS)) == ("runs/r/", "runs/r/results.json")
    assert layout.run_file("r", layout.ANNOUNCED) == "runs/r/keys.json"
    assert layout.state_pointer(KEY) == f"checkpoints/{KEY}.json"
    assert re.fullmatch(f"checkpoints/{KEY}/3-[0-9a-f]{{32}}", layout.new_state(KEY, 3))
    assert layout.lease_name("gc") == "leases/gc.json"
    assert layout.schedule_name("nightly") == "schedules/nightly.json"
    assert re.fullmatch(r"gc/[0-9a-f]{32}\.json", layout.new_journal(layout.JOURNALS))
    assert re.fullmatch(r"gc/shared-[0-9a-f]{32}\.json", layout.new_journal(layout.SHARED_JOURNALS))
    assert re.fullmatch("checks/[0-9a-f]{32}", layout.new_probe())


def test_what_is_no_key_has_no_name() -> None:
    for key in ("", "../x", "A" * 64, KEY + "\n", KEY[:-1]):
        assert not layout.is_key(key)
        with pytest.raises(ValueError, match="not a recipe key"):
            layout.manifest_name(key)
        with pytest.raises(ValueError, match="not a recipe key"):
            layout.new_attempt(key)
    for key in ("", "../x", ".x", "a/b"):
        with pytest.raises(ValueError, match="not a lease key"):
            layout.lease_name(key)


@given(HASHES, PARTS)
def test_a_name_says_whose_it_is(key: str, part: str) -> None:
    attempt = layout.new_attempt(key)
    assert layout.manifest_key(layout.manifest_name(key)) == key
    assert layout.rows_fingerprint(layout.rows_name(key)) == key
    assert layout.base_identity(layout.base_index(key)) == layout.base_identity(layout.base_file(key, part)) == key
    assert layout.lease_key(layout.lease_name(key)) == key
    assert layout.run_of(layout.run_file("r", part)) == ("r", part)
    assert layout.attempt_of(attempt) == layout.attempt_of(f"{attempt}/{part}") == attempt
    keyed = (attempt, layout.base_index(key), layout.state_pointer(key), layout.new_state(key, 1))
    assert all(map(layout.is_keyed, keyed))
    for name in (layout.rows_name(key), layout.run_file("r", part), layout.schedule_name(part), f"objects/{part}"):
        assert not layout.is_keyed(name)
        assert layout.manifest_key(name) is layout.base_identity(name) is layout.attempt_of(name) is None


@given(st.lists(PARTS.filter(lambda part: part != "objects"), max_size=3), HASHES, st.lists(PARTS, max_size=3))
def test_places_in_a_bucket(prefix: list[str], key: str, inside: list[str]) -> None:
    name = "/".join([*prefix, "objects", key, *inside])
    found = layout.split_stored(name)
    assert found is not None
    assert (found.prefix, found.key, found.inside) == ("/".join(prefix), key, tuple(inside))
    assert found.name == "/".join(["objects", key, *inside])
    assert found.is_file == (len(inside) == 2)


def test_other_places_in_a_bucket() -> None:
    for name in ("", "objects", f"objects/{KEY}x", f"my-objects/{KEY}/a/b", f"artifacts/{KEY}.json"):
        assert layout.split_stored(name) is None


SPELLED = re.compile(r"[(^]*(?:" + "|".join(map(re.escape, layout.FOLDERS)) + ")")


def spelled(text: str) -> list[str]:
    """Names of the store that a module writes out: strings, and beginnings of formatted ones, but no docstrings."""
    tree = ast.parse(text)
    told = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    strings = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return [str(n.value) for n in strings if id(n) not in told and SPELLED.match(str(n.value))]


def test_spelling_is_noticed() -> None:
    assert spelled('"""objects/x"""\nx = f"objects/{key}/"\n') == ["objects/"]
    assert spelled('x = re.compile(r"(objects/[0-9a-f]+)")\ny = f"{url}/runs/{run}"') == ["(objects/[0-9a-f]+)"]


def test_no_other_module_spells_a_name() -> None:
    files = [path for package in ("infra", "workers", "merge", "pipeline") for path in (ROOT / package).rglob("*.py")]
    found = {str(path.relative_to(ROOT)): names for path in files if (names := spelled(path.read_text()))}
    assert list(found) == ["infra/store/layout.py"]
