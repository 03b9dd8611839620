import time
from datetime import UTC, datetime

import pytest

from infra.errors import StoreError
from infra.store.admin import (
    abort_upload,
    delete_if_match,
    list_objects,
    list_uploads,
    server_time,
    upload_size,
)
from infra.store.s3 import Store


def test_objects_are_as_old_as_the_store_says(store: Store) -> None:
    before = server_time(store)
    store.put("a/x", b"123")
    store.put("b", b"")
    found = {item.name: item for item in list_objects(store)}
    assert found.keys() == {"a/x", "b"}
    assert [item.name for item in list_objects(store, "a/")] == ["a/x"]
    assert found["a/x"].size == 3
    info = store.head("a/x")
    assert info is not None
    assert found["a/x"].etag == info.etag
    time.sleep(1.1)  # the Date header has whole seconds
    age = (server_time(store) - found["a/x"].modified).total_seconds()
    assert 0 <= age < 60
    assert before <= found["b"].modified
    assert abs((before - datetime.now(UTC)).total_seconds()) < 60


def test_unfinished_uploads_are_found_and_aborted(store: Store) -> None:
    s3 = store._client()
    where = {"Bucket": store.bucket, "Key": store._key("objects/k/a/f")}
    upload_id = s3.create_multipart_upload(**where)["UploadId"]
    s3.upload_part(**where, UploadId=upload_id, PartNumber=1, Body=bytes(5 << 20))
    s3.create_multipart_upload(Bucket=store.bucket, Key=store._key("elsewhere"))
    (upload,) = list_uploads(store, "objects/")
    assert (upload.name, upload.upload_id) == ("objects/k/a/f", upload_id)
    assert (server_time(store) - upload.started).total_seconds() < 60
    assert upload_size(store, upload) == 5 << 20
    assert len(list(list_uploads(store))) == 2
    assert list(list_objects(store)) == []
    abort_upload(store, upload)
    abort_upload(store, upload)
    assert list(list_uploads(store, "objects/")) == []
    assert upload_size(store, upload) == 0


def test_delete_only_what_was_seen(store: Store) -> None:
    store.put("x", b"one")
    (old,) = list_objects(store)
    store.put("x", b"two")
    assert not delete_if_match(store, "x", old.etag)
    assert store.get("x") == b"two"
    (new,) = list_objects(store)
    assert delete_if_match(store, "x", new.etag)
    assert not delete_if_match(store, "x", new.etag)
    assert store.head("x") is None


def test_an_unreachable_store_is_named() -> None:
    store = Store("factory", "http://127.0.0.1:9", "", ("a", "b"))
    with pytest.raises(StoreError, match=r"127\.0\.0\.1:9"):
        server_time(store)
