"""The pipeline: capture, fold, place, calibrate, partition, granularity, reconstruct, evaluate, in this order."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from quiesce.data import Samples, check_like, gather
from quiesce.errors import DataError, ModelError, RecipeError
from quiesce.evaluate import Metrics, compare, outputs_of
from quiesce.export.checkpoint import check_storable
from quiesce.export.export import require
from quiesce.graph.attention import split_attention
from quiesce.graph.backends import BACKENDS
from quiesce.graph.bias import make_room_for_biases, round_biases
from quiesce.graph.calibrate import calibrate
from quiesce.graph.capture import LARGEST_CLIP, capture, images_together, interface_of
from quiesce.graph.fold import LeftBatchNorm, fold
from quiesce.graph.layer_norm import LeftLayerNorm, reparameterize
from quiesce.graph.ops import hyperparameters, is_weight_op, weight_node
from quiesce.graph.partition import partition
from quiesce.graph.place import (
    annotate,
    end_grids_at_bounds,
    float_layers,
    insert,
    layers_at_common_bits,
    never_quantized_layers,
)
from quiesce.graph.rewrite import device_of, follow_tensors
from quiesce.graph.unit import Unit, boundary, reach
from quiesce.memory import SPARE, Memory, Peak, Rows, Stored, free_memory, parse_bytes
from quiesce.oscillation.capacity import modcap
from quiesce.oscillation.measure import ModuleLoss, summarize
from quiesce.precision.assignment import Budget, MixedPrecision, mixed_precision
from quiesce.precision.sensitivity import Sensitivity, layer_sensitivities
from quiesce.processes import ALONE, Processes
from quiesce.progress import Progress, ProgressCallback
from quiesce.quant import kernels
from quiesce.quant.fake_quantize import fake_quantizers, float_mode, restore, snapshot
from quiesce.quantized import QuantizedModel
from quiesce.recipe import BACKENDS as BACKEND_DEMANDS
from quiesce.recipe import GranularityRecipe, Recipe, check_bits
from quiesce.reconstruct.granular import Outcome, block_pass, check_granularity, merged_pass, propose
from quiesce.reconstruct.journal import check_same_run, digest_of, digest_of_text, open_journal
from quiesce.reconstruct.loop import Job, Pass, layer_pass, measure_pass
from quiesce.reconstruct.losses import fisher_weights
from quiesce.reconstruct.plan import Sizes, reserve
from quiesce.reconstruct.streams import Network, Tensors
from quiesce.result import MemoryRecord, Result, Run, hardware, versions

FUSED_STEPS = {"cpu": 5000, "cuda": 1000}
"""Steps of all units from which on compiling kernels pays even on a small network: it takes some 20 seconds on a CPU,
and on a GPU some 3 the first time and less than one from then on."""
COPIES = 2
"""Of the network, beside the captured one, that preparation holds: the folded one, and that with fake-quantizers."""
SNAPSHOTS = 3
"""States of all fake-quantizers that a run holds at a time: the calibrated one, and those of two passes."""


def quantize(
    model: nn.Module | ExportedProgram,
    calibration: object,
    recipe: Recipe,
    *,
    evaluate: object = None,
    device: torch.device | str | None = None,
    memory: int | str | None = None,
    progress: ProgressCallback | None = None,
    name: str | None = None,
    preprocessing: dict[str, Any] | None = None,
    progress_folder: Path | str | None = None,
    fused: bool | None = None,
    processes: Processes | None = None,
) -> QuantizedModel:
    """Quantize ``model`` as ``recipe`` says.

    Args:
        model: the float network (never changed), or a program saved by torch.export.
        calibration: images without labels: a tensor [N, ...], or an iterable of batches: tensors, (tensor, label)
            pairs, or dicts of keyword arguments, such as a DataLoader.
        evaluate: data of the same kinds, with labels if top-1 is wanted; None measures no accuracy.
        device: where to work; None is the model's device.
        memory: what may be taken on the device, in bytes or such as ``"4GB"``: what has no room is kept on the host or
            in temporary files. Tensors of images that are given here are not counted: they stay where they are. None
            takes most of what is free.
        progress: called as ``progress(stage, steps_done, steps_planned)``.
        name: the model's name in the result; None is its class.
        preprocessing: kept with the network, for who loads it.
        progress_folder: where finished units are kept, so that the same call, made again after an interruption, goes on
            behind them to the same result, bit for bit (docs/resume.md). It stays when all is done: remove it once the
            result is safe. None keeps nothing.
        fused: run the elementwise maths of steps as compiled kernels; None does where there is a compiler, and steps
            enough to pay for compiling. Results differ by rounding.
        processes: those that share the work (``Processes.current()`` under torchrun, docs/parallel.md): all make this
            call with the same arguments and get the same network, each working on its share of the images. None: this
            process works alone.

    Raises:
        QuiesceError: one sentence on what is wrong with the model, the data or the recipe, or that ``progress_folder``
            is of another run.
    """
    budget = _bytes(memory)
    if progress_folder is not None and (processes is None or processes.first):
        where = torch.device(device) if device is not None else _device_of(model)
        check_same_run(Path(progress_folder), _settings(recipe, where, budget))
    prepared = prepare(
        model, calibration, recipe, evaluate=evaluate, device=device, memory=budget, name=name, processes=processes
    )
    runs, _ = run(prepared, recipe, progress=progress, progress_folder=progress_folder, fused=fused)
    return QuantizedModel(prepared.network(recipe), prepared.result(runs, recipe), recipe, preprocessing)


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
    recipe's guard. ``processes`` are as for :func:`quantize`.
    """
    began = time.perf_counter()
    processes = processes or ALONE
    where = torch.device(device) if device is not None else _device_of(model)
    budget = _bytes(memory)
    in_file = budget is not None and where.type == "cpu"
    samples = gather(calibration, "calibration", in_file=in_file)
    holdout = _holdout(recipe, len(samples)) if holdout is None else holdout
    recipe = _of_process(recipe, processes)
    captured = _captured(model, samples, where)
    together = images_together(captured, samples.select(slice(LARGEST_CLIP)).to(where))
    _check_together(together, recipe, {"calibration images": len(samples) - holdout, "held-out images": holdout})
    processes.part("calibration images", len(samples), together)
    samples = samples.select(processes.share(len(samples), together))
    holdout = processes.part("held-out images", holdout, together) if holdout else 0
    _check_batch(recipe, len(samples) - holdout, processes)
    network = Network(captured, _memory(captured, where, budget, recipe, processes), together)
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
        _check_together(together, recipe, {"evaluation images": len(evaluation)})
        with float_mode(graph):
            processes.part("evaluation images", len(evaluation), together)
            reference = _outputs(graph, evaluation, recipe.calibration_batch, processes, together)
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
        float_layers=_left_float(folded, recipe),
        seconds=time.perf_counter() - began,
        device=where,
        memory=budget,
        processes=processes,
    )


def run(
    prepared: Prepared,
    recipe: Recipe,
    *,
    block: Pass | None = None,
    progress: ProgressCallback | None = None,
    progress_folder: Path | str | None = None,
    fused: bool | None = None,
) -> tuple[list[Run], Pass]:
    """Reconstruct the prepared network as ``recipe`` says and leave it in the state that was kept.

    ``block`` is a block pass of the same prepared network and the same reconstruction settings. Where a merged
    granularity needs one and has none, short passes measure instead; with ``granularity.measuring = 1`` a full one is
    made, and reported as a run of its own in front. ``progress_folder`` and ``fused`` are as for :func:`quantize`.

    Returns:
        The runs, the asked-for one last, and its pass.
    """
    restore(prepared.graph, prepared.initial)
    memory = _memory(prepared.graph, prepared.device, prepared.memory, recipe, prepared.processes)
    memory.trim()  # of what preparation has freed
    with Peak(prepared.device) as peak:
        job = _job(prepared, recipe, memory, fused)
        runs, kept = _run(prepared, recipe, job, block, progress, progress_folder)
    record = MemoryRecord(
        memory.budget, memory.reserved, memory.most["device"], memory.most["host"], memory.most["file"], peak.bytes
    )
    size = prepared.processes.size
    return [replace(made, memory=record, kernels=job.kernels, processes=size) for made in runs], kept


def _run(
    prepared: Prepared,
    recipe: Recipe,
    job: Job,
    block: Pass | None,
    progress: ProgressCallback | None,
    progress_folder: Path | str | None,
) -> tuple[list[Run], Pass]:
    if recipe.reconstruction is None or recipe.granularity is None:
        measured = measure_pass(job)
        return [_report(prepared, recipe, measured, measured.seconds)], measured
    if progress_folder is None:
        return _reconstruct(prepared, recipe, recipe.granularity, job, block, progress)
    identity = _identity(prepared, recipe, job, block)
    if not prepared.processes.first:  # the first one keeps progress, and tells the others
        return _reconstruct(prepared, recipe, recipe.granularity, job, block, progress)
    with open_journal(Path(progress_folder), identity) as journal:
        return _reconstruct(prepared, recipe, recipe.granularity, replace(job, journal=journal), block, progress)


def _reconstruct(
    prepared: Prepared,
    recipe: Recipe,
    granularity: GranularityRecipe,
    job: Job,
    block: Pass | None,
    progress: ProgressCallback | None,
) -> tuple[list[Run], Pass]:
    counter = Progress(progress)
    if granularity.method == "layer":
        done = layer_pass(job, partition(prepared.graph, "layer"), counter)
        return [_report(prepared, recipe, done, done.seconds)], done
    if granularity.method == "block":
        done = block_pass(job, counter)
        return [_report(prepared, recipe, done, done.seconds)], done
    outcome = merged_pass(job, granularity, counter, block)
    runs = [_report_outcome(prepared, recipe, outcome)]
    if block is None and outcome.block is not None:
        restore(prepared.graph, outcome.block.state)
        plain = recipe.with_settings(granularity="block", scheme=None, overlap=0)
        runs.insert(0, _report(prepared, plain, outcome.block, outcome.block.seconds))
        restore(prepared.graph, outcome.kept.state)
    return runs, outcome.kept


@dataclass(frozen=True)
class Analysis:
    """What the network's structure says before any optimization."""

    modules: list[str]
    capacities: dict[str, float]
    differentials: list[float]
    merges: list[list[str]]
    layers: dict[str, list[str]]
    """Module → its weight layers."""
    float_layers: dict[str, str]
    """Layers with weights that stay float, with the reason of each."""


def analyze(model: nn.Module | ExportedProgram, example: Samples, recipe: Recipe) -> Analysis:
    """Return blocks, data-free capacities, differentials, and the merges they imply. Takes seconds.

    A recipe with a data-dependent granularity is analyzed by ``modcap``, with its other settings.
    """
    settings = recipe.granularity or GranularityRecipe()
    if settings.method != "scheme":
        settings = GranularityRecipe(
            method="modcap", k=settings.k, lam=settings.lam, alpha=settings.alpha, max_modules=settings.max_modules
        )
    folded, _ = fold(_captured(model, example, _device_of(model)))
    folded = split_attention(folded)
    graph = insert(folded, annotate(folded, BACKENDS[recipe.backend], recipe))
    units = partition(graph, "block")
    names = [u.name for u in units]
    capacities = modcap(graph, units, settings.alpha)
    proposal = propose(names, settings, capacities)
    return Analysis(
        modules=names,
        capacities=dict(zip(names, capacities, strict=True)),
        differentials=proposal.differentials,
        merges=[[names[i] for i in group] for group in proposal.groups if len(group) > 1],
        layers={u.name: list(u.layers) for u in units},
        float_layers=_left_float(folded, recipe),
    )


def measure_sensitivity(
    model: nn.Module | ExportedProgram,
    calibration: object,
    recipe: Recipe,
    *,
    bits: Collection[int] = (2, 4, 8),
    holdout: float = 0.25,
    device: torch.device | str | None = None,
    progress: ProgressCallback | None = None,
) -> Sensitivity:
    """Measure how much error quantizing each weight layer alone, to nearest, causes at the network's outputs.

    Args:
        model: as for :func:`quantize`.
        calibration: likewise. The last ``holdout`` of the images, a share, are what errors are measured on; ranges are
            taken from the others.
        recipe: what is quantized to how many bits; its reconstruction has no part in it.
        bits: 2 to 8; the weight alone is measured at each of them, besides at the bits that the recipe gives it.
        device: as for :func:`quantize`.
        progress: called as ``progress(layer, trials_done, trials_planned)``.

    Raises:
        QuiesceError: one sentence on what is wrong with the model, the data or the settings.
    """
    return _sensitivity(model, calibration, recipe, bits, holdout, device, progress)[1]


def choose_bits(
    model: nn.Module | ExportedProgram,
    calibration: object,
    recipe: Recipe,
    *,
    average_bits: float | None = None,
    size: float | None = None,
    bops: float | None = None,
    bits: Collection[int] = tuple(range(2, 9)),
    holdout: float = 0.25,
    device: torch.device | str | None = None,
    progress: ProgressCallback | None = None,
) -> MixedPrecision:
    """Choose the weight bits of each layer from its sensitivity: least error within a budget, exactly.

    The first and the last layer, and those with ``weight_bits`` in an override of ``recipe``, keep their bits. The
    recipe that is returned has an override for every quantized layer: :func:`quantize` takes it as any other.

    Args:
        model: as for :func:`measure_sensitivity`, and so are ``calibration``, ``recipe``, ``holdout``, ``device``,
            ``progress``.
        average_bits: the budget as the mean number of bits of a weight, over the layers whose bits are chosen; or
        size: as bytes of the integers of all quantized weights; or
        bops: as bit operations for one image (:class:`~quiesce.precision.assignment.Budget`). One of the three.
        bits: to choose from, 2 to 8.

    Raises:
        RecipeError: there is nothing to choose, or the budget is below what the fewest bits cost.
        ModelError: scipy is not installed.
        QuiesceError: as for :func:`measure_sensitivity`.
    """
    require(("scipy",), "mixed")
    budget = Budget(average_bits=average_bits, size=size, bops=bops)
    if "weights.bits" in BACKEND_DEMANDS[recipe.backend]:
        raise RecipeError(f"backend {recipe.backend!r} demands one number of bits, so there are none to choose.")
    choices = sorted(set(bits))
    prepared, sensitivity = _sensitivity(model, calibration, recipe, choices, holdout, device, progress)
    free = layers_at_common_bits(prepared.graph, recipe)
    return mixed_precision(recipe, sensitivity, free, budget, choices)


def _sensitivity(
    model: nn.Module | ExportedProgram,
    calibration: object,
    recipe: Recipe,
    bits: Collection[int],
    holdout: float,
    device: torch.device | str | None,
    progress: ProgressCallback | None,
) -> tuple[Prepared, Sensitivity]:
    began = time.perf_counter()
    for number in bits:
        check_bits("the number of bits", number)
    samples = gather(calibration, "calibration")
    first = len(samples) - round(holdout * len(samples))
    if not 0 < first < len(samples):
        raise DataError(
            f"a share of {holdout} of {len(samples)} calibration images can't be held out and leave others; "
            "give more images or another share."
        )
    prepared = prepare(
        model, samples.select(slice(first)), replace(recipe, granularity=None, reconstruction=None), device=device
    )
    held = samples.select(slice(first, None))
    _check_together(prepared.together, recipe, {"held-out images": len(held)})
    layers, passes = layer_sensitivities(
        prepared.graph, _inputs(Network(prepared.graph), held), recipe, bits, Progress(progress)
    )
    seconds = time.perf_counter() - began
    return prepared, Sensitivity(layers, len(held), first, passes, seconds, prepared.float_layers)


def _captured(model: nn.Module | ExportedProgram, samples: Samples, device: torch.device) -> fx.GraphModule:
    """Capture on at most two samples; a single one is repeated, as a batch of one would be taken for a constant."""
    example = samples.select(slice(0, 2)) if len(samples) > 1 else samples.select(torch.zeros(2, dtype=torch.long))
    graph = follow_tensors(capture(model, example.to(_device_of(model))).to(device))
    _check_captured(graph, samples)
    return graph


def _left_float(graph: fx.GraphModule, recipe: Recipe) -> dict[str, str]:
    return {**never_quantized_layers(graph), **float_layers(graph, BACKENDS[recipe.backend], recipe)}


def _reparameterized(
    graph: fx.GraphModule, samples: Samples, recipe: Recipe, processes: Processes
) -> tuple[fx.GraphModule, list[LeftLayerNorm]]:
    wanted = recipe.activations.layer_norm == "reparameterized" and recipe.activations.bits is not None
    return reparameterize(graph, samples, recipe, processes) if wanted else (graph, [])


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


def _device_of(model: nn.Module | ExportedProgram) -> torch.device:
    tensors = [*model.parameters(), *model.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


def _holdout(recipe: Recipe, images: int) -> int:
    granularity = recipe.granularity
    if granularity is None or not granularity.guard or granularity.method in ("layer", "block"):
        return 0
    return max(1, round(granularity.holdout * images))


def _of_process(recipe: Recipe, processes: Processes) -> Recipe:
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


def _check_together(together: int, recipe: Recipe, counts: dict[str, int]) -> None:
    counts = counts | {"calibration_batch": recipe.calibration_batch}
    if recipe.reconstruction is not None:
        counts |= {"batch_size": recipe.reconstruction.batch_size}
    wrong = ", ".join(f"{name} ({count})" for name, count in counts.items() if count % together)
    if wrong:
        raise DataError(f"the network takes {together} images together; give a multiple of {together} of: {wrong}.")


def _identity(prepared: Prepared, recipe: Recipe, job: Job, block: Pass | None) -> dict[str, Any]:
    """Return all that decides the numbers of a run, as nested plain data; the same in all processes."""
    return {
        **_settings(recipe, prepared.device, prepared.memory),
        "fused kernels": job.kernels == "fused",
        "processes": prepared.processes.size,
        "model": {"structure": digest_of_text(prepared.graph.code), "tensors": digest_of(_tensors(prepared.graph))},
        "calibration": {
            "images": len(prepared.samples),
            "held out": len(prepared.samples) - prepared.images,
            "values": ", ".join(prepared.processes.texts(digest_of(prepared.samples.inputs))),
        },
        "block pass": None if block is None else digest_of(block.state),
    }


def _settings(recipe: Recipe, device: torch.device, memory: int | None) -> dict[str, Any]:
    """Return the part of :func:`_identity` that is known before any work."""
    code = "".join(path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.rglob("*.py")))
    return {
        "recipe": recipe.to_dict(),
        "memory budget": memory,
        "versions": versions(),
        "code of quiesce": digest_of_text(code),
        "hardware": hardware(device),
    }


def _job(prepared: Prepared, recipe: Recipe, memory: Memory | None = None, fused: bool | None = False) -> Job:
    """``memory`` keeps what passes carry; None sets no limit."""
    processes, recipe = prepared.processes, _of_process(recipe, prepared.processes)
    network = Network(prepared.graph, memory, prepared.together, processes)
    inputs = _inputs(network, prepared.samples)
    reconstruction = recipe.reconstruction
    fisher = None
    if reconstruction is not None and reconstruction.fisher:
        # Room for the work on units is kept before Fisher weights take any.
        reserve(network, prepared.modules, Sizes.of(recipe, prepared.together))
        generator = torch.Generator().manual_seed(processes.seed(recipe.seed))
        names = {
            n
            for u in partition(prepared.graph, _finest(recipe))
            for n in boundary(network.nodes, u.start, u.stop).outputs
        }
        fisher = fisher_weights(network, inputs, names, recipe.calibration_batch, generator)
    chosen = _kernels(prepared, recipe, fused)
    if processes.size > 1:
        processes.check_alike(_what_must_be_alike(prepared, recipe, chosen))
    return Job(
        network=network,
        modules=prepared.modules,
        inputs=inputs,
        images=prepared.images,
        together=prepared.together,
        initial=prepared.initial,
        recipe=recipe,
        reconstruction=reconstruction,  # type: ignore[arg-type]
        regularizer_weight=regularizer_weight(prepared.graph, recipe),
        fisher=fisher,
        kernels=chosen,
        first=processes.place(len(prepared.samples))[0],
        overlap=_overlap(recipe),
    )


def _tensors(graph: fx.GraphModule) -> dict[str, Tensor]:
    """Return the float tensors that the graph reads, by name."""
    return {str(n.target): getattr(graph, str(n.target)) for n in graph.graph.nodes if n.op == "get_attr"}


def _what_must_be_alike(prepared: Prepared, recipe: Recipe, chosen: str) -> dict[str, str]:
    """Digests, by names for messages, of what processes must agree in from the start."""
    graph, state = prepared.graph, prepared.initial
    texts = {"recipe": repr(recipe), "structure of the network": graph.code, "kind of kernels": chosen}
    return {f"the {name}": digest_of_text(text) for name, text in texts.items()} | {
        f"tensor {name}": digest_of({name: tensor}) for name, tensor in {**_tensors(graph), **state}.items()
    }


def _kernels(prepared: Prepared, recipe: Recipe, fused: bool | None) -> str:
    """Return "fused" if steps are to run compiled kernels, else "eager" with the reason."""
    if recipe.reconstruction is None:
        return "eager: nothing is optimized"
    if fused is False:
        return "eager: asked for"
    steps = recipe.reconstruction.steps * len(prepared.modules)
    if fused is None and steps < FUSED_STEPS.get(prepared.device.type, 0):
        return f"eager: {steps} steps of all units are too few to pay for compiling"
    problem = kernels.problem(prepared.device)
    if problem is not None and fused:
        raise ModelError(f"kernels can't be compiled for {prepared.device} ({problem}); install a C++ compiler.")
    return "fused" if problem is None else f"eager: no kernel could be compiled ({problem})"


def _memory(
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
    network = Network(graph, _memory(graph, device, budget, recipe, processes))
    units = (reach(module, modules, _overlap(recipe)) for module in modules)
    reserve(network, units, Sizes.of(recipe, together))


def _overlap(recipe: Recipe) -> int:
    return 0 if recipe.granularity is None else recipe.granularity.overlap


def _bytes(memory: int | str | None) -> int | None:
    return parse_bytes(memory) if isinstance(memory, str) else memory


def _most_of(free: int | None) -> int | None:
    return None if free is None else int((1 - SPARE) * free)


def _inputs(network: Network, samples: Samples) -> Tensors:
    """Return the samples by the names of the network's inputs, where they are: they are moved when they are read."""
    flat = interface_of(network.gm).flatten(samples.args, samples.kwargs)
    return {name: _read_from(t, network.memory.device) for name, t in zip(network.inputs, flat, strict=True)}


def _read_from(tensor: Tensor, device: torch.device) -> Rows:
    """Images get channels last in memory: convolutions, depthwise ones above all, are several times faster so."""
    if tensor.ndim == 4:
        return Stored(tensor, device, tensor.dtype, torch.channels_last)
    return tensor if tensor.device == device else Stored(tensor, device, tensor.dtype)


def _finest(recipe: Recipe) -> str:
    return "layer" if recipe.granularity is not None and recipe.granularity.method == "layer" else "block"


def regularizer_weight(graph: fx.GraphModule, recipe: Recipe) -> float | None:
    """Return λ: the recipe's, or 0.1 for networks with depthwise convolutions and 0.01 for others (QDrop's scripts).

    None stands for one of each unit's own (``relative_regularizer``).
    """
    if recipe.reconstruction is None:
        return 0.0
    if recipe.reconstruction.regularizer_weight is not None:
        return recipe.reconstruction.regularizer_weight
    if recipe.reconstruction.relative_regularizer is not None:
        return None
    layers = [n for n in graph.graph.nodes if is_weight_op(n)]
    depthwise = any(hyperparameters(n, weight_node(n).meta["val"].shape).depthwise for n in layers)
    return 0.1 if depthwise else 0.01


def _outputs(graph: fx.GraphModule, samples: Samples, batch: int, processes: Processes, together: int) -> list[Tensor]:
    """Return the network's outputs on all ``samples``; each process computes those of its share."""
    flat = interface_of(graph).flatten
    mine = samples.select(processes.share(len(samples), together))
    return [processes.gather(t) for t in outputs_of(lambda *a, **k: graph(*flat(a, k)), mine, batch, device_of(graph))]


def _report(prepared: Prepared, recipe: Recipe, done: Pass, seconds: float) -> Run:
    """Evaluate the network as it is now and write down the run."""
    metrics = Metrics(None, None, None, 0)
    if prepared.evaluation is not None:
        graph, batch = prepared.network(recipe), recipe.calibration_batch
        outputs = _outputs(graph, prepared.evaluation, batch, prepared.processes, prepared.together)
        metrics = compare(outputs, prepared.evaluation.labels, prepared.reference)
    names = [m.name for m in prepared.modules]
    absolute = summarize([loss.absolute for loss in done.losses])
    relative = summarize([loss.relative for loss in done.losses])
    return Run(
        preset=recipe.name,
        granularity=None if recipe.granularity is None else recipe.granularity.method,
        weight_bits=recipe.weights.bits,
        activation_bits=recipe.activations.bits,
        seed=recipe.seed,
        top1=metrics.top1,
        agreement=metrics.agreement,
        sqnr_db=metrics.sqnr_db,
        seconds=seconds + prepared.seconds,
        units=[record.modules for record in done.records] or [[name] for name in names],
        module_losses=_by_name(names, done.losses, "absolute"),
        relative_losses=_by_name(names, done.losses, "relative"),
        peak_loss=absolute.peak,
        final_loss=absolute.final,
        oscillation=absolute.oscillation,
        relative_peak_loss=relative.peak,
        relative_final_loss=relative.final,
        relative_oscillation=relative.oscillation,
        unit_records=done.records,
    )


def _report_outcome(prepared: Prepared, recipe: Recipe, outcome: Outcome) -> Run:
    report = _report(prepared, recipe, outcome.kept, outcome.seconds)
    names = [m.name for m in prepared.modules]
    report.capacities = dict(zip(names, outcome.proposal.capacities, strict=False))
    report.differentials = outcome.proposal.differentials
    report.proposed_merges = outcome.merges
    report.guard = outcome.guard
    report.block_seconds = outcome.block_seconds
    report.reused_seconds = outcome.reused_seconds
    report.measuring_steps = outcome.measuring_steps
    report.measuring_seconds = outcome.measuring_seconds
    return report


def _by_name(names: list[str], losses: list[ModuleLoss], field: str) -> dict[str, float]:
    return {name: getattr(loss, field) for name, loss in zip(names, losses, strict=True)}
