"""The stateful shells around the numerics: one module per quantized tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from quiesce.errors import ModelError
from quiesce.quant.draws import Draws
from quiesce.quant.functional import dequantize
from quiesce.quant.grids import GRIDS
from quiesce.quant.kernels import NO_CLIP, fused_fake_quantize, is_dense, mixed
from quiesce.quant.rounding import ROUNDINGS
from quiesce.quant.rounding.nearest import nearest
from quiesce.quant.rounding.rounding import Rounding
from quiesce.quant.spec import QuantizationSpec


class WeightFakeQuantize(nn.Module):
    """Stands for one weight as integers. The float weight passes through it untouched while it is off.

    ``scale`` and ``zero_point`` have shape [channels] (or [] per tensor), ``quantized`` the weight's shape. While
    ``rounding`` is set, the weight is the soft-rounded one that is being learned. ``held`` is the dequantized weight,
    kept from :meth:`hold` until the grid or the integers change.
    """

    scale: Tensor
    zero_point: Tensor
    quantized: Tensor
    held: Tensor | None

    def __init__(self, spec: QuantizationSpec, shape: torch.Size | tuple[int, ...], like: Tensor) -> None:
        super().__init__()
        self.spec = spec
        self.enabled = True
        self.rounding: Rounding | None = None
        channels = () if spec.ch_axis is None else (shape[spec.ch_axis],)
        self.register_buffer("scale", like.new_ones(channels))
        self.register_buffer("zero_point", like.new_zeros(channels))
        self.register_buffer("quantized", torch.zeros(shape, dtype=spec.dtype, device=like.device))
        self.register_buffer("held", None, persistent=False)

    def forward(self, weight: Tensor | None = None) -> Tensor:
        if not self.enabled:
            if weight is None:
                raise ModelError(
                    "this network was loaded from a file without float weights; its quantizers can't be off."
                )
            return weight
        if self.rounding is not None:
            soft: Tensor = self.rounding()
            return soft
        return self.dequantized_weight() if self.held is None else self.held

    def hold(self) -> None:
        """Keep the dequantized weight instead of computing it in each forward pass."""
        self.held = self.dequantized_weight()

    def release(self) -> None:
        self.held = None

    def set_parameters(self, scale: Tensor, zero_point: Tensor, weight: Tensor) -> None:
        """Set the grid and round ``weight`` to nearest on it."""
        self.release()
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)
        self.round_to_nearest(weight)

    def round_to_nearest(self, weight: Tensor) -> None:
        """Set the integers to the nearest ones of ``weight`` on the grid as it is."""
        self.release()
        self.quantized.copy_(nearest(weight, self.spec, self.scale, self.zero_point))

    def start_rounding(self, name: str, weight: Tensor, warm: bool, *, fused: bool = False) -> Rounding:
        """Attach and return the learned rounding ``name``; ``warm`` starts it from the integers held now."""
        start = self.quantized if warm else None
        self.rounding = ROUNDINGS[name](weight, self.spec, self.scale, self.zero_point, start, fused=fused)
        return self.rounding

    def harden(self) -> None:
        """Turn the learned rounding into integers, take over its scale, and drop it."""
        if self.rounding is not None:
            self.release()
            self.quantized.copy_(self.rounding.harden())
            self.scale.copy_(self.rounding.learned_scale(self.scale))
            self.rounding = None

    def quantized_weight(self) -> Tensor:
        """Return the integers (int8 or uint8, the weight's shape): what exporters read, with scale and zero point."""
        return self.quantized

    def dequantized_weight(self) -> Tensor:
        ndim = self.quantized.ndim
        return dequantize(
            self.quantized, self.spec.broadcast(self.scale, ndim), self.spec.broadcast(self.zero_point, ndim)
        )


class Drop:
    """QDrop (arXiv 2203.05740): while optimizing, an element stays unquantized with probability ``prob``.

    ``prob`` is resolved to 1/256: an element is left when its random byte is below ``share`` (0-dim).
    """

    def __init__(self, prob: float, draws: Draws) -> None:
        self.draws = draws
        # 256 does not fit a byte: compared with one, it would be 0.
        self.share = torch.tensor(float(min(round(256 * prob), 255)), device=draws.device)

    def mix(self, number: int, quantized: Tensor, unquantized: Tensor) -> Tensor:
        """Return, element by element, ``unquantized`` with probability ``prob``, else ``quantized``: tensor ``number``
        of the unit."""
        key = self.draws.key(number, quantized)
        needs_grad = quantized.requires_grad or unquantized.requires_grad
        fused = self.draws.fused and not (needs_grad and torch.is_grad_enabled())
        return mixed(quantized, unquantized, key, self.share, fused=fused)


class ActivationFakeQuantize(nn.Module):
    """Quantizes one activation tensor with one scale (0-dim); the scale can be learned (LSQ)."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, spec: QuantizationSpec, like: Tensor) -> None:
        super().__init__()
        self.spec = spec
        self.enabled = True
        self.largest = math.inf
        """Value above which the grid shall not end when the scale has been learned."""
        self._learning: _Learning | None = None
        self.register_buffer("scale", like.new_ones(()))
        self.register_buffer("zero_point", like.new_zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return x
        if self._learning is not None:
            made = self._learning(x)
        else:
            made = GRIDS[self.spec.grid].fake_quantize(x, self.scale, self.zero_point, self.spec)
        return _laid_out_as(x, made)

    @property
    def learning(self) -> bool:
        return self._learning is not None

    @property
    def has_kernel(self) -> bool:
        """True when all that is done while learning can be one compiled kernel."""
        return self.spec.grid == "uniform"

    def start_learning(
        self,
        learn_scale: bool,
        drop: Drop | None = None,
        number: int = 0,
        *,
        fused: bool = False,
        clip: tuple[float, float] = NO_CLIP,
    ) -> None:
        """Prepare for the optimization loop: gradients flow through, elements are dropped, the scale may be learned.

        ``number`` tells the unit's tensors apart. ``fused`` takes one compiled kernel where there is one, which can
        ``clip`` its input too.
        """
        self.scale.requires_grad_(learn_scale)
        self._learning = _Learning(self, drop, number, fused, clip)

    def stop_learning(self) -> None:
        self._learning = None
        self.scale.requires_grad_(False)
        self.scale.grad = None
        if self.largest < math.inf:
            self.scale.clamp_(max=self.largest / (self.spec.quant_max - float(self.zero_point)))

    def set_parameters(self, scale: Tensor, zero_point: Tensor) -> None:
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)


def _laid_out_as(x: Tensor, made: Tensor) -> Tensor:
    """Return ``made`` with the strides of images ``x`` of one channel, which operators take for rows.

    Behind it, convolutions would lay out all that they make in rows, and take several times as long.
    """
    if x.ndim == 4 and x.shape[1] == 1 and made.stride() != x.stride() and is_dense(x) and is_dense(made):
        return made.as_strided(x.shape, x.stride())
    return made


class _Learning:
    """How an activation is quantized in the optimization loop, with its zero point as a number."""

    def __init__(
        self, quantizer: ActivationFakeQuantize, drop: Drop | None, number: int, fused: bool, clip: tuple[float, float]
    ) -> None:
        self.clip = clip
        self.scale, self.spec, self.drop, self.number = quantizer.scale, quantizer.spec, drop, number
        self.grid = GRIDS[self.spec.grid]
        self.zero_point = float(quantizer.zero_point)
        self.numbers: Tensor | None = None
        """What the kernel takes, where there is one."""
        if fused and quantizer.has_kernel:
            ends = (self.spec.quant_min - self.zero_point, self.spec.quant_max - self.zero_point)
            share = 0.0 if drop is None else float(drop.share)
            self.numbers = self.scale.new_tensor([*ends, *clip, share])

    def __call__(self, x: Tensor) -> Tensor:
        if self.numbers is not None and is_dense(x):
            key = None if self.drop is None else self.drop.draws.key(self.number, x)
            return fused_fake_quantize(x, self.scale, self.numbers, key)
        x = x if self.clip == NO_CLIP else x.clamp(*self.clip)
        quantized = self.grid.learned(x, self.scale, self.zero_point, self.spec)
        return quantized if self.drop is None else self.drop.mix(self.number, quantized, x)


FakeQuantize = WeightFakeQuantize | ActivationFakeQuantize


def fake_quantizers(module: nn.Module) -> dict[str, FakeQuantize]:
    """Return the fake-quantizers of ``module`` by their names in it."""
    return {n: m for n, m in module.named_modules() if isinstance(m, WeightFakeQuantize | ActivationFakeQuantize)}


@contextmanager
def float_mode(module: nn.Module) -> Iterator[None]:
    """Within the block, ``module`` is the float teacher: its fake-quantizers are off."""
    switched = [q for q in fake_quantizers(module).values() if q.enabled]
    for quantizer in switched:
        quantizer.enabled = False
    try:
        yield
    finally:
        for quantizer in switched:
            quantizer.enabled = True


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """Return a copy of every fake-quantizer's tensors, keyed ``<quantizer>.<tensor>``."""
    found = fake_quantizers(module)
    return {f"{n}.{key}": tensor.detach().clone() for n, q in found.items() for key, tensor in _state(q)}


@torch.no_grad()
def restore(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Put back what :func:`snapshot` took; tensors of quantizers that ``module`` does not hold are passed over."""
    for name, quantizer in fake_quantizers(module).items():
        if isinstance(quantizer, WeightFakeQuantize):
            quantizer.release()
        for key, tensor in _state(quantizer):
            tensor.copy_(state[f"{name}.{key}"])


def _state(quantizer: FakeQuantize) -> Iterator[tuple[str, Tensor]]:
    yield "scale", quantizer.scale
    yield "zero_point", quantizer.zero_point
    if isinstance(quantizer, WeightFakeQuantize):
        yield "quantized", quantizer.quantized
