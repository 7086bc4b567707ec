"""The demo: one network, one table, seven ways to quantize it to 2-bit weights and 4-bit activations, and a file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from quiesce.data import Samples
from quiesce.demo.assets import load_images, load_network, preprocessing
from quiesce.evaluate import compare, outputs_of
from quiesce.export.export import require
from quiesce.export.parity import OnnxSession
from quiesce.outputs import EXPORT_NAME
from quiesce.pipeline import run
from quiesce.preparation import prepare
from quiesce.progress import ProgressCallback
from quiesce.quantized import QuantizedModel
from quiesce.recipe import Recipe
from quiesce.report.html import write_report
from quiesce.result import ExportRecord, Result, Run

STEPS = 200
"""Steps a unit, so that all methods together take minutes on two CPU cores; the presets take more."""
BITS = {"weight_bits": 2, "activation_bits": 4}


def recipes(seed: int) -> dict[str, Recipe]:
    """Return the recipes of the demo's rows; the last is the one whose network is saved."""
    settings = {**BITS, "seed": seed}
    qdrop = Recipe.preset("qdrop-fast", **settings, steps=STEPS)
    return {
        "nearest": Recipe.preset("nearest", **settings),
        "adaround": Recipe.preset("adaround-fast", **settings, steps=STEPS),
        "brecq": Recipe.preset("brecq-fast", **settings, steps=STEPS),
        "qdrop": qdrop,
        "qdrop + modcap": qdrop.with_settings(granularity="modcap"),
        "qdrop + loss": qdrop.with_settings(granularity="loss"),
        "best": Recipe.preset("best-fast", **settings, steps=STEPS),
    }


def run_demo(out: Path, seed: int, progress: ProgressCallback | None = None) -> Result:
    """Quantize the embedded network by every recipe and write the last one's network, result and report to ``out``.

    The network is written as ONNX too, and that file is run on the test images in ONNX Runtime. All rows optimize on
    the same images, those that the guard holds out being held out from all of them; ``best`` optimizes on these, too,
    once its merges are decided.
    """
    require(("onnx", "onnxscript", "onnxruntime"), "onnx")
    with _one_thread():
        return _run_rows(out, seed, progress)


def _run_rows(out: Path, seed: int, progress: ProgressCallback | None) -> Result:
    calibration, test, labels = load_images()
    rows = recipes(seed)
    final = rows["best"]
    prepared = prepare(load_network(), calibration, final, evaluate=[(test, labels)], name="demo")
    runs: list[Run] = []
    block = None
    for name, recipe in rows.items():
        named = None if progress is None else _prefixed(name, progress)
        made, done = run(prepared, recipe, block=block if recipe.name == rows["qdrop"].name else None, progress=named)
        block = done if name == "qdrop" else block
        runs += made
    result = prepared.result(runs, final)
    network = QuantizedModel(prepared.network(final), result, final, preprocessing())
    network.save(out)
    result.exports.append(_exported(network, out / f"{EXPORT_NAME}.onnx", test, labels))
    result.write(out / "result.json")
    write_report(result, out / "report.html")
    return result


def _exported(network: QuantizedModel, path: Path, test: Tensor, labels: Tensor) -> ExportRecord:
    """Write the network as ONNX and measure the file as its users will run it."""
    import onnxruntime

    export = network.export_onnx(path)
    session = OnnxSession(path)
    metrics = compare(outputs_of(lambda x: session([x]), Samples((test,))), labels, None)
    runtime = f"ONNX Runtime {onnxruntime.__version__}"
    return ExportRecord(path.name, export.format, export.bytes, runtime, metrics.top1, list(export.notes))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from a second thread, and threads that wait for each other lose much on a busy
    machine. It also makes the table the same on any number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _prefixed(name: str, progress: ProgressCallback) -> ProgressCallback:
    return lambda stage, done, total: progress(f"{name}: {stage}", done, total)
