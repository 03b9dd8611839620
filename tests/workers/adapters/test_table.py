"""Tables of contents in memory: what goes in comes out, in a fraction of the bytes."""

import json
import math
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import AdapterError
from workers.adapters.support import SparseTensor
from workers.adapters.table import ENCODINGS, LowRankRow, Row, SparseRow, Table
from workers.adapters.writer import AdapterMeta, AdapterReader, save_adapter
from workers.tensors.header import Piece
from workers.tensors.source import FileSource

NUMBER = st.integers(0, 2**48)


@st.composite
def rows(draw: st.DrawFn) -> Row:
    if draw(st.booleans()):
        out, into, rank = draw(NUMBER), draw(NUMBER), draw(NUMBER)
        scale = draw(st.floats(-(2.0**20), 2.0**20))
        kinds = st.sampled_from([torch.bfloat16, torch.float32])
        a, b = Piece(draw(kinds), (rank, into), draw(NUMBER)), Piece(draw(kinds), (out, rank), draw(NUMBER))
        return LowRankRow((out, into), scale, a, b)
    count = draw(NUMBER)
    support = draw(st.none() | st.builds(Piece, st.sampled_from([torch.uint8, torch.int32]), st.tuples(NUMBER), NUMBER))
    values = Piece(draw(st.sampled_from([torch.bfloat16, torch.float32])), (count,), draw(NUMBER))
    shape = tuple(draw(st.lists(NUMBER, min_size=1, max_size=8)))
    block = draw(st.none() | st.tuples(NUMBER, NUMBER))
    return SparseRow(shape, count, draw(st.sampled_from(ENCODINGS)), block, support, values)


@given(st.dictionaries(st.text(), rows(), max_size=6))
def test_rows_come_back_as_they_went_in(given_rows: dict[str, Row]) -> None:
    table = Table(given_rows)
    assert dict(table) == given_rows
    assert list(table) == table.names == sorted(given_rows)
    assert len(table) == len(given_rows)
    for name, row in given_rows.items():
        assert name in table
        positions = math.prod(row.shape) if isinstance(row, LowRankRow) else row.count
        assert (table.shape(name), table.count(name)) == (row.shape, positions)
    assert "missing\0" not in table
    assert 3 not in table
    with pytest.raises(KeyError):
        table["missing\0"]


def test_blocks_of_absurd_sides_are_refused(tmp_path: Path) -> None:
    tensor = SparseTensor((4, 4), torch.tensor([], dtype=torch.int64), torch.tensor([]))
    save_adapter(tmp_path / "a", {"w": tensor}, AdapterMeta("b" * 64))
    data = (tmp_path / "a").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    meta = json.loads(header["__metadata__"]["adapter"])
    meta["tensors"]["w"] |= {"encoding": "blocks", "block": [10**30, 1], "count": 0}
    header["__metadata__"]["adapter"] = json.dumps(meta)
    header["w.support"] |= {"dtype": "I32"}
    text = json.dumps(header).encode()
    (tmp_path / "b").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    with pytest.raises(AdapterError, match="block size"):
        AdapterReader(FileSource(tmp_path / "b"))
