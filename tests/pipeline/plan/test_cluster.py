"""A Ray cluster that is not there is refused in time, and Ray is told when to give up."""

import socket
import time

import pytest

from pipeline.plan.cluster import ClusterError, check_answers

NOBODY = "127.0.0.1:1"
REFUSED = {
    "nothing listens": (NOBODY, r"no Ray head answers at RAY_ADDRESS=127\.0\.0\.1:1 within 1 s \(Connection refused\)"),
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
def test_what_ray_looks_up_itself_is_left_to_it(address: str) -> None:
    check_answers(address)
