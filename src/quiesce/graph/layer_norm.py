"""Scale reparameterization of layer norms: outputs whose channels have one common range, the function unchanged.

Channels of a layer norm's output differ widely in range, and one grid for all of them suits few. Where only linear
layers read it, the difference can be moved into their weights (RepQ-ViT, arXiv 2212.08254, section 3.2). With scale
s_c and zero point z_c of each channel c, their means s̃ and z̃ (a whole number), r = s / s̃ and t = s · (z − z̃),

    γ' = γ / r        β' = (β + t) / r        W' = W diag(r)        b' = b − W t

give y' = (y + t) / r and W'y' + b' = Wy + b. On the grid of s̃ and z̃ y' has the integers that y has channel by
channel: y' / s̃ + z̃ = (y + s(z − z̃)) / s + z̃ = y / s + z.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from quiesce.data import Samples
from quiesce.graph.calibrate import Sampler
from quiesce.graph.capture import interface_of
from quiesce.graph.ops import WEIGHT_OPS, argument, aten, input_node, weight_node
from quiesce.graph.rewrite import add_tensor, device_of, tidy
from quiesce.processes import ALONE, Processes
from quiesce.quant.ranges import find_range
from quiesce.quant.spec import QuantizationSpec
from quiesce.recipe import Recipe

SAMPLED_VALUES = 2**12
"""Values of a channel that its range is found on."""


@dataclass(frozen=True)
class LeftLayerNorm:
    """A layer norm that stays as it is, and why."""

    node: str
    reason: str


def reparameterize(
    gm: fx.GraphModule,
    samples: Samples,
    recipe: Recipe,
    processes: Processes = ALONE,
) -> tuple[fx.GraphModule, list[LeftLayerNorm]]:
    """Return a copy of the float network ``gm`` with layer norms reparameterized, and the list of those left.

    Ranges of channels are those of the ``samples`` of all ``processes``, found as ``recipe.activations`` says.
    Computed in float64.
    """
    gm = copy.deepcopy(gm)
    norms = gm.graph.find_nodes(op="call_function", target=aten.layer_norm.default)
    reasons = {node: _why_not(node) for node in norms}
    fitting = [node for node in norms if not reasons[node]]
    for node, values in _observed(gm, fitting, samples, recipe, processes).items():
        _rescale(gm, node, *_channel_grids(values, recipe))
    left = [LeftLayerNorm(node.name, reason) for node, reason in reasons.items() if reason]
    return tidy(gm), left


def _why_not(norm: fx.Node) -> str:
    readers = list(norm.users)
    if len(norm.args[1]) != 1:  # type: ignore[arg-type]
        return "it normalizes more than the last axis"
    if any(n.op != "get_attr" for n in _affine(norm) if n is not None):
        return "its parameters are computed from the input"
    others = [n.name for n in readers if n.target is not aten.linear.default or n.args[0] is not norm]
    if others or not readers:
        return f"{', '.join(others) or 'nothing'} reads it, which is no linear layer"
    if any(n.op != "get_attr" for reader in readers for n in reader.all_input_nodes if n is not norm):
        return "the weight or bias of a layer behind it is computed from the input"
    if any(len(weight_node(reader).users) > 1 for reader in readers):
        return "a layer behind it shares its weight with another one"
    return ""


def _affine(norm: fx.Node) -> tuple[Any, Any]:
    return argument(norm, 2, "weight", None), argument(norm, 3, "bias", None)


@torch.no_grad()
def _observed(
    gm: fx.GraphModule, norms: list[fx.Node], samples: Samples, recipe: Recipe, processes: Processes
) -> dict[fx.Node, Tensor]:
    """Return values [channels, values] of each norm."""
    graph = fx.Graph()
    mapped: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(gm.graph, mapped)
    graph.output(tuple(mapped[n] for n in norms))
    network = fx.GraphModule(gm, graph)
    first, images = processes.place(len(samples))
    samplers = {n: Sampler(-(-SAMPLED_VALUES // images), first, recipe.seed) for n in norms}
    found: dict[fx.Node, list[Tensor]] = {n: [] for n in norms}
    for batch in samples.batches(recipe.calibration_batch, device_of(gm)):
        for node, y in zip(norms, network(*interface_of(gm).flatten(batch.args, batch.kwargs)), strict=True):
            whole = (y.numel() // y.shape[-1]) % len(batch) == 0
            rows = y.reshape(len(batch) if whole else 1, -1, y.shape[-1])
            found[node].append(samplers[node].draw(rows).flatten(0, 1))
    return {node: processes.gather(torch.cat(seen)).T.double() for node, seen in found.items()}


def _channel_grids(values: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor, Tensor]:
    """Return scale and zero point [channels], and the zero point of all; a flat channel has the mean scale.

    A channel's grid need not hold 0, as that of a tensor must: its range is found around its mean.
    """
    settings = recipe.activations
    assert settings.bits is not None
    spec = QuantizationSpec(settings.bits, settings.symmetric)
    centre = values.mean(dim=1)
    low, high = find_range(values - centre[:, None], spec, settings.range, settings.percentile)
    scale = (high - low) / (spec.quant_max - spec.quant_min)
    flat = scale <= 1e-6 * values.abs().amax()
    scale = torch.where(flat, 1.0 if flat.all() else scale[~flat].mean(), scale)
    zero_point = spec.quant_min - torch.round((centre + low) / scale)
    common = zero_point.mean().round().clamp(spec.quant_min, spec.quant_max)
    return scale, zero_point, torch.zeros_like(common) if spec.symmetric else common


def _rescale(gm: fx.GraphModule, norm: fx.Node, scale: Tensor, zero_point: Tensor, common: Tensor) -> None:
    ratio = scale / scale.mean()
    shift = scale * (zero_point - common)
    gain, offset = (None if n is None else getattr(gm, n.target) for n in _affine(norm))
    dtype = norm.meta["val"].dtype
    new_gain = (1 if gain is None else gain.double()) / ratio
    new_offset = (shift if offset is None else offset.double() + shift) / ratio
    with gm.graph.inserting_before(norm):
        affine = (
            _constant(gm, f"{norm.name}_gain", new_gain.to(dtype)),
            _constant(gm, f"{norm.name}_offset", new_offset.to(dtype)),
        )
    norm.args = (*norm.args[:2], *affine, *norm.args[4:])
    norm.kwargs = {k: v for k, v in norm.kwargs.items() if k not in ("weight", "bias")}
    for linear in list(norm.users):
        _absorb(gm, linear, ratio, shift)


def _absorb(gm: fx.GraphModule, linear: fx.Node, ratio: Tensor, shift: Tensor) -> None:
    """Let a linear layer take y' = (y + shift) / ratio for y."""
    at = weight_node(linear)
    weight = getattr(gm, str(at.target))
    bias_at = argument(linear, WEIGHT_OPS[linear.target].bias, "bias", None)  # type: ignore[index]
    moved = -(weight.double() @ shift)
    bias = moved if bias_at is None else getattr(gm, str(bias_at.target)).double() + moved
    setattr(gm, str(at.target), (weight.double() * ratio).to(weight.dtype))
    with gm.graph.inserting_before(linear):
        new = _constant(gm, f"{at.name}_bias", bias.to(weight.dtype))
    linear.args, linear.kwargs = (input_node(linear), at, new), {}


def _constant(gm: fx.GraphModule, name: str, tensor: Tensor) -> fx.Node:
    return gm.graph.get_attr(add_tensor(gm, name, tensor))
