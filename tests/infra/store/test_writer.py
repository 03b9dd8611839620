"""Streamed uploads against the real object store: the bytes arrive, nothing half-written shows."""

import hashlib
import os
import pickle
import subprocess
import sys

import pytest

from infra.errors import StoreError
from infra.store.s3 import Store
from infra.store.writer import StoreTarget, StoreWriter

PART = 5 << 20  # the least that S3 accepts


def uploads(store: Store) -> list[str]:
    """Names of unfinished multi-part uploads under the store's prefix."""
    found = store._client().list_multipart_uploads(Bucket=store.bucket, Prefix=store.prefix)
    return [entry["Key"] for entry in found.get("Uploads", ())]


@pytest.mark.parametrize("size", [0, 1, PART - 1, PART, PART + 1, 4 * PART + 12345])
def test_what_is_written_arrives(store: Store, size: int) -> None:
    data = os.urandom(size)
    with StoreWriter(store, "file", PART, in_flight=2) as writer:
        for start in range(0, size, 999_983):
            assert writer.write(memoryview(data)[start : start + 999_983]) == min(999_983, size - start)
        assert store.head("file") is None
        ref = writer.close()
    assert (ref.name, ref.size, ref.sha256) == ("file", size, hashlib.sha256(data).hexdigest())
    assert store.get("file") == data
    assert pickle.loads(pickle.dumps(ref)) == ref
    assert uploads(store) == []


def test_one_large_write_is_cut_into_parts(store: Store) -> None:
    data = os.urandom(3 * PART + 7)
    with StoreWriter(store, "file", PART) as writer:
        writer.write(data)
        assert len(writer._buffer) < PART
        writer.close()
    assert store.get("file") == data


@pytest.mark.parametrize("size", [0, 10, 2 * PART + 7])
def test_a_sealed_file_has_arrived_but_does_not_show(store: Store, size: int) -> None:
    data = os.urandom(size)
    with StoreWriter(store, "file", PART) as writer:
        writer.write(data)
        writer.seal()
        assert not writer._buffer
        assert store.head("file") is None
        with pytest.raises(StoreError, match="sealed"):
            writer.write(b"x")
        writer.close()
    assert store.get("file") == data
    assert uploads(store) == []


@pytest.mark.parametrize("size", [10, 2 * PART])
def test_leaving_early_leaves_nothing(store: Store, size: int) -> None:
    with StoreWriter(store, "file", PART) as writer:
        writer.write(bytes(size))
        assert len(uploads(store)) == (size > PART)
    assert store.head("file") is None
    assert uploads(store) == []
    writer.abort()
    for call in (writer.close, lambda: writer.write(b"x")):
        with pytest.raises(StoreError, match="closed"):
            call()


def test_a_failed_part_fails_the_file(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Store.call

    def fail(self: Store, operation: str, *args: object, **kwargs: object) -> object:
        if operation == "upload_part" and kwargs["PartNumber"] == 2:
            raise StoreError("part two is lost")
        return real(self, operation, *args, **kwargs)

    def write() -> None:
        with StoreWriter(store, "file", PART, in_flight=1) as writer:
            for _ in range(5):
                writer.write(bytes(PART))
            writer.close()

    monkeypatch.setattr(Store, "call", fail)
    with pytest.raises(StoreError, match="part two is lost"):
        write()
    assert store.head("file") is None
    assert uploads(store) == []


def test_a_killed_writer_leaves_no_object(real_store: Store) -> None:
    code = f"""
import os, signal
from infra.store.s3 import Store
from infra.store.writer import StoreWriter
writer = StoreWriter(Store({real_store.bucket!r}, {real_store.endpoint!r}, {real_store.prefix!r}), "file", {PART})
writer.write(bytes({4 * PART}))
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == -9
    assert real_store.head("file") is None
    assert list(real_store.list()) == []


def test_a_target_keeps_what_is_finished_or_nothing(store: Store) -> None:
    target = StoreTarget(store, "folder/")
    target.open("a").write(b"1")
    target.finish("a")
    target.commit()
    assert store.get(target.files["a"].name) == b"1"
    assert target.files["a"].name == "folder/a"
    target.open("b").write(b"2")
    target.abort()
    assert list(store.list()) == []
