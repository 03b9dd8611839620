"""Headers of safetensors files: the library reads what is written here and the other way round; damage is one error."""

import contextlib
import json
import math
import struct
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from infra.errors import TensorFileError
from workers.tensors.header import (
    DTYPES,
    MAX_HEADER,
    Header,
    Row,
    header_bytes,
    header_room,
    library_order,
    read_header,
    widest_first,
)

NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(lambda name: name != "__metadata__")
TYPES, SHAPES = st.sampled_from(list(DTYPES.values())), st.lists(st.integers(0, 5), max_size=3).map(tuple)
ROWS = st.dictionaries(NAMES, st.tuples(TYPES, SHAPES), max_size=6).map(
    lambda found: [(name, dtype, shape) for name, (dtype, shape) in found.items()]
)
TEXT = st.text(st.characters(codec="utf-8"))
METADATA = st.dictionaries(TEXT, TEXT, max_size=3)


def read(data: bytes) -> Header:
    return read_header(lambda start, length: data[start : start + length], len(data))


def file_of(rows: list[Row], metadata: dict[str, str]) -> bytes:
    """With zeros for data."""
    return header_bytes(rows, metadata) + bytes(sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in rows))


@given(ROWS, METADATA)
def test_what_is_written_is_read_here_and_by_the_library(rows: list[Row], metadata: dict[str, str]) -> None:
    data = file_of(rows, metadata)
    header = read(data)
    assert header.metadata == metadata
    assert [(name, piece.dtype, piece.shape) for name, piece in header.pieces.items()] == rows
    assert header.start % 64 == 0
    found = load(data)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()} == {
        name: (dtype, shape) for name, dtype, shape in rows
    }


@given(ROWS, st.dictionaries(TEXT, TEXT, min_size=1, max_size=1))  # it keeps no order, and writes no empty table
def test_the_librarys_header_is_read_and_written(rows: list[Row], metadata: dict[str, str]) -> None:
    data = save({name: torch.zeros(shape, dtype=dtype) for name, dtype, shape in rows}, metadata)
    header = read(data)
    assert header.metadata == metadata
    assert {(name, piece.dtype, piece.shape) for name, piece in header.pieces.items()} == set(rows)
    ordered = library_order(rows)
    assert header_bytes(ordered, metadata, align=8, escape=False) == data[: header.start]
    assert [name for name, _, _ in ordered] == sorted(header.pieces, key=list(header.pieces).index)


@given(ROWS, METADATA)
def test_room_holds_the_header_and_the_library_accepts_the_padding(rows: list[Row], metadata: dict[str, str]) -> None:
    rows = [row for row in rows if len(row[2]) < 3]
    room = header_room([name for name, _, _ in rows], metadata)
    head = header_bytes(rows, metadata, room)
    data = head + file_of(rows, metadata)[len(header_bytes(rows, metadata)) :]
    assert len(head) == 8 + room
    assert read(data).metadata == metadata
    assert load(data).keys() == {name for name, _, _ in rows}


@given(ROWS)
def test_every_tensor_lies_aligned(rows: list[Row]) -> None:
    pieces = read(file_of(widest_first(rows), {})).pieces
    assert all(piece.start % piece.dtype.itemsize == 0 for piece in pieces.values())


def test_what_does_not_fit_is_not_written() -> None:
    with pytest.raises(TensorFileError, match="does not fit the 10 reserved"):
        header_bytes([], {"a": "b"}, room=10)
    with pytest.raises(TensorFileError, match="does not fit"):
        header_bytes([], {"a": "b" * MAX_HEADER})


def edited(edit: Callable[[dict[str, Any]], object]) -> bytes:
    data = save({"x": torch.ones(2), "y": torch.ones(3)}, {"a": "b"})
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes are too short"),
    "cut length": (b"1234567", "7 bytes are too short"),
    "longer than the file": (struct.pack("<Q", 100) + b"{}", "header of 100 bytes in a file of 10"),
    "absurd length": (b"\xff" * 20, "in a file of 20"),
    "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1", "run git lfs pull"),
    "GGUF": (b"GGUF\3\0\0\0" + b"\0" * 20, "a GGUF file"),
    "a page": (b"<!doctype html>", "a page of the web"),
    "no header": (struct.pack("<Q", 0), "not JSON"),
    "no JSON": (struct.pack("<Q", 2) + b"{]", "not JSON"),
    "no text": (struct.pack("<Q", 2) + b"\xff\xff", "not JSON"),
    "deep": (struct.pack("<Q", 100_000) + b"[" * 100_000, "not JSON"),
    "a list": (struct.pack("<Q", 2) + b"[]", "not a JSON object"),
    "a name twice": (struct.pack("<Q", 15) + b'{"a":{},"a":{}}', "a name appears twice"),
    "metadata": (edited(lambda h: h.update(__metadata__=3)), "metadata is not a table of strings"),
    "metadata of numbers": (edited(lambda h: h["__metadata__"].update(a=3)), "metadata is not a table of strings"),
    "no entry": (edited(lambda h: h.update(x=None)), "'x' is malformed"),
    "no type": (edited(lambda h: h["x"].pop("dtype")), "'x' is malformed"),
    "unknown type": (edited(lambda h: h["x"].update(dtype="C64")), "unsupported dtype"),
    "narrow type": (edited(lambda h: h["x"].update(dtype="F8_E4M3")), "F8_E4M3 is a type of quantised weights"),
    "type of another type": (edited(lambda h: h["x"].update(dtype=[])), "unsupported dtype"),
    "no shape": (edited(lambda h: h["x"].update(shape=2)), "'x' is malformed"),
    "three offsets": (edited(lambda h: h["x"].update(data_offsets=[0, 4, 8])), "'x' is malformed"),
    "fraction": (edited(lambda h: h["x"].update(shape=[2.0])), "no integers"),
    "truth": (edited(lambda h: h["x"].update(shape=[2, True])), "no integers"),
    "negative": (edited(lambda h: h["x"].update(shape=[-1, -2])), "no integers"),
    "too large": (edited(lambda h: h["x"].update(shape=[2**63])), "no integers"),
    "another shape": (edited(lambda h: h["x"].update(shape=[3])), "'x' does not fit"),
    "huge product": (edited(lambda h: h["x"].update(shape=[2**62] * 10_000)), "'x' does not fit"),
    "backwards": (edited(lambda h: h["x"].update(data_offsets=[8, 0])), "'x' does not fit"),
    "behind the end": (edited(lambda h: h["y"].update(data_offsets=[12, 24])), "'y' does not fit"),
    "overlap": (edited(lambda h: h["y"].update(data_offsets=[4, 16])), "overlaps another or leaves a gap"),
    "gap": (edited(lambda h: h.pop("x")), "overlaps another or leaves a gap"),
    "rest": (edited(lambda h: h.pop("y")), "12 bytes behind the last entry"),
}


@pytest.mark.parametrize(("data", "message"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_headers_are_one_kind_of_error(data: bytes, message: str) -> None:
    with pytest.raises(TensorFileError, match=message):
        read(data)


def test_a_file_that_ends_while_it_is_read() -> None:
    data = save({"x": torch.ones(2)})
    with pytest.raises(TensorFileError, match="got 5"):
        read_header(lambda start, length: data[start : start + length][:5], len(data))


@given(st.binary(max_size=60), st.integers(0, 60))
def test_whatever_the_bytes_are(data: bytes, length: int) -> None:
    for content in (data, struct.pack("<Q", min(length, len(data))) + data):
        with contextlib.suppress(TensorFileError):
            read(content)
