"""Commands explain themselves and refuse what is mistyped without importing what they work with."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.__main__ import main

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "transformers", "datasets", "ray", "mlflow", "boto3", "pydantic", "rich"}
LIGHT = {"click", "pipeline", "merge", "workers", "infra"}
"""All that a command may import, beside the standard library, to explain itself or to refuse an option."""
CPU_SECONDS = 0.5
"""Of one such call, the interpreter's own start included."""
ENTRANCES = {
    "pipeline": [[], *([name] for name in main.commands)],
    "merge": [[], ["run"], ["plan"], ["export"], ["methods"]],
    "workers.convert": [[], ["from-peft"], ["to-checkpoint"]],
    "infra.stack": [[], ["up"], ["env"]],
    "infra.schedule": [[]],
    "infra.rayjob": [[]],
}
NOT_ASKED = {"pipeline.main", "infra.environment"}
"""Entrances that are looked at by themselves: a script, and one without options."""
EVERY = [(module, words) for module, commands in ENTRANCES.items() for words in commands]


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )


PROGRAM = """
import sys
before = set(sys.modules)  # an environment may bring its own
import runpy, time
sys.argv = ["x", *sys.argv[2:], *sys.argv[1].split()]
try:
    runpy.run_module({module!r}, run_name="__main__")
except SystemExit as done:
    foreign = {{name.partition(".")[0] for name in sys.modules.keys() - before}} - set(sys.stdlib_module_names)
    print(done.code, sorted(foreign - {light!r}))
    print(time.process_time())
"""


@pytest.mark.parametrize(("option", "code"), [("--help", 0), ("--mistyped", 2)])
@pytest.mark.parametrize(("module", "words"), EVERY, ids=lambda each: each if isinstance(each, str) else "-".join(each))
def test_asking_for_help_or_mistyping_an_option_imports_nothing(
    module: str, words: list[str], option: str, code: int
) -> None:
    program, seconds = PROGRAM.format(module=module, light=LIGHT), []
    while not seconds or (seconds[-1] > CPU_SECONDS and len(seconds) < 3):  # a shared core counts what others delay
        done = python("-c", program, option, *words)
        *_, found, took = done.stdout.splitlines()
        assert found == f"{code} []", done.stderr
        seconds.append(float(took))
    assert min(seconds) < CPU_SECONDS
    assert "usage" in (done.stdout + done.stderr).lower()


def test_every_entrance_is_looked_at() -> None:
    files = (file for package in ("pipeline", "merge", "workers", "infra") for file in (ROOT / package).rglob("*.py"))
    started = {file.relative_to(ROOT) for file in files if "if __name__ ==" in file.read_text()}
    modules = {".".join(file.with_suffix("").parts).removesuffix(".__main__") for file in started}
    assert modules == ENTRANCES.keys() | NOT_ASKED


def test_what_a_shell_hands_to_a_job_is_said_without_libraries() -> None:
    done = python("-X", "importtime", "-m", "infra.environment")
    assert done.returncode == 0
    assert not HEAVY & {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}


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
