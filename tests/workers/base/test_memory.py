"""A process's memory is known whatever the process is called."""

import multiprocessing
import sys
from pathlib import Path

import pytest

from infra.stack.processes import start_id
from workers.base.memory import peak_bytes

NAMES = ("größe", "отзывы", "naïve", "🙂", "任务", "हिन्दी", "مهمة", "plain", "a) b (c", "\udcff")


def _named(name: str) -> tuple[int, str | None]:
    """In a process of its own, which Ray would call so: 15 bytes are kept, and the last letter may be cut."""
    import ctypes
    import os

    ctypes.CDLL(None).prctl(15, f"ray::expert {name}".encode(errors="surrogateescape"), 0, 0, 0)  # PR_SET_NAME
    return peak_bytes(), start_id(os.getpid())


@pytest.mark.skipif(sys.platform != "linux", reason="titles of processes as Linux keeps them")
def test_any_title() -> None:
    with multiprocessing.get_context("fork").Pool(1) as pool:
        found = pool.map(_named, NAMES)
    assert all(peak > 1 << 20 for peak, _ in found)
    assert len({started for _, started in found}) == 1
    assert None not in {started for _, started in found}
    assert b"VmHWM" in Path("/proc/self/status").read_bytes()
