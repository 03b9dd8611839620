"""Resident memory of this process: its peak over one piece of work, and giving freed memory back.

A Ray worker does one expert, merge node or evaluation after the other in one process. Linux with glibc; elsewhere the
peak is that of the whole process and nothing is given back.
"""

import contextlib
import ctypes
import gc
import resource
from collections.abc import Iterator
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_M_MMAP_THRESHOLD = -3  # malloc.h
_RESET_PEAK = "5"  # proc(5): resets VmHWM to the current resident size


def reset_peak() -> None:
    """Let `peak_bytes` count from now on."""
    with contextlib.suppress(OSError):
        _CLEAR_REFS.write_text(_RESET_PEAK, encoding="utf-8")


def peak_bytes() -> int:
    """Largest resident size since `reset_peak`, in bytes; shared pages of mapped files count too."""
    with contextlib.suppress(OSError):
        for line in _STATUS.read_bytes().splitlines():  # the process's title in it may end inside a letter
            if line.startswith(b"VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def map_large_tensors() -> None:
    """Let tensors of 2 MiB and more have mappings of their own, which end with them, for the rest of this process.

    Batches of varying length would leave holes in the heap that the next longer one cannot use. On the quickstart's
    longest batches the peak falls from 3.0 to 2.8 GiB and a step takes a few percent longer.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2 << 20)


def give_back() -> None:
    """Return freed memory to the system, which glibc keeps for this process; a tenth of a second per freed GiB."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def freed_afterwards() -> Iterator[None]:
    """Give back what was allocated inside and freed since."""
    try:
        yield
    finally:
        gc.collect()  # a model's modules refer to each other in cycles
        give_back()
