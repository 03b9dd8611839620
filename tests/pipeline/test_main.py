"""`python -m pipeline`: commands are listed without being imported, and get their arguments as they were typed."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.__main__ import COMMANDS

ROOT = Path(__file__).parents[2]


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )


def test_listing_the_commands_imports_none_of_them() -> None:
    program = (
        "import sys\nfrom pipeline.__main__ import main\nmain(['--help'], standalone_mode=False)\n"
        "print(sorted({'torch', 'ray', 'mlflow', 'boto3'} & set(sys.modules)))"
    )
    done = python("-c", program)
    assert done.returncode == 0, done.stderr
    *listed, imported = done.stdout.splitlines()
    assert imported == "[]"
    assert all(any(line.split()[:1] == [name] for line in listed) for name in COMMANDS)


def test_the_scheduler_does_without_torch() -> None:
    program = (
        "import sys\nfrom pipeline.__main__ import main\n"
        "try:\n    main(['schedule', '--help'])\nexcept SystemExit as done:\n    "
        "print(done.code, 'torch' in sys.modules)"
    )
    done = python("-c", program)
    assert done.stdout.splitlines()[-1] == "0 False", done.stderr
    assert "--cron" in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_there_and_explains_itself(name: str) -> None:
    done = python("-m", "pipeline", name, "--help")
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()


def test_bad_input_has_the_commands_own_message_and_status() -> None:
    done = python("-m", "pipeline", "plan", "--config", "/no/such.yaml", "train.steps=3")
    assert done.returncode == 2
    assert "/no/such.yaml: no such configuration file" in done.stdout
    assert python("-m", "pipeline", "plan").returncode == 2
    assert python("-m", "pipeline", "nothing").returncode == 2
