"""Which part of the project may import which, in functions too: infra ← workers ← merge ← pipeline, room by room.

What a module imports only for type checking counts as well, and so do programs in strings.
"""

import ast
import re
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("infra", "workers", "merge", "pipeline")

ROOMS = {
    "infra": ("", "store", "artifacts", "engine", "registry", "schedule", "stack"),
    "workers": (
        "tensors", "adapters", "text", "base", "masks", "measuring", "training", "scoring", "jobs", "conversion",
        "serving", "",
    ),
    "merge": ("methods", "files", "tree", "modelled", "by_hand", ""),
    "pipeline": (
        "data", "config", "gate", "records", "report", "flow", "collection", "plan", "running", "commands", "",
    ),
}  # fmt: skip
"""Of each package, from the bottom up: a room imports what is below it. "": modules in no room."""

BELOW = {"infra": set(), "workers": {"infra"}, "merge": {"infra"}, "pipeline": {"infra", "workers", "merge"}}
"""The packages that each one may import beside itself."""

SHARED = {
    "merge.methods": {"workers.adapters"},
    "merge.files": {"workers.tensors", "workers.adapters"},
    "merge.tree": {"workers.tensors", "workers.adapters", "workers.measuring"},
    "merge.modelled": {
        "workers.tensors",
        "workers.adapters",
        "workers.text",
        "workers.base",
        "workers.masks",
        "workers.training",
        "workers.jobs",
    },
    "merge.by_hand": {
        "workers.tensors",
        "workers.adapters",
        "workers.measuring",
        "workers.text",
        "workers.base",
        "workers.conversion",
    },
}
"""What merges share with workers: the files that one writes and the other reads; by hand, bases and formats too;
where a merge runs a model, what workers run one with."""

EXCEPTIONS = {
    # in a process of its own: what a schedule runs is checked beforehand
    "infra.schedule.job": {"pipeline.config.candidates", "pipeline.config.model"},
    # `python -m infra.rayjob`, by its name in manifests that are in use
    "infra.rayjob": {"infra.schedule.rayjob"},
}

MOST = 13
"""Modules of one room."""

SERVICES = {"ray", "mlflow", "boto3", "botocore"}
CONNECTED = {
    "merge.__main__",
    "merge.commands",
    "merge.tree.export",
    "merge.tree.jobs",
    "merge.tree.keys",
    "merge.tree.licences",
    "merge.tree.local",
    "merge.tree.reduction",
}
"""Modules that reach a service, through infra at most, beside those of `CONNECTED_ROOMS`; all others of workers and
merge compute."""
CONNECTED_ROOMS = ("workers.jobs", "workers.serving", "merge.modelled", "merge.by_hand")


def _modules() -> dict[str, Path]:
    files = (path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


MODULES = _modules()


def imported(text: str, types: bool = True) -> set[str]:
    """Full names of the modules that a source imports, wherever it does; `from package import module` is the module.

    Programs in strings count, and `module:function`, which is imported when it is called (`infra.deferred`). Without
    `types`: only what is imported when the module is, so not in functions and not for type checking.
    """
    found: set[str] = set()
    tree = ast.parse(text)
    for node in ast.walk(tree) if types else tree.body:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= _in_string(node.value)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & MODULES.keys() or {str(node.module)}
    return found


def _in_string(text: str) -> set[str]:
    if re.fullmatch(r"[a-z_.]+:[a-z_]+", text):
        return {text.partition(":")[0]} & MODULES.keys()
    if not re.search(r"^\s*(from|import) ", text, re.MULTILINE):
        return set()
    try:
        return imported(textwrap.dedent(text))
    except (SyntaxError, AssertionError):  # words, not a program
        return set()


IMPORTS = {name: imported(path.read_text()) for name, path in MODULES.items()}


def reaches(name: str, what: set[str]) -> list[str]:
    """A chain of imports from a module to one of these packages, or []."""
    paths, seen = [[name]], {name}
    for path in paths:
        for each in sorted(IMPORTS.get(path[-1], ())):
            if each.split(".")[0] in what:
                return [*path, each]
            if each not in seen:
                seen.add(each)
                paths.append([*path, each])
    return []


def test_imports_are_found_wherever_they_stand():
    text = (
        "import a.b\nfrom infra.store import s3\nfrom infra.errors import X\ndef f():\n from merge.tree import trie\n"
    )
    assert imported(text) == {"a.b", "infra.store.s3", "infra.errors", "merge.tree.trie"}
    strings = "run('import infra.rayjob; infra.rayjob.x()')\ncall('pipeline.config.model:load')\nsay('from now on')\n"
    assert imported(strings) == {"infra.rayjob", "pipeline.config.model"}


def room_of(name: str) -> tuple[str, str]:
    """A module's package and room."""
    package, *rest = name.split(".")
    return package, rest[0] if len(rest) > 1 else ""


def test_every_module_has_a_room_and_no_room_is_crowded() -> None:
    rooms: dict[tuple[str, str], list[str]] = {}
    for name, path in MODULES.items():
        if path.name != "__init__.py":
            rooms.setdefault(room_of(name), []).append(name)
    assert {room for room in rooms if room[1] not in ROOMS[room[0]]} == set()
    assert {room: len(found) for room, found in rooms.items() if len(found) > MOST} == {}
    repeating = [name for name in MODULES if len(set(name.split("."))) < len(name.split("."))]
    assert repeating == []


@pytest.mark.parametrize("package", PACKAGES)
def test_rooms_import_what_is_below_them(package: str) -> None:
    wrong = set()
    for name, found in IMPORTS.items():
        if room_of(name)[0] != package:
            continue
        own = ROOMS[package].index(room_of(name)[1]) if MODULES[name].name != "__init__.py" else len(ROOMS[package])
        for each in found & MODULES.keys() - EXCEPTIONS.get(name, set()):
            other, room = room_of(each)
            if other == package:
                fine = ROOMS[package].index(room) <= own
            else:
                fine = other in BELOW[package] or f"{other}.{room}" in SHARED.get(f"{package}.{room_of(name)[1]}", ())
            if not fine:
                wrong.add(f"{name} imports {each}")
        wrong |= {f"{name} imports {each}" for each in found if each.split(".")[0] in ("tests", "benchmarks")}
    assert not wrong
    assert all(each in IMPORTS[name] for name, allowed in EXCEPTIONS.items() for each in allowed)  # none is stale


def test_no_modules_import_each_other() -> None:
    """Through any number of others; what is imported for types alone does not count."""
    found = {name: imported(path.read_text(), types=False) & MODULES.keys() for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " → ".join([*above[above.index(name) :], name])
        if name not in done:
            for each in sorted(found[name]):
                visit(each, (*above, name))
            done.add(name)

    for name in sorted(found):
        visit(name, ())


def test_what_computes_reaches_no_service() -> None:
    """Neither itself nor through what it imports."""
    names = [n for n in MODULES if n.split(".")[0] in ("workers", "merge") and not n.startswith(CONNECTED_ROOMS)]
    reaching = {n: " → ".join(reaches(n, SERVICES)) for n in names}
    unlisted = {chain for name, chain in reaching.items() if chain and name not in CONNECTED}
    assert not unlisted
    assert not {name for name in CONNECTED if not reaching[name]}  # none is stale
