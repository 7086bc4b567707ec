"""One step of a unit's optimization: what it learns, its rates, and forward, backward and update.

A step is a static function of tensors on the device (images, β, learning rates): what is constant is made before the
first one, and nothing is read back, so that a GPU can replay it (:mod:`quiesce.reconstruct.cuda_graph`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, fx, nn

from quiesce.memory import Rows
from quiesce.quant.fake_quantize import ActivationFakeQuantize, Drop, WeightFakeQuantize
from quiesce.quant.kernels import NO_CLIP
from quiesce.quant.rounding.rounding import Rounding
from quiesce.recipe import ReconstructionRecipe
from quiesce.reconstruct.batches import Batch, Batches, Problem
from quiesce.reconstruct.fuse import Clip
from quiesce.reconstruct.losses import reconstruction_loss

PUSHED = 0.2
"""Share of the steps, the last ones, in which roundings are pushed to decisions."""


@dataclass
class Learned:
    """What a unit learns: a rounding per weight, a step size per activation."""

    weights: list[WeightFakeQuantize]
    activations: list[ActivationFakeQuantize]
    step_sizes: list[Tensor]

    @classmethod
    def attach(
        cls,
        module: fx.GraphModule,
        recipe: ReconstructionRecipe,
        warm: Collection[WeightFakeQuantize],
        drop: Drop | None,
        *,
        fused: bool = False,
        clips: Mapping[str, Clip] = MappingProxyType({}),
    ) -> Learned:
        weights: list[WeightFakeQuantize] = []
        activations: list[ActivationFakeQuantize] = []
        for node in module.graph.nodes:
            quantizer = getattr(module, str(node.target)) if node.op == "call_module" else None
            if isinstance(quantizer, WeightFakeQuantize):
                weight = getattr(module, str(node.args[0].target))
                quantizer.start_rounding(recipe.rounding, weight, quantizer in warm, fused=fused)
                weights.append(quantizer)
            elif isinstance(quantizer, ActivationFakeQuantize):
                clip, number = clips.get(str(node.target), NO_CLIP), len(activations)
                quantizer.start_learning(recipe.learn_step_sizes, drop, number, fused=fused, clip=clip)
                activations.append(quantizer)
        return cls(weights, activations, [q.scale for q in activations if recipe.learn_step_sizes])

    def roundings(self) -> list[Rounding]:
        return [q.rounding for q in self.weights if q.rounding is not None]

    def variables(self) -> list[Tensor]:
        return [*(r.V for r in self.roundings()), *self.step_sizes, *self.weight_step_sizes()]

    def weight_step_sizes(self) -> list[nn.Parameter]:
        return [r.step_sizes for r in self.roundings() if r.step_sizes is not None]

    def undecided(self) -> float:
        """Return the share of weights whose :meth:`~quiesce.quant.rounding.rounding.Rounding.undecided` counts."""
        roundings = self.roundings()
        number = sum(r.V.numel() for r in roundings)
        return int(sum(r.undecided() for r in roundings)) / number if number else 0.0

    def harden(self) -> None:
        for quantizer in self.weights:
            quantizer.harden()
        for activation in self.activations:
            activation.stop_learning()


@dataclass(frozen=True)
class Moment:
    """What changes from step to step; tensors on the device."""

    number: Tensor
    """Of the step, int64 [], for random draws."""
    beta: Tensor
    """The regularizer's exponent []."""
    weight: Tensor
    """The regularizer's weight [], 0 in the warm-up."""
    rates: Tensor
    """Learning rates [3], one for each of :attr:`Step.optimizers`."""
    push: Tensor
    """How far roundings are pushed to a decision [], in multiples of Adam's steps."""


class Schedule:
    """The moments of all steps.

    Rounding learns at a constant rate, step sizes at one with a cosine decay to 0. β falls linearly from start to end
    over the steps behind the warm-up (AdaRound's code). The push rises linearly over the last fifth of the steps.
    """

    def __init__(self, recipe: ReconstructionRecipe, regularizer_weight: float, steps: int, like: Rows) -> None:
        """``like`` has the dtype and the device of what is optimized."""
        self.warmup = int(recipe.warmup * steps) if regularizer_weight > 0 else steps
        self.unpushed = int((1 - PUSHED) * steps) if recipe.decision_push > 0 else steps
        weights = [0.0 if t < self.warmup else regularizer_weight for t in range(steps)]
        dtype, device = like.dtype, like.device
        self._numbers = torch.arange(steps, device=device)
        self._betas = torch.tensor([_beta(t, steps, recipe) for t in range(steps)], dtype=dtype, device=device)
        self._weights = torch.tensor(weights, dtype=dtype, device=device)
        decays = [0.5 * (1 + math.cos(math.pi * t / steps)) for t in range(steps)]
        rates = [[recipe.rounding_lr, recipe.step_size_lr * d, recipe.weight_step_size_lr * d] for d in decays]
        self._rates = torch.tensor(rates, dtype=torch.float64, device=device)
        pushes = [recipe.decision_push * max(0.0, 1.0 - (steps - t) / (PUSHED * steps)) for t in range(steps)]
        self._pushes = torch.tensor(pushes, dtype=dtype, device=device)

    def at(self, step: int | Tensor) -> Moment:
        """Return the moment of ``step``: its number, or that on the device, int64 [1]."""
        tables = (self._numbers, self._betas, self._weights, self._rates, self._pushes)
        if isinstance(step, int):
            return Moment(*(table[step] for table in tables))
        return Moment(*(table.index_select(0, step).squeeze(0) for table in tables))

    def slow_down(self, factor: float) -> None:
        """Multiply all learning rates from now on."""
        self._rates *= factor


class Step:
    """One step: draw, forward, backward, update."""

    def __init__(
        self,
        problem: Problem,
        recipe: ReconstructionRecipe,
        learned: Learned,
        drop: Drop | None,
        regularizer_weight: float,
        steps: int,
        batches: Batches | None = None,
        micro_batch: int | None = None,
        fused: bool = False,
    ) -> None:
        """``micro_batch`` images are worked on at a time, None: all of a batch; ``batches`` gathers them ahead.

        ``fused`` computes the loss in a compiled kernel.
        """
        self.fused = fused
        self.batches = batches or Batches(problem)
        self.micro_batch = micro_batch or recipe.batch_size
        self.problem, self.learned, self.drop, self.steps = problem, learned, drop, steps
        self.batch_size = recipe.batch_size
        self.roundings = learned.roundings()
        self.schedule = Schedule(recipe, regularizer_weight, steps, problem.targets[0])
        self.optimizers = [
            _adam(variables, problem.device)
            for variables in ([r.V for r in self.roundings], learned.step_sizes, learned.weight_step_sizes())
        ]
        """Of rounding, activations' step sizes and weights' step sizes, each with a rate of its own; None where there
        is nothing to learn: a unit may have float weights, or step sizes only."""
        self.floors = [scale.detach() * 1e-3 for scale in learned.step_sizes]

    def take(self, step: int, images: Tensor, following: Tensor | None = None) -> Tensor:
        """Take step number ``step`` on ``images`` (their numbers), and return the reconstruction loss before it.

        ``following`` are the images of the next step.
        """
        parts = torch.split(images, self.micro_batch)
        ahead = [*parts[1:], None if following is None else following[: self.micro_batch]]
        batches = (self.batches.of(part, behind) for part, behind in zip(parts, ahead, strict=True))
        return self.run(self.schedule.at(step), batches, len(images), self.decides(step))

    def run(self, now: Moment, batches: Iterable[Batch], images: int, decides: tuple[bool, bool]) -> Tensor:
        """Take the step of ``now`` on ``batches``, the parts of a batch of ``images``, as :meth:`decides` says.

        Gradients of parts of the batch add up to the batch's, as losses are means over images; so those of several
        processes, which take as many images each, are averaged.
        """
        for optimizer in self._working():
            optimizer.zero_grad(set_to_none=True)
        total = torch.zeros_like(now.weight)
        penalized, pushed = decides
        for batch in batches:
            loss = self.loss(now.number, batch)
            if len(batch.images) < images:
                loss = loss * (len(batch.images) / images)
            loss.backward()
            total += loss.detach()
        gradients = [v.grad for v in self.learned.variables() if v.grad is not None]
        self.problem.processes.mean_([total, *gradients])
        if penalized:
            for rounding in self.roundings:
                rounding.add_penalty(now.beta, now.weight)
        for adam, rate in zip(self.optimizers, now.rates.unbind(), strict=True):
            if adam is not None:
                _set_rate(adam, rate)
                adam.step()
        if pushed:
            amount = (now.push * now.rates[0]).to(now.push.dtype)
            for rounding in self.roundings:
                rounding.push(amount)
        self._keep_positive()
        return total

    def decides(self, step: int) -> tuple[bool, bool]:
        """Tell whether ``step`` has the regularizer, and the push: on a GPU all do if any does, so that all are the
        same kernels."""
        last = self.steps - 1 if self.problem.device.type == "cuda" else step
        return last >= self.schedule.warmup, last >= self.schedule.unpushed

    def loss(self, number: Tensor, batch: Batch) -> Tensor:
        """Return the reconstruction loss on ``batch`` with the draws of step ``number`` (int64 [])."""
        drop = self.drop
        if drop is not None:
            drop.draws.begin(number, batch.images)
        inputs = []
        # Activations are numbered 0, 1, …, and inputs −1, −2, …
        for i, (q, f) in enumerate(zip(batch.quantized_inputs, batch.float_inputs, strict=True)):
            inputs.append(q if drop is None or q is f else drop.mix(-1 - i, q, f))
        return reconstruction_loss(self.problem.module(*inputs), batch.targets, batch.weights, fused=self.fused)

    def state(self) -> list[Tensor]:
        """Return a copy of all that steps change."""
        return [t.detach().clone() for t in self._changing()]

    @torch.no_grad()
    def go_back(self, state: Sequence[Tensor]) -> None:
        """Put back, in place, what :meth:`state` gave; optimizers that had taken no step then start from zeros."""
        for i, tensor in enumerate(self._changing()):
            tensor.copy_(state[i]) if i < len(state) else tensor.zero_()

    def _changing(self) -> list[Tensor]:
        moments = [t for optimizer in self._working() for of in optimizer.state.values() for t in of.values()]
        return [*self.learned.variables(), *moments]

    def _working(self) -> list[torch.optim.Adam]:
        return [optimizer for optimizer in self.optimizers if optimizer is not None]

    @torch.no_grad()
    def _keep_positive(self) -> None:
        """A step size that learning would push through zero stops at a thousandth of where it started."""
        for scale, floor in zip(self.learned.step_sizes, self.floors, strict=True):
            torch.maximum(scale, floor, out=scale)


def _adam(variables: Sequence[Tensor], device: torch.device) -> torch.optim.Adam | None:
    """On a GPU an optimizer that can be part of a CUDA graph: its rate is a tensor there."""
    if not variables:
        return None
    if device.type == "cuda":
        rate = torch.zeros((), dtype=torch.float32, device=device)
        return torch.optim.Adam(list(variables), lr=rate, fused=True, capturable=True)
    return torch.optim.Adam(list(variables), lr=0.0, fused=True)


def _set_rate(optimizer: torch.optim.Adam, rate: Tensor) -> None:
    (group,) = optimizer.param_groups
    if isinstance(group["lr"], Tensor):
        group["lr"].copy_(rate)
    else:
        group["lr"] = rate.item()


def _beta(step: int, steps: int, recipe: ReconstructionRecipe) -> float:
    start = recipe.warmup * steps
    progress = max(0.0, (step - start) / max(1.0, steps - start))
    return recipe.beta_start + (recipe.beta_end - recipe.beta_start) * progress
