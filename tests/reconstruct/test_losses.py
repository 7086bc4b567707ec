from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from quiesce.errors import ModelError
from quiesce.graph.unit import boundary
from quiesce.pipeline import run
from quiesce.preparation import Prepared, prepare
from quiesce.reconstruct.losses import fisher_weights, squared_error, weighted_squared_error
from quiesce.reconstruct.streams import Network
from tiny import Chain, images, recipe


@pytest.mark.parametrize("shape", [(5, 3, 4, 6), (5, 7), (5, 3, 8)])
def test_squared_error_sums_channels_and_averages_the_rest(shape: tuple[int, ...]) -> None:
    student, teacher = torch.randn(shape), torch.randn(shape)
    expected = (student - teacher).square().sum(1).mean()
    torch.testing.assert_close(squared_error(student, teacher), expected)
    torch.testing.assert_close(weighted_squared_error(student, teacher, torch.ones(shape)), expected)
    weight = torch.rand(shape)
    expected = ((student - teacher).square() * weight).sum(1).mean()
    torch.testing.assert_close(weighted_squared_error(student, teacher, weight), expected)


def test_squared_error_of_one_number_an_image() -> None:
    student, teacher = torch.randn(6), torch.randn(6)
    torch.testing.assert_close(squared_error(student, teacher), (student - teacher).square().mean())


def by_hand(model: Chain, x: Tensor, seed: int) -> tuple[list[Tensor], Tensor]:
    """Squared gradients at stem and blocks of the module itself, each divided by its mean; and its logits."""
    taps = [torch.relu(model.stem(x))]
    for block in model.blocks:
        taps.append(block(taps[-1]))
    logits = model.head(taps[-1].mean((2, 3)))
    labels = torch.multinomial(logits.softmax(1), 1, generator=torch.Generator().manual_seed(seed)).squeeze(1)
    loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
    squares = [g.square() for g in torch.autograd.grad(loss, taps)]
    return [s / s.mean() for s in squares], logits


def fisher_of(prepared: Prepared, names: set[str], seed: int = 5, batch: int = 64) -> tuple[Network, dict[str, Tensor]]:
    network = Network(prepared.graph)
    inputs = {network.inputs[0]: prepared.samples.args[0]}
    return network, fisher_weights(network, inputs, names, batch, torch.Generator().manual_seed(seed))


def produced(prepared: Prepared) -> list[str]:
    nodes = Network(prepared.graph).nodes
    return [boundary(nodes, m.start, m.stop).outputs[0] for m in prepared.modules[:-1]]


def test_fisher_weights_are_the_squared_gradients_of_the_float_network(chain: Prepared) -> None:
    names = produced(chain)
    network, found = fisher_of(chain, set(names))
    expected, _ = by_hand(Chain(4), chain.samples.args[0], seed=5)
    assert len(expected) == len(names) == 5
    for name, weight in zip(names, expected, strict=True):
        torch.testing.assert_close(found[name], weight, rtol=2e-3, atol=1e-4)
        assert found[name].mean().item() == pytest.approx(1.0, rel=1e-4)
    assert network.executions == network.end  # one forward (and backward) pass


def test_fisher_weights_estimate_the_diagonal_of_the_fisher_information() -> None:
    """At the logits E[g²] = p(1 − p): averaged over many draws for one and the same image."""

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.out = nn.Linear(4, 6), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return 3 * self.out(torch.relu(self.hidden(x)))

    model = Logits().eval()
    x = torch.randn(1, 4).expand(20_000, 4).contiguous()
    prepared = prepare(model, x, recipe("nearest"))
    name = Network(prepared.graph).outputs[0]
    _, found = fisher_of(prepared, {name}, batch=20_000)
    p = model(x[:1]).softmax(1).squeeze(0)
    diagonal = p * (1 - p)
    torch.testing.assert_close(found[name].mean(0), (diagonal / diagonal.mean()).detach(), rtol=0.05, atol=0.02)


def test_fisher_weights_do_not_depend_on_the_batch_size(chain: Prepared) -> None:
    names = set(produced(chain))
    _, whole = fisher_of(chain, names)
    _, parts = fisher_of(chain, names, batch=5)
    for name in names:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-2, atol=1e-3)


def test_fisher_weights_leave_quantizers_and_gradients_alone(chain: Prepared) -> None:
    fisher_of(chain, set(produced(chain)))
    assert all(not t.requires_grad for t in chain.graph.buffers())
    assert all(q.enabled for q in chain.graph.modules() if hasattr(q, "enabled"))


class Maps(nn.Module):
    """Returns feature maps, not logits."""

    def __init__(self, outputs: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
        self.outputs = outputs

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = self.body(x)
        return y if self.outputs == 1 else (y.mean((2, 3)), y)


@pytest.mark.parametrize(
    ("outputs", "message"), [(1, r"the network returns shape \[\d+, 4, 4, 4\]"), (2, "the network returns 2 outputs")]
)
def test_fisher_weighting_is_refused_without_logits(outputs: int, message: str) -> None:
    settings = recipe("brecq-fast", fisher=True)
    prepared = prepare(Maps(outputs).eval(), images(16), settings)
    with pytest.raises(ModelError, match=f"Fisher weighting needs logits.*{message}.*fisher = false"):
        run(prepared, settings)


@pytest.mark.parametrize("granularity", ["block", "layer"])
def test_fisher_weighting_changes_what_is_learned(chain: Prepared, granularity: str) -> None:
    results = {}
    for fisher in (False, True):
        settings = recipe("brecq-fast", fisher=fisher, granularity=granularity, steps=30)
        (report,), done = run(chain, settings)
        results[fisher] = done.state
        assert all(len(r.loss_curve) == 30 for r in report.unit_records)
    assert any(not torch.equal(results[True][n], results[False][n]) for n in results[True] if "quantized" in n)
