import pytest
import torch

from quiesce.quant.spec import QuantizationSpec


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_grid_of_b_bits_has_2_to_the_b_integers_that_fit_its_dtype(bits: int) -> None:
    for symmetric in (False, True):
        spec = QuantizationSpec(bits, symmetric)
        assert spec.quant_max - spec.quant_min + 1 == 2**bits
        assert torch.iinfo(spec.dtype).min <= spec.quant_min <= 0 < spec.quant_max <= torch.iinfo(spec.dtype).max
    assert QuantizationSpec(bits).quant_min == 0
    assert QuantizationSpec(bits, symmetric=True).quant_min == -(2 ** (bits - 1))


def test_broadcast_puts_channels_on_their_axis() -> None:
    scale = torch.arange(3.0)
    assert QuantizationSpec(4, ch_axis=0).broadcast(scale, 4).shape == (3, 1, 1, 1)
    assert QuantizationSpec(4, ch_axis=1).broadcast(scale, 3).shape == (1, 3, 1)
    assert QuantizationSpec(4).broadcast(torch.tensor(2.0), 4).shape == ()
