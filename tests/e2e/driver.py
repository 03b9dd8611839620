"""One driver for many runs: Ray keeps its workers from run to run, so that a small run does not mostly import torch.

Runs that are killed, that meet other services or that are submitted get a process of their own (`background.py`).
"""

import contextlib
import json
import select
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Finished:
    """A command that ended; `results` is what a run reported."""

    code: int
    output: str
    results: dict[str, Any] | None


@dataclass
class Driver:
    """`driver_process.py` with these variables; it is started by the first command."""

    env: dict[str, str]
    log: Path
    """What the process itself writes, and what is written past the command's own output."""
    _process: subprocess.Popen[str] | None = field(default=None, init=False)

    def call(self, *arguments: str, train_version: int = 0, seconds: float = 420) -> Finished:
        """Exit status and output of `python -m pipeline …`."""
        if self._process is None or self._process.poll() is not None:
            self._process = self._start()
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        ready, line = [process.stdout], ""
        with contextlib.suppress(OSError):  # it ends while we write
            process.stdin.write(json.dumps({"arguments": arguments, "train_version": train_version}) + "\n")
            process.stdin.flush()
            ready, _, _ = select.select([process.stdout], [], [], seconds)
            line = process.stdout.readline() if ready else ""
        if not line:
            self.close()
            what = "the driver ended" if ready else f"not done within {seconds:.0f} s"
            raise AssertionError(f"{' '.join(arguments)}: {what}\n{self.log.read_text()[-4000:]}")
        answer = json.loads(line)
        return Finished(answer["code"], answer["output"], None)

    def close(self) -> None:
        """End the process; the next command starts another."""
        process, self._process = self._process, None
        if process:
            with contextlib.suppress(subprocess.TimeoutExpired, OSError):
                process.communicate(timeout=30)  # its stdin ends, and so does it
            process.kill()
            process.wait()

    def _start(self) -> subprocess.Popen[str]:
        with self.log.open("a") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "tests.e2e.driver_process"], cwd=ROOT, env=self.env,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
