"""The pipeline: capture, fold, place, calibrate, partition, granularity, reconstruct, evaluate, in this order."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from quiesce.errors import ModelError
from quiesce.evaluate import Metrics, compare
from quiesce.graph.ops import has_depthwise
from quiesce.graph.partition import partition
from quiesce.graph.unit import boundary
from quiesce.memory import Memory, Peak
from quiesce.oscillation.measure import ModuleLoss, summarize
from quiesce.preparation import (
    Prepared,
    as_bytes,
    inputs_of,
    memory_of,
    model_device,
    network_outputs,
    overlap_of,
    part_of_process,
    prepare,
)
from quiesce.processes import Processes
from quiesce.progress import Progress, ProgressCallback
from quiesce.quant import kernels
from quiesce.quant.fake_quantize import restore
from quiesce.quantized import QuantizedModel
from quiesce.recipe import GranularityRecipe, Recipe
from quiesce.reconstruct.granular import Outcome, block_pass, merged_pass
from quiesce.reconstruct.journal import check_same_run, digest_of, digest_of_text, open_journal
from quiesce.reconstruct.loop import Job, Pass, layer_pass, measure_pass
from quiesce.reconstruct.losses import fisher_weights
from quiesce.reconstruct.plan import Sizes, reserve
from quiesce.reconstruct.streams import Network
from quiesce.result import MemoryRecord, Run, hardware, versions

FUSED_STEPS = {"cpu": 5000, "cuda": 1000}
"""Steps of all units from which on compiling kernels pays even on a small network: it takes some 20 seconds on a CPU,
and on a GPU some 3 the first time and less than one from then on."""


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
    budget = as_bytes(memory)
    if progress_folder is not None and (processes is None or processes.first):
        where = torch.device(device) if device is not None else model_device(model)
        check_same_run(Path(progress_folder), _settings(recipe, where, budget))
    prepared = prepare(
        model, calibration, recipe, evaluate=evaluate, device=device, memory=budget, name=name, processes=processes
    )
    runs, _ = run(prepared, recipe, progress=progress, progress_folder=progress_folder, fused=fused)
    return QuantizedModel(prepared.network(recipe), prepared.result(runs, recipe), recipe, preprocessing)


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
    memory = memory_of(prepared.graph, prepared.device, prepared.memory, recipe, prepared.processes)
    memory.trim()  # of what preparation has freed
    with Peak(prepared.device) as peak:
        job = job_of(prepared, recipe, memory, fused)
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


def job_of(prepared: Prepared, recipe: Recipe, memory: Memory | None = None, fused: bool | None = False) -> Job:
    """``memory`` keeps what passes carry; None sets no limit."""
    processes, recipe = prepared.processes, part_of_process(recipe, prepared.processes)
    network = Network(prepared.graph, memory, prepared.together, processes)
    inputs = inputs_of(network, prepared.samples)
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
        overlap=overlap_of(prepared.graph, recipe),
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
    return 0.1 if has_depthwise(graph) else 0.01


def _report(prepared: Prepared, recipe: Recipe, done: Pass, seconds: float) -> Run:
    """Evaluate the network as it is now and write down the run."""
    metrics = Metrics(None, None, None, 0)
    if prepared.evaluation is not None:
        graph, batch = prepared.network(recipe), recipe.calibration_batch
        outputs = network_outputs(graph, prepared.evaluation, batch, prepared.processes, prepared.together)
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
