"""How commands end: Ctrl-C at any time, errors that nobody wrote a message for, terminals that know few letters."""

import ast
import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from infra.ending import ending, message
from infra.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("infra", "workers", "merge", "pipeline")

ENDINGS: dict[str, tuple[BaseException, int, str]] = {
    "an error of ours": (ConfigError("steps: 0, accepted are 1 and more"), 1, "error: steps: 0, accepted"),
    "a file that is not there": (FileNotFoundError(2, "No such file", "a/b"), 1, "error: a/b: No such file"),
    "a full disk": (OSError(errno.ENOSPC, "No space left on device"), 1, "error: No space left on device"),
    "a bug": (KeyError("x"), 1, r"error: KeyError: 'x' \(unexpected; the traceback is in (\S+)\)"),
    "a long error": (ValueError("first\nsecond"), 1, r"error: ValueError: first \(unexpected; the traceback is in"),
    "an error without words": (RuntimeError(), 1, r"error: RuntimeError: no message \(unexpected"),
    "Ctrl-C": (KeyboardInterrupt(), 130, "stopped"),
    "an answer that was broken off": (click.Abort(), 130, "stopped"),
}  # fmt: skip
"""What a command raises, its exit status, and what is read of it."""


@pytest.mark.parametrize("case", ENDINGS)
def test_a_line_and_a_status(
    case: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    error, status, text = ENDINGS[case]
    with pytest.raises(SystemExit) as ended, ending():
        raise error
    said = capsys.readouterr().err.strip()
    assert ended.value.code == status
    assert "\n" not in said
    found = re.match(text, said)
    assert found, said
    if found.groups():
        assert "Traceback" in Path(found[1]).read_text()
    assert bool(list(tmp_path.iterdir())) == ("unexpected" in said)


@pytest.mark.parametrize("passing", [SystemExit(2), click.ClickException("x"), BrokenPipeError(errno.EPIPE, "gone")])
def test_what_click_prints_by_itself_passes(passing: BaseException) -> None:
    with pytest.raises(type(passing)), ending():
        raise passing


def test_a_traceback_that_cannot_be_kept_is_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/proc/nothing")
    assert message(KeyError("x")) == "KeyError: 'x' (unexpected; the traceback stands above)"
    assert "KeyError" in capsys.readouterr().err


INTERRUPTED = {
    "while it is imported": "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nwork = print\n",
    "while it works": "import os, signal\ndef work(): os.kill(os.getpid(), signal.SIGINT)\n",
    "inside a library that makes another error of it": (
        "import os, signal\n"
        "def work():\n"
        "    try: os.kill(os.getpid(), signal.SIGINT)\n"
        "    except KeyboardInterrupt: raise ImportError('cannot be imported')\n"
    ),
}


@pytest.mark.parametrize("case", INTERRUPTED)
def test_ctrl_c_is_130_whenever_it_comes(case: str, tmp_path: Path) -> None:
    (tmp_path / "interrupted.py").write_text(INTERRUPTED[case])
    program = (
        "import click\nfrom infra.deferred import deferred\nfrom infra.ending import start\n"
        "@click.command()\ndef command(): deferred('interrupted:work')()\nstart(command, 'command')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}, capture_output=True,
        text=True, check=False, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
    )  # fmt: skip
    assert (done.returncode, done.stderr, done.stdout) == (130, "stopped\n", "")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize(
    "command", [("merge", "methods"), ("merge", "run", "--help"), ("pipeline", "run", "--help"), ("infra.stack", "-h")]
)
def test_any_terminal_is_told_everything(command: tuple[str, ...], encoding: str) -> None:
    env = {**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "200"}
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=env, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert b"UnicodeEncodeError" not in done.stderr
    assert len(done.stdout) > 200


def _starts(path: Path) -> Any:
    """The calls below `if __name__ == "__main__"`."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
            yield from (ast.unparse(each).split("(")[0] for each in node.body)


def test_every_command_ends_so() -> None:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    found = {str(path.relative_to(ROOT)): list(_starts(path)) for path in files}
    started = {name: calls for name, calls in found.items() if calls}
    assert {name for name, calls in started.items() if calls != ["start"]} == {"infra/environment.py"}
    assert len(started) >= 7
