"""The allow-list of operators that a saved graph may hold."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from quiesce.errors import ModelError

_PYTHON = {
    f"operator.{f.__name__}": f for f in (operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv)
}


@cache
def operators() -> MappingProxyType[str, Any]:
    """Return the allowed operators by name: pure ATen functions listed in operators.txt, and arithmetic on sizes.

    None of them draws random numbers (attention and recurrent layers only with dropout, see
    :func:`draws_random_numbers`), writes to its arguments, or touches anything but tensors. Names that this version of
    torch does not have are left out.
    """
    text = resources.files("quiesce.export").joinpath("operators.txt").read_text(encoding="utf-8")
    names = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    found = {name: _resolve(name) for name in names}
    return MappingProxyType(_PYTHON | {name: op for name, op in found.items() if op is not None})


def _resolve(name: str) -> Any:
    _, packet, overload = name.split(".")
    return getattr(getattr(torch.ops.aten, packet, None), overload, None)


def draws_random_numbers(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """True for a call with dropout: attention and recurrent layers are on the list, and random only with it.

    Attention has ``dropout_p`` above 0 then, recurrent layers ``train``.
    """
    names = [a.name for a in target._schema.arguments] if hasattr(target, "_schema") else []
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return bool(given.get("dropout_p", 0.0) != 0.0 or ("dropout" in names and given.get("train", False)))


def operator_name(node: fx.Node) -> str:
    """Return the name under which a node's operator is saved.

    Raises:
        ModelError: it is not on the list, or called with dropout.
    """
    for name, target in operators().items():
        if target is node.target and not draws_random_numbers(target, node.args, node.kwargs):
            return name
    raise ModelError(
        f"operator {node.target} of node {node.name} is not among those that can be saved (export/operators.txt)."
    )
