"""Files written tensor by tensor: what the library writes, what it reads, and nothing of what was not finished."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save

from infra.errors import TensorFileError
from tests.workers.tensors.test_header import NAMES
from workers.tensors.header import DTYPES, MAX_HEADER
from workers.tensors.writer import TensorWriter, raw_bytes, save_tensors, write_tensors


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    made = {}
    for name in draw(st.lists(NAMES, unique=True, max_size=6)):
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        values = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
        made[name] = values.to(draw(st.sampled_from(list(DTYPES.values()))))
    return made


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in wanted.items()
    )


@given(tensors())
def test_the_librarys_bytes(tmp_path_factory: pytest.TempPathFactory, given: dict[str, torch.Tensor]) -> None:
    path = tmp_path_factory.mktemp("f") / "f"
    save_tensors(path, given, {"a": "é"})
    assert path.read_bytes() == save(given, {"a": "é"})


@given(tensors())
def test_the_library_reads_every_way_of_writing(
    tmp_path_factory: pytest.TempPathFactory, given: dict[str, torch.Tensor]
) -> None:
    folder = tmp_path_factory.mktemp("f")
    rows = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in given.items()]
    write_tensors(folder / "known", rows, lambda name: [raw_bytes(given[name])])
    with TensorWriter(folder / "unknown", 4000) as writer:
        for name, tensor in given.items():
            writer.write(name, tensor)
        writer.close({"format": "pt"})
    for path in folder.iterdir():
        assert same(load_file(path), given)
        with safe_open(path, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}


def test_shared_memory_and_strides(tmp_path: Path) -> None:
    square = torch.arange(6.0).view(2, 3)
    given = {"a": square, "b": square, "c": square.T, "d": square[:, 1:]}
    save_tensors(tmp_path / "f", given, {})
    assert same(load_file(tmp_path / "f"), given)


def test_nothing_is_left_of_what_fails(tmp_path: Path) -> None:
    def content(name: str) -> list[bytes]:
        raise RuntimeError(name)

    with pytest.raises(RuntimeError):
        write_tensors(tmp_path / "f", [("x", torch.float32, (1,))], content)
    with pytest.raises(TensorFileError, match="too many tensors"):
        TensorWriter(tmp_path / "f", MAX_HEADER + 1)
    with TensorWriter(tmp_path / "f", 100) as writer:
        writer.write("x", torch.ones(1))
    assert list(tmp_path.iterdir()) == []
