"""Batches of a unit's tensors: gathered for the step at hand, and by a thread for the next one while it runs."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx

from quiesce.memory import Rows, take
from quiesce.processes import ALONE, Processes
from quiesce.transfer import Ahead, far


@dataclass(frozen=True)
class Problem:
    """A unit with what it is fed and what it should return: tensors [images, ...], in the module's order.

    An input that both streams share is the same object in both lists.
    """

    module: fx.GraphModule
    images: int
    """The first ones are optimized on; tensors may hold more."""
    quantized_inputs: list[Rows]
    float_inputs: list[Rows]
    targets: list[Rows]
    weights: list[Rows] | None = None
    """Fisher weights of the targets, or None."""
    together: int = 1
    """Neighbouring images that stay together in every batch."""
    name: str = "unit"
    processes: Processes = ALONE
    """Those that have the other images."""
    first: int = 0
    """The number of the first image among those of all processes."""
    numbers: Tensor | None = None
    """Those of all images [images], on the device, where they do not follow the first one's."""

    @property
    def device(self) -> torch.device:
        return self.targets[0].device

    @property
    def rows(self) -> list[Rows]:
        return [*self.quantized_inputs, *self.float_inputs, *self.targets, *(self.weights or [])]


@dataclass(frozen=True)
class Batch:
    """Rows of a problem's tensors for some images, on the working device."""

    images: Tensor
    """Their numbers among those of all processes."""
    quantized_inputs: list[Tensor]
    float_inputs: list[Tensor]
    targets: list[Tensor]
    weights: list[Tensor] | None

    @classmethod
    def of(cls, problem: Problem, images: Tensor) -> Batch:
        """Gather the rows of ``images``, numbers [batch] on the CPU or where the rows are; each tensor once."""
        taken = {key: take(r, images) for key, r in {id(r): r for r in problem.rows}.items()}
        numbers = images + problem.first if problem.numbers is None else take(problem.numbers, images)
        return cls._regrouped(problem, taken, numbers.to(problem.device))

    @classmethod
    def _regrouped(cls, source: Problem | Batch, made: dict[int, Tensor], images: Tensor) -> Batch:
        """Return what was ``made`` of each of the source's tensors, by its id, grouped as these are."""
        quantized, unquantized, targets, weights = (
            [made[id(t)] for t in group]
            for group in (source.quantized_inputs, source.float_inputs, source.targets, source.weights or [])
        )
        return cls(images, quantized, unquantized, targets, None if source.weights is None else weights)

    @property
    def tensors(self) -> list[Tensor]:
        return [self.images, *self.quantized_inputs, *self.float_inputs, *self.targets, *(self.weights or [])]

    def map(self, make: Callable[[Tensor], Tensor]) -> Batch:
        """Return one with what ``make`` returns for each tensor; those that are one tensor stay one."""
        made = {id(t): make(t) for t in self.tensors}
        return self._regrouped(self, made, made[id(self.images)])

    def copy_(self, other: Batch) -> None:
        """Take over the values of ``other``, a batch of as many images of the same problem."""
        for mine, theirs in self._beside(other):
            mine.copy_(theirs)

    def put(self, places: Tensor, other: Batch) -> None:
        """Take over the rows of ``other``, images of the same problem, to ``places`` [images of other]."""
        for mine, theirs in self._beside(other):
            mine.index_copy_(0, places, theirs)

    def _beside(self, other: Batch) -> Collection[tuple[Tensor, Tensor]]:
        """Each tensor once, with the other's."""
        return {id(mine): (mine, theirs) for mine, theirs in zip(self.tensors, other.tensors, strict=True)}.values()


class Batches:
    """Batches of a problem, one after another; used in a ``with`` block, which ends the thread.

    Where a tensor is not on the device as it is worked with, the next batch is gathered while one is in use.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        read = partial(Batch.of, problem)
        self._ahead = Ahead(read, lambda batch: batch.tensors, problem.device, threaded=far(problem.rows))

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: object) -> None:
        self._ahead.__exit__()

    @property
    def ahead(self) -> bool:
        """True if batches are gathered ahead, from elsewhere than the device."""
        return self._ahead.threaded

    def wait(self) -> None:
        """Wait until what is gathered ahead is there."""
        self._ahead.wait()

    def of(self, images: Tensor, following: Tensor | None = None) -> Batch:
        """Return the batch of ``images`` (views of one tensor that stays); then gather that of ``following``."""
        behind = None if following is None else (_key(following), following)
        return self._ahead.of(_key(images), images, behind)


def _key(images: Tensor) -> tuple[int, int]:
    return images.data_ptr(), len(images)
