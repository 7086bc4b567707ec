"""What a worker does: one cell, in a process of its own, from names to files that are returned as bytes."""

from __future__ import annotations

import json
import os
import tempfile
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from quiesce.data import Samples, load_data
from quiesce.errors import ModelError, QuiesceError
from quiesce.models import LoadedModel, load_model
from quiesce.pipeline import quantize
from quiesce.preprocess import override
from quiesce.progress import ProgressCallback
from quiesce.reconstruct.journal import digest_of
from quiesce.result import versions
from quiesce.sweep.plan import Cell

CELL_FILE, RESULT_FILE, NETWORK_FILE = "cell.json", "result.json", "quantized.safetensors"
EVALUATION_SEED = 0
"""Picks the evaluation images: the same ones for all cells, whatever their seeds."""


@dataclass(frozen=True)
class Task:
    """A cell, and how it is to be run."""

    cell: Cell
    folder: Path
    """Of the sweep file."""
    threads: int
    device: str
    save_network: bool
    versions: dict[str, str]
    """That the process has to have."""
    tries: int = 1
    """How often the cell has been begun, this time included."""


@dataclass(frozen=True)
class Outcome:
    """What came of a cell: files by name, or an error."""

    files: dict[str, bytes] = field(default_factory=dict)
    error: str | None = None
    """One sentence, or for what is no fault of the user's the traceback."""


def deciding_versions() -> dict[str, str]:
    """Return the versions that decide numbers: results of others are not taken over, nor mixed with these."""
    return {name: version for name, version in versions().items() if name in ("quiesce", "torch")}


def attempt(task: Task, progress: ProgressCallback | None = None) -> Outcome:
    """Run a cell on ``task.threads`` threads; an error is returned, so that it does not stop other cells.

    The process is meant for this cell alone: its working folder becomes that of the sweep file, if that is there.
    """
    torch.set_num_threads(task.threads)
    try:
        if task.versions != deciding_versions():
            raise ModelError(f"the worker has {deciding_versions()}, and the sweep {task.versions}; install the same.")
        if task.folder.is_dir():
            os.chdir(task.folder)
        return Outcome(_files(task, progress))
    except QuiesceError as error:
        return Outcome(error=str(error))
    except Exception:
        return Outcome(error=traceback.format_exc())


def _files(task: Task, progress: ProgressCallback | None) -> dict[str, bytes]:
    network, recipe = task.cell.network, task.cell.recipe
    loaded = load_model(network.model, weights=network.weights, by_order=network.weights_by_order, trust=network.trust)
    preprocessing = override(loaded.preprocessing, **network.preparation)
    samples = load_data(network.calibration, preprocessing, limit=network.images, seed=recipe.seed)
    test = None
    if network.evaluate is not None:
        test = load_data(
            network.evaluate, preprocessing, limit=network.evaluate_images, seed=EVALUATION_SEED, what="evaluation"
        )
    quantized = quantize(
        loaded.model,
        samples,
        recipe,
        evaluate=test,
        device=task.device,
        progress=progress,
        name=loaded.name,
        preprocessing=None if preprocessing is None else preprocessing.to_dict(),
    )
    about = task.cell.settings(task.versions) | {
        "inputs": _fingerprints(loaded, samples, test),
        "tries": task.tries,
    }
    files = {CELL_FILE: (json.dumps(about, indent=2) + "\n").encode()}
    if not task.save_network:
        return files | {
            RESULT_FILE: quantized.result.to_json().encode(),
            "recipe.toml": recipe.to_toml().encode(),
        }
    with tempfile.TemporaryDirectory() as folder:
        quantized.save(folder)
        return files | {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def _fingerprints(loaded: LoadedModel, samples: Samples, test: Samples | None) -> dict[str, str]:
    """Return checksums of what the cell was given, by which a sweep sees that a file or the user's code has changed."""
    found = {
        "model": digest_of({k: v for k, v in loaded.model.state_dict().items() if isinstance(v, Tensor)}),
        "calibration": digest_of(samples.inputs),
    }
    if test is not None:
        labels = {} if test.labels is None else {"labels": test.labels}
        found["evaluate"] = digest_of(test.inputs | labels)
    return found
