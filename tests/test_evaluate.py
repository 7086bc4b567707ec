"""Metrics against hand computations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quiesce.data import Samples
from quiesce.errors import DataError
from quiesce.evaluate import compare, evaluate, outputs_of

LOGITS = torch.tensor([[3.0, 1.0], [0.0, 2.0], [5.0, 4.0], [0.0, 1.0]])


def test_top1_agreement_and_sqnr() -> None:
    reference = LOGITS + torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    metrics = compare([LOGITS], torch.tensor([0, 1, 1, 1]), [reference])
    assert metrics.top1 == 75.0
    assert metrics.agreement == 75.0
    assert metrics.sqnr_db == pytest.approx(10 * math.log10((9 + 1 + 9 + 4 + 25 + 16 + 1) / 9))
    assert metrics.images == 4


def test_nothing_is_made_up() -> None:
    assert compare([LOGITS], None, None) == compare([LOGITS], None, None)
    plain = compare([LOGITS], None, None)
    assert (plain.top1, plain.agreement, plain.sqnr_db) == (None, None, None)
    same = compare([LOGITS], None, [LOGITS])
    assert (same.agreement, same.sqnr_db) == (100.0, None)
    maps = compare([torch.ones(2, 3, 4, 4)], torch.tensor([0, 1]), [torch.zeros(2, 3, 4, 4)])
    assert (maps.top1, maps.agreement) == (None, None)


def test_sqnr_covers_all_outputs() -> None:
    two = compare([LOGITS, LOGITS + 1], None, [LOGITS, LOGITS])
    signal, noise = 2 * LOGITS.square().sum().item(), float(LOGITS.numel())
    assert two.sqnr_db == pytest.approx(10 * math.log10(signal / noise))


def test_labels_beyond_the_classes_are_refused() -> None:
    with pytest.raises(DataError, match="labels go from 0 to 7, and the network has 2 classes"):
        compare([LOGITS], torch.tensor([0, 1, 7, 0]), None)


def test_batches_change_nothing() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"double": 2 * x, "half": x / 2}

    samples = Samples((torch.randn(7, 3),))
    whole, parts = outputs_of(Pair(), samples, 7), outputs_of(Pair(), samples, 3)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    network = nn.Linear(3, 4)
    labelled = Samples((torch.randn(7, 3),), {}, torch.arange(7) % 4)
    assert evaluate(network, labelled, batch_size=2) == evaluate(network, labelled)


@pytest.mark.parametrize("labels", [[0, 1, 2, 0], [-1, 0, 1, 1]])
def test_labels_outside_the_classes_are_refused(labels: list[int]) -> None:
    with pytest.raises(DataError, match="the network has 2 classes"):
        compare([LOGITS], torch.tensor(labels), None)


def test_labels_of_a_network_without_logits_are_left_alone() -> None:
    assert compare([torch.ones(2, 3, 4)], torch.tensor([900, 901]), None).top1 is None
    assert compare([LOGITS, LOGITS], torch.tensor([900, 901, 902, 903]), None).top1 is None


def test_sqnr_of_a_network_that_blew_up_is_none() -> None:
    assert compare([torch.full((4, 2), torch.inf)], None, [LOGITS]).sqnr_db is None
    assert compare([torch.full((4, 2), torch.nan)], None, [LOGITS]).sqnr_db is None
    assert compare([LOGITS], None, [torch.zeros(4, 2)]).sqnr_db is None


def test_outputs_keep_the_order_of_the_result_and_leave_out_constants() -> None:
    def network(x: Tensor) -> dict[str, Any]:
        return {"b": (x, None), "a": [x + 1, 3]}

    first, second = outputs_of(network, Samples((torch.zeros(5, 2),)), 2)
    assert first.shape == second.shape == (5, 2)
    assert first.sum() == 0
    assert second.sum() == 10


def test_keyword_inputs_are_passed_by_name() -> None:
    def network(*, left: Tensor, right: Tensor) -> Tensor:
        return left - right

    samples = Samples((), {"right": torch.ones(3, 2), "left": torch.zeros(3, 2)})
    (out,) = outputs_of(network, samples)
    assert torch.equal(out, -torch.ones(3, 2))
