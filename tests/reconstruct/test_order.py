from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quiesce.reconstruct.order import ROUNDS, USES, Order, draw_order


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@given(
    clips=st.integers(2, 40),
    together=st.integers(1, 3),
    steps=st.integers(1, 300),
    batch=st.integers(1, 8),
    window=st.integers(1, 50),
)
def test_a_window_holds_what_each_step_takes(clips: int, together: int, steps: int, batch: int, window: int) -> None:
    batch, window = min(batch, clips) * together, max(window, batch) * together
    order = draw_order(clips * together, steps, batch, seeded(), window=window, together=together)
    assert order.size == min(window, clips * together)
    held: list[int | None] = [None] * order.size
    came = 0
    for step in range(steps):
        while came < order.first[step] + order.size:
            held[came % order.size] = int(order.visits[came])
            came += 1
        assert came == order.first[step] + order.size
        assert len(set(held)) == order.size
        taken = order.images[step].tolist()
        assert len(set(taken)) == batch == len(taken)
        assert taken == [held[place] for place in order.places[step].tolist()]
        whole = [[n // together for n in taken[i : i + together]] for i in range(0, batch, together)]
        assert all(len(set(of_one)) == 1 for of_one in whole)
    visited = Counter(order.visits.tolist())
    assert set(visited) == set(range(clips * together)) and len(set(visited.values())) == 1


def test_without_a_window_all_are_at_hand() -> None:
    for window in (None, 24, 25):
        order = draw_order(24, 5, 4, seeded(), window=window)
        again = seeded()
        wanted = torch.stack([torch.randperm(24, generator=again)[:4] for _ in range(5)])
        assert torch.equal(order.images, wanted) and torch.equal(order.places, wanted)
        assert order.size == 24 and not order.first.any()


@pytest.mark.parametrize(("steps", "rounds"), [(4, 1), (16, 2), (50, ROUNDS), (5 * USES * 64 // 8, 5), (5000, 19)])
def test_images_come_again_where_there_are_steps_for_it(steps: int, rounds: int) -> None:
    order = draw_order(64, steps, 8, seeded(), window=16)
    assert len(order.visits) == rounds * 64


def test_images_come_evenly_over_the_steps_and_are_used_alike() -> None:
    order: Order = draw_order(256, 4000, 8, seeded(), window=64)
    moves = order.first.diff()
    assert set(moves.tolist()) == {0, 8}
    between = moves.nonzero().flatten().diff()
    assert between.max() - between.min() <= 1
    uses = torch.bincount(order.images.flatten(), minlength=256)
    assert uses.min() > 0.5 * uses.float().mean() and uses.max() < 2 * uses.float().mean()
