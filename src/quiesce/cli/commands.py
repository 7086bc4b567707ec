"""The commands: each reads names and files, calls the library, and shows progress and tables.

What a command needs is imported in it, once all that can be wrong with what was typed has been looked at.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quiesce.cli import options
from quiesce.cli.arguments import find_device, read_budget, read_numbers, read_preprocessing, read_recipe
from quiesce.cli.signals import Stopped, ctrl_c_as_keyboard_interrupt, interruptible, signals_as_exceptions
from quiesce.cli.tables import (
    analysis_table,
    cells_table,
    layers_table,
    metrics_table,
    mixed_table,
    parity_table,
    results_table,
    sensitivity_table,
    sweep_table,
    totals_table,
)
from quiesce.cli.terminal import progress_bar, show, stdout_to_stderr
from quiesce.errors import ClusterError, DataError, ModelError, QuiesceError, RecipeError, nearest_name
from quiesce.export.export import EXPORT_OPTIONS

if TYPE_CHECKING:
    from quiesce.data import Samples
    from quiesce.preprocess import Preprocessing
    from quiesce.quantized import QuantizedModel
    from quiesce.result import Result, Run
    from quiesce.sweep.plan import Sweep
    from quiesce.sweep.table import Row

app = typer.Typer(
    help="Quantize PyTorch networks to 2-8 bits; measure and remove the oscillation of their reconstruction loss.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line.

    An error of the user's is one line on stderr and exit code 1; Ctrl-C and SIGTERM are one line and 128 + the number
    of the signal. Of several processes under torchrun, the first one speaks, and others of their errors.
    """
    rank = int(os.environ.get("RANK", "0"))
    try:
        with signals_as_exceptions():
            app(arguments)
    except QuiesceError as error:
        typer.echo(f"error{f' in process {rank}' if rank else ''}: {error}", err=True)
        sys.exit(1)
    except Stopped as stopped:
        if rank == 0:
            typer.echo(" ".join(["stopped", *getattr(stopped, "__notes__", [])]), err=True)
        sys.exit(128 + stopped.number)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"quiesce {metadata.version('quiesce')}")
        raise typer.Exit


@app.callback()
def _of_all_commands(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    from quiesce.processes import started_by_torchrun

    command = context.invoked_subcommand
    if command != "quantize" and started_by_torchrun():
        raise ClusterError(f"{command} is work for one process; start it without torchrun.")


@app.command()
def demo(
    out: options.Out = Path("runs/demo"),
    seed: options.Seed = 0,
    force: options.Force = False,
) -> None:
    """Compare the methods on a small network and images that come with the package."""
    from quiesce.demo.run import run_demo
    from quiesce.outputs import output_folder

    with output_folder(out, force=force) as folder, progress_bar() as progress:
        result = run_demo(folder, seed, progress)
    _show_results(result, out)


@app.command()
def quantize(
    model: options.Model,
    calibration: options.Calibration,
    out: options.Out,
    evaluate: options.Evaluation = None,
    preset: options.Preset = None,
    recipe: options.RecipeFile = None,
    weight_bits: options.WeightBits = None,
    activation_bits: options.ActivationBits = None,
    leave_float: options.LeaveFloat = None,
    mixed: options.Mixed = None,
    mixed_bits: options.MixedBits = None,
    backend: options.BackendName = None,
    granularity: options.Granularity = None,
    steps: options.Steps = None,
    seed: options.RecipeSeed = None,
    settings: options.Settings = None,
    images: options.CalibrationImages = 1024,
    evaluate_images: options.EvaluationImages = None,
    resize: options.Resize = None,
    crop: options.Crop = None,
    mean: options.Mean = None,
    std: options.Std = None,
    interpolation: options.Interpolation = None,
    weights: options.Weights = None,
    weights_by_order: options.WeightsByOrder = False,
    trust: options.Trust = False,
    device: options.Device = None,
    memory: options.MemoryBudget = None,
    force: options.Force = False,
    restart: options.Restart = False,
    compile_steps: options.Compile = None,
) -> None:
    """Quantize MODEL, and write the network, its result, its recipe and a report to a folder.

    Interrupted, it goes on where it was when the same command is given again.
    """
    # All that can be wrong is looked at before anything slow is done.
    from quiesce.memory import parse_bytes
    from quiesce.outputs import check_free, output_folder

    check_free(out, force)
    chosen = read_recipe(
        recipe,
        preset,
        settings or [],
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        leave_float=leave_float,
        backend=backend,
        granularity=granularity,
        steps=steps,
        seed=seed,
    )
    budget = read_budget(mixed, mixed_bits)
    most = None if memory is None else parse_bytes(memory)
    place = find_device(device)
    preparation = read_preprocessing(resize, crop, mean, std, interpolation)

    from quiesce import choose_bits
    from quiesce import quantize as quantize_model
    from quiesce.data import load_data
    from quiesce.models import load_model
    from quiesce.preprocess import override
    from quiesce.processes import process_group
    from quiesce.reconstruct.journal import discard
    from quiesce.report.html import write_report

    kept = out.resolve().with_name(f"{out.resolve().name}.progress")
    with interruptible(kept):
        with process_group(place) as processes:
            if restart and processes.first:
                discard(kept)
            loaded = load_model(model, weights=weights, by_order=weights_by_order, trust=trust)
            preprocessing = override(loaded.preprocessing, **preparation)
            in_file = most is not None and place.type == "cpu"
            samples = load_data(calibration, preprocessing, limit=images, seed=chosen.seed, in_file=in_file)
            test = None
            if evaluate is not None:
                test = load_data(
                    evaluate, preprocessing, limit=evaluate_images, seed=chosen.seed, what="evaluation", in_file=in_file
                )
            bar = progress_bar if processes.first else nullcontext
            if budget:
                with bar() as progress, stdout_to_stderr():
                    made = choose_bits(loaded.model, samples, chosen, **budget, device=place, progress=progress)
                chosen = made.recipe
                if processes.first:
                    show(mixed_table(made))
            with bar() as progress:
                quantized = quantize_model(
                    loaded.model,
                    samples,
                    chosen,
                    evaluate=test,
                    device=place,
                    memory=most,
                    progress=progress,
                    name=loaded.name,
                    preprocessing=None if preprocessing is None else preprocessing.to_dict(),
                    progress_folder=kept,
                    fused=compile_steps,
                    processes=processes,
                )
        if not processes.first:
            return
        with output_folder(out, force=force) as folder:
            quantized.save(folder)
            write_report(quantized.result, folder / "report.html")
    _show_results(quantized.result, out)
    discard(kept)


@app.command()
def sweep(
    file: options.SweepFile,
    out: options.SweepOut,
    address: options.Address = None,
    save_networks: options.SaveNetworks = False,
    dry_run: options.DryRun = False,
) -> None:
    """Quantize networks by all combinations of settings, on many processes or machines, and compare them in one table.

    The same command again runs what is missing.
    """
    from quiesce.sweep.plan import read_sweep

    plan = read_sweep(file)
    if address is not None:
        plan = replace(plan, cluster=replace(plan.cluster, address=address))

    from quiesce.sweep.cell import deciding_versions
    from quiesce.sweep.report import write_sweep_report
    from quiesce.sweep.run import changed_inputs, check_folder, finished, others, run_sweep
    from quiesce.sweep.table import summarize

    check_folder(out)
    kept = finished(plan, out, save_networks)
    bar = progress_bar() if len(kept) < len(plan.cells) else nullcontext()
    show(_counted(plan, len(kept)))
    if dry_run:
        show(cells_table(plan, {row.name for row in kept.values()}))
        return
    try:
        # Ray prints there when a worker is lost, of which one is told in one line.
        with bar as progress, redirect_stdout(io.StringIO()), ctrl_c_as_keyboard_interrupt():
            rows = run_sweep(
                plan, out, save_networks=save_networks, progress=progress, tell=lambda text: typer.echo(text, err=True)
            )
    except (KeyboardInterrupt, Stopped):
        done = f"{len(finished(plan, out, save_networks))} of {len(plan.cells)} cells are finished and kept in {out}"
        typer.echo(f"interrupted: {done}; the same command runs the others.", err=True)
        raise
    summaries = summarize(plan.cells, rows)
    report = write_sweep_report(summaries, rows, deciding_versions(), out)
    show(sweep_table(summaries))
    left = others(plan, out)
    if left:
        show(f"{left} finished cells in {out} are of other settings or versions, and in no table.")
    for path in (out / "results.csv", out / "results.jsonl", report):
        show(str(path))
    wrong = changed_inputs(plan, rows, out) + _failures(rows)
    for text in wrong:
        typer.echo(f"error: {text}", err=True)
    if wrong:
        raise typer.Exit(1)


@app.command()
def evaluate(
    folder: options.Folder,
    data: options.Data,
    images: options.EvaluationImages = None,
    batch_size: options.BatchSize = 64,
    seed: options.ImageSeed = 0,
    resize: options.Resize = None,
    crop: options.Crop = None,
    mean: options.Mean = None,
    std: options.Std = None,
    interpolation: options.Interpolation = None,
    device: options.Device = None,
) -> None:
    """Measure a saved network on labelled images, prepared as the network's own preprocessing says."""
    place = find_device(device)
    preparation = read_preprocessing(resize, crop, mean, std, interpolation)

    import quiesce
    from quiesce.data import load_data
    from quiesce.evaluate import evaluate as measure
    from quiesce.preprocess import override

    quantized = quiesce.load(folder)
    preprocessing = override(_stored_preprocessing(quantized), **preparation)
    samples = load_data(data, preprocessing, limit=images, seed=seed, what="evaluation")
    with _data_that_fits(folder, data):
        metrics = measure(quantized.to(place), samples.to(place), batch_size=batch_size)
    show(metrics_table(metrics, quantized.result.model, folder))
    if metrics.top1 is None:
        show("The data has no labels, so there is no top-1.")


@app.command()
def analyze(
    model: options.Model,
    input_shape: options.InputShape = None,
    recipe: options.RecipeFile = None,
    weight_bits: options.WeightBits = None,
    activation_bits: options.ActivationBits = None,
    leave_float: options.LeaveFloat = None,
    granularity: options.CapacityGranularity = None,
    settings: options.Settings = None,
    sensitivity: options.Sensitivities = False,
    calibration: options.SensitivityImages = None,
    images: options.SensitivityCount = 256,
    bits: options.TriedBits = "2,4,8",
    resize: options.Resize = None,
    crop: options.Crop = None,
    mean: options.Mean = None,
    std: options.Std = None,
    interpolation: options.Interpolation = None,
    weights: options.Weights = None,
    weights_by_order: options.WeightsByOrder = False,
    trust: options.Trust = False,
    device: options.Device = None,
    json_file: options.Json = None,
    figure: options.Figure = None,
) -> None:
    """Show the blocks of MODEL, their capacities, and the merges these imply, without optimizing anything.

    Capacities depend on shapes and bits only, so pretrained weights are loaded for --sensitivity alone.
    """
    if granularity not in (None, "modcap", "scheme"):
        raise RecipeError(f"--granularity {granularity!r} needs optimization; analyze takes modcap or scheme.")
    method = granularity if granularity or recipe else "modcap"
    chosen = read_recipe(
        recipe,
        None,
        settings or [],
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        leave_float=leave_float,
        granularity=method,
    )
    given = read_numbers("--input-shape", input_shape, int)
    if given is not None and min(given) < 1:
        raise DataError(f"--input-shape is {input_shape!r}; give numbers above 0, without the batch.")

    tried = read_numbers("--bits", bits, int)
    preparation = read_preprocessing(resize, crop, mean, std, interpolation)
    if sensitivity != (calibration is not None) or (figure is not None and not sensitivity):
        raise DataError("--sensitivity, --calibration and --figure go together: give the first two, or none of them.")
    place = find_device(device)

    import torch

    from quiesce import measure_sensitivity
    from quiesce.analysis import analyze as analyze_model
    from quiesce.data import Samples, load_data
    from quiesce.models import RANDOM, load_model
    from quiesce.outputs import check_new, write_text
    from quiesce.preprocess import override
    from quiesce.report.plots import sensitivities

    for path in (json_file, figure):
        if path is not None:
            check_new(path, force=True)
    library = model.startswith(("timm:", "torchvision:"))
    weights = RANDOM if library and not sensitivity else weights
    loaded = load_model(model, weights=weights, by_order=weights_by_order, trust=trust)
    samples = None
    if calibration is not None:
        preprocessing = override(loaded.preprocessing, **preparation)
        samples = load_data(calibration, preprocessing, limit=images, seed=chosen.seed)
    shape = given or loaded.input_shape
    if samples is None and shape is None:
        raise DataError(f"the input shape of {loaded.name} is not known; give --input-shape, such as 3,224,224.")
    example = samples
    if example is None:
        example = Samples((torch.randn(2, *(shape or ()), generator=torch.Generator().manual_seed(0)),))
    analysis = analyze_model(loaded.model, example, chosen)
    numbers = asdict(analysis)
    show(analysis_table(analysis, loaded.name))
    _show_float_layers(analysis.float_layers)
    if samples is not None:
        with progress_bar() as progress:
            found = measure_sensitivity(
                loaded.model, samples, chosen, bits=tried or (), device=place, progress=progress
            )
        numbers["sensitivity"] = found.to_dict()
        show(sensitivity_table(found, loaded.name))
        if figure is not None:
            write_text(figure, sensitivities(found) + "\n")
    if json_file is not None:
        write_text(json_file, json.dumps(numbers, indent=2, allow_nan=False) + "\n")


@app.command()
def export(
    folder: options.Folder,
    form: options.ExportForm,
    out: options.ExportOut = None,
    compat: options.Compat = False,
    symmetric: options.Symmetric = False,
    pt2e: options.Pt2e = False,
    batch: options.RunBatch = None,
    check: options.Check = None,
    images: options.CheckImages = 2000,
    force: options.ForceFile = False,
) -> None:
    """Write a saved network in a form that another program runs."""
    if form not in EXPORT_OPTIONS:
        raise ModelError(f"--format {form!r} is unknown.{nearest_name(form, EXPORT_OPTIONS)}")
    settings = {"compat": compat, "symmetric": symmetric, "pt2e": pt2e, "batch": batch}
    given = {name: value for name, value in settings.items() if value}
    for name in given:
        if name not in EXPORT_OPTIONS[form]:
            raise ModelError(f"--{name} is not for --format {form}; it is for {_formats_with(name)}.")
    if check is not None and form != "onnx":
        raise ModelError("--check runs the file in ONNX Runtime; it is for --format onnx.")

    import quiesce
    from quiesce.outputs import EXPORT_NAME, check_new
    from quiesce.quantized import EXPORTS

    target = EXPORTS[form]
    path = folder / f"{EXPORT_NAME}{target.suffix}" if out is None else out
    check_new(path, force)
    quantized = quiesce.load(folder)
    samples = None if check is None else _check_samples(quantized, check, images)
    written = target.write(quantized, path, force=force, **given)
    show(f"{written.path}: {written.format}, {written.bytes:,} bytes")
    for note in written.notes:
        show(f"- {note}")
    if samples is not None:
        from quiesce.export.parity import check_parity

        with _data_that_fits(folder, str(check)):
            parity = check_parity(quantized.graph_module, path, samples)
        show(parity_table(parity))


@app.command()
def inspect(
    path: options.Stored,
    json_file: options.Json = None,
) -> None:
    """Show what a file of a quantized network holds: bits, scales and bytes of each layer, and what it should take."""
    from quiesce.export.inspect import inspect as read_inventory
    from quiesce.outputs import write_text

    inventory = read_inventory(path)
    if json_file is not None:
        write_text(json_file, json.dumps(inventory.to_dict(), indent=2) + "\n")
    show(layers_table(inventory))
    show(totals_table(inventory))


@app.command()
def report(
    folder: options.Folder,
) -> None:
    """Write DIR/report.html again from DIR/result.json."""
    from quiesce.report.html import write_report
    from quiesce.result import Result

    show(f"{write_report(Result.read(folder / 'result.json'), folder / 'report.html')}")


def _counted(plan: Sweep, kept: int) -> str:
    """Say how many cells a sweep has, of what, and where they are to run."""
    cells, cluster = plan.cells, plan.cluster
    numbers = {
        "network": len({cell.network for cell in cells}),
        "bit-width": len({cell.bits for cell in cells}),
        "method": len({cell.method for cell in cells}),
        "seed": len({cell.recipe.seed for cell in cells}),
    }
    of = ", ".join(f"{count} {name}{'s' if count > 1 else ''}" for name, count in numbers.items())
    where = "on this machine" if cluster.address is None else f"at {cluster.address}"
    each = f"{cluster.cpus} core{'s' if cluster.cpus > 1 else ''}" + (f", {cluster.gpus:g} GPU" if cluster.gpus else "")
    return f"{len(cells)} cells ({of}): {kept} finished, {len(cells) - kept} to run {where}, {each} each"


def _failures(rows: list[Row]) -> list[str]:
    """Return a sentence for each error, with the number of cells that it has stopped."""
    errors = [row.error.strip().splitlines()[-1] for row in rows if row.error is not None]
    return [f"{errors.count(error)} of {len(rows)} cells failed: {error}" for error in dict.fromkeys(errors)]


@contextmanager
def _data_that_fits(folder: Path, data: str) -> Iterator[None]:
    """Within the block, data that the saved network can't take is an error of the user's."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"the network of {folder} can't be run on {data} ({reason}); give data as it was made for."
        ) from error


def _formats_with(option: str) -> str:
    return " and ".join(form for form, known in EXPORT_OPTIONS.items() if option in known)


def _check_samples(quantized: QuantizedModel, data: str, images: int) -> Samples:
    from quiesce.data import load_data

    preprocessing = _stored_preprocessing(quantized)
    return load_data(data, preprocessing, limit=images, seed=quantized.recipe.seed, what="check")


def _stored_preprocessing(quantized: QuantizedModel) -> Preprocessing | None:
    from quiesce.preprocess import Preprocessing

    stored = quantized.preprocessing
    return None if stored is None else Preprocessing.from_dict(stored)


def _show_results(result: Result, out: Path) -> None:
    show(results_table(result))
    _show_undecided(result.runs)
    _show_float_layers(result.float_layers)
    for path in sorted(out.iterdir()):
        show(str(path))


def _show_undecided(runs: list[Run]) -> None:
    from quiesce.result import UNDECIDED

    for run in runs:
        undecided = run.undecided_units()
        if undecided:
            share, worst = max((unit.undecided or 0.0, " + ".join(unit.modules)) for unit in undecided)
            show(
                f"{run.preset} {run.granularity}: in {len(undecided)} of {len(run.unit_records)} units more than "
                f"{100 * UNDECIDED:g} % of the roundings were undecided when they were cut off, most in {worst} "
                f"({100 * share:.1f} %); give the regularizer more weight (relative_regularizer = 300), or take more "
                "steps"
            )


def _show_float_layers(layers: dict[str, str]) -> None:
    for reason in dict.fromkeys(layers.values()):
        names = [name for name, why in layers.items() if why == reason]
        counted = "1 weight layer is" if len(names) == 1 else f"{len(names)} weight layers are"
        show(f"{counted} left float, as {reason}: {', '.join(names)}")
