"""The command line: reads names and files, calls the library, shows progress and tables."""

from __future__ import annotations

import ctypes
import io
import json
import logging
import os
import re
import signal
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from quiesce.errors import ClusterError, DataError, ModelError, QuiesceError, RecipeError, nearest_name
from quiesce.export.export import EXPORT_OPTIONS
from quiesce.recipe import BACKENDS, DEFAULT_PRESET, GRANULARITIES, PRESETS, Recipe
from quiesce.tables import (
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

if TYPE_CHECKING:
    import torch

    from quiesce.data import Samples
    from quiesce.preprocess import Preprocessing
    from quiesce.quantized import QuantizedModel
    from quiesce.result import Result
    from quiesce.sweep.plan import Sweep
    from quiesce.sweep.table import Row

_MODEL = "timm:NAME, torchvision:NAME, module.path:callable (runs your code), or FILE.pt2 (with --trust)."
_STORED = "A folder that quantize or demo has written, one of its files, or an ONNX file."
_DATA = "an image folder, an .npz (x or images, y or labels), or module.path:callable (runs your code)"

app = typer.Typer(
    help="Quantize PyTorch networks to 2-8 bits; measure and remove the oscillation of their reconstruction loss.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_RECIPE, _IMAGES, _NETWORK = "Recipe", "Preparation of images (default: the model's own)", "Parameters of MODEL"


def _option(help_text: str, metavar: str | None, *names: str, panel: str = "Options", **more: Any) -> Any:
    return typer.Option(*names, help=help_text, metavar=metavar, rich_help_panel=panel, **more)


Model = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL)]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A folder that quantize or demo has written.")]
Out = Annotated[Path, _option("Folder for the results; made by this command.", "DIR")]
Force = Annotated[bool, _option("Replace earlier results in the output folder.", None, "--force")]
Restart = Annotated[bool, _option("Throw an interrupted run's progress away instead of going on.", None, "--restart")]
Compile = Annotated[
    bool | None,
    _option("Compile the elementwise maths of steps.", None, "--compile/--no-compile", show_default="when it pays"),
]
Seed = Annotated[int, _option("Seed of everything random.", "N", min=0)]
Device = Annotated[str | None, _option("Such as cuda:1.", "NAME", show_default="cuda if there is one, else cpu")]
Calibration = Annotated[str, _option(f"Images to fit on, labels unused: {_DATA}.", "DATA")]
Evaluation = Annotated[str | None, _option("Images to measure on, in the same forms.", "DATA")]
Data = Annotated[str, _option(f"Images to measure on: {_DATA}.", "DATA")]
CalibrationImages = Annotated[int, _option("Most calibration images to use.", "N", min=1)]
EvaluationImages = Annotated[int | None, _option("Most evaluation images to use.", "N", min=1, show_default="all")]
ImageSeed = Annotated[int, _option("Picks the images when --images is given.", "N", min=0)]
BatchSize = Annotated[int, _option("Images per forward pass; does not change the result.", "N", min=1)]
InputShape = Annotated[str | None, _option("Shape of one input, where MODEL does not say it.", "C,H,W")]
Json = Annotated[Path | None, _option("Write the numbers there.", "FILE", "--json")]

RecipeFile = Annotated[Path | None, _option("Settings from TOML; options beside it win.", "FILE", panel=_RECIPE)]
Preset = Annotated[
    str | None, _option(f"Start from {', '.join(PRESETS)}.", "NAME", panel=_RECIPE, show_default=DEFAULT_PRESET)
]
WeightBits = Annotated[int | None, _option("Bits of weights, 2-8.", "N", panel=_RECIPE, show_default="4")]
ActivationBits = Annotated[str | None, _option("Bits of activations, 2-8.", "N|float", panel=_RECIPE, show_default="4")]
LeaveFloat = Annotated[
    list[str] | None,
    _option(
        "Layers not to quantize, by a pattern of names or of types (type:Linear). Repeatable.",
        "PATTERN",
        "--leave-float",
        panel=_RECIPE,
    ),
]
BackendName = Annotated[
    str | None,
    _option(f"What is quantized where: {', '.join(BACKENDS)}.", "NAME", panel=_RECIPE, show_default="academic"),
]
Granularity = Annotated[
    str | None,
    _option(
        f"What is optimized jointly: {', '.join(GRANULARITIES)}.", "NAME", panel=_RECIPE, show_default="the preset's"
    ),
]
CapacityGranularity = Annotated[
    str | None,
    _option("How merges are chosen: modcap or scheme.", "NAME", panel=_RECIPE, show_default="modcap"),
]
Steps = Annotated[
    int | None, _option("Optimization steps for each module.", "N", panel=_RECIPE, show_default="the preset's")
]
MemoryBudget = Annotated[
    str | None,
    _option(
        "What reconstruction may take on the device, such as 4GB; what has no room goes to files.",
        "SIZE",
        "--memory",
        show_default="most of what is free",
    ),
]
RecipeSeed = Annotated[
    int | None, _option("Seed of everything random.", "N", "--seed", panel=_RECIPE, show_default="0")
]
Settings = Annotated[
    list[str] | None,
    _option("Any key of a recipe file, such as granularity.k=3. Repeatable.", "KEY=VALUE", "--set", panel=_RECIPE),
]

Sensitivities = Annotated[
    bool, _option("Rank layers by the output error that quantizing each alone causes.", None, "--sensitivity")
]
SensitivityImages = Annotated[
    str | None, _option(f"For --sensitivity: images, labels unused: {_DATA}.", "DATA", "--calibration")
]
SensitivityCount = Annotated[
    int, _option("Most images to use; errors are measured on a quarter of them.", "N", "--images", min=2)
]
TriedBits = Annotated[str, _option("For --sensitivity: bits to try each weight at alone.", "N,N,…", "--bits")]
Figure = Annotated[Path | None, _option("Draw the sensitivities there, as SVG.", "FILE", "--figure")]
Mixed = Annotated[
    str | None,
    _option(
        "Choose the weight bits of each layer for a budget: mean bits (3), bytes of the weights (1.2MB), or bit "
        "operations for an image (20GBOP).",
        "BUDGET",
        "--mixed",
        panel=_RECIPE,
    ),
]
MixedBits = Annotated[
    str | None,
    _option("Bits that --mixed chooses from.", "N,N,…", "--mixed-bits", panel=_RECIPE, show_default="2,3,4,5,6,7,8"),
]

ExportForm = Annotated[str, _option(f"{', '.join(EXPORT_OPTIONS)}.", "NAME", "--format")]
ExportOut = Annotated[Path | None, _option("The file.", "FILE", "--out", show_default="DIR/quantized with a suffix")]
Compat = Annotated[bool, _option("Integers of 8 bits only, and opset 13: onnx, openvino.", None, "--compat")]
Symmetric = Annotated[bool, _option("Weights with zero points of 0: onnx, openvino.", None, "--symmetric")]
Pt2e = Annotated[bool, _option("Operators of quantized_decomposed: program.", None, "--pt2e")]
RunBatch = Annotated[int | None, _option("Images a run: executorch.", "N", "--batch", min=1, show_default="1")]
Check = Annotated[str | None, _option(f"Compare with the simulation on images: onnx. {_DATA}.", "DATA")]
CheckImages = Annotated[int, _option("Most images to compare on.", "N", min=1)]
ForceFile = Annotated[bool, _option("Replace the file if it is there.", None, "--force")]

SweepFile = Annotated[
    Path, typer.Argument(metavar="FILE", help="Networks, data and grids of settings (docs/sweep.md).")
]
SweepOut = Annotated[Path, _option("Folder for the results; finished cells in it are kept.", "DIR", "--out")]
Address = Annotated[
    str | None, _option("Of a Ray cluster, such as HOST:6379.", "ADDRESS", show_default="the file's, else this machine")
]
SaveNetworks = Annotated[bool, _option("Keep the quantized networks, too.", None, "--save-networks")]
DryRun = Annotated[bool, _option("Show the cells and which are finished; run none.", None, "--dry-run")]

Weights = Annotated[
    str | None,
    _option(
        "A .safetensors, .pt or .pth state dict, or 'random'.",
        "FILE|random",
        panel=_NETWORK,
        show_default="the library's pretrained ones",
    ),
]
WeightsByOrder = Annotated[
    bool, _option("Take the file's tensors in order, whatever their names.", None, "--weights-by-order", panel=_NETWORK)
]
Trust = Annotated[bool, _option("Read a .pt2 file, which can run code stored in it.", None, "--trust", panel=_NETWORK)]

Resize = Annotated[str | None, _option("Pixels of the shorter side, or height,width.", "N|H,W|none", panel=_IMAGES)]
Crop = Annotated[str | None, _option("Pixels of the central crop.", "N|H,W", panel=_IMAGES)]
Mean = Annotated[str | None, _option("Subtracted per channel, of pixels in 0-1.", "R,G,B", panel=_IMAGES)]
Std = Annotated[str | None, _option("Divided by per channel.", "R,G,B", panel=_IMAGES)]
Interpolation = Annotated[
    str | None, _option("Of resizing: nearest, bilinear, bicubic or lanczos.", "NAME", panel=_IMAGES)
]


class Stopped(BaseException):
    """The user, or the system, wants the program to end. Neither an Exception, nor what click catches."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def main(arguments: list[str] | None = None) -> None:
    """Run the command line.

    An error of the user's is one line on stderr and exit code 1; Ctrl-C and SIGTERM are one line and 128 + the number
    of the signal. Of several processes under torchrun, the first one speaks, and others of their errors.
    """
    rank = int(os.environ.get("RANK", "0"))
    try:
        with _signals_as_exceptions():
            app(arguments)
    except QuiesceError as error:
        typer.echo(f"error{f' in process {rank}' if rank else ''}: {error}", err=True)
        sys.exit(1)
    except Stopped as stopped:
        if rank == 0:
            typer.echo(" ".join(["stopped", *getattr(stopped, "__notes__", [])]), err=True)
        sys.exit(128 + stopped.number)


@contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """Within the block, Ctrl-C and SIGTERM raise :class:`Stopped`, so that all is left in order."""

    process = os.getpid()

    def stop(number: int, _: FrameType | None) -> None:
        if os.getpid() != process:  # a worker of a DataLoader: it just ends
            os._exit(128 + number)
        raise Stopped(number)

    earlier = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


@contextmanager
def _ctrl_c_as_keyboard_interrupt() -> Iterator[None]:
    """Within the block, Ctrl-C raises what Python itself raises: Ray's compiled code fails at any other exception."""
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, earlier)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"quiesce {metadata.version('quiesce')}")
        raise typer.Exit


@app.callback()
def _options(
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
    out: Out = Path("runs/demo"),
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Compare the methods on a small network and images that come with the package."""
    from quiesce.demo.run import run_demo
    from quiesce.outputs import output_folder

    with output_folder(out, force=force) as folder, _progress() as progress:
        result = run_demo(folder, seed, progress)
    _show_results(result, out)


@app.command()
def quantize(
    model: Model,
    calibration: Calibration,
    out: Out,
    evaluate: Evaluation = None,
    preset: Preset = None,
    recipe: RecipeFile = None,
    weight_bits: WeightBits = None,
    activation_bits: ActivationBits = None,
    leave_float: LeaveFloat = None,
    mixed: Mixed = None,
    mixed_bits: MixedBits = None,
    backend: BackendName = None,
    granularity: Granularity = None,
    steps: Steps = None,
    seed: RecipeSeed = None,
    settings: Settings = None,
    images: CalibrationImages = 1024,
    evaluate_images: EvaluationImages = None,
    resize: Resize = None,
    crop: Crop = None,
    mean: Mean = None,
    std: Std = None,
    interpolation: Interpolation = None,
    weights: Weights = None,
    weights_by_order: WeightsByOrder = False,
    trust: Trust = False,
    device: Device = None,
    memory: MemoryBudget = None,
    force: Force = False,
    restart: Restart = False,
    compile_steps: Compile = None,
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
    budget = _budget(mixed, mixed_bits)
    most = None if memory is None else parse_bytes(memory)
    place = _device(device)
    preparation = _preprocessing_options(resize, crop, mean, std, interpolation)

    from quiesce import choose_bits
    from quiesce import quantize as quantize_model
    from quiesce.data import load_data
    from quiesce.models import load_model
    from quiesce.preprocess import override
    from quiesce.processes import process_group
    from quiesce.reconstruct.journal import discard
    from quiesce.report.html import write_report

    kept = out.resolve().with_name(f"{out.resolve().name}.progress")
    with _interruptible(kept):
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
            bar = _progress if processes.first else nullcontext
            if budget:
                with bar() as progress, _stdout_to_stderr():
                    made = choose_bits(loaded.model, samples, chosen, **budget, device=place, progress=progress)
                chosen = made.recipe
                if processes.first:
                    _print(mixed_table(made))
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
    file: SweepFile,
    out: SweepOut,
    address: Address = None,
    save_networks: SaveNetworks = False,
    dry_run: DryRun = False,
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
    bar = _progress() if len(kept) < len(plan.cells) else nullcontext()
    _print(_counted(plan, len(kept)))
    if dry_run:
        _print(cells_table(plan, {row.name for row in kept.values()}))
        return
    try:
        # Ray prints there when a worker is lost, of which one is told in one line.
        with bar as progress, redirect_stdout(io.StringIO()), _ctrl_c_as_keyboard_interrupt():
            rows = run_sweep(
                plan, out, save_networks=save_networks, progress=progress, tell=lambda text: typer.echo(text, err=True)
            )
    except (KeyboardInterrupt, Stopped):
        done = f"{len(finished(plan, out, save_networks))} of {len(plan.cells)} cells are finished and kept in {out}"
        typer.echo(f"interrupted: {done}; the same command runs the others.", err=True)
        raise
    summaries = summarize(plan.cells, rows)
    report = write_sweep_report(summaries, rows, deciding_versions(), out)
    _print(sweep_table(summaries))
    left = others(plan, out)
    if left:
        _print(f"{left} finished cells in {out} are of other settings or versions, and in no table.")
    for path in (out / "results.csv", out / "results.jsonl", report):
        _print(str(path))
    wrong = changed_inputs(plan, rows, out) + _failures(rows)
    for text in wrong:
        typer.echo(f"error: {text}", err=True)
    if wrong:
        raise typer.Exit(1)


@app.command()
def evaluate(
    folder: Folder,
    data: Data,
    images: EvaluationImages = None,
    batch_size: BatchSize = 64,
    seed: ImageSeed = 0,
    resize: Resize = None,
    crop: Crop = None,
    mean: Mean = None,
    std: Std = None,
    interpolation: Interpolation = None,
    device: Device = None,
) -> None:
    """Measure a saved network on labelled images, prepared as the network's own preprocessing says."""
    place = _device(device)
    preparation = _preprocessing_options(resize, crop, mean, std, interpolation)

    import quiesce
    from quiesce.data import load_data
    from quiesce.evaluate import evaluate as measure
    from quiesce.preprocess import override

    quantized = quiesce.load(folder)
    preprocessing = override(_stored_preprocessing(quantized), **preparation)
    samples = load_data(data, preprocessing, limit=images, seed=seed, what="evaluation")
    with _data_that_fits(folder, data):
        metrics = measure(quantized.to(place), samples.to(place), batch_size=batch_size)
    _print(metrics_table(metrics, quantized.result.model, folder))
    if metrics.top1 is None:
        _print("The data has no labels, so there is no top-1.")


@app.command()
def analyze(
    model: Model,
    input_shape: InputShape = None,
    recipe: RecipeFile = None,
    weight_bits: WeightBits = None,
    activation_bits: ActivationBits = None,
    leave_float: LeaveFloat = None,
    granularity: CapacityGranularity = None,
    settings: Settings = None,
    sensitivity: Sensitivities = False,
    calibration: SensitivityImages = None,
    images: SensitivityCount = 256,
    bits: TriedBits = "2,4,8",
    resize: Resize = None,
    crop: Crop = None,
    mean: Mean = None,
    std: Std = None,
    interpolation: Interpolation = None,
    weights: Weights = None,
    weights_by_order: WeightsByOrder = False,
    trust: Trust = False,
    device: Device = None,
    json_file: Json = None,
    figure: Figure = None,
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
    given = _numbers("--input-shape", input_shape, int)
    if given is not None and min(given) < 1:
        raise DataError(f"--input-shape is {input_shape!r}; give numbers above 0, without the batch.")

    tried = _numbers("--bits", bits, int)
    preparation = _preprocessing_options(resize, crop, mean, std, interpolation)
    if sensitivity != (calibration is not None) or (figure is not None and not sensitivity):
        raise DataError("--sensitivity, --calibration and --figure go together: give the first two, or none of them.")
    place = _device(device)

    import torch

    from quiesce import measure_sensitivity
    from quiesce.data import Samples, load_data
    from quiesce.models import RANDOM, load_model
    from quiesce.outputs import check_new, write_text
    from quiesce.pipeline import analyze as analyze_model
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
    _print(analysis_table(analysis, loaded.name))
    _print_float_layers(analysis.float_layers)
    if samples is not None:
        with _progress() as progress:
            found = measure_sensitivity(
                loaded.model, samples, chosen, bits=tried or (), device=place, progress=progress
            )
        numbers["sensitivity"] = found.to_dict()
        _print(sensitivity_table(found, loaded.name))
        if figure is not None:
            write_text(figure, sensitivities(found) + "\n")
    if json_file is not None:
        write_text(json_file, json.dumps(numbers, indent=2, allow_nan=False) + "\n")


@app.command()
def export(
    folder: Folder,
    form: ExportForm,
    out: ExportOut = None,
    compat: Compat = False,
    symmetric: Symmetric = False,
    pt2e: Pt2e = False,
    batch: RunBatch = None,
    check: Check = None,
    images: CheckImages = 2000,
    force: ForceFile = False,
) -> None:
    """Write a saved network in a form that another program runs."""
    if form not in EXPORT_OPTIONS:
        raise ModelError(f"--format {form!r} is unknown.{nearest_name(form, EXPORT_OPTIONS)}")
    options = {"compat": compat, "symmetric": symmetric, "pt2e": pt2e, "batch": batch}
    given = {name: value for name, value in options.items() if value}
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
    _print(f"{written.path}: {written.format}, {written.bytes:,} bytes")
    for note in written.notes:
        _print(f"- {note}")
    if samples is not None:
        from quiesce.export.parity import check_parity

        with _data_that_fits(folder, str(check)):
            parity = check_parity(quantized.graph_module, path, samples)
        _print(parity_table(parity))


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help=_STORED)],
    json_file: Json = None,
) -> None:
    """Show what a file of a quantized network holds: bits, scales and bytes of each layer, and what it should take."""
    from quiesce.export.inspect import inspect as read_inventory
    from quiesce.outputs import write_text

    inventory = read_inventory(path)
    if json_file is not None:
        write_text(json_file, json.dumps(inventory.to_dict(), indent=2) + "\n")
    _print(layers_table(inventory))
    _print(totals_table(inventory))


@app.command()
def report(
    folder: Folder,
) -> None:
    """Write DIR/report.html again from DIR/result.json."""
    from quiesce.report.html import write_report
    from quiesce.result import Result

    _print(f"{write_report(Result.read(folder / 'result.json'), folder / 'report.html')}")


def read_recipe(file: Path | None, preset: str | None, settings: list[str], **options: Any) -> Recipe:
    """Return the recipe of ``file`` or of ``preset``, with ``KEY=VALUE`` settings and then options (not None) on top.

    Raises:
        RecipeError: an unknown or contradicting setting, or a value out of range.
    """
    if file is not None and preset is not None:
        raise RecipeError("--recipe and --preset both say where to start; give one (a file may name a preset itself).")
    base = Recipe.from_toml(file) if file is not None else Recipe.preset(preset or DEFAULT_PRESET)
    given = {key: value for key, value in options.items() if value is not None}
    if "activation_bits" in given:
        given["activation_bits"] = _bits(given["activation_bits"])
    return base.with_settings(**(dict(_setting(s) for s in settings) | given))


def _bits(text: str) -> int | str:
    if text == "float":
        return text
    try:
        return int(text)
    except ValueError as error:
        raise RecipeError(f"--activation-bits is {text!r}; give a whole number from 2 to 8, or 'float'.") from error


def _setting(text: str) -> tuple[str, Any]:
    """Split ``key=value``. A bare word is a string, as quotes rarely survive a shell."""
    key, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not key:
        raise RecipeError(f"--set {text!r} is not of the form key=value.")
    if re.fullmatch(r"[A-Za-z][\w-]*", value) and value not in ("true", "false", "nan", "inf"):
        return key, value
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"the value of --set {text!r} is not valid TOML ({error}).") from error


def _budget(text: str | None, bits: str | None) -> dict[str, Any]:
    """Return the arguments of ``choose_bits`` that --mixed and --mixed-bits stand for; nothing without --mixed."""
    if text is None:
        if bits is not None:
            raise RecipeError("--mixed-bits says what --mixed chooses from; give --mixed too.")
        return {}
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:([kMGT]?)(B|BOP))?", text)
    if not found:
        raise RecipeError(f"--mixed is {text!r}; give mean bits such as 3, bytes such as 1.2MB, or such as 20GBOP.")
    number, prefix, unit = found.groups()
    amount = float(number) * 1000 ** " kMGT".index(prefix or " ")
    name = {"B": "size", "BOP": "bops", None: "average_bits"}[unit]
    choices = _numbers("--mixed-bits", bits, int)
    return {name: amount} | ({} if choices is None else {"bits": choices})


def _device(name: str | None) -> torch.device:
    """The device of that name; of several processes on a machine, each takes a GPU of its own."""
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device {name!r} can't be used ({str(error).splitlines()[0]}); give --device cpu.") from error
    return device


def _preprocessing_options(
    resize: str | None, crop: str | None, mean: str | None, std: str | None, interpolation: str | None
) -> dict[str, Any]:
    return {
        "resize": "none" if resize == "none" else _size("--resize", resize, square=False),
        "crop": _size("--crop", crop, square=True),
        "mean": _numbers("--mean", mean, float),
        "std": _numbers("--std", std, float),
        "interpolation": interpolation,
    }


def _size(option: str, text: str | None, *, square: bool) -> int | tuple[int, ...] | None:
    """Read ``N`` or ``H,W``; ``square`` makes N a pair."""
    sides = _numbers(option, text, int)
    if sides is None:
        return None
    if len(sides) > 2:
        raise DataError(f"{option} is {text!r}; give one number of pixels, or height,width.")
    if len(sides) == 1:
        return sides * 2 if square else sides[0]
    return sides


def _numbers(option: str, text: str | None, kind: type[int] | type[float]) -> tuple[Any, ...] | None:
    if text is None:
        return None
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        wanted = "whole numbers" if kind is int else "numbers"
        raise DataError(f"{option} is {text!r}; give {wanted} separated by commas.") from error


@contextmanager
def _interruptible(kept: Path) -> Iterator[None]:
    """Within the block, to be stopped says how to go on from the finished units in ``kept``."""
    from quiesce.reconstruct.journal import finished_units

    try:
        yield
    except Stopped as stopped:
        if count := finished_units(kept):
            again = "the same command (without --restart) goes on behind them"
            stopped.add_note(f"after {count} finished units, kept in {kept}; {again}")
        raise


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar on stderr, and above it what the package logs; yield what moves it: (stage, done, total)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar, _logged():
        task = bar.add_task("starting", total=None)

        def move(stage: str, done: int, total: int) -> None:
            bar.update(task, description=stage, completed=done, total=total)

        yield move


@contextmanager
def _logged() -> Iterator[None]:
    """Within the block, what the package logs is a line on stderr."""
    logger, handler = logging.getLogger("quiesce"), logging.StreamHandler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


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
def _stdout_to_stderr() -> Iterator[None]:
    """Within the block, what libraries in C print (HiGHS on its repairs) goes to stderr: stdout is for results."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)


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
    return " and ".join(form for form, options in EXPORT_OPTIONS.items() if option in options)


def _check_samples(quantized: QuantizedModel, data: str, images: int) -> Samples:
    from quiesce.data import load_data

    preprocessing = _stored_preprocessing(quantized)
    return load_data(data, preprocessing, limit=images, seed=quantized.recipe.seed, what="check")


def _stored_preprocessing(quantized: QuantizedModel) -> Preprocessing | None:
    from quiesce.preprocess import Preprocessing

    stored = quantized.preprocessing
    return None if stored is None else Preprocessing.from_dict(stored)


def _show_results(result: Result, out: Path) -> None:
    _print(results_table(result))
    _print_float_layers(result.float_layers)
    for path in sorted(out.iterdir()):
        _print(str(path))


def _print_float_layers(layers: dict[str, str]) -> None:
    for reason in dict.fromkeys(layers.values()):
        names = [name for name, why in layers.items() if why == reason]
        counted = "1 weight layer is" if len(names) == 1 else f"{len(names)} weight layers are"
        _print(f"{counted} left float, as {reason}: {', '.join(names)}")


def _print(content: str | Table) -> None:
    """Print to stdout; tables keep all columns where the output is not a terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(content, markup=False, highlight=False, soft_wrap=isinstance(content, str))
