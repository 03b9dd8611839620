"""Commands explain themselves and refuse what is mistyped without importing what they work with."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.__main__ import main

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "transformers", "datasets", "ray", "mlflow", "boto3", "pydantic", "rich"}
ENTRANCES = {
    "pipeline": [[], *([name] for name in main.commands)],
    "merge": [[], ["run"], ["plan"], ["export"], ["methods"]],
    "workers.convert": [[], ["from-peft"], ["to-checkpoint"]],
}
EVERY = [(module, words) for module, commands in ENTRANCES.items() for words in commands]


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )


PROGRAM = """
import runpy, sys
sys.argv = ["x", *sys.argv[2:], *sys.argv[1].split()]
try:
    runpy.run_module({module!r}, run_name="__main__")
except SystemExit as done:
    print(done.code, sorted({heavy!r} & set(sys.modules)))
"""


@pytest.mark.parametrize(("option", "code"), [("--help", 0), ("--mistyped", 2)])
@pytest.mark.parametrize(("module", "words"), EVERY, ids=lambda each: each if isinstance(each, str) else "-".join(each))
def test_asking_for_help_or_mistyping_an_option_imports_nothing(
    module: str, words: list[str], option: str, code: int
) -> None:
    done = python("-c", PROGRAM.format(module=module, heavy=HEAVY), option, *words)
    assert done.stdout.splitlines()[-1] == f"{code} []", done.stderr
    assert "usage" in (done.stdout + done.stderr).lower()


def test_the_main_job_explains_itself_as_a_script() -> None:
    done = python("-X", "importtime", "pipeline/main.py", "--help")
    assert done.returncode == 0
    assert "--config" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "click" in imported
    assert not HEAVY & imported


def test_the_scheduler_does_without_torch() -> None:
    program = "import sys\nimport infra.schedule.scheduler\nprint('torch' in sys.modules)"
    assert python("-c", program).stdout.splitlines()[-1] == "False"


def test_bad_input_has_the_commands_own_message_and_status() -> None:
    done = python("-m", "pipeline", "plan", "--config", "/no/such.yaml", "train.steps=3")
    assert done.returncode == 2
    assert "/no/such.yaml: no such configuration file" in done.stdout
    assert python("-m", "pipeline", "plan").returncode == 2
    assert python("-m", "pipeline", "nothing").returncode == 2
