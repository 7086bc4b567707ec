"""The quantized network as a module; what it answers once saved, loaded or exported is tested in ``export/``."""

from __future__ import annotations

import copy

import pytest
import torch

import quiesce
from quiesce.errors import ModelError
from tiny import Chain
from tiny import recipe as small

X = torch.randn(24, 3, 8, 8)


def test_a_quantized_network_is_a_module_like_others() -> None:
    network = quiesce.quantize(Chain(1), X, small("nearest"))
    twin = copy.deepcopy(network).to("cpu").train()
    assert torch.equal(twin(X), network(X))
    assert not network(X).requires_grad
    assert list(network.parameters()) == []
    assert network(X[:1]).shape == (1, 10)
    with pytest.raises(ModelError, match="call it with: 1 positional"):
        network(X, X)
