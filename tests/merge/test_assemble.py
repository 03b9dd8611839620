"""Parts of a root become one adapter file: the very bytes that one writer makes."""

import pytest

from infra.errors import AdapterError, MergeError
from merge.adapter_file import AdapterWriter
from merge.assemble import assemble
from merge.reduce import Part, reduce_root
from merge.specs import Candidate, plan_reductions
from tests.merge.experts import children, load, make_experts, same
from workers.ranged_file import LocalFile


def make_parts(folder, paths, candidate, of: int):
    """The files of a root's parts, and of the whole."""
    spec = plan_reductions([candidate])[0].spec
    files = []
    for index in range(of):
        files.append(folder / f"part-{of}-{index}")
        reduce_root(children(paths), spec, {candidate: AdapterWriter(files[-1])}, part=Part(index, of))
    reduce_root(children(paths), spec, {candidate: AdapterWriter(folder / "whole")})
    return [LocalFile(path) for path in files], folder / "whole"


@pytest.mark.parametrize("method", ["mean", "ties"])
@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_parts_become_the_file_of_one_writer(tmp_path, method, parts):
    """Five parts of three tensors: some are empty."""
    paths = make_experts(tmp_path, ["a", "b", "c"], skip="l1.v.weight")
    files, whole = make_parts(tmp_path, paths, Candidate(method), parts)
    with open(tmp_path / "joined", "wb") as out:
        size = assemble(files, out.write)
    assert (tmp_path / "joined").read_bytes() == whole.read_bytes()
    assert size == whole.stat().st_size
    assert same(load(tmp_path / "joined"), load(whole))


def test_parts_that_do_not_belong_together_are_refused_before_writing(tmp_path):
    paths = make_experts(tmp_path, ["a", "b", "c"])
    (first, second), whole = make_parts(tmp_path, paths, Candidate("mean"), 2)
    (tmp_path / "x").mkdir()
    (_, other), _ = make_parts(tmp_path / "x", paths, Candidate("task_arithmetic"), 2)
    written: list[bytes] = []
    for parts, message in (
        ([], "at least one"),
        ([first, other], "another merge"),
        ([first, first], "an earlier part"),
    ):
        with pytest.raises(MergeError, match=message):
            assemble(parts, written.append)
    second.path.write_bytes(second.path.read_bytes()[:-1])
    with pytest.raises(AdapterError):
        assemble([first, LocalFile(second.path)], written.append)
    assert not written
    assert whole.is_file()
