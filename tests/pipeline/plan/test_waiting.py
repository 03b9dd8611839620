"""Waiting for a cluster that scales from zero; figures that say what is true. Clocks and clusters are pretended."""

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given as over
from hypothesis import strategies as st

from infra.errors import ConfigError
from pipeline.config.resources import GIB, ResourcesConfig
from pipeline.plan import figures
from pipeline.plan.waiting import bundle, wait_for_room

HEAD = {"Alive": True, "Resources": {"memory": 8.0 * GIB}}
NODE = {"Alive": True, "Resources": {"CPU": 4.0, "memory": 16.0 * GIB}}
GONE = {"Alive": False, "Resources": {"CPU": 4.0, "memory": 16.0 * GIB}}


@dataclass
class Pretended:
    """A cluster that has other nodes from certain seconds on."""

    nodes: dict[float, list[dict[str, Any]]]
    now: float = 0.0
    asked: list[list[dict[str, float]]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def seen(self) -> list[dict[str, Any]]:
        return self.nodes[max(at for at in self.nodes if at <= self.now)]

    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    def wait(self, **resources: Any) -> list[dict[str, Any]]:
        return wait_for_room(
            ResourcesConfig(**resources), self.said.append, self.seen, lambda asked: self.asked.append(list(asked)),
            lambda: self.now, self.pass_time,
        )  # fmt: skip


def test_a_cluster_that_has_room_is_not_waited_for_and_not_asked() -> None:
    cluster = Pretended({0: [HEAD, NODE]})
    assert cluster.wait() == [HEAD, NODE]
    assert (cluster.now, cluster.asked, cluster.said) == (0, [], [])


def test_a_head_without_cpus_is_asked_for_nodes_and_waited_for_until_they_are_there() -> None:
    cluster = Pretended({0: [HEAD], 100: [HEAD, GONE], 150: [HEAD, NODE]})
    assert cluster.wait() == [HEAD, NODE]
    assert 150 <= cluster.now < 155
    assert cluster.asked == [
        [{"CPU": 1, "memory": 3 * GIB}, {"CPU": 1, "memory": 3 * GIB}, {"memory": 3 * GIB // 2}],
        [],  # and let go again
    ]
    first, *later = cluster.said
    assert "resources.expert asks for 1 CPUs, 0 GPUs and 3 GiB; no node of the Ray cluster has that" in first
    assert "at most 600 s (resources.cluster_wait_seconds)" in first
    assert later == [
        "still waiting for the Ray cluster, 60 of 600 s",
        "still waiting for the Ray cluster, 120 of 600 s",
    ]


REFUSED: dict[str, tuple[dict[str, Any], dict[float, list[dict[str, Any]]], float, str]] = {
    "no node ever": (
        {},
        {0: [HEAD]},
        600,
        "8.0 GiB); 600 s were waited for one (resources.cluster_wait_seconds). Lower",
    ),
    "no node in the time given": ({"cluster_wait_seconds": 7.5}, {0: [HEAD]}, 7.5, "; 7.5 s were waited for one"),
    "not to be waited for": ({"cluster_wait_seconds": 0}, {0: [HEAD]}, 0, "8.0 GiB). Lower the request or add nodes."),
    "nodes that are too small": ({"expert": {"gpus": 1}}, {0: [HEAD, NODE]}, 0, "asks for 1 CPUs, 1 GPUs and 3 GiB"),
    "nodes of the wrong kind": (
        {"expert": {"gpus": 1}},
        {0: [HEAD], 60: [HEAD, NODE]},
        600,
        "(the largest: 4 CPUs, 0 GPUs, 16.0 GiB); 600 s were waited for one",
    ),
    "nobody": ({"cluster_wait_seconds": 0}, {0: [GONE]}, 0, "(the largest: 0 CPUs, 0 GPUs, 0.0 GiB)"),
    "a little too much": ({"node": {"cpus": 0, "memory_gib": 16.01}}, {0: [NODE]}, 0, "16.01 GiB; no node of the Ray"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_missing_is_said_after_the_bound(case: str) -> None:
    resources, nodes, waited, message = REFUSED[case]
    cluster = Pretended(nodes)
    with pytest.raises(ConfigError) as caught:
        cluster.wait(**resources)
    assert message in str(caught.value)
    assert cluster.now == waited
    assert not cluster.asked or cluster.asked[-1] == []


def test_a_node_with_gpus_may_be_waited_for_beside_others() -> None:
    large = {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 1.0, "memory": 64.0 * GIB}}
    cluster = Pretended({0: [NODE], 30: [NODE, large]})
    assert cluster.wait(expert={"gpus": 0.5}, cluster_wait_seconds=60) == [NODE, large]
    assert (
        cluster.asked[0][0]
        == {"CPU": 1, "GPU": 0.5, "memory": 3 * GIB}
        == bundle(ResourcesConfig(expert={"gpus": 0.5}).expert)
    )


@over(st.floats(0, 1e9), st.floats(0, 1e9))
def test_figures_say_what_is_true(one: float, other: float) -> None:
    less, more = min(one, other), max(one, other)
    assert float(figures.there_is(less)) <= less + 1e-6
    assert float(figures.needed(more)) >= more - 1e-6
    if more - less > 1e-6:
        assert float(figures.there_is(less)) < float(figures.needed(more))


@pytest.mark.parametrize(
    ("value", "there", "need", "written"),
    [
        (3.0, "3.0", "3.0", "3"),
        (3.04, "3.0", "3.1", "3.04"),
        (2.999999, "2.9", "3.0", "2.999999"),
        (0.1, "0.1", "0.1", "0.1"),
        (1e-7, "0.0", "0.1", "1e-07"),
        (123456.789, "123456.7", "123456.8", "123456.789"),
    ],
)
def test_a_need_is_rounded_up_and_what_there_is_down(value: float, there: str, need: str, written: str) -> None:
    assert (figures.there_is(value), figures.needed(value), figures.given(value)) == (there, need, written)
