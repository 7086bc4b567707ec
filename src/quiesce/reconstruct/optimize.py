"""Optimize one unit: learn its rounding and step sizes so that its output matches the float one.

One loop for all methods: AdaRound, BRECQ and QDrop differ in the unit's extent, the drop, and what is learned. A step
is a static function of an index, β and learning rates: what is constant is made before the first one, and nothing is
read back from the device until the last.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from quiesce.quant.fake_quantize import ActivationFakeQuantize, Drop, WeightFakeQuantize
from quiesce.quant.rounding.rounding import Rounding
from quiesce.recipe import ReconstructionRecipe
from quiesce.reconstruct.losses import squared_error, weighted_squared_error

CURVE_POINTS = 50
"""Points of the loss curve that is kept."""


@dataclass(frozen=True)
class Problem:
    """A unit with what it is fed and what it should return: tensors [images, ...], in the module's order."""

    module: fx.GraphModule
    quantized_inputs: list[Tensor]
    float_inputs: list[Tensor]
    targets: list[Tensor]
    weights: list[Tensor] | None = None
    """Fisher weights of the targets, or None."""
    together: int = 1
    """Neighbouring images that stay together in every batch."""


def optimize(
    problem: Problem,
    recipe: ReconstructionRecipe,
    *,
    steps: int,
    regularizer_weight: float,
    warm: bool,
    generator: torch.Generator,
    on_step: Callable[[], None],
) -> list[list[float]]:
    """Learn the unit's state in place, harden it, and return the loss curve (pairs ``[step, loss]``).

    The unit must have something to learn (:meth:`~quiesce.reconstruct.streams.Network.learns`).
    """
    drop = Drop(recipe.drop_prob, generator) if recipe.drop_prob > 0 else None
    learned = _Learned.attach(problem.module, recipe, warm, drop)
    try:
        return _run(problem, recipe, learned, drop, steps, regularizer_weight, generator, on_step)
    finally:
        learned.harden()


@dataclass
class _Learned:
    """What a unit learns: a rounding per weight, a step size per activation."""

    weights: list[WeightFakeQuantize]
    activations: list[ActivationFakeQuantize]
    step_sizes: list[Tensor]

    @classmethod
    def attach(cls, module: fx.GraphModule, recipe: ReconstructionRecipe, warm: bool, drop: Drop | None) -> _Learned:
        weights, activations = [], []
        for node in module.graph.nodes:
            quantizer = getattr(module, str(node.target)) if node.op == "call_module" else None
            if isinstance(quantizer, WeightFakeQuantize):
                quantizer.start_rounding(recipe.rounding, getattr(module, str(node.args[0].target)), warm)
                weights.append(quantizer)
            elif isinstance(quantizer, ActivationFakeQuantize):
                quantizer.start_learning(drop, recipe.learn_step_sizes)
                activations.append(quantizer)
        return cls(weights, activations, [q.scale for q in activations if recipe.learn_step_sizes])

    def roundings(self) -> list[Rounding]:
        return [q.rounding for q in self.weights if q.rounding is not None]

    def harden(self) -> None:
        for quantizer in self.weights:
            quantizer.harden()
        for activation in self.activations:
            activation.stop_learning()


def _run(
    problem: Problem,
    recipe: ReconstructionRecipe,
    learned: _Learned,
    drop: Drop | None,
    steps: int,
    regularizer_weight: float,
    generator: torch.Generator,
    on_step: Callable[[], None],
) -> list[list[float]]:
    images, device = problem.targets[0].shape[0], problem.targets[0].device
    order = _batch_order(images, steps, recipe.batch_size, generator, problem.together)
    roundings = learned.roundings()
    step_sizes = _adam(learned.step_sizes, recipe.step_size_lr)
    optimizers = _adam([r.V for r in roundings], recipe.rounding_lr) + step_sizes
    floors = [scale.detach() * 1e-3 for scale in learned.step_sizes]
    losses = torch.zeros(steps, device=device)
    betas = torch.tensor([_beta(t, steps, recipe) for t in range(steps)], device=device)
    warmup = int(recipe.warmup * steps)
    for step in range(steps):
        index = order[step]
        loss = _loss(problem, index, drop)
        losses[step].copy_(loss.detach())
        if step >= warmup and regularizer_weight > 0 and roundings:
            loss = loss + regularizer_weight * torch.stack([r.regularizer(betas[step]) for r in roundings]).sum()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        _set_cosine(step_sizes, recipe.step_size_lr, step / steps)
        for optimizer in optimizers:
            optimizer.step()
        _keep_positive(learned.step_sizes, floors)
        on_step()
    return _curve(losses)


def _adam(variables: list[Tensor], rate: float) -> list[torch.optim.Adam]:
    """An optimizer, or none where there is nothing to learn: a unit may have float weights, or step sizes only."""
    return [torch.optim.Adam(variables, lr=rate, fused=True)] if variables else []


def _batch_order(images: int, steps: int, batch_size: int, generator: torch.Generator, together: int) -> Tensor:
    """Indices [steps, batch_size] of the images of each step, none twice in a step; neighbours ``together``."""
    where, clips, size = generator.device, images // together, batch_size // together
    draws = torch.stack([torch.randperm(clips, generator=generator, device=where)[:size] for _ in range(steps)])
    return (draws.unsqueeze(-1) * together + torch.arange(together, device=where)).flatten(1)


def _loss(problem: Problem, index: Tensor, drop: Drop | None) -> Tensor:
    pairs = zip(problem.quantized_inputs, problem.float_inputs, strict=True)
    inputs = [q[index] if drop is None or q is f else drop.mix(q[index], f[index]) for q, f in pairs]
    outputs = problem.module(*inputs)
    total = []
    for i, (output, target) in enumerate(zip(outputs, problem.targets, strict=True)):
        if problem.weights is None:
            total.append(squared_error(output, target[index]))
        else:
            total.append(weighted_squared_error(output, target[index], problem.weights[i][index]))
    return total[0] if len(total) == 1 else torch.stack(total).sum()


def _beta(step: int, steps: int, recipe: ReconstructionRecipe) -> float:
    """β falls linearly from start to end over the steps behind the warm-up (AdaRound's code)."""
    start = recipe.warmup * steps
    progress = max(0.0, (step - start) / max(1.0, steps - start))
    return recipe.beta_start + (recipe.beta_end - recipe.beta_start) * progress


def _set_cosine(optimizers: list[torch.optim.Adam], rate: float, progress: float) -> None:
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = 0.5 * rate * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def _keep_positive(step_sizes: list[Tensor], floors: list[Tensor]) -> None:
    """A step size that learning would push through zero stops at a thousandth of where it started."""
    for scale, floor in zip(step_sizes, floors, strict=True):
        torch.maximum(scale, floor, out=scale)


def _curve(losses: Tensor) -> list[list[float]]:
    values = losses.tolist()
    size = max(1, math.ceil(len(values) / CURVE_POINTS))
    return [
        [min(i + size, len(values)), sum(values[i : i + size]) / len(values[i : i + size])]
        for i in range(0, len(values), size)
    ]
