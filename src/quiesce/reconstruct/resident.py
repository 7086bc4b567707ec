"""Images at hand: the part of a unit's tensors that its steps draw from, on the device, while the rest is elsewhere."""

from __future__ import annotations

from dataclasses import replace

import torch

from quiesce.memory import rows_like
from quiesce.reconstruct.batches import Batches, Problem
from quiesce.reconstruct.order import Order


class Residents:
    """The window of an order, on the device: filled for its first step, and moved on with the steps.

    What comes next is gathered by the thread of ``source`` while steps run.
    """

    def __init__(self, source: Batches, order: Order, at_a_time: int) -> None:
        """``at_a_time`` images are fetched together."""
        self._source, self._order, self._at_a_time = source, order, at_a_time
        like = source.of(order.visits[:at_a_time])
        self._held = like.map(lambda rows: rows_like(rows, order.size))
        self._stop = 0
        """The number of the visit that comes next."""
        self.problem: Problem = replace(
            source.problem,
            images=order.size,
            quantized_inputs=[*self._held.quantized_inputs],
            float_inputs=[*self._held.float_inputs],
            targets=[*self._held.targets],
            weights=None if self._held.weights is None else [*self._held.weights],
            numbers=self._held.images,
        )
        """The problem of these images."""
        self.move_to(0)

    def move_to(self, step: int) -> None:
        """Hold what ``step`` draws from: the one behind the last one, or an earlier one."""
        first = int(self._order.first[step])
        stop = first + self._order.size
        if stop < self._stop:
            self._stop = first
        while self._stop < stop:
            self._fetch(min(self._stop + self._at_a_time, stop))

    def _fetch(self, stop: int) -> None:
        visits, first = self._order.visits, self._stop
        behind = visits[stop : stop + self._at_a_time]
        batch = self._source.of(visits[first:stop], behind if len(behind) else None)
        places = (torch.arange(first, stop) % self._order.size).to(batch.images.device)
        self._held.put(places, batch)
        self._stop = stop
