"""An object store in memory with the habits of some servers, and faults at a chosen request.

Only what `Store`, `StoreWriter` and `infra.store.admin` ask for; signatures are not checked.
"""

import contextlib
import hashlib
import threading
import time
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAULTS = {
    "reset": (0, ""),
    "unwell": (500, "InternalError"),
    "forbidden": (403, "AccessDenied"),
    "unknown": (418, "Teapot"),
    "silent": (403, ""),
}
"""Status and code of an answer in place of the right one; 0: the connection is closed without any."""


class FakeS3:
    """`habit`: how it is unlike others. `delay`: seconds between its look and its write; 0 makes them one step.
    `fault`: what becomes of request number `at` (from 0), once."""

    def __init__(self, habit: str = "", delay: float = 0.0, prefix: str = "") -> None:
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, bytes] = {}
        self.habit, self.delay, self.prefix = habit, delay, prefix
        self.fault, self.at, self.asked = "", -1, 0
        self.lock: Any = contextlib.nullcontext() if delay else threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fail(self, fault: str, at: int) -> None:
        """From here on count anew, and fail so at that request."""
        self.fault, self.at, self.asked = fault, at, 0

    def answer(self, method: str, path: str, headers: Any, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        """Status, body, headers; an error's body is its code."""
        url = urllib.parse.urlsplit(path)
        query = {name: values[0] for name, values in urllib.parse.parse_qs(url.query, True).items()}
        _, bucket, *rest = urllib.parse.unquote(url.path).split("/", 2)
        key = rest[0] if rest else ""
        if (refused := self._refusal(method, bucket, key, query, headers)) is not None:
            return refused
        if not key:
            return self._listing(query)
        if "uploads" in query or "uploadId" in query:
            return self._upload(method, key, query, body)
        if method == "PUT":
            return self._put(key, headers, body)
        if key not in self.objects:
            return (403, b"AccessDenied", {}) if self.habit == "403-for-missing" else (404, b"NoSuchKey", {})
        if method == "DELETE":
            self.objects.pop(key, None)
            return 204, b"", {}
        data, etag = self.objects[key], {"ETag": _etag(self.objects[key])}
        if method == "GET" and "Range" in headers:
            start, end = map(int, headers["Range"].removeprefix("bytes=").split("-"))
            if start >= len(data):
                return 416, b"InvalidRange", {}
            etag["Content-Range"] = f"bytes {start}-{min(end, len(data) - 1)}/{len(data)}"
            return 206, data[start : end + 1], etag
        return 200, data, etag

    def _refusal(
        self, method: str, bucket: str, key: str, query: dict[str, str], headers: Any
    ) -> tuple[int, bytes, dict[str, str]] | None:
        """What this habit refuses."""
        checksum = {"x-amz-trailer", "x-amz-sdk-checksum-algorithm"} & {name.lower() for name in headers}
        if self.habit == "no-checksums" and method == "PUT" and checksum:
            return 400, b"InvalidArgument", {}
        if self.habit == "virtual-only" and not headers["Host"].startswith(f"{bucket}."):
            return 403, b"SecondLevelDomainForbidden", {}
        if self.habit == "prefix-policy" and not (key or query.get("prefix", "")).startswith(self.prefix):
            return 403, b"AccessDenied", {}
        if self.habit == "no-conditions" and {"If-None-Match", "If-Match"} & set(headers):
            return 501, b"NotImplemented", {}
        if self.habit.startswith("says "):
            status, _, code = self.habit.removeprefix("says ").partition(" ")
            return int(status), code.encode(), {}
        return None

    def _put(self, key: str, headers: Any, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        chunked = "aws-chunked" in (headers.get("Content-Encoding") or "")
        if self.habit == "keeps-framing":
            body = b"5;chunk-signature=0\r\n" + body
        elif chunked:
            size, _, rest = body.partition(b"\r\n")
            body = rest[: int(size.split(b";")[0], 16)]
        with self.lock:
            there = self.objects.get(key)
            absent, same = headers.get("If-None-Match"), headers.get("If-Match")
            if self.habit != "ignores-conditions" and (
                (absent == "*" and there is not None) or (same and (there is None or _etag(there) != same))
            ):
                return 412, b"PreconditionFailed", {}
            time.sleep(self.delay)
            self.objects[key] = body
        return 200, b"", {"ETag": _etag(body)}

    def _upload(self, method: str, key: str, query: dict[str, str], body: bytes) -> tuple[int, bytes, dict[str, str]]:
        if "uploads" in query:
            return 200, b"<R><UploadId>one</UploadId></R>", {}
        if method == "PUT":
            self.parts[query["partNumber"]] = body
            return 200, b"", {"ETag": _etag(body)}
        if method == "POST":
            self.objects[key] = b"".join(self.parts[number] for number in sorted(self.parts, key=int))
            self.parts.clear()
            return 200, b"<R><ETag>x</ETag></R>", {}
        self.parts.clear()
        return 204, b"", {}

    def _listing(self, query: dict[str, str]) -> tuple[int, bytes, dict[str, str]]:
        names = sorted(name for name in self.objects if name.startswith(query.get("prefix", "")))
        entry = "<Contents><Key>{}</Key><Size>{}</Size><ETag>x</ETag><LastModified>{}</LastModified></Contents>"
        items = "".join(entry.format(name, len(self.objects[name]), "2026-01-01T00:00:00Z") for name in names)
        return 200, f"<R><IsTruncated>false</IsTruncated>{items}</R>".encode(), {}

    def _handler(outer) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def serve(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                number, outer.asked = outer.asked, outer.asked + 1
                if number == outer.at:
                    status, text = FAULTS[outer.fault]
                    answer: bytes = text.encode()
                    more: dict[str, str] = {}
                else:
                    status, answer, more = outer.answer(self.command, self.path, self.headers, body)
                if status == 0:
                    self.close_connection = True
                    return
                if status >= 400 and answer and not answer.startswith(b"<"):
                    answer = b"<Error><Code>%s</Code><Message>%s</Message></Error>" % (answer, answer)
                self.send_response(status)
                for name, value in {**more, "Content-Length": str(len(answer)), "Connection": "close"}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD" and status != 204:
                    self.wfile.write(answer)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = serve

            def log_message(self, *_: Any) -> None:
                pass

        return Handler


def _etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


@contextlib.contextmanager
def serving(habit: str = "", delay: float = 0.0, prefix: str = "") -> Iterator[FakeS3]:
    """A server for a block."""
    made = FakeS3(habit, delay, prefix)
    try:
        yield made
    finally:
        made.close()
