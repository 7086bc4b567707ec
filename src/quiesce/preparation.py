"""Everything up to reconstruction: capture, fold, place, partition, calibrate."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from quiesce.data import Samples, check_like, gather
from quiesce.errors import DataError, RecipeError
from quiesce.evaluate import Metrics, compare, outputs_of
from quiesce.export.checkpoint import check_storable
from quiesce.graph.attention import split_attention
from quiesce.graph.backends import BACKENDS
from quiesce.graph.bias import make_room_for_biases, round_biases
from quiesce.graph.calibrate import calibrate
from quiesce.graph.capture import LARGEST_CLIP, capture, images_together, interface_of
from quiesce.graph.fold import LeftBatchNorm, fold
from quiesce.graph.layer_norm import LeftLayerNorm, reparameterize
from quiesce.graph.ops import has_depthwise
from quiesce.graph.partition import partition
from quiesce.graph.place import annotate, end_grids_at_bounds, float_layers, insert, never_quantized_layers
from quiesce.graph.rewrite import device_of, follow_tensors
from quiesce.graph.unit import Unit, reach
from quiesce.memory import SPARE, Memory, Rows, Stored, free_memory, parse_bytes
from quiesce.processes import ALONE, Processes
from quiesce.quant.fake_quantize import fake_quantizers, float_mode, snapshot
from quiesce.recipe import Recipe
from quiesce.reconstruct.granular import check_granularity
from quiesce.reconstruct.plan import Sizes, reserve
from quiesce.reconstruct.streams import Network, Tensors
from quiesce.result import Result, Run, hardware, versions

COPIES = 2
"""Of the network, beside the captured one, that preparation holds: the folded one, and that with fake-quantizers."""
SNAPSHOTS = 3
"""States of all fake-quantizers that a run holds at a time: the calibrated one, and those of two passes."""


@dataclass
class Prepared:
    """A calibrated network with nearest rounding, and the data: where every run of a comparison starts."""

    graph: fx.GraphModule
    modules: list[Unit]
    samples: Samples
    """Calibration images: this process's share of them."""
    images: int
    """Images to optimize on: the first of ``samples``; the rest is held out for guards."""
    together: int
    """Images that the network takes together, such as the frames of a clip; 1 as a rule."""
    initial: dict[str, Tensor]
    evaluation: Samples | None
    reference: list[Tensor] | None
    """The float network's outputs on the evaluation data."""
    float_metrics: Metrics | None
    name: str
    left: list[LeftBatchNorm | LeftLayerNorm]
    float_layers: dict[str, str]
    """Layers with weights that stay float, with the reason of each."""
    seconds: float
    device: torch.device
    memory: int | None = None
    """Bytes that reconstruction may take on the device; None: most of what is free."""
    processes: Processes = ALONE
    """Those that share the images."""

    def network(self, recipe: Recipe) -> fx.GraphModule:
        """Return the network in its present state as the recipe's backend runs it: with integer biases if it has them.

        Fake-quantizers are shared with ``graph``, which keeps its float biases.
        """
        return round_biases(self.graph) if BACKENDS[recipe.backend].integer_bias else self.graph

    def result(self, runs: list[Run], recipe: Recipe) -> Result:
        metrics = self.float_metrics
        return Result(
            model=self.name,
            float={"top1": None if metrics is None else metrics.top1},
            runs=runs,
            recipe=recipe.to_dict(),
            versions=versions(),
            hardware=hardware(self.device),
            float_layers=self.float_layers,
        )


def prepare(
    model: nn.Module | ExportedProgram,
    calibration: object,
    recipe: Recipe,
    *,
    evaluate: object = None,
    device: torch.device | str | None = None,
    memory: int | str | None = None,
    name: str | None = None,
    holdout: int | None = None,
    processes: Processes | None = None,
) -> Prepared:
    """Do everything up to reconstruction: capture, fold, place, calibrate, partition.

    ``holdout`` calibration images, the last ones (of each process's share), are kept from optimization; None asks the
    recipe's guard. ``processes`` are as for :func:`quiesce.quantize`.
    """
    began = time.perf_counter()
    processes = processes or ALONE
    where = torch.device(device) if device is not None else model_device(model)
    budget = as_bytes(memory)
    in_file = budget is not None and where.type == "cpu"
    samples = gather(calibration, "calibration", in_file=in_file)
    holdout = _holdout(recipe, len(samples)) if holdout is None else holdout
    recipe = part_of_process(recipe, processes)
    captured = capture_on(model, samples, where)
    together = images_together(captured, samples.select(slice(LARGEST_CLIP)).to(where))
    check_together(together, recipe, {"calibration images": len(samples) - holdout, "held-out images": holdout})
    processes.part("calibration images", len(samples), together)
    samples = samples.select(processes.share(len(samples), together))
    holdout = processes.part("held-out images", holdout, together) if holdout else 0
    _check_batch(recipe, len(samples) - holdout, processes)
    network = Network(captured, memory_of(captured, where, budget, recipe, processes), together)
    network.memory.hold("device", COPIES * sum(t.nbytes for t in captured.buffers()) if budget else 0)
    recipe = replace(recipe, calibration_batch=network.images_at_a_time(recipe.calibration_batch))
    folded, left = fold(captured)
    folded, left_norms = _reparameterized(split_attention(folded), samples, recipe, processes)
    graph = insert(folded, annotate(folded, BACKENDS[recipe.backend], recipe))
    check_storable(graph)
    modules = partition(graph, "block")
    if recipe.granularity is not None:
        check_granularity([m.name for m in modules], recipe.granularity)
    _check_memory(graph, modules, where, budget, recipe, together, processes)
    network.memory.trim()
    calibrate(graph, samples, recipe, processes)
    if BACKENDS[recipe.backend].integer_bias:
        make_room_for_biases(graph)
        end_grids_at_bounds(graph)
    evaluation = None if evaluate is None else gather(evaluate, "evaluation", in_file=in_file)
    reference = metrics = None
    if evaluation is not None:
        check_like(evaluation, samples, "evaluation")
        check_together(together, recipe, {"evaluation images": len(evaluation)})
        with float_mode(graph):
            processes.part("evaluation images", len(evaluation), together)
            reference = network_outputs(graph, evaluation, recipe.calibration_batch, processes, together)
        # Labels that do not fit are found now, not after hours of work.
        metrics = compare(reference, evaluation.labels, None)
    return Prepared(
        graph=graph,
        modules=modules,
        samples=samples,
        images=len(samples) - holdout,
        together=together,
        initial=snapshot(graph),
        evaluation=evaluation,
        reference=reference,
        float_metrics=metrics,
        name=name or type(model).__name__,
        left=[*left, *left_norms],
        float_layers=left_float(folded, recipe),
        seconds=time.perf_counter() - began,
        device=where,
        memory=budget,
        processes=processes,
    )


def capture_on(model: nn.Module | ExportedProgram, samples: Samples, device: torch.device) -> fx.GraphModule:
    """Capture on at most two samples; a single one is repeated, as a batch of one would be taken for a constant."""
    example = samples.select(slice(0, 2)) if len(samples) > 1 else samples.select(torch.zeros(2, dtype=torch.long))
    graph = follow_tensors(capture(model, example.to(model_device(model))).to(device))
    _check_captured(graph, samples)
    return graph


def _check_captured(graph: fx.GraphModule, samples: Samples) -> None:
    """A saved program has shapes of its own, which the calibration images must have."""
    flat = interface_of(graph).flatten(samples.args, samples.kwargs)
    for node, tensor in zip([n for n in graph.graph.nodes if n.op == "placeholder"], flat, strict=True):
        expected = node.meta["val"]
        fixed = zip(expected.shape[1:], tensor.shape[1:], strict=False)
        if (
            expected.dtype != tensor.dtype
            or expected.ndim != tensor.ndim
            or any(isinstance(a, int) and a != b for a, b in fixed)
        ):
            raise DataError(
                f"calibration: input {node.name} has shape {list(tensor.shape)} and {tensor.dtype}, and the network "
                f"was captured with {[str(s) for s in expected.shape]} and {expected.dtype}; prepare the images so."
            )


def left_float(graph: fx.GraphModule, recipe: Recipe) -> dict[str, str]:
    """Return the layers with weights that stay float, with the reason of each."""
    return {**never_quantized_layers(graph), **float_layers(graph, BACKENDS[recipe.backend], recipe)}


def _reparameterized(
    graph: fx.GraphModule, samples: Samples, recipe: Recipe, processes: Processes
) -> tuple[fx.GraphModule, list[LeftLayerNorm]]:
    wanted = recipe.activations.layer_norm == "reparameterized" and recipe.activations.bits is not None
    return reparameterize(graph, samples, recipe, processes) if wanted else (graph, [])


def model_device(model: nn.Module | ExportedProgram) -> torch.device:
    """Return where the model's tensors are; the CPU if it has none."""
    tensors = [*model.parameters(), *model.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


def _holdout(recipe: Recipe, images: int) -> int:
    granularity = recipe.granularity
    if granularity is None or not granularity.guard or granularity.method in ("layer", "block"):
        return 0
    return max(1, round(granularity.holdout * images))


def part_of_process(recipe: Recipe, processes: Processes) -> Recipe:
    """Return ``recipe`` with one process's part of a batch."""
    learning, size = recipe.reconstruction, processes.size
    if learning is None:
        return recipe
    if learning.batch_size % size:
        raise RecipeError(
            f"a batch_size of {learning.batch_size} can't be shared equally by {size} processes; give a multiple of "
            f"{size}, or start another number."
        )
    return replace(recipe, reconstruction=replace(learning, batch_size=learning.batch_size // size))


def _check_batch(recipe: Recipe, images: int, processes: Processes) -> None:
    if recipe.reconstruction is not None and images < recipe.reconstruction.batch_size:
        which = "" if processes.size == 1 else f" in process {processes.rank} (its share)"
        raise DataError(
            f"calibration has {images} images to optimize on{which}, fewer than a batch of "
            f"{recipe.reconstruction.batch_size}; give more images or a smaller batch_size."
        )


def check_together(together: int, recipe: Recipe, counts: dict[str, int]) -> None:
    """Raise where ``counts`` of images, or the recipe's batches, are no multiples of ``together``."""
    counts = counts | {"calibration_batch": recipe.calibration_batch}
    if recipe.reconstruction is not None:
        counts |= {"batch_size": recipe.reconstruction.batch_size}
    wrong = ", ".join(f"{name} ({count})" for name, count in counts.items() if count % together)
    if wrong:
        raise DataError(f"the network takes {together} images together; give a multiple of {together} of: {wrong}.")


def memory_of(
    graph: fx.GraphModule, device: torch.device, budget: int | None, recipe: Recipe, processes: Processes
) -> Memory:
    """What a run may take: a stated budget, of which the network has its part, or most of what is free.

    Processes of one machine share its memory, but each has a GPU of its own.
    """
    free = free_memory(torch.device("cpu"))
    host = _most_of(None if free is None else free // processes.beside)
    narrow = recipe.stream_dtype == "bf16"
    if budget is None:
        there = host if device.type == "cpu" else _most_of(free_memory(device))
        return Memory(device, there, host, narrow=narrow)
    memory = Memory(device, budget, host, stated=True, narrow=narrow)
    state = sum(t.nbytes for quantizer in fake_quantizers(graph).values() for t in quantizer.buffers())
    memory.hold("device", sum(t.nbytes for t in graph.buffers()) + SNAPSHOTS * state)
    return memory


def _check_memory(
    graph: fx.GraphModule,
    modules: list[Unit],
    device: torch.device,
    budget: int | None,
    recipe: Recipe,
    together: int,
    processes: Processes,
) -> None:
    """Raise what a walk over the modules would raise for lack of memory, before anything slow is done."""
    network = Network(graph, memory_of(graph, device, budget, recipe, processes))
    overlap = overlap_of(graph, recipe)
    units = (reach(module, modules, overlap) for module in modules)
    reserve(network, units, Sizes.of(recipe, together))


def overlap_of(graph: fx.GraphModule, recipe: Recipe) -> int:
    """Return how many modules behind a unit are optimized along with it."""
    if recipe.granularity is None:
        return 0
    if recipe.granularity.overlap is not None:
        return recipe.granularity.overlap
    return 2 if has_depthwise(graph) else 1


def as_bytes(memory: int | str | None) -> int | None:
    """Return a budget such as ``"4GB"`` as a number; None is none."""
    return parse_bytes(memory) if isinstance(memory, str) else memory


def _most_of(free: int | None) -> int | None:
    return None if free is None else int((1 - SPARE) * free)


def inputs_of(network: Network, samples: Samples) -> Tensors:
    """Return the samples by the names of the network's inputs, where they are: they are moved when they are read."""
    flat = interface_of(network.gm).flatten(samples.args, samples.kwargs)
    return {name: _read_from(t, network.memory.device) for name, t in zip(network.inputs, flat, strict=True)}


def _read_from(tensor: Tensor, device: torch.device) -> Rows:
    """Images get channels last in memory: convolutions, depthwise ones above all, are several times faster so."""
    if tensor.ndim == 4:
        return Stored(tensor, device, tensor.dtype, torch.channels_last)
    return tensor if tensor.device == device else Stored(tensor, device, tensor.dtype)


def network_outputs(
    graph: fx.GraphModule, samples: Samples, batch: int, processes: Processes, together: int
) -> list[Tensor]:
    """Return the network's outputs on all ``samples``; each process computes those of its share."""
    flat = interface_of(graph).flatten
    mine = samples.select(processes.share(len(samples), together))
    return [processes.gather(t) for t in outputs_of(lambda *a, **k: graph(*flat(a, k)), mine, batch, device_of(graph))]
