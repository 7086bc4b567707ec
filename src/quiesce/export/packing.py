"""Integers of 2 to 8 bits as a dense stream of bits, least significant bit first.

Bit ``j`` of integer ``i`` is bit ``i · bits + j`` of the stream, and bit ``k`` of the stream is bit ``k mod 8`` of byte
``⌊k / 8⌋``. Signed integers are in two's complement. Bits left over in the last byte are 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

GROUP = 8
"""Integers that are packed together: at any number of bits they fill whole bytes, and one 64-bit word holds them."""


def packed_size(count: int, bits: int) -> int:
    """Return the bytes that ``count`` integers of ``bits`` bits take."""
    return -(-count * bits // 8)


def pack(integers: Tensor, bits: int) -> Tensor:
    """Return ``integers`` (uint8, or int8 for signed ones, any shape) as a stream of bytes, uint8 [packed_size].

    Integers are taken in row-major order, and must fit ``bits`` bits: of larger ones, only the low bits are kept.
    """
    flat = integers.reshape(-1)
    groups = flat.new_zeros(-(-flat.numel() // GROUP), GROUP)
    groups.view(-1)[: flat.numel()] = flat
    words = groups.new_zeros(len(groups), dtype=torch.int64)
    for i in range(GROUP):
        words |= (groups[:, i].to(torch.int64) & _mask(bits)) << (bits * i)
    octets = torch.stack([(words >> (8 * j) & 0xFF).to(torch.uint8) for j in range(bits)], dim=1)
    return octets.view(-1)[: packed_size(flat.numel(), bits)].clone()


def unpack(packed: Tensor, bits: int, shape: Sequence[int], signed: bool) -> Tensor:
    """Return the integers of ``shape`` (int8 if ``signed``, else uint8) that :func:`pack` made ``packed`` of.

    Raises:
        ValueError: ``packed`` is no stream of as many integers as ``shape`` has. Nothing is allocated before.
    """
    count = math.prod(shape)
    if packed.dtype != torch.uint8 or tuple(packed.shape) != (packed_size(count, bits),):
        raise ValueError(
            f"{list(shape)} integers of {bits} bits are uint8 [{packed_size(count, bits)}], "
            f"not {packed.dtype} {list(packed.shape)}"
        )
    if count * bits % 8 and int(packed[-1]) >> (count * bits % 8):
        raise ValueError("bits behind the last integer are not 0")
    octets = packed.new_zeros(-(-count // GROUP), bits)
    octets.view(-1)[: len(packed)] = packed
    words = packed.new_zeros(len(octets), dtype=torch.int64)
    for j in range(bits):
        words |= octets[:, j].to(torch.int64) << (8 * j)
    integers = torch.stack([(words >> (bits * i) & _mask(bits)).to(torch.uint8) for i in range(GROUP)], dim=1)
    integers = integers.view(-1)[:count].reshape(tuple(shape))
    if not signed:
        return integers.contiguous()
    sign = 1 << (bits - 1)
    return ((integers ^ sign) - sign).view(torch.int8)


def _mask(bits: int) -> int:
    return (1 << bits) - 1
