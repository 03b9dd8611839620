"""A Ray cluster that is not there is refused in time, and Ray is told when to give up."""

import socket
import time
from pathlib import Path

import pytest
from ray._private.utils import read_ray_address

from pipeline.plan.cluster import ClusterError, _on_this_machine, check_answers

NOBODY = "127.0.0.1:1"
REFUSED = {
    "nothing listens": (NOBODY, r"no Ray head answers at 127\.0\.0\.1:1 \(RAY_ADDRESS\) .*\(Connection refused\)"),
    "no such host": ("nowhere.invalid:6379", r"no Ray head answers.*(not known|resolution)"),
    "the dashboard's address": ("http://127.0.0.1:8265", "accepted: host:port.*RAY_API_SERVER_ADDRESS"),
    "no port": ("head", "RAY_ADDRESS is 'head'; accepted: host:port"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    address, text = REFUSED[case]
    began = time.monotonic()
    with pytest.raises(ClusterError, match=text) as refused:
        check_answers(address, seconds=1)
    assert time.monotonic() - began < 30
    assert "\n" not in str(refused.value)


def test_a_head_that_says_nothing_is_refused_too() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ClusterError, match="something listens there, but no Ray head"):
            check_answers(address, seconds=1)


@pytest.mark.parametrize("address", ["", "auto", "local", "ray://head:10001"])
def test_what_ray_looks_up_itself_is_left_to_it(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    check_answers(address)


def test_a_head_that_was_killed_is_not_asked_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray keeps the address of the last head that was started here: `ray stop` removes it, and nothing else does."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(NOBODY)
    assert read_ray_address() == NOBODY
    with pytest.raises(ClusterError, match=r"no Ray head answers at 127\.0\.0\.1:1"):
        check_answers("auto", seconds=1)
    assert _on_this_machine() == "local"
