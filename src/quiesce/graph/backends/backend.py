"""The description of a backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Backend:
    """Which tensors a target quantizes, in terms of ATen operators."""

    name: str
    weight_ops: frozenset[Any]
    """Operators whose weight and input are quantized."""
    input_ops: frozenset[Any] = frozenset()
    """Further operators (additions, concats, pools) all of whose tensor inputs are quantized."""
