"""A file written straight into the object store: parts go up in the background while the next ones are made.

Memory is bounded by the part being filled and those under way. Nothing is visible under the object's name before
`close`; an error, or leaving the context early, aborts the upload. A process that is killed leaves the parts of an
unfinished upload, never an object; a life-cycle rule (AbortIncompleteMultipartUpload) clears them. The SHA-256 is that
of the bytes as they were given.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from infra.errors import StoreError
from infra.store.s3 import FileRef, Store

PART_BYTES = 16 << 20
IN_FLIGHT = 3
_MAX_PARTS = 10_000  # S3's own limit


class StoreWriter:
    """One object, written once from front to back. A context manager; one thread at a time.

    Raises StoreError as `Store` does, for a write also when an earlier part failed.
    """

    def __init__(self, store: Store, name: str, part_bytes: int = PART_BYTES, in_flight: int = IN_FLIGHT) -> None:
        """`part_bytes`: S3 accepts 5 MiB and more; an object has at most 10,000 parts."""
        self.name = name
        self.size = 0
        self._store, self._part_bytes, self._in_flight = store, part_bytes, in_flight
        self._digest = hashlib.sha256()
        self._buffer = bytearray()
        self._upload: str | None = None
        self._parts: list[dict[str, Any]] = []
        self._pending: deque[Future[dict[str, Any]]] = deque()
        self._pool: ThreadPoolExecutor | None = None
        self._open, self._sealed = True, False

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Append bytes; returns how many. Waits while as many parts are under way as may be."""
        if not self._open or self._sealed:
            raise StoreError(f"{self._store.uri(self.name)} is written to after it was sealed, closed or aborted")
        view = memoryview(data).cast("B")
        self._digest.update(view)
        self.size += len(view)
        at = 0
        while at < len(view):
            take = view[at : at + self._part_bytes - len(self._buffer)]
            self._buffer += take
            at += len(take)
            if len(self._buffer) == self._part_bytes:
                self._send()
        return len(view)

    def seal(self) -> None:
        """Send everything, so that only `close` is left, which then needs no memory and little time. No writes after
        it."""
        try:
            if self._buffer:
                self._send()
            while self._pending:
                self._parts.append(self._pending.popleft().result())
        except BaseException:
            self.abort()
            raise
        self._sealed = True
        if self._pool is not None:
            self._pool.shutdown(wait=True)

    def close(self) -> FileRef:
        """Complete the object and return its reference; the stored size is checked."""
        if not self._open:
            raise StoreError(f"{self._store.uri(self.name)} is closed twice, or after it was aborted")
        try:
            if self._upload is None:
                self._store.put(self.name, bytes(self._buffer))
            else:
                if self._buffer:
                    self._send()
                while self._pending:
                    self._parts.append(self._pending.popleft().result())
                self._call("complete_multipart_upload", MultipartUpload={"Parts": self._parts})
        except BaseException:
            self.abort()
            raise
        self._finish()
        info = self._store.head(self.name)
        if info is None or info.size != self.size:
            found = "nothing" if info is None else f"{info.size} bytes"
            raise StoreError(f"{self._store.uri(self.name)} holds {found} after writing {self.size} bytes")
        return FileRef(self.name, self._digest.hexdigest(), self.size)

    def abort(self) -> None:
        """Give up: no object appears. Fine after `close` (which it does not undo) and when repeated."""
        if not self._open:
            return
        for future in self._pending:
            future.cancel()
        self._finish()  # waits for parts under way: one that arrives after the abort would stay
        if self._upload is not None:
            with contextlib.suppress(StoreError):
                self._call("abort_multipart_upload")

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def _send(self) -> None:
        """Upload the full buffer in the background."""
        if self._upload is None:
            self._upload = str(self._call("create_multipart_upload")["UploadId"])
            self._pool = ThreadPoolExecutor(self._in_flight, thread_name_prefix="store-write")
        assert self._pool is not None
        while len(self._pending) >= self._in_flight:
            self._parts.append(self._pending.popleft().result())
        number = len(self._parts) + len(self._pending) + 1
        if number > _MAX_PARTS:
            raise StoreError(f"{self._store.uri(self.name)} needs more than {_MAX_PARTS} parts of {self._part_bytes} B")
        body, self._buffer = self._buffer, bytearray()
        self._pending.append(self._pool.submit(self._put_part, number, body))

    def _put_part(self, number: int, body: bytearray) -> dict[str, Any]:
        answer = self._call("upload_part", PartNumber=number, Body=bytes(body))
        return {"PartNumber": number, "ETag": answer["ETag"]}

    def _call(self, operation: str, **arguments: Any) -> Any:
        upload = {} if self._upload is None else {"UploadId": self._upload}
        return self._store.call(operation, "write", self.name, **upload, **arguments)

    def _finish(self) -> None:
        self._open = False
        self._buffer = bytearray()
        self._pending.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True)


class StoreTarget:
    """Files of one folder in the store, for writers that make several (`merge.files.checkpoint_writer.Target`)."""

    def __init__(self, store: Store, prefix: str) -> None:
        """`prefix`: the folder's name, for example that of `infra.store.layout.new_attempt`."""
        self._store, self._prefix = store, prefix.rstrip("/")
        self._writers: dict[str, StoreWriter] = {}
        self.files: dict[str, FileRef] = {}

    def open(self, name: str) -> StoreWriter:
        """A new file; what is closed through `finish` is in `files`."""
        writer = self._store.open_write(f"{self._prefix}/{name}")
        self._writers[name] = writer
        return writer

    def finish(self, name: str) -> None:
        """Complete one file."""
        self.files[name] = self._writers.pop(name).close()

    def commit(self) -> None:
        """All files are complete: nothing is left to do, a manifest makes them an artifact."""

    def abort(self) -> None:
        """Drop what was written."""
        for writer in self._writers.values():
            writer.abort()
        self._writers.clear()
        for ref in self.files.values():
            with contextlib.suppress(StoreError):
                self._store.delete(ref.name)
        self.files.clear()
