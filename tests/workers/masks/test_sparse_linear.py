"""Gradients, reads and writes of a support against autograd's dense weight gradient and plain indexing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from workers.adapters.support import Block, SupportSpec
from workers.masks import sparse_linear
from workers.masks.sparse_linear import Part, Slot, block_gradient, dense_is_cheaper

OUT, IN = 12, 8
KINDS: dict[str, Block | None] = {
    "element": None,
    "row": (1, IN),
    "column": (OUT, 1),
    "block": (4, 2),
    "one": (1, 1),
    "strip": (2, IN),
    "everything": (OUT, IN),
}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11, torch.bfloat16: 4e-2}


def units_of(block: Block | None) -> int:
    return OUT * IN // (1 if block is None else block[0] * block[1])


def make_slot(block: Block | None, chosen: list[torch.Tensor], dtype: torch.dtype = torch.float32) -> Slot:
    """A slot whose parts hold ``chosen`` units one after the other, with a gap before each."""
    torch.manual_seed(0)
    module = nn.Linear(IN, OUT, bias=False).to(dtype).requires_grad_(False)
    area = 1 if block is None else block[0] * block[1]
    parts, cursor = [], 3
    for units in chosen:
        parts.append(Part(units.to(torch.int32), cursor, cursor + units.numel() * area))
        cursor = parts[-1].stop + 3
    flat_grad = torch.zeros(cursor, dtype=torch.promote_types(dtype, torch.float32))
    return Slot("m", module, block, parts, flat_grad, lambda: None, lambda weight, dtype: None)


def in_layout(slot: Slot, dense: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    """The unit layout by plain slicing: unit after unit, each row-major."""
    height, width = slot.block or (1, 1)
    columns = IN // width
    found = [
        dense[u // columns * height : (u // columns + 1) * height, u % columns * width : (u % columns + 1) * width]
        for u in units.tolist()
    ]
    return torch.cat([dense.new_empty(0), *(tile.reshape(-1) for tile in found)])


def dense_gradient(weight: torch.Tensor, x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    leaf = weight.detach().clone().requires_grad_(True)
    nn.functional.linear(x, leaf).backward(grad)
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("tokens", [(5,), (2, 3), (2, 3, 300), (0,)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.0, 0.2, 0.6, 1.0])
def test_gradient_sums_over_backward_passes(
    kind: str, share: float, tokens: tuple[int, ...], dtype: torch.dtype
) -> None:
    block = KINDS[kind]
    order = torch.randperm(units_of(block), generator=torch.Generator().manual_seed(1))
    first = order[: round(share * units_of(block))].sort().values
    second = order[first.numel() : first.numel() + 1].sort().values  # empty when the first holds everything
    slot = make_slot(block, [first, second, order[:0]], dtype)
    want = torch.zeros(OUT, IN, dtype=slot.flat_grad.dtype)
    for _ in range(2):
        x, grad = torch.randn(*tokens, IN, dtype=dtype), torch.randn(*tokens, OUT, dtype=dtype)
        slot.accumulate(grad, x)
        want += dense_gradient(slot.weight, x, grad)
    largest = float(want.abs().max()) or 1.0
    covered = torch.zeros(slot.flat_grad.numel(), dtype=torch.bool)
    for part in slot.parts:
        found = slot.flat_grad[part.start : part.stop]
        torch.testing.assert_close(found, in_layout(slot, want, part.units), rtol=0, atol=TOLERANCE[dtype] * largest)
        covered[part.start : part.stop] = True
    assert not slot.flat_grad[~covered].any()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_written_values_are_read_back_and_nothing_else_changes(data: st.DataObject) -> None:
    block = KINDS[data.draw(st.sampled_from(sorted(KINDS)))]
    total = units_of(block)
    size = data.draw(st.sampled_from([0, 1, total // 2, total]))
    units = torch.randperm(total)[:size].sort().values
    slot = make_slot(block, [units])
    before = slot.weight.detach().clone()
    part = slot.parts[0]
    version = slot.weight._version
    read = slot.gather(slot.weight.detach(), part.units)
    assert torch.equal(read, in_layout(slot, before, units))
    values = torch.randn(read.numel())
    slot.write(part.units, values)
    assert slot.weight._version > version
    assert torch.equal(read, in_layout(slot, before, units))  # what was read is a copy
    want = before.clone().view(-1)
    want[SupportSpec((OUT, IN), units, block).indices()] = 0.0
    changed = slot.weight.detach().clone()
    assert torch.equal(in_layout(slot, changed, units), values)
    changed.view(-1)[SupportSpec((OUT, IN), units, block).indices()] = 0.0
    assert torch.equal(changed.view(-1), want)


@pytest.mark.parametrize("kind", ["row", "column", "block", "everything"])
def test_only_elements_make_a_dense_gradient(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> torch.Tensor:
        raise AssertionError("a dense gradient was computed")

    monkeypatch.setattr(sparse_linear, "weight_gradient", refuse)
    slot = make_slot(KINDS[kind], [torch.tensor([0])])
    assert kind != "block" or not dense_is_cheaper((16, 16), 0.05)
    monkeypatch.setattr(sparse_linear, "dense_is_cheaper", lambda *_: False)
    slot.accumulate(torch.randn(5, OUT), torch.randn(5, IN))
    assert slot.flat_grad.any()
    with pytest.raises(AssertionError):
        make_slot(None, [torch.tensor([0])]).accumulate(torch.randn(5, OUT), torch.randn(5, IN))


def test_a_module_without_positions_costs_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_linear, "weight_gradient", lambda *_: pytest.fail("a dense gradient was computed"))
    slot = make_slot(None, [])
    slot.accumulate(torch.randn(5, OUT), torch.randn(5, IN))
    assert not slot.flat_grad.any()


@pytest.mark.parametrize("tokens", [100, 600])
@pytest.mark.parametrize("threads", [1, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_way_to_multiply_blocks_gives_the_same(
    tokens: int, threads: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looped and batched, in several chunks of blocks and of tokens, from strided operands."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(sparse_linear, "CPU_BMM_ELEMENTS", 2000)
    grad = torch.randn(24, tokens).t().to(dtype)
    x = torch.randn(12, tokens).t().to(dtype)
    ids = torch.tensor([0, 3, 4, 9, 13, 17], dtype=torch.int32)
    found = torch.ones(6, 4, 4)
    block_gradient(grad, x, ids, (4, 4), found)
    dense = (grad.double().t() @ x.double()).view(6, 4, 3, 4).permute(0, 2, 1, 3).reshape(18, 4, 4)
    want = 1 + dense[ids.long()]
    torch.testing.assert_close(found.double(), want, rtol=0, atol=TOLERANCE[dtype] * float(want.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_waits_for_the_device(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors without data, whatever would copy to the host or depend on values raises."""
    monkeypatch.setattr(sparse_linear, "dense_is_cheaper", lambda *_: False)
    block = KINDS[kind]
    for size in {1, units_of(block)}:
        slot = make_slot(block, [torch.arange(size)])
        slot.module.to("meta")
        slot.flat_grad = slot.flat_grad.to("meta")
        part = slot.parts[0]
        part.units = part.units.to("meta")
        slot.accumulate(torch.randn(5, OUT, device="meta"), torch.randn(5, IN, device="meta"))
        slot.write(part.units, slot.gather(slot.weight.detach(), part.units))
    with pytest.raises((RuntimeError, NotImplementedError)):
        part.units.tolist()
