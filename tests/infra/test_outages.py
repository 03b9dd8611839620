"""An object store that goes away for a while: a stub of S3 that fails as it is told, for no real one does."""

import pickle
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import botocore.exceptions as bexc
import pytest
from boto3.exceptions import RetriesExceededError

from infra.errors import StoreError
from infra.store import s3
from infra.store.client import passes
from infra.store.s3 import Store

MORE_THAN_BOTO3 = 8
"""Answers that say "not now": boto3 itself asks five times."""


class Stub:
    """Objects in memory. ``faults`` says what becomes of the next requests: "refuse" (503), or "lose", which does what
    was asked and then says 503."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.faults: deque[str] = deque()
        self.asked = 0
        self.port = 0
        self._server: ThreadingHTTPServer | None = None

    def start(self) -> None:
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _answer(self, status: int, body: bytes = b"", head: bool = False) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("ETag", '"tag"')
                self.send_header("Connection", "close")
                self.end_headers()
                if not head:
                    self.wfile.write(body)

            def _serve(self) -> None:
                stub.asked += 1
                sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                fault = stub.faults.popleft() if stub.faults else ""
                status, body = (503, b"") if fault == "refuse" else stub.do(self.command, self.path, sent, self.headers)
                self._answer(503 if fault else status, b"" if fault else body, self.command == "HEAD")

            do_GET = do_HEAD = do_PUT = do_DELETE = _serve

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        """Connections are refused from here on."""
        if self._server:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def do(self, method: str, path: str, body: bytes, headers: Any) -> tuple[int, bytes]:
        path = path.split("?")[0]
        if method == "PUT":
            if headers.get("If-None-Match") == "*" and path in self.objects:
                return 412, b"<Error><Code>PreconditionFailed</Code></Error>"
            self.objects[path] = body
            return 200, b""
        if path not in self.objects:
            return 404, b"<Error><Code>NoSuchKey</Code></Error>"
        return (204, b"") if method == "DELETE" else (200, self.objects[path])


@pytest.fixture
def stub() -> Iterator[Stub]:
    made = Stub()
    made.start()
    yield made
    made.stop()


@pytest.fixture
def store(stub: Stub) -> Store:
    """A store at the stub that has answered once."""
    made = Store("bucket", f"http://127.0.0.1:{stub.port}", credentials=("name", "secret"))
    made.put("x", b"before")
    return made


def test_a_restart_of_the_server_is_waited_for(stub: Stub, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    stub.stop()
    outcome: list[bytes] = []
    reader = threading.Thread(target=lambda: outcome.append(store.get("x")))
    reader.start()
    time.sleep(4)  # boto3 itself gives up after a second
    assert reader.is_alive()
    stub.start()
    reader.join(60)
    assert outcome == [b"before"]
    monkeypatch.setattr(s3, "OUTAGE_S", 0.0)
    stub.stop()
    hasty = Store("bucket", store.endpoint, credentials=("name", "secret"))
    hasty._answered = True
    with pytest.raises(StoreError, match="is unreachable"):  # so it is this that waits
        hasty.get("x")


@pytest.mark.parametrize("what", ["get", "head", "put", "list", "delete", "upload_file", "download_file"])
def test_every_request_waits(stub: Stub, store: Store, tmp_path: Any, what: str) -> None:
    stub.faults.extend(["refuse"] * MORE_THAN_BOTO3)
    (tmp_path / "file").write_bytes(b"file")
    arguments: dict[str, tuple[Any, ...]] = {
        "put": (b"after",), "upload_file": (tmp_path / "file",), "download_file": (tmp_path / "fetched",),
    }  # fmt: skip
    stub.objects["/bucket"] = b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>"
    found = getattr(store, what)("x", *arguments.get(what, ()))
    assert not list(found) if what == "list" else True
    assert not stub.faults


def test_a_write_whose_answer_was_lost_is_ours(stub: Stub, store: Store) -> None:
    stub.faults.extend(["lose", *["refuse"] * 5])  # longer than boto3 asks, so its own count starts anew
    assert store.put_if_absent("y", b"ours")
    stub.faults.extend(["refuse"] * 6)
    assert not store.put_if_absent("y", b"theirs")
    assert stub.objects["/bucket/y"] == b"ours"


def test_who_never_answered_is_not_waited_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    began = time.monotonic()
    with pytest.raises(StoreError, match="is unreachable"):
        Store("bucket", f"http://127.0.0.1:{port}", credentials=("name", "secret")).get("x")
    assert time.monotonic() - began < s3.OUTAGE_S / 2


def test_a_hasty_request_is_made_once(stub: Stub, store: Store) -> None:
    stub.faults.append("refuse")
    before = stub.asked
    with pytest.raises(StoreError):
        store.hasty(1.0).get("x")
    assert stub.asked == before + 1
    assert store.hasty(1.0).get("x") == b"before"  # it has answered, and is hasty still
    stub.faults.append("refuse")
    with pytest.raises(StoreError):
        store.hasty(1.0).get("x")


def test_a_worker_that_starts_in_an_outage_waits(stub: Stub, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its copy of the store has asked nothing yet, but the sender's has."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "name")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    for copy in (pickle.loads(pickle.dumps(store)), store.beside("bucket")):
        stub.faults.extend(["refuse"] * MORE_THAN_BOTO3)
        assert copy.get("x") == b"before"
        assert not stub.faults
    never = Store("bucket", store.endpoint)
    stub.faults.extend(["refuse"] * MORE_THAN_BOTO3)
    with pytest.raises(StoreError):
        pickle.loads(pickle.dumps(never)).get("x")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (bexc.ClientError({"ResponseMetadata": {"HTTPStatusCode": 501}}, "DeleteObject"), False),
        (bexc.ClientError({"ResponseMetadata": {"HTTPStatusCode": 503}}, "DeleteObject"), True),
        (bexc.ClientError({"Error": {"Code": "SlowDown"}}, "PutObject"), True),
        (bexc.ClientError({"Error": {"Code": "AccessDenied"}}, "PutObject"), False),
        (bexc.EndpointConnectionError(endpoint_url="http://x"), True),
        (bexc.NoCredentialsError(), False),
        (RetriesExceededError(ConnectionError("broken")), True),
    ],
)
def test_what_passes(error: Exception, expected: bool) -> None:
    assert passes(error) == expected
