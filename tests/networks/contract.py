"""The contract that every network is held to, from capture to its file: what is broken raises AssertionError."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import fx, nn

from catalogue import Entry
from fresh_process import check_identical
from quiesce.data import Samples
from quiesce.evaluate import outputs_of
from quiesce.graph.ops import weight_node
from quiesce.graph.partition import LOOSE_LAYERS, partition
from quiesce.graph.place import module_stack, weight_layers
from quiesce.graph.unit import Unit, boundary, compute_nodes
from quiesce.pipeline import regularizer_weight, run
from quiesce.preparation import Prepared, prepare
from quiesce.progress import Progress
from quiesce.quant.draws import Draws
from quiesce.quant.fake_quantize import (
    ActivationFakeQuantize,
    Drop,
    WeightFakeQuantize,
    fake_quantizers,
    float_mode,
    restore,
    snapshot,
)
from quiesce.quantized import QuantizedModel
from quiesce.recipe import Recipe
from quiesce.reconstruct.batches import Batch, Problem
from quiesce.reconstruct.loop import _Walk
from quiesce.reconstruct.losses import squared_error
from quiesce.reconstruct.optimize import optimize
from quiesce.reconstruct.step import Learned, Step
from small_nets import call
from tiny import job, recipe

STEPS, IMAGES, BATCH = 3, 6, 4
LONG_STEPS = 50
RATES = (
    {},
    {"rounding_lr": 1e-2, "step_size_lr": 2e-4},
    {"rounding_lr": 3e-3, "step_size_lr": 1e-5, "drop_prob": 0.0},
    {"rounding_lr": 1e-2, "step_size_lr": 1e-3, "drop_prob": 0.0, "regularizer_weight": 0.0, "batch_size": IMAGES},
    {"rounding_lr": 1e-3, "step_size_lr": 1e-3, "drop_prob": 0.0, "regularizer_weight": 0.0, "batch_size": IMAGES},
)
"""Settings at which that many steps on so few images shall lower a loss, at one of them: the preset's, and slower ones.
In the last two, nothing but the loss that is looked at is lowered, on all images."""
NOTHING_TO_GAIN = 1.02
"""A unit's loss over that of the float unit on quantized inputs, up to which its own rounding does not matter."""
LARGEST_SHARE = 0.25
"""Of a network's weight layers that one unit may hold."""
LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


@dataclass
class Row:
    """What was found in a network."""

    parameters: int
    layers: int
    float_layers: tuple[str, ...]
    """Layers left float, with the reason."""
    units: int
    """Block units."""
    block_types: tuple[str, ...]
    largest_unit: str
    largest: int
    """Weight layers of the largest block unit."""
    seconds: float = 0.0


def hold(entry: Entry, folder: Path) -> Row:
    """Hold one network to the contract; ``folder`` is for files."""
    began = time.perf_counter()
    model = entry.model()
    settings = recipe(weight_bits=4, steps=STEPS, batch_size=BATCH)
    prepared = prepare(model, entry.samples(IMAGES, seed=1), settings, name=entry.name)
    check_float_outputs(prepared.graph, model, entry)
    check_weights(prepared, model, entry)
    for granularity in ("layer", "block"):
        units = partition(prepared.graph, granularity)
        check_units(prepared.graph, units)
        check_reconstruction(prepared, units, settings, entry, long=granularity == "block")
    check_sizes(units, entry)
    check_integers(prepared.graph)
    check_file(prepared, settings, entry, folder)
    largest = max(units, key=lambda unit: len(unit.layers))
    return Row(
        parameters=sum(p.numel() for p in model.parameters()),
        layers=sum(len(unit.layers) for unit in units),
        float_layers=tuple(f"{name}: {reason}" for name, reason in prepared.float_layers.items()),
        units=len(units),
        block_types=tuple(dict.fromkeys(k for u in units if (k := block_type(prepared.graph, u)))),
        largest_unit=largest.name,
        largest=len(largest.layers),
        seconds=time.perf_counter() - began,
    )


def check_float_outputs(gm: fx.GraphModule, model: nn.Module, entry: Entry) -> None:
    """Captured and folded, the network computes what it did, at other batch sizes too."""
    for count in (1, 3):
        samples = entry.samples(count, seed=count + 10)
        with float_mode(gm):
            found = outputs_of(call(gm), samples)
        for output, expected in zip(found, outputs_of(model, samples), strict=True):
            assert output.shape == expected.shape
            error = (output - expected).norm() / expected.norm()
            assert error <= entry.float_error, f"float outputs differ by {error:.1e} at a batch of {count}"


def check_weights(prepared: Prepared, model: nn.Module, entry: Entry) -> None:
    """Every convolution and linear layer that runs is in the graph, and its weight is quantized or left with reason."""
    gm = prepared.graph
    layers = weight_layers(gm)
    known = {path for name in layers for path in same_module(model, name.partition(":")[0])}
    missing = unexcused(called_layers(model, entry.samples(1, seed=2)) - known, entry.exceptions)
    assert not missing, f"layers are not in the graph: {sorted(missing)}"
    quantizers = fake_quantizers(gm)
    for name, layer in layers.items():
        quantized = isinstance(quantizers.get(str(weight_node(layer).target)), WeightFakeQuantize)
        assert quantized or name in prepared.float_layers, f"the weight of {name} is not quantized"


def same_module(model: nn.Module, path: str) -> set[str]:
    """All paths of the module at ``path``, which may be registered in several places; ``path`` if there is none."""
    every = dict(model.named_modules(remove_duplicate=False))
    return {other for other, module in every.items() if module is every.get(path)} | {path}


@torch.no_grad()
def called_layers(model: nn.Module, samples: Samples) -> set[str]:
    """Names of the convolutions and linear layers that forward calls."""
    called: set[str] = set()

    def note(name: str) -> Callable[..., None]:
        return lambda *_: called.add(name)

    handles = [m.register_forward_hook(note(n)) for n, m in model.named_modules() if isinstance(m, LAYERS)]
    model(*samples.args, **samples.kwargs)
    for handle in handles:
        handle.remove()
    return called


def unexcused(names: set[str], excuses: dict[str, str]) -> set[str]:
    return {name for name in names if not any(fnmatchcase(name, pattern) for pattern in excuses)}


def check_units(gm: fx.GraphModule, units: list[Unit]) -> None:
    """Each weight layer is in one unit, and what a unit reads is made in front of it."""
    nodes = compute_nodes(gm)
    found, expected = [layer for unit in units for layer in unit.layers], list(weight_layers(gm))
    assert found == expected, f"layers of units: {found}; of the network: {expected}"
    assert [0, *[u.stop for u in units]] == [*[u.start for u in units], len(nodes)], "units do not chain"
    made = {n.name for n in gm.graph.nodes if n.op == "placeholder"}
    for unit in units:
        ends = boundary(nodes, unit.start, unit.stop)
        assert set(ends.inputs) <= made, f"{unit.name} reads what nothing in front of it returns"
        made |= set(ends.outputs)
    output = next(n for n in gm.graph.nodes if n.op == "output")
    assert {n.name for n in output.args[0]} <= made, "the network returns what no unit does"


def check_sizes(units: list[Unit], entry: Entry) -> None:
    total = sum(len(unit.layers) for unit in units)
    for unit in units:
        small = len(unit.layers) <= max(LOOSE_LAYERS, LARGEST_SHARE * total)
        assert small or entry.large_unit, f"{unit.name} holds {len(unit.layers)} of {total} weight layers"


def check_reconstruction(prepared: Prepared, units: list[Unit], settings: Recipe, entry: Entry, *, long: bool) -> None:
    """Gradients reach all that is learned, and steps can be taken; if ``long``, many of them lower a block's loss."""
    restore(prepared.graph, prepared.initial)
    walk = _Walk(job(prepared, settings))
    seen = {""}
    for unit in units:
        problem = walk._problem(unit)
        check_gradients(problem, prepared, settings, entry, unit)
        kind = block_type(prepared.graph, unit) if long else ""
        if kind not in seen:
            check_loss(problem, prepared, settings, unit)
        seen.add(kind)
        walk.optimize(unit, [unit.name], STEPS, False, Progress())


def check_loss(problem: Problem, prepared: Prepared, settings: Recipe, unit: Unit) -> None:
    """Many steps lower the unit's loss, unless its own rounding hardly matters; the unit is left as it was."""
    state, before, floor = snapshot(problem.module), loss_of(problem), floor_of(problem)
    if before < NOTHING_TO_GAIN * floor:
        return
    after = []
    for rates in RATES:
        chosen = settings.with_settings(**rates).reconstruction
        assert chosen is not None
        optimize(
            problem,
            chosen,
            steps=LONG_STEPS,
            regularizer_weight=regularizer_weight(prepared.graph, settings.with_settings(**rates)),
            warm=(),
            seed=0,
            on_step=lambda: None,
        )
        after.append(loss_of(problem))
        restore(problem.module, state)
        if after[-1] < before:
            return
    raise AssertionError(f"the loss of {unit.name} went from {before:.4g} to {after}, above {floor:.4g}")


def block_type(gm: fx.GraphModule, unit: Unit) -> str:
    """The class of the block module that a unit is; "" for a unit that is none, or only a layer."""
    stacks = (dict(module_stack(n)) for n in compute_nodes(gm)[unit.start : unit.stop])
    kinds = (stack[unit.name].rsplit(".", 1)[-1] for stack in stacks if unit.name in stack)
    return next(kinds, "") if len(unit.layers) > 1 else ""


@torch.no_grad()
def loss_of(problem: Problem) -> float:
    outputs = problem.module(*(rows[: problem.images] for rows in problem.quantized_inputs))
    pairs = zip(outputs, problem.targets, strict=True)
    return sum(float(squared_error(o, rows[: problem.images])) for o, rows in pairs)


def floor_of(problem: Problem) -> float:
    """The loss of the float unit on quantized inputs."""
    with float_mode(problem.module):
        return loss_of(problem)


def check_gradients(problem: Problem, prepared: Prepared, settings: Recipe, entry: Entry, unit: Unit) -> None:
    """Every rounding and every step size has a finite gradient that is not all zeros."""
    assert settings.reconstruction is not None
    state = snapshot(problem.module)
    drop = Drop(settings.reconstruction.drop_prob, Draws(0, problem.device))
    learned = Learned.attach(problem.module, settings.reconstruction, (), drop)
    names = {id(q): n for n, q in fake_quantizers(prepared.graph).items()}
    try:
        step = Step(problem, settings.reconstruction, learned, drop, 0.0, 1)
        step.loss(torch.tensor(0), Batch.of(problem, torch.arange(BATCH))).backward()
        gradients = {names[id(q)]: q.rounding.V.grad for q in learned.weights if q.rounding is not None}
        gradients |= {names[id(q)]: q.scale.grad for q in learned.activations}
    finally:
        learned.harden()
        restore(problem.module, state)
    broken = {n for n, g in gradients.items() if g is None or not g.isfinite().all() or not g.any()}
    assert not unexcused(broken, entry.no_gradient), f"no or infinite gradients in {unit.name}: {sorted(broken)}"


def check_integers(gm: fx.GraphModule) -> None:
    """Hardened weights are on their grids."""
    for name, quantizer in fake_quantizers(gm).items():
        if isinstance(quantizer, WeightFakeQuantize):
            assert quantizer.rounding is None
            spec, weight = quantizer.spec, quantizer().double()
            scale, zero = (spec.broadcast(p.double(), weight.ndim) for p in (quantizer.scale, quantizer.zero_point))
            steps = weight / scale + zero
            assert (steps - steps.round()).abs().max() < 1e-3, f"{name} is off its grid"
            assert spec.quant_min <= steps.round().min() and steps.round().max() <= spec.quant_max
        else:
            assert isinstance(quantizer, ActivationFakeQuantize)
            assert quantizer.scale.isfinite() and quantizer.scale > 0, f"{name} has a scale of {quantizer.scale}"


def check_file(prepared: Prepared, settings: Recipe, entry: Entry, folder: Path) -> None:
    """Saved, and loaded by another process, the network gives the same bits."""
    state = snapshot(prepared.graph)
    runs, _ = run(prepared, Recipe.preset("nearest", weight_bits=4, activation_bits=4))
    restore(prepared.graph, state)
    network = QuantizedModel(prepared.network(settings), prepared.result(runs, settings), settings, None)
    samples = entry.samples(2, seed=20)
    check_identical(network, network.save(folder / "network"), *samples.args, **samples.kwargs)
