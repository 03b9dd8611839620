"""What is said of work whose workers were lost, and whose slots a training takes."""

import pytest
from ray.exceptions import OutOfMemoryError, WorkerCrashedError

from pipeline.config.resources import WorkerResources
from pipeline.running.ray_workers import expert_slots, lost

KILLED = """1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.3, ID: 03) \
was 30.79GB used / 31.54GB limit (0.97)
OOM kill reason: Memory usage exceeded threshold
Selected to kill: (Task: job ID=01000000, task name=expert größe, pid=19725, actual memory used=4.04GB, worker ID=b3)
Top 10 memory users: PID	MEM(GB)	COMMAND"""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            KILLED,
            r"the last one on node 10\.0\.0\.3, where 30\.79 of 31\.54 GB were in use; this one used 4\.04 GB",
        ),
        ("killed, in other words", r"the last one, it reserves resources\.expert\.memory_gib=1\.5"),
    ],
)
def test_which_worker_needs_how_much(text: str, said: str) -> None:
    message = str(lost(OutOfMemoryError(text), "expert", 1.5))
    with pytest.raises(Exception, match=said):
        raise lost(OutOfMemoryError(text), "expert", 1.5)
    assert message.startswith("out of memory: Ray's memory monitor")
    assert "\n" not in message


def test_another_end() -> None:
    message = str(lost(WorkerCrashedError(), "node", 2))
    assert message.startswith("WorkerCrashedError: The worker died unexpectedly")
    assert "raise resources.node.memory_gib=2" in message
    assert "\n" not in message


def test_a_training_takes_as_many_slots_as_experts_would_fit_there() -> None:
    expert, two = WorkerResources(cpus=1), WorkerResources(cpus=2)
    assert expert_slots(expert, expert) == expert_slots(expert, two) == 1
    assert expert_slots(two, expert) == 2
    assert expert_slots(WorkerResources(cpus=0, gpus=1), WorkerResources(cpus=0, gpus=0.25)) == 4
    assert expert_slots(expert, WorkerResources(cpus=0)) == 1
