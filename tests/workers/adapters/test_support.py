"""Supports: encodings round trip, sizes, block geometry, and refusal of hostile data."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import AdapterError, ConfigError
from workers.adapters.support import (
    SparseTensor,
    SupportSpec,
    added,
    block_runs,
    decode_blocks,
    decode_support,
    encode_support,
    expand_blocks,
    find_blocks,
)


@st.composite
def supports(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    numel = draw(st.integers(1, 4000))
    density = draw(st.sampled_from([0.0, 0.002, 0.05, 0.5, 1.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return (torch.rand(numel, generator=generator) < density).nonzero().view(-1), numel


@given(supports())
@settings(max_examples=80, deadline=None)
def test_round_trip(case: tuple[torch.Tensor, int]) -> None:
    indices, numel = case
    encoding, data = encode_support(indices, numel)
    assert torch.equal(decode_support(encoding, data, numel, indices.numel()), indices)


@pytest.mark.parametrize("gap", [0, 1, 253, 254, 255, 256, 509, 510, 511, 100_000])
def test_gap_lengths(gap: int) -> None:
    indices = torch.tensor([gap, 2 * gap + 1])
    encoding, data = encode_support(indices, 10_000_000)
    assert encoding == "gap8"
    assert data.numel() == 2 + 2 * (gap // 255)
    assert torch.equal(decode_support(encoding, data, 10_000_000, 2), indices)


def test_the_smallest_encoding_is_chosen() -> None:
    numel = 8000
    assert encode_support(torch.arange(numel), numel)[0] == "dense"
    assert encode_support(torch.arange(0, numel, 2), numel)[0] == "bitmap"
    encoding, data = encode_support(torch.arange(0, numel, 20), numel)
    assert (encoding, data.numel()) == ("gap8", 400)


@given(
    st.sampled_from(["gap8", "bitmap", "dense", "blocks", "x"]),
    st.binary(max_size=64),
    st.integers(-2, 2**60),
    st.integers(-2, 600),
)
@settings(max_examples=300, deadline=None)
def test_hostile_data_is_valid_or_refused(encoding: str, data: bytes, numel: int, count: int) -> None:
    raw = torch.tensor(list(data), dtype=torch.uint8)
    if encoding == "dense" and count == numel:
        return
    try:
        indices = decode_support(encoding, raw, numel, count)
    except AdapterError:
        return
    assert indices.numel() == count
    SparseTensor((numel,), indices, torch.zeros(count)).check()


def test_blocks_expand_to_their_elements() -> None:
    shape, block = (6, 8), (3, 2)
    ids = torch.tensor([1, 4, 7])
    mask = torch.zeros(2, 4, 3, 2)
    mask.view(8, 3, 2)[ids] = 1
    dense = mask.permute(0, 2, 1, 3).reshape(6, 8)
    indices = expand_blocks(ids, shape, block)
    assert torch.equal(indices, dense.view(-1).nonzero().view(-1))
    assert torch.equal(find_blocks(indices, shape, block, "w"), ids)
    assert torch.equal(decode_blocks(ids.to(torch.int32), shape, block), indices)
    starts, order = block_runs(torch.tensor([7, 1]), shape, block)
    assert bool((starts[1:] > starts[:-1]).all())
    assert sorted(order.tolist()) == list(range(6))


def test_bad_blocks_are_refused() -> None:
    with pytest.raises(AdapterError, match="union of whole"):
        find_blocks(torch.tensor([0, 1, 2]), (4, 4), (2, 2), "w")
    for ids in ([3, 1], [0, 0], [-1], [4]):
        with pytest.raises(AdapterError):
            decode_blocks(torch.tensor(ids, dtype=torch.int32), (4, 4), (2, 2))
    with pytest.raises(ConfigError, match=r"proj.*3x3.*4x4"):
        SupportSpec((4, 4), torch.tensor([0]), (3, 3)).check("proj")


@pytest.mark.parametrize("bad", [[2, 1], [1, 1], [-1, 2], [0, 9]])
def test_unsorted_or_out_of_range_positions(bad: list[int]) -> None:
    with pytest.raises(AdapterError, match="w"):
        SparseTensor((3, 3), torch.tensor(bad), torch.zeros(2)).check("w")
    with pytest.raises(ConfigError):
        SupportSpec((3, 3), torch.tensor(bad)).check("w")


@given(st.lists(supports(), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_changes_of_one_weight_add_up(cases: list[tuple[torch.Tensor, int]]) -> None:
    numel = max(numel for _, numel in cases)
    parts = [SparseTensor((numel,), indices, torch.rand(indices.numel())) for indices, _ in cases]
    parts += [SparseTensor((numel,), torch.arange(numel), torch.rand(numel))] if numel % 2 else []
    total = added(parts)
    total.check()
    assert set(total.indices.tolist()) == {at for part in parts for at in part.indices.tolist()}
    dense = [torch.zeros(numel).index_add(0, part.indices, part.values) for part in parts]
    assert torch.equal(torch.zeros(numel).index_add(0, total.indices, total.values), sum(dense[1:], dense[0]))
