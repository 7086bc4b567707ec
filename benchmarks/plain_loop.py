"""One unit's optimization as the references write it: the baseline of speed.py.

It follows the loops of BRECQ's and QDrop's published code, on our graph: images in rows, ⌊W/s⌋ in every step, fake
quantization as separate differentiable operators, a walk over the modules for the regularizer, Adam and its scheduler
as torch makes them by default, a permutation of all images for each batch. Nothing of it is copied.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from quiesce.quant.fake_quantize import ActivationFakeQuantize, Drop, WeightFakeQuantize
from quiesce.recipe import ReconstructionRecipe
from quiesce.reconstruct.batches import Problem

ZETA, GAMMA = 1.1, -0.1


class PlainWeight(nn.Module):
    """AdaRound's soft rounding, all of it in every step."""

    def __init__(self, quantizer: WeightFakeQuantize, weight: Tensor) -> None:
        super().__init__()
        spec = quantizer.spec
        self.low, self.high = spec.quant_min, spec.quant_max
        self.scale = spec.broadcast(quantizer.scale, weight.ndim)
        self.zero_point = spec.broadcast(quantizer.zero_point, weight.ndim)
        share = weight / self.scale - torch.floor(weight / self.scale)
        self.alpha = nn.Parameter(-torch.log((ZETA - GAMMA) / (share - GAMMA) - 1))

    def soft_targets(self) -> Tensor:
        return torch.clamp(torch.sigmoid(self.alpha) * (ZETA - GAMMA) + GAMMA, 0, 1)

    def forward(self, weight: Tensor) -> Tensor:
        integers = torch.floor(weight / self.scale) + self.soft_targets()
        integers = torch.clamp(integers + self.zero_point, self.low, self.high)
        return (integers - self.zero_point) * self.scale


class PlainActivation(nn.Module):
    """LSQ with QDrop's drop, straight through the rounding."""

    def __init__(self, quantizer: ActivationFakeQuantize, drop_prob: float) -> None:
        super().__init__()
        self.low, self.high = quantizer.spec.quant_min, quantizer.spec.quant_max
        self.scale = nn.Parameter(quantizer.scale.clone())
        self.zero_point = quantizer.zero_point
        self.drop_prob = drop_prob
        self.round: Callable[[Tensor], Tensor] = _straight_through
        self.clip: Callable[[Tensor, float, float], Tensor] = torch.clamp
        self.mix: Callable[[Tensor, Tensor], Tensor] | None = None
        """Draws of another's, to compare losses."""

    def forward(self, x: Tensor) -> Tensor:
        integers = self.round(x / self.scale)
        integers = self.clip(integers + self.zero_point, self.low, self.high)
        quantized = (integers - self.zero_point) * self.scale
        if self.drop_prob == 0:
            return quantized
        return _dropped(quantized, x, self.drop_prob) if self.mix is None else self.mix(quantized, x)


def _straight_through(x: Tensor) -> Tensor:
    return (x.round() - x).detach() + x


class _ExactlyStraightThrough(torch.autograd.Function):
    """The same to the last bit: the sum above can miss the whole number, and so fall on the other side of a clip."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        return grads[0]


class _Clip(torch.autograd.Function):
    """With a gradient at both ends, as torch.clamp had when the references were written (2.14 has none there)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward((x >= low) & (x <= high))
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        return grads[0] * inside, None, None


def _dropped(quantized: Tensor, x: Tensor, prob: float) -> Tensor:
    return torch.where(torch.rand_like(quantized) < 1 - prob, quantized, x)


def _mixed(drop: Drop, number: int, quantized: Tensor, x: Tensor) -> Tensor:
    """Draws go by the order of memory, and Quiesce's images have channels last."""
    if x.ndim == 4:
        quantized, x = (t.contiguous(memory_format=torch.channels_last) for t in (quantized, x))
    return drop.mix(number, quantized, x)


class PlainLoop:
    """A unit and its data as the references hold them, and a step."""

    def __init__(
        self, problem: Problem, recipe: ReconstructionRecipe, steps: int, weight: float, drop: Drop | None = None
    ) -> None:
        """``drop`` gives its draws, to compare losses; without it they are torch's, as in the references."""
        self.recipe, self.steps, self.regularizer_weight = recipe, steps, weight
        self.module = plain(problem.module, recipe.drop_prob)
        self.quantized, self.float, self.targets = (
            [t[: problem.images].contiguous() for t in tensors]
            for tensors in (problem.quantized_inputs, problem.float_inputs, problem.targets)
        )
        parts = list(self.module.modules())
        self.rounding = torch.optim.Adam([m.alpha for m in parts if isinstance(m, PlainWeight)], lr=recipe.rounding_lr)
        scales = [m.scale for m in parts if isinstance(m, PlainActivation)]
        self.step_sizes = torch.optim.Adam(scales, lr=recipe.step_size_lr)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.step_sizes, T_max=steps, eta_min=0.0)
        self.count = 0
        self.drop = drop
        if drop is not None:
            self._take_draws(drop)

    def _take_draws(self, drop: Drop) -> None:
        """Number activations as :class:`quiesce.reconstruct.optimize.Learned` does."""
        called = [getattr(self.module, str(n.target)) for n in self.module.graph.nodes if n.op == "call_module"]
        for number, activation in enumerate(m for m in called if isinstance(m, PlainActivation)):
            activation.mix = partial(_mixed, drop, number)
            activation.round, activation.clip = _ExactlyStraightThrough.apply, _Clip.apply

    def take(self, images: Tensor | None = None) -> Tensor:
        """Take a step, on ``images`` or a random batch of all; return the reconstruction loss before it."""
        recipe = self.recipe
        if images is None:
            images = torch.randperm(self.targets[0].shape[0])[: recipe.batch_size]
        inputs = []
        for i, (q, f) in enumerate(zip(self.quantized, self.float, strict=True)):
            if recipe.drop_prob == 0 or q is f:
                inputs.append(q[images])
            elif self.drop is not None:
                inputs.append(_mixed(self.drop, -1 - i, q[images], f[images]))
            else:
                inputs.append(_dropped(q[images], f[images], recipe.drop_prob))
        self.rounding.zero_grad()
        self.step_sizes.zero_grad()
        outputs = self.module(*inputs)
        losses = [
            (output - target[images]).abs().pow(2).sum(1).mean()
            for output, target in zip(outputs, self.targets, strict=True)
        ]
        loss = total = sum(losses[1:], losses[0])
        if self.count >= recipe.warmup * self.steps:
            total = loss + self._round_loss()
        total.backward()
        self.rounding.step()
        self.step_sizes.step()
        self.schedule.step()
        self.count += 1
        detached: Tensor = loss.detach()
        return detached

    def _round_loss(self) -> Tensor:
        start = self.recipe.warmup * self.steps
        progress = (self.count - start) / max(1.0, self.steps - start)
        beta = self.recipe.beta_start + (self.recipe.beta_end - self.recipe.beta_start) * progress
        penalty = torch.zeros(())
        for _, part in self.module.named_modules():
            if isinstance(part, PlainWeight):
                penalty = penalty + (1 - ((part.soft_targets() - 0.5).abs() * 2).pow(beta)).sum()
        return self.regularizer_weight * penalty


def plain(module: fx.GraphModule, drop_prob: float) -> fx.GraphModule:
    """Return a copy of a unit with quantizers of this file and weights in rows."""
    parts: dict[str, object] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            parts[str(node.target)] = getattr(module, str(node.target)).contiguous()
        elif node.op == "call_module":
            quantizer = getattr(module, str(node.target))
            if isinstance(quantizer, WeightFakeQuantize):
                weight = getattr(module, str(node.args[0].target))
                parts[str(node.target)] = PlainWeight(quantizer, weight.contiguous())
            else:
                parts[str(node.target)] = PlainActivation(quantizer, drop_prob)
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    return fx.GraphModule(parts, graph)
