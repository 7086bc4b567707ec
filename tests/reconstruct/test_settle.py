from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from quiesce.pipeline import Prepared, prepare, run
from quiesce.quant.fake_quantize import WeightFakeQuantize, restore
from quiesce.quant.rounding.adaround import AdaRound
from quiesce.quant.spec import QuantizationSpec
from quiesce.reconstruct.batches import Problem
from quiesce.reconstruct.settle import DECIDED, Doubt, settle, undecided
from tiny import Chain, images, recipe

SPEC = QuantizationSpec(bits=2, symmetric=False, ch_axis=0)


class Product(nn.Module):
    """x Ŵᵀ with the quantizer's weight."""

    def __init__(self, quantizer: WeightFakeQuantize) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x @ self.quantizer().T,)


def quantizer_at(shares: Tensor) -> WeightFakeQuantize:
    """One whose weights lie between the integers 1 and 2, ``shares`` [rows, columns] of the way up."""
    quantizer = WeightFakeQuantize(SPEC, shares.shape, shares)
    rows = torch.ones(len(shares))
    quantizer.set_parameters(rows, torch.zeros(len(shares)), 1.0 + shares)
    quantizer.start_rounding("adaround", 1.0 + shares, warm=False)
    return quantizer


def problem_of(quantizer: WeightFakeQuantize, weight: Tensor, count: int = 64) -> Problem:
    x = torch.randn(count, weight.shape[1], generator=torch.Generator().manual_seed(0))
    return Problem(Product(quantizer), count, [x], [x], [x @ weight.T])  # type: ignore[arg-type]


def loss_of(problem: Problem) -> float:
    (output,) = problem.module(*problem.quantized_inputs)
    return (output - problem.targets[0]).square().sum(1).mean().item()


class TestUndecided:
    def test_the_least_decided_come_first(self) -> None:
        quantizers = [quantizer_at(torch.tensor([[0.4, 0.1, 0.55]])), quantizer_at(torch.tensor([[0.98, 0.5]]))]
        found = undecided(quantizers, 4)
        assert [(quantizers.index(d.quantizer), d.place) for d in found] == [
            (1, (0, 1)),
            (0, (0, 2)),
            (0, (0, 0)),
            (0, (0, 1)),
        ]
        assert [d.place for d in undecided(quantizers, 1)] == [(0, 1)]
        assert undecided(quantizers, 0) == []

    def test_what_is_decided_or_clipped_is_left(self) -> None:
        shares = torch.tensor([[0.5 * DECIDED, 1.0 - 0.5 * DECIDED, 0.3]])
        quantizer = quantizer_at(shares)
        assert [d.place for d in undecided([quantizer], 3)] == [(0, 2)]
        quantizer = quantizer_at(shares + 4.0)  # above the largest integer, 3
        with torch.no_grad():
            assert isinstance(quantizer.rounding, AdaRound)
            quantizer.rounding.V.zero_()
        assert undecided([quantizer], 3) == []

    def test_turning_takes_the_other_integer_and_twice_takes_it_back(self) -> None:
        quantizer = quantizer_at(torch.tensor([[0.4, 0.6]]))
        (doubt, other) = undecided([quantizer], 2)
        quantizer.harden()
        before = quantizer.quantized.clone()
        assert before.tolist() == [[1, 2]]
        doubt.turn()
        assert quantizer.quantized.tolist() != before.tolist()
        other.turn()
        assert quantizer.quantized.tolist() == [[2, 1]]
        doubt.turn()
        other.turn()
        assert torch.equal(quantizer.quantized, before)


class TestSettle:
    def settled(self, shares: Tensor, weight: Tensor, most: int) -> tuple[Problem, list[Doubt], int]:
        quantizer = quantizer_at(shares)
        problem = problem_of(quantizer, weight)
        doubts = undecided([quantizer], most)
        quantizer.harden()
        return problem, doubts, settle(problem, doubts, torch.arange(problem.images), 16)

    def test_finds_what_trying_everything_finds(self) -> None:
        """Roundings that make the float weight's outputs best, though each is nearer to the other side."""
        goal = torch.tensor([[2.0, 1.0, 2.0, 2.0], [1.0, 1.0, 2.0, 1.0]])
        shares = torch.where(goal == 2.0, 0.45, 0.55)
        problem, doubts, turned = self.settled(shares, goal, 8)
        assert turned == len(doubts) == 8
        assert loss_of(problem) == 0.0

    def test_no_single_turn_would_lower_the_loss_further(self) -> None:
        generator = torch.Generator().manual_seed(1)
        shares = torch.rand(3, 4, generator=generator) * 0.9 + 0.05
        problem, doubts, _ = self.settled(shares, 1.0 + shares.flip(1), 12)
        least = loss_of(problem)
        for doubt in doubts:
            doubt.turn()
            assert loss_of(problem) >= least
            doubt.turn()
        everything = []
        for turned in itertools.product([False, True], repeat=4):  # of one row: rows do not depend on each other
            chosen = [d for d, turn in zip([d for d in doubts if d.place[0] == 0], turned, strict=True) if turn]
            for doubt in chosen:
                doubt.turn()
            everything.append(loss_of(problem))
            for doubt in chosen:
                doubt.turn()
        assert least <= 1.5 * min(everything)

    def test_parts_of_the_images_give_the_loss_of_all(self) -> None:
        shares = torch.rand(3, 4, generator=torch.Generator().manual_seed(2))
        whole, parts = (quantizer_at(shares) for _ in range(2))
        results = []
        for quantizer, at_a_time in ((whole, 64), (parts, 5)):
            doubts = undecided([quantizer], 12)
            quantizer.harden()
            settle(problem_of(quantizer, 1.0 + shares.flip(0)), doubts, torch.arange(64), at_a_time)
            results.append(quantizer.quantized)
        assert torch.equal(*results)


class TestInARun:
    @pytest.mark.parametrize("overlap", [0, 1])
    @pytest.mark.parametrize("fused", [False, True])
    def test_a_run_says_how_many_were_turned_and_loses_less(self, overlap: int, fused: bool) -> None:
        """A regularizer that decides nothing: what is cut off at the end is settled."""
        settings = recipe(steps=40, regularizer_weight=0.0, rounding_lr=2e-2, granularity="block", overlap=overlap)
        chain = prepare(Chain(3), images(32), settings)
        losses, turned = {}, {}
        for most in (0, 12):
            made, _ = run(chain, settings.with_settings(settled_roundings=most), fused=fused)
            turned[most] = [record.settled for record in made[-1].unit_records]
            losses[most] = list(made[-1].module_losses.values())
        assert sum(turned[0]) == 0 < sum(turned[12])
        assert losses[12][-1] < losses[0][-1]

    def test_it_is_the_same_again(self, chain: Prepared) -> None:
        settings = recipe(steps=10, regularizer_weight=0.0, settled_roundings=8)
        states = []
        for _ in range(2):
            restore(chain.graph, chain.initial)
            _, done = run(chain, settings)
            states.append(done.state)
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
