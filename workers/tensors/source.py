"""Where a file's bytes come from: ranges of a local file or of an object, read ahead where tensors are small.

Objects of the store are `infra.store.source`. Not here: what the bytes mean (`workers.tensors.header`).
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Protocol

from infra.errors import AdapterError

_BLOCK = 8 << 20


class ByteSource(Protocol):
    """Random access to the bytes of one file or object."""

    @property
    def size(self) -> int: ...

    def read(self, offset: int, length: int) -> bytes: ...


class FileSource:
    """A :class:`ByteSource` over a local file. Raises AdapterError for a file that cannot be read."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self.size = self.path.stat().st_size
        except OSError as error:
            raise self._unreadable(error) from error

    def read(self, offset: int, length: int) -> bytes:
        """At most ``length`` bytes from ``offset``; fewer at the end of the file."""
        try:
            with self.path.open("rb") as handle:
                handle.seek(offset)
                return handle.read(length)
        except OSError as error:
            raise self._unreadable(error) from error

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fill ``buffer`` from ``offset``; returns the bytes read. One copy less than `read` for large tensors."""
        try:
            with self.path.open("rb", buffering=0) as handle:
                handle.seek(offset)
                done = 0
                while done < len(buffer):
                    got = handle.readinto(buffer[done:])
                    if not got:
                        break
                    done += got
                return done
        except OSError as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: OSError) -> AdapterError:
        return AdapterError(f"{self.path}: cannot read the file: {error.strerror}")

    def __str__(self) -> str:
        return str(self.path)


class ReadAhead:
    """Ranged reads of a remote file in blocks: its tensors are small and are asked for in the order in which they lie.

    A read inside the last block fetched costs nothing; any other fetches a block from its beginning. Holds one block.
    """

    def __init__(self, source: ByteSource, block: int = _BLOCK) -> None:
        self.source, self.size, self._block = source, source.size, block
        self._start, self._held = 0, b""
        self._lock = threading.Lock()  # several threads read the tensors of one file

    def __str__(self) -> str:
        return str(self.source)

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`. Raises what the source raises."""
        with self._lock:
            at = offset - self._start
            if at < 0 or at + length > len(self._held):
                if length >= self._block:
                    return self.source.read(offset, length)
                self._held = self.source.read(offset, max(length, min(self._block, self.size - offset)))
                self._start, at = offset, 0
            return self._held[at : at + length]
