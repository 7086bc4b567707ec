"""Steps on a GPU as one CUDA graph: captured once in a unit, then replayed, so that no kernel waits to be launched.

A step of a small unit has hundreds of kernels of a few microseconds each, and launching one from Python takes longer
than that. In the graph the number of the step is a tensor, from which images, β and learning rates follow.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from quiesce.memory import is_out_of_memory
from quiesce.reconstruct.batches import Batch
from quiesce.reconstruct.step import Step

WARM_STEPS = 3
"""Steps in front of the capture: they compile kernels, let libraries choose theirs, and make optimizers' state."""
LEAST_STEPS = 20
"""Steps behind them that capturing pays for."""


def obstacle(step: Step) -> str | None:
    """Return why ``step`` is not to be captured, or None."""
    if step.problem.device.type != "cuda":
        return "no GPU"
    if step.problem.processes.size > 1:
        return "several processes"
    if step.steps < WARM_STEPS + LEAST_STEPS:
        return "few steps"
    if step.batches.ahead and step.micro_batch < step.batch_size:
        return "parts of a batch come from elsewhere than the GPU"
    return None


@contextmanager
def on_a_stream(device: torch.device) -> Iterator[None]:
    """Where ``device`` is a GPU, work on a stream of its own within the block, as the default one can't be captured.

    Convolutions add up in an order that does not change, so that a run can be repeated bit for bit.
    """
    if device.type != "cuda":
        yield
        return
    stream, around = _stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(around)
    with torch.cuda.stream(stream), _repeatable():
        yield
    around.wait_stream(stream)


@contextmanager
def _repeatable() -> Iterator[None]:
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all units: what it has freed can't be had on another one."""
    return torch.cuda.Stream(device)


class StepGraph:
    """Steps of a unit, captured on the current stream when some have been taken already."""

    def __init__(self, step: Step, order: Tensor, losses: Tensor, first: int) -> None:
        """``order`` [steps, batch] are the images of all steps, on the CPU; ``losses`` [steps] are written.

        Raises:
            RuntimeError: something in the step can't be captured; ``step`` can still be taken.
        """
        device = step.problem.device
        self._step, self._order, self._losses = step, order, losses
        self._next = first
        self._position = torch.tensor([first], device=device)
        self._images = order.to(device)
        self._batch: Batch | None = None
        if step.batches.ahead:
            self._batch = step.batches.of(order[first], order[first]).map(torch.clone)
            step.batches.wait()
        self._graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream(device)
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self._body()

    def _body(self) -> None:
        step, position = self._step, self._position
        if self._batch is not None:
            batches = [self._batch]
        else:
            chosen = self._images.index_select(0, position).squeeze(0)
            batches = [Batch.of(step.problem, part) for part in torch.split(chosen, step.micro_batch)]
        now, images = step.schedule.at(position), self._images.shape[1]
        loss = step.run(now, batches, images, step.decides(self._next))
        self._losses.index_copy_(0, position, loss.to(self._losses.dtype).view(1))
        position += 1

    def take(self, number: int) -> None:
        """Take step ``number``."""
        if self._batch is not None:
            following = self._order[number + 1] if number + 1 < len(self._order) else None
            self._batch.copy_(self._step.batches.of(self._order[number], following))
        if number != self._next:
            self._position.fill_(number)
        self._graph.replay()
        self._next = number + 1


def captured(step: Step, order: Tensor, losses: Tensor, first: int) -> StepGraph | str:
    """Return the graph of ``step`` from step ``first`` on, or why it can't be captured."""
    try:
        return StepGraph(step, order, losses, first)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        return str(error).strip().partition("\n")[0] or type(error).__name__
