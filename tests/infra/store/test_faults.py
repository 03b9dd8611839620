"""What object stores refuse, in words, and a fault at every request of everything that is asked of one."""

import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from infra.errors import StoreError
from infra.store import admin
from infra.store.client import STYLE_VARIABLE, make_client
from infra.store.s3 import Store
from tests.infra.store.fake_s3 import FAULTS, FakeS3, serving

KEYS = ("name", "secret")


def at(server: FakeS3, prefix: str = "") -> Store:
    """A store that asks once and waits for nothing."""
    store = Store("bucket", server.endpoint, prefix, KEYS)
    store._client_, store._patience = make_client(server.endpoint, KEYS, attempts=1, read_timeout=5), 0.0
    return store


REFUSED = {
    "checksums that the server does not know": (
        {"habit": "no-checksums"}, r"did not take what was sent.*AWS_REQUEST_CHECKSUM_CALCULATION=when_required",
    ),
    "a server that keeps the framing of what it is sent": (
        {"habit": "keeps-framing"}, r"keeps other bytes than it is sent.*AWS_REQUEST_CHECKSUM_CALCULATION",
    ),
    "buckets in the host name only": (
        {"habit": "virtual-only"}, "wants the bucket's name in the address.*FACTORY_S3_ADDRESSING_STYLE=virtual",
    ),
    "no leave to list": ({"habit": "403-for-missing"}, r"cannot look at .*-absent.*s3:ListBucket"),
    "a policy for another prefix": (
        {"habit": "prefix-policy", "prefix": "team-b/"}, r"does not permit it \(AccessDenied\).*FACTORY_S3_PREFIX",
    ),
    "a wrong key": ({"habit": "says 403 InvalidAccessKeyId"}, r"refused the credentials \(InvalidAccessKeyId\)"),
    "a wrong secret": ({"habit": "says 403 SignatureDoesNotMatch"}, "refused the credentials.*AWS_SECRET_ACCESS_KEY"),
    "another region": ({"habit": "says 400 AuthorizationHeaderMalformed"}, "another region.*AWS_REGION"),
    "a wrong clock": ({"habit": "says 403 RequestTimeTooSkewed"}, "set this machine's clock"),
    "a full store": ({"habit": "says 507 XMinioStorageFull"}, r"no room left.*pipeline gc"),
    "no bucket": ({"habit": "says 404 NoSuchBucket"}, "has no bucket 'bucket'.*FACTORY_S3_BUCKET"),
    "another service": ({"habit": "says 404 "}, "does not answer as an object store does.*FACTORY_S3_ENDPOINT"),
    "no conditional writes": ({"habit": "no-conditions"}, "does not take conditional writes"),
    "conditions that are ignored": ({"habit": "ignores-conditions"}, "ignores conditional writes"),
    "two winners at once": ({"delay": 0.05}, r"lets \d of 8 writers of one name win at the same moment"),
}  # fmt: skip
"""What is refused before any work: a server, and what is read of it."""


@pytest.mark.parametrize("case", REFUSED)
def test_the_check_names_the_cause(case: str) -> None:
    how, text = REFUSED[case]
    with serving(**how) as server, pytest.raises(StoreError, match=text) as refused:
        Store("bucket", server.endpoint, "team-a", KEYS).check()
    assert "\n" not in str(refused.value)
    assert server.endpoint in str(refused.value)


def test_a_policy_for_the_prefix_is_enough_and_nothing_is_left() -> None:
    with serving("prefix-policy", prefix="team-a/") as server:
        store = Store("bucket", server.endpoint, "team-a", KEYS)
        store.check()
        assert abs(admin.server_time(store).timestamp() - time.time()) < 60
    assert server.objects == {}


def test_what_the_messages_advise_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    with serving("no-checksums") as server:
        Store("bucket", server.endpoint, "", KEYS).check()
    monkeypatch.setenv(STYLE_VARIABLE, "virtual")
    assert make_client("http://store.example:1", KEYS).meta.config.s3 == {"addressing_style": "virtual"}
    monkeypatch.setenv(STYLE_VARIABLE, "vhost")
    with pytest.raises(StoreError, match="'vhost'; accepted: path, virtual, auto"):
        Store("bucket", server.endpoint, "", KEYS).check()


# -- a fault at every request --


def whole_file(store: Store, folder: Path) -> None:
    (folder / "file").write_bytes(b"file" * 1000)
    ref = store.upload_file("file", folder / "file")
    assert store.download_file(ref, folder / "copy").read_bytes() == b"file" * 1000


def parts(store: Store, folder: Path) -> None:
    with store.open_write("parts") as writer:
        writer._part_bytes = 10
        writer.write(b"0123456789" * 3)
        ref = writer.close()
    assert store.get("parts") == b"0123456789" * 3
    assert ref.size == 30


def one_winner(store: Store, folder: Path) -> None:
    first, second = store.put_if_absent("once", b"first"), store.put_if_absent("once", b"second")
    assert (first, second) == (True, False)
    data, etag = store.get_with_etag("once") or (b"", "")
    assert data == b"first"
    assert store.replace_if_match("once", b"third", etag)
    assert not store.replace_if_match("once", b"fourth", etag)


def reading(store: Store, folder: Path) -> None:
    store.put("a/b", b"0123456789")
    assert (store.get("a/b"), store.get_range("a/b", 2, 3)) == (b"0123456789", b"234")
    assert (store.head("a/b") is None, store.head("a/none")) == (False, None)
    assert list(store.list("a/")) == ["a/b"]


def looking_after(store: Store, folder: Path) -> None:
    store.put("c/d", b"1")
    assert [(each.name, each.size) for each in admin.list_objects(store, "c/")] == [("c/d", 1)]
    admin.server_time(store)
    store.delete("c/d")
    store.delete("c/d")


SCENES: tuple[Callable[[Store, Path], None], ...] = (whole_file, parts, one_winner, reading, looking_after)


@pytest.fixture
def server() -> Iterator[FakeS3]:
    with serving() as made:
        yield made


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("scene", SCENES)
def test_a_fault_at_any_request_is_one_line_that_names_the_place(
    scene: Callable[[Store, Path], None], fault: str, server: FakeS3, tmp_path: Path
) -> None:
    """Or it changes nothing. And what was asked for works, once the fault has passed."""
    store = at(server)
    scene(store, tmp_path)
    count, said = server.asked, []
    for number in range(count):
        server.objects.clear()
        server.fail(fault, number)
        began = time.monotonic()
        try:
            scene(store, tmp_path)
        except StoreError as error:
            said.append(str(error))
        assert time.monotonic() - began < 20
    assert len(said) >= count / 2, "hardly any fault was noticed"
    assert [text for text in said if "\n" in text or "s3://bucket/" not in text or server.endpoint not in text] == []
    server.objects.clear()
    server.fail("", -1)
    scene(store, tmp_path)


def test_a_full_disk_is_named_and_leaves_nothing(server: FakeS3, tmp_path: Path) -> None:
    store = at(server)
    store.put("x", b"1" * 100_000)
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(StoreError, match=r"File too large|No space left"):
            store.download_file("x", tmp_path / "copy")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []
