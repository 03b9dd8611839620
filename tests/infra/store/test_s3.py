import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from infra.errors import StoreError
from infra.stack import processes
from infra.store.errors import ObjectMissing
from infra.store.s3 import Store, split_uri
from infra.store.source import StoreSource


def test_round_trip(store: Store) -> None:
    assert store.head("a/b") is None
    assert store.get_with_etag("a/b") is None
    store.put("a/b", b"hello")
    info = store.head("a/b")
    assert info is not None
    assert info.size == 5
    assert store.get("a/b") == b"hello"
    assert store.get_with_etag("a/b") == (b"hello", info.etag)
    store.put("a/c", b"")
    assert sorted(store.list("a/")) == ["a/b", "a/c"]
    assert store.get("a/c") == b""
    store.delete("a/b")
    store.delete("a/b")
    assert list(store.list()) == ["a/c"]
    with pytest.raises(ObjectMissing, match="no such object"):
        store.get("a/b")


def test_ranges(store: Store) -> None:
    store.put("x", bytes(range(100)))
    assert store.get_range("x", 10, 5) == bytes(range(10, 15))
    assert store.get_range("x", 0, 0) == b""
    source = StoreSource(store, "x")
    assert source.size == 100
    assert source.read(99, 1) == b"c"
    with pytest.raises(StoreError):
        source.read(98, 5)
    with pytest.raises(StoreError, match="outside"):
        source.read(100, 1)
    with pytest.raises(ObjectMissing):
        StoreSource(store, "y")


def test_sixteen_racing_writers_have_one_winner(store: Store) -> None:
    for name in ("first", "second", "third"):
        with ThreadPoolExecutor(16) as pool:
            won = list(pool.map(lambda i, n=name: store.put_if_absent(n, b"%d" % i), range(16)))
        assert won.count(True) == 1
        assert store.get(name) == b"%d" % won.index(True)


def test_replace_only_what_was_read(store: Store) -> None:
    store.put("x", b"one")
    found = store.get_with_etag("x")
    assert found is not None
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: store.replace_if_match("x", b"two %d" % i, found[1]), range(8)))
    assert won.count(True) == 1
    assert store.get("x") == b"two %d" % won.index(True)
    assert not store.replace_if_match("absent", b"two", found[1])
    assert store.head("absent") is None


def test_files_round_trip_in_parts(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(os.urandom(1 << 20) * 34)  # above the multi-part threshold
    ref = store.upload_file("large", path)
    assert ref.size == 34 << 20
    got = store.download_file(ref, tmp_path / "deep" / "copy")
    assert got.read_bytes() == path.read_bytes()
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["copy"]


def test_corruption_is_detected_and_leaves_nothing(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"good bytes")
    ref = store.upload_file("file", path)
    store.put("file", b"evil bytes")
    with pytest.raises(StoreError, match="corrupted"):
        store.download_file(ref, tmp_path / "out" / "copy")
    with pytest.raises(StoreError, match="corrupted"):
        store.download_file("file", tmp_path / "out" / "copy", sha256=ref.sha256)
    with pytest.raises(ObjectMissing):
        store.download_file("absent", tmp_path / "out" / "copy")
    assert list((tmp_path / "out").iterdir()) == []


def test_check_accepts_the_stack_and_leaves_nothing(store: Store) -> None:
    store.check()
    assert list(store.list()) == []


def test_refused_credentials(real_store: Store) -> None:
    wrong = Store(real_store.bucket, real_store.endpoint, credentials=(os.environ["AWS_ACCESS_KEY_ID"], "wrong"))
    with pytest.raises(StoreError, match="refused the credentials") as caught:
        wrong.check()
    assert str(real_store.endpoint) in str(caught.value)
    with pytest.raises(StoreError, match="refused the credentials"):
        wrong.get("x")


def test_missing_bucket(store: Store) -> None:
    with pytest.raises(StoreError, match="has no bucket 'nowhere'"):
        Store("nowhere", store.endpoint).check()


def test_unreachable_is_said_quickly(real_store: Store) -> None:
    port = processes.choose_ports({"x": 21999}, frozenset())["x"]
    began = time.monotonic()
    with pytest.raises(StoreError, match=f"127.0.0.1:{port}, bucket 'factory' is unreachable"):
        Store("factory", f"http://127.0.0.1:{port}").check()
    assert time.monotonic() - began < 10


def test_a_proxy_does_not_capture_loopback(real_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.delenv("no_proxy")
    real_store.put("x", b"direct")
    assert real_store.get("x") == b"direct"


def test_pickled_copy_works_and_carries_no_credentials(store: Store) -> None:
    store.put("x", b"1")
    with_secret = Store(store.bucket, store.endpoint, store.prefix, credentials=("name", "very secret"))
    assert b"very secret" not in pickle.dumps(with_secret)
    assert pickle.loads(pickle.dumps(store)).get("x") == b"1"


def test_bad_addresses() -> None:
    assert split_uri("s3://bucket/a/b") == ("bucket", "a/b")
    with pytest.raises(StoreError, match="s3://"):
        split_uri("/a/b")
    with pytest.raises(StoreError, match="http://host:port"):
        Store("factory", "nonsense").head("x")
