"""Metrics against hand computations."""

from __future__ import annotations

import math

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
