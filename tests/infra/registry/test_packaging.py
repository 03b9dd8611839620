"""Registered models of several commits, each with its own code, in one process that has packages of the same names."""

import ast
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from infra.registry.packaging import renamed, save_model, write_package

ROOT = Path(__file__).resolve().parents[3]
PROBE = """
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

from infra.kind import Kind


class Probe(PythonModel):
    def load_context(self, context):
        from workers.answering import TEXT  # as the real models do: when they are loaded

        self._text = TEXT

    def predict(self, context, model_input, params=None):
        from infra.kind import Kind as later

        assert later is Kind
        return [f"{Kind.__module__.split('.')[0]} {self._text}"]


set_model(Probe())
"""
CLIENT = """
import json, sys
import infra, workers
import mlflow.pyfunc
models = [mlflow.pyfunc.load_model(path) for path in sys.argv[1:]]
print(json.dumps([model.predict(["x"])[0].split() for model in models for _ in range(2)]))
print(infra.MINE, workers.MINE)
"""


def write(root: Path, text: str) -> Path:
    for name, content in {
        "infra/__init__.py": "", "infra/kind.py": "class Kind: pass\n", "workers/__init__.py": "",
        "workers/answering.py": f"TEXT = {text!r}\n", "workers/serving/probe.py": PROBE,
    }.items():  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def test_two_versions_in_one_process_run_their_own_code_beside_a_users_packages(tmp_path: Path) -> None:
    saved, before = [], set(sys.modules)  # models that other tests loaded are among them
    for text in ("one", "two"):
        folder = tmp_path / f"saved-{text}"
        folder.mkdir()
        root = write(tmp_path / f"code-{text}", text)
        saved.append(save_model(folder, "workers/serving/probe.py", {}, {"key": text}, root))
        assert not [name for name in set(sys.modules) - before if name.startswith("expert_factory_")]
        assert str(folder) not in sys.path
    client = tmp_path / "client"
    for package in ("infra", "workers"):
        (client / package).mkdir(parents=True)
        (client / package / "__init__.py").write_text(f"MINE = 'my {package}'\n")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CLIENT, *map(str, saved)], cwd=client, capture_output=True, text=True,
        timeout=300, check=False, env={"PYTHONPATH": str(client), "HOME": str(tmp_path), "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    answers, own = done.stdout.strip().splitlines()[-2:]
    first, again, second, _ = json.loads(answers)
    assert first == again
    assert (first[1], second[1]) == ("one", "two")
    assert first[0] != second[0]
    assert own == "my infra my workers"


def test_the_whole_copy_names_itself_only(tmp_path: Path) -> None:
    package, script = write_package(tmp_path, "workers/serving/adapter_model.py")
    assert sorted(file.name for file in package.iterdir()) == ["__init__.py", "code.zip"]  # MLflow sends file by file
    archive = zipfile.ZipFile(package / "code.zip")
    sources = {name: archive.read(name).decode() for name in archive.namelist()} | {script.name: script.read_text()}
    assert len(sources) > 100
    for file, text in sources.items():
        for node in ast.walk(ast.parse(text)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not {name.split(".")[0] for name in names} & {"infra", "workers", "merge", "pipeline"}, file


def test_the_name_is_that_of_the_content(tmp_path: Path) -> None:
    names = set()
    for at, text in enumerate(("one", "one", "two")):
        names.add(write_package(tmp_path / str(at), "workers/serving/probe.py", write(tmp_path / text, text))[0].name)
        (tmp_path / str(at) / "bytes").write_bytes((next((tmp_path / str(at)).glob("*/code.zip"))).read_bytes())
    assert len(names) == 2
    assert (tmp_path / "0" / "bytes").read_bytes() == (tmp_path / "1" / "bytes").read_bytes()


def test_imports_are_renamed_and_nothing_else() -> None:
    lines = [
        "from {}infra.a import b  # from infra.a import c", "x = 'from workers import y'", "if x:",
        "    from {}workers import z", "from infrared import a", "import workersmith", "",
    ]  # fmt: skip
    text = "\n".join(lines)
    assert renamed(text.replace("{}", ""), "p") == text.replace("{}", "p.")
    with pytest.raises(ValueError, match=r"line 2: `import infra\.a`"):
        renamed("x = 1\nimport infra.a\n", "p")
