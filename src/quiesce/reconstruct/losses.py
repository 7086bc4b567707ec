"""Reconstruction losses."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from quiesce.errors import ModelError
from quiesce.graph.rewrite import let_gradients_through
from quiesce.memory import Rows
from quiesce.quant.kernels import sum_of_squares
from quiesce.reconstruct.streams import Network, Tensors


def reconstruction_loss(
    outputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    weights: Sequence[Tensor] | None = None,
    *,
    fused: bool = False,
) -> Tensor:
    """Return the squared errors of all outputs, weighted where there are weights, added up.

    ``fused`` runs what is not weighted as compiled kernels.
    """
    total = []
    for i, (output, target) in enumerate(zip(outputs, targets, strict=True)):
        if weights is None:
            total.append(squared_error(output, target, fused=fused))
        else:
            total.append(weighted_squared_error(output, target, weights[i]))
    return total[0] if len(total) == 1 else torch.stack(total).sum()


def squared_error(student: Tensor, teacher: Tensor, *, fused: bool = False) -> Tensor:
    """Return Σ over channels (axis 1) of (ŷ − y)², averaged over images and positions (AdaRound's and BRECQ's code)."""
    return sum_of_squares(student, teacher, fused=fused) * (_channels(student) / student.numel())


def weighted_squared_error(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """Return :func:`squared_error` with each element weighted (BRECQ, eq. 10)."""
    return ((student - teacher).square() * weight).sum() * (_channels(student) / student.numel())


def _channels(tensor: Tensor) -> int:
    return tensor.shape[1] if tensor.ndim > 1 else 1


def fisher_weights(
    network: Network, inputs: Tensors, names: set[str], batch: int, generator: torch.Generator
) -> Tensors:
    """Return the squared gradients of the float network's own loss at the nodes ``names``, scaled to mean 1 each.

    The loss is the cross-entropy against labels sampled from the network's softmax, so that E[g²] is the diagonal of
    the Fisher information (BRECQ, arXiv 2102.05426, eq. 10). One forward and one backward pass. Means are those over
    the images of all processes.

    Raises:
        ModelError: the network's output is not one tensor of logits [images, classes].
    """
    module, order = _with_taps(network, names)
    images = len(next(iter(inputs.values())))
    # Everything that the network makes is kept for the way back, where gradients take as much again.
    batch = network.memory.at_a_time(batch, 2 * network.row_bytes(n.name for n in network.nodes), 0, network.together)
    squares: dict[str, Rows] = {}
    sums: dict[str, Tensor] = {}
    for first in range(0, images, batch):
        network.executions += network.end
        fed = [inputs[n][first : first + batch] for n in network.inputs]
        fed = [t.clone().requires_grad_() if t.is_floating_point() else t for t in fed]
        with torch.enable_grad():
            *taps, logits = module(*fed)
            _check_logits(logits, network)
            if not logits.requires_grad:
                raise ModelError(
                    "Fisher weighting needs floating-point inputs to differentiate by; set fisher = false."
                )
            labels = torch.multinomial(logits.detach().softmax(1).cpu(), 1, generator=generator).squeeze(1)
            loss = torch.nn.functional.cross_entropy(logits, labels.to(logits.device), reduction="sum")
            gradients = torch.autograd.grad(loss, taps, materialize_grads=True)
        for name, gradient in zip(order, gradients, strict=True):
            square = gradient.square()
            if name not in squares:
                squares[name] = network.memory.room(square, images)
                sums[name] = square.new_zeros((), dtype=torch.float64)
            squares[name][first : first + batch] = square
            sums[name] += square.sum(dtype=torch.float64)
    for name, rows in squares.items():
        total, entries = network.processes.sum(torch.stack([sums[name], sums[name].new_tensor(math.prod(rows.shape))]))
        mean = (total / entries).clamp(min=torch.finfo(rows.dtype).tiny).to(rows.dtype)
        for first in range(0, images, batch):
            rows[first : first + batch] = rows[first : first + batch] / mean
    return squares


def _with_taps(network: Network, names: set[str]) -> tuple[torch.nn.Module, list[str]]:
    """The float network as a module that also returns those of ``names`` that can have gradients, and their order."""
    from torch import fx

    graph = fx.Graph()
    mapped: dict[fx.Node, fx.Node] = {}
    for node in network.gm.graph.nodes:
        if node.op == "output":
            order = [n for n in mapped if n.name in names and n.meta["val"].is_floating_point()]
            graph.output((*[mapped[n] for n in order], *[mapped[n] for n in node.args[0]]))
        elif node.op == "call_module":
            mapped[node] = mapped[node.args[0]]
        else:
            mapped[node] = graph.node_copy(node, mapped.__getitem__)
    return let_gradients_through(fx.GraphModule(network.gm, graph)), [n.name for n in order]


def _check_logits(logits: Tensor, network: Network) -> None:
    if len(network.outputs) != 1 or logits.ndim != 2 or logits.shape[1] < 2:
        shapes = f"{len(network.outputs)} outputs" if len(network.outputs) != 1 else f"shape {list(logits.shape)}"
        raise ModelError(
            f"Fisher weighting needs logits [images, classes], and the network returns {shapes}; set fisher = false."
        )
