"""The peak of one piece of work, and memory that is given back."""

import mmap
import subprocess
import sys

from workers.base import memory

MIB = 1 << 20


def test_the_peak_is_that_of_the_work_since_the_reset() -> None:
    memory.reset_peak()
    before = memory.peak_bytes()
    with mmap.mmap(-1, 64 * MIB) as block:  # not from the heap, which may hold as much that is free and resident
        block.write(bytes([1]) * (64 * MIB))
        grown = memory.peak_bytes()
    assert grown - before > 48 * MIB
    memory.reset_peak()
    assert memory.peak_bytes() < grown - 48 * MIB


FRAGMENTED = """
import sys
from contextlib import nullcontext
from workers.base import memory
with memory.freed_afterwards() if sys.argv[1] == "trim" else nullcontext():
    pieces = [bytearray(100_000) for _ in range(1000)]  # below glibc's threshold for mappings of their own
    kept = pieces[-1]
    del pieces
memory.reset_peak()
print(memory.peak_bytes())
"""


def resident_after(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", FRAGMENTED, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_freed_memory_goes_back_to_the_system() -> None:
    assert resident_after("keep") - resident_after("trim") > 64 * MIB
