"""The quantized network as a module; what it answers once saved, loaded or exported is tested in ``export/``."""

from __future__ import annotations

import copy

import pytest
import torch

import quiesce
from quiesce.errors import ModelError
from tiny import Chain, images, recipe


def test_a_quantized_network_is_a_module_like_others() -> None:
    x = images(24)
    network = quiesce.quantize(Chain(1), x, recipe("nearest"))
    twin = copy.deepcopy(network).to("cpu").train()
    assert torch.equal(twin(x), network(x))
    assert not network(x).requires_grad
    assert list(network.parameters()) == []
    assert network(x[:1]).shape == (1, 10)
    with pytest.raises(ModelError, match="call it with: 1 positional"):
        network(x, x)
