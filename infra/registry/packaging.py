"""A registered model on disk: what MLflow runs when it is loaded, and a copy of this project under a name of its own.

MLflow puts the code of every model that it loads into one process's import path. Were the packages called `infra` and
`workers` in each of them, the second model that a process loads would run the first one's code, and a user's own
package of that name would hide both. So the copy is one package, named after the digest of its content, whose imports
name it. Its modules lie in one archive: MLflow stores and fetches a model file by file.
"""

import ast
import contextlib
import hashlib
import importlib.metadata
import sys
import threading
import zipfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("infra", "workers")
_REQUIREMENTS = (
    "mlflow", "torch", "transformers", "accelerate", "safetensors", "tokenizers", "numpy", "boto3", "filelock",
    "psutil", "requests", "rouge-score", "tenacity",
)  # fmt: skip
_ARCHIVE = "code.zip"
_INIT = f'''"""Code of the expert factory, for the model that it came with; the modules are in {_ARCHIVE}."""

from pathlib import Path

__path__.append(str(Path(__file__).parent / "{_ARCHIVE}"))
'''
_SAVE_LOCK = threading.Lock()  # MLflow's loader of models from code keeps global state
_READ_LOCK = threading.Lock()  # Python 3.11 parses in one thread at a time only


def save_model(
    folder: Path, entry: str, config: Mapping[str, Any], about: Mapping[str, Any], root: Path = _ROOT
) -> Path:
    """Save a pyfunc model below `folder`; returns its path. `entry`: the file below `root` that MLflow runs, `config`:
    what its code is told; `about`: MLflow's metadata."""
    import mlflow.pyfunc as pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema

    path = folder / "model"
    package, script = write_package(folder, entry, root)
    with _SAVE_LOCK, _importable(folder, package.name):
        pyfunc.save_model(
            path,
            python_model=str(script),
            code_paths=[str(package)],
            model_config=dict(config),
            # Inputs are texts, or a table that may have more columns: no schema of MLflow says that.
            signature=ModelSignature(outputs=Schema([ColSpec("string")])),
            pip_requirements=requirements(),
            metadata=dict(about),
        )
    return path


@contextlib.contextmanager
def _importable(folder: Path, package: str) -> Iterator[None]:
    """While a model is saved MLflow runs its code, which imports this package; nothing of it stays afterwards."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.split(".")[0] == package]:
            del sys.modules[name]


def requirements() -> list[str]:
    """Pinned requirements of a registered model, as installed here, without local version labels (``+cpu``)."""
    return [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in _REQUIREMENTS]


def write_package(folder: Path, entry: str, root: Path = _ROOT) -> tuple[Path, Path]:
    """Copy the packages to `folder` as one. `entry`: module below `root` that MLflow runs, as a path.

    Returns the package's folder and the entry's file, which lies beside it.

    Raises ValueError for an import that binds the name of one of the packages itself.
    """
    with _READ_LOCK:
        name, sources = _package(root)
    package = folder / name
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text(_INIT, encoding="utf-8")
    with zipfile.ZipFile(package / _ARCHIVE, "w", zipfile.ZIP_DEFLATED) as archive:
        for relative, text in sources.items():
            archive.writestr(zipfile.ZipInfo(relative), text, zipfile.ZIP_DEFLATED)  # without a time: the same bytes
    script = folder / Path(entry).name
    script.write_text(sources[entry], encoding="utf-8")
    return package, script


@cache
def _package(root: Path) -> tuple[str, Mapping[str, str]]:
    """Its name and, by path, its sources: of this process's own code, so they are read once."""
    sources = {
        path.relative_to(root).as_posix(): path.read_text(encoding="utf-8")
        for package in _PACKAGES
        for path in sorted((root / package).rglob("*.py"))
    }
    name = f"expert_factory_{_digest(sources)[:16]}"
    return name, {relative: renamed(text, name, relative) for relative, text in sources.items()}


def _digest(sources: Mapping[str, str]) -> str:
    digest = hashlib.sha256()
    for name, text in sorted(sources.items()):
        digest.update(f"{len(name)} {name} {len(text)} {text}".encode())
    return digest.hexdigest()


def renamed(text: str, name: str, what: str = "the source") -> str:
    """A source with the packages' imports below the package `name`; all else stays, to the line and column."""
    lines = text.splitlines(keepends=True)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import) and any(_ours(alias.name) for alias in node.names):
            raise ValueError(f"{what}, line {node.lineno}: `import {node.names[0].name}`; use `from … import …`")
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module and _ours(node.module):
            at = node.lineno - 1
            old = f"from {node.module} import"
            start = lines[at].encode()[: node.col_offset].decode()
            rest = lines[at][len(start) :]
            if not rest.startswith(old):
                raise ValueError(f"{what}, line {node.lineno}: not of the form `{old} …`")
            lines[at] = f"{start}from {name}.{node.module} import{rest[len(old) :]}"
    return "".join(lines)


def _ours(module: str) -> bool:
    return module.split(".")[0] in _PACKAGES
