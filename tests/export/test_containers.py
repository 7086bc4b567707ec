"""Containers hold the same values as the quantizer, in the narrowest type that was asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quiesce.errors import ModelError
from quiesce.export.containers import WIDTHS, StoredWeight, store_weight
from quiesce.quant.fake_quantize import WeightFakeQuantize
from quiesce.quant.spec import QuantizationSpec


def quantizer(bits: int, symmetric: bool, ch_axis: int | None, seed: int) -> WeightFakeQuantize:
    generator = torch.Generator().manual_seed(seed)
    shape = (3, 4, 2)
    made = WeightFakeQuantize(QuantizationSpec(bits, symmetric, ch_axis), shape, torch.zeros(()))
    spec = made.spec
    made.scale.copy_(torch.rand(made.scale.shape, generator=generator) + 0.1)
    made.quantized.copy_(torch.randint(spec.quant_min, spec.quant_max + 1, shape, generator=generator))
    if not symmetric:
        made.zero_point.copy_(torch.randint(spec.quant_max + 1, made.zero_point.shape, generator=generator))
    return made


def values(stored: StoredWeight) -> np.ndarray:
    shape = [1] * stored.integers.ndim
    if stored.ch_axis is not None:
        shape[stored.ch_axis] = -1
    zero_point, scale = (p.reshape(shape) if p.ndim else p for p in (stored.zero_point, stored.scale))
    return (stored.integers - zero_point).astype(np.float32) * scale


@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    shifted=st.booleans(),
    ch_axis=st.sampled_from([None, 0, 1]),
    narrowest=st.sampled_from([2, 4, 8]),
    seed=st.integers(0, 2**16),
)
def test_the_values_are_the_quantizers(
    bits: int, symmetric: bool, shifted: bool, ch_axis: int | None, narrowest: int, seed: int
) -> None:
    source = quantizer(bits, symmetric, ch_axis, seed)
    stored = store_weight("layer", source, narrowest=narrowest, symmetric=shifted)
    assert np.array_equal(values(stored), source.dequantized_weight().numpy())
    assert stored.width in WIDTHS and stored.width >= narrowest
    low, high = (
        (-(1 << (stored.width - 1)), (1 << (stored.width - 1)) - 1) if stored.signed else (0, 2**stored.width - 1)
    )
    assert low <= stored.integers.min() and stored.integers.max() <= high
    if shifted:
        assert not stored.zero_point.any()
    else:
        assert stored.width == next(w for w in WIDTHS if w >= max(bits, narrowest))


@pytest.mark.parametrize("bits", range(2, 9))
def test_filled_containers_hold_the_same_values_on_a_finer_grid(bits: int) -> None:
    source = quantizer(bits, True, 0, 3)
    source.quantized[0, 0, 0] = source.spec.quant_min
    stored = store_weight("layer", source, narrowest=8, fill=True)
    assert np.array_equal(values(stored), source.dequantized_weight().numpy())
    assert stored.container == "INT8" and stored.integers.min() == -128
    assert np.array_equal(stored.scale * 2 ** (8 - bits), source.scale.numpy())


@pytest.mark.parametrize("ch_axis", [None, 0, 1])
def test_turned_weights_keep_their_channels(ch_axis: int | None) -> None:
    source = quantizer(4, False, ch_axis, 1)
    turned = store_weight("layer", source).permuted([2, 0, 1])
    assert np.array_equal(values(turned), source.dequantized_weight().permute(2, 0, 1).numpy())


def test_a_symmetric_weight_that_does_not_fit_names_its_layer() -> None:
    source = quantizer(8, False, 0, 0)
    source.quantized[0, 0, 0], source.zero_point[0] = 255, 0
    with pytest.raises(ModelError, match=r"the weight of features\.0 has 8 bits with zero points"):
        store_weight("features.0", source, narrowest=8, widest=8, symmetric=True)
