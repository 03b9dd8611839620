"""Which part of the project may import which, in functions too: infra ← workers ← merge ← pipeline.

What a module imports only for type checking counts as well.
"""

import ast
import re
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("infra", "workers", "merge", "pipeline")

BELOW = {"infra": {"infra"}, "workers": {"infra", "workers"}, "merge": {"infra", "merge"}}
"""The packages that each one may import."""

FORMATS = {
    "workers.adapter",
    "workers.adapter_format",
    "workers.importance_file",
    "workers.mask_file",
    "workers.ranged_file",
    "workers.support",
    "workers.tensorfile",
}
"""What merges share with workers: the files that one writes and the other reads."""

EXCEPTIONS = {
    "merge.commands": {"pipeline.merge_command"},  # `python -m merge`
    "infra.scheduled_job": {"pipeline.config"},  # in a process of its own: what a schedule runs is checked beforehand
    # MLflow loads these files as models: what serves an expert is what evaluates it
    "infra.adapter_model": {"workers.base", "workers.cache", "workers.inplace"},
    "infra.checkpoint_model": {"workers.base", "workers.cache"},
    "infra.text_model": {
        "workers.adapter",
        "workers.classification",
        "workers.devices",
        "workers.model",
        "workers.prompt",
        "workers.rows",
        "workers.scoring",
    },
}

SERVICES = {"ray", "mlflow", "boto3", "botocore"}
CONNECTED = {
    "merge.__main__",
    "merge.commands",
    "merge.export",
    "merge.jobs",
    "merge.keys",
    "merge.licences",
    "merge.local",
    "merge.reduction",
    "workers.evaluator",
    "workers.expert",
    "workers.importance",
    "workers.resume",
    "workers.shared_support",
}
"""Modules of workers and merge that reach a service, through infra at most; all others compute."""


def _modules() -> dict[str, Path]:
    files = (path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


MODULES = _modules()


def imported(text: str) -> set[str]:
    """Full names of the modules that a source imports, wherever it does; `from package import module` is the module.

    Programs in strings count, and `module:function`, which is imported when it is called (`infra.deferred`).
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
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
    text = "import a.b\nfrom infra import store\nfrom infra.errors import X\ndef f():\n    from merge.tree import g\n"
    assert imported(text) == {"a.b", "infra.store", "infra.errors", "merge.tree"}
    strings = "run('import infra.gc; infra.gc.x()')\ncall('pipeline.config:load')\nsay('from here on: nothing')\n"
    assert imported(strings) == {"infra.gc", "pipeline.config"}


@pytest.mark.parametrize("package", BELOW)
def test_packages_import_what_is_below_them(package):
    wrong = {
        f"{name} imports {each}"
        for name, found in IMPORTS.items()
        if name.split(".")[0] == package
        for each in found - EXCEPTIONS.get(name, set()) - (FORMATS if package == "merge" else set())
        if each.split(".")[0] in {*PACKAGES, "tests", "benchmarks"} - BELOW[package]
    }
    assert not wrong
    assert all(each in IMPORTS[name] for name, allowed in EXCEPTIONS.items() for each in allowed)  # none is stale


def test_what_computes_reaches_no_service():
    """Neither itself nor through what it imports."""
    reaching = {n: " → ".join(reaches(n, SERVICES)) for n in MODULES if n.split(".")[0] in ("workers", "merge")}
    unlisted = {chain for name, chain in reaching.items() if chain and name not in CONNECTED}
    assert not unlisted
    assert not {name for name in CONNECTED if not reaching[name]}  # none is stale
