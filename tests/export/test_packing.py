"""Packed integers: exact, dense, and laid out as the page says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quiesce.export.packing import pack, packed_size, unpack

BITS = range(2, 9)
shapes = st.lists(st.integers(0, 9), max_size=4)


def integers(bits: int, signed: bool, shape: list[int], seed: int) -> Tensor:
    low = -(1 << (bits - 1)) if signed else 0
    drawn = torch.randint(low, low + (1 << bits), shape, generator=torch.Generator().manual_seed(seed))
    return drawn.to(torch.int8 if signed else torch.uint8)


def reference(values: Tensor, bits: int) -> bytes:
    """The stream as one large number, integer 0 in its lowest bits."""
    flat = values.flatten().tolist()
    number = sum((v % (1 << bits)) << (bits * i) for i, v in enumerate(flat))
    return number.to_bytes((len(flat) * bits + 7) // 8, "little")


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", BITS)
@given(shape=shapes, seed=st.integers(0, 2**31))
def test_round_trip_is_exact_and_dense(bits: int, signed: bool, shape: list[int], seed: int) -> None:
    values = integers(bits, signed, shape, seed)
    packed = pack(values, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (packed_size(values.numel(), bits),) == ((values.numel() * bits + 7) // 8,)
    assert bytes(packed.tolist()) == reference(values, bits)
    again = unpack(packed, bits, shape, signed)
    assert again.dtype == values.dtype and torch.equal(again, values)


@pytest.mark.parametrize("bits", BITS)
def test_layout_is_that_of_packbits(bits: int) -> None:
    values = integers(bits, False, [41], seed=3)
    stream = np.unpackbits(values.numpy()[:, None], axis=1, bitorder="little")[:, :bits]
    assert np.array_equal(np.packbits(stream, bitorder="little"), pack(values, bits).numpy())


def test_examples_of_the_page() -> None:
    assert pack(torch.tensor([1, 2, 3, 0, 2], dtype=torch.uint8), 2).tolist() == [0b00_11_10_01, 0b10]
    assert pack(torch.tensor([-1, 0, 3], dtype=torch.int8), 3).tolist() == [0b11_000_111, 0b0]


def test_any_memory_layout_is_packed_in_order_of_its_elements() -> None:
    values = integers(3, False, [5, 3, 2, 2], seed=1)
    for layout in (values.contiguous(memory_format=torch.channels_last), values.mT.contiguous().mT):
        assert torch.equal(pack(layout, 3), pack(values, 3))
    assert unpack(pack(values, 3), 3, values.shape, False).is_contiguous()


@pytest.mark.parametrize(
    ("packed", "bits", "shape"),
    [
        (torch.zeros(1, dtype=torch.uint8), 2, [5]),  # one byte short
        (torch.zeros(3, dtype=torch.uint8), 2, [5]),  # one byte too many
        (torch.zeros(2, dtype=torch.int8), 2, [5]),
        (torch.zeros(2, 1, dtype=torch.uint8), 2, [5]),
        (torch.tensor([0, 0b100], dtype=torch.uint8), 2, [5]),  # a bit behind the last integer
        (torch.zeros(2, dtype=torch.uint8), 2, [2**62, 2**62]),  # nothing of that size is allocated
    ],
)
def test_a_stream_that_does_not_fit_is_refused(packed: Tensor, bits: int, shape: list[int]) -> None:
    with pytest.raises(ValueError, match=r"integers of 2 bits are uint8|bits behind the last"):
        unpack(packed, bits, shape, signed=False)
