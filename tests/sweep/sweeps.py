"""A sweep file, and the module with its network and data."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import pytest

from quiesce.outputs import output_folder
from quiesce.sweep.cell import Outcome, Task, attempt, deciding_versions
from quiesce.sweep.plan import Sweep

SOURCE = """
import os
import signal
import time
from pathlib import Path

import torch
from torch import nn


def net():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()


def images():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(32, 3, 8, 8, generator=generator), torch.randint(3, (32,), generator=generator))]


def larger():
    return [torch.randn(32, 3, 9, 9)]


def raises():
    raise SystemError("out of luck")


def waits_to_be_killed_once():
    if not Path("pid").exists():
        Path("pid.partial").write_text(str(os.getpid()))
        Path("pid.partial").rename("pid")
        time.sleep(600)
    return images()


def always_dies():
    with open("deaths", "a") as file:
        file.write("x")
    os.kill(os.getpid(), signal.SIGKILL)
"""
SWEEP = """
[data]
calibration = "sweep_source:images"
evaluate = "sweep_source:images"

[[network]]
name = "net"
model = "sweep_source:net"

[grid]
bits = ["2/4", "4/float"]
preset = ["brecq-fast", "qdrop-fast"]
seed = [0, 1]

[recipe]
steps = 2
batch_size = 8
weight_range = "minmax"
activation_range = "minmax"
"""

ONE_CELL = (('["2/4", "4/float"]', '"2/4"'), ('["brecq-fast", "qdrop-fast"]', '"qdrop-fast"'), ("[0, 1]", "0"))
"""Changes that leave one cell; all but the first leave two."""


def task(sweep: Sweep, number: int = 0, **settings: object) -> Task:
    given = {"threads": 1, "device": "cpu", "save_network": False, "versions": deciding_versions()} | settings
    return Task(sweep.cells[number], sweep.folder, **given)  # type: ignore[arg-type]


def run_here(sweep: Sweep, number: int = 0, **settings: object) -> Outcome:
    """Run a cell in this process, which keeps its working folder."""
    with contextlib.chdir("."):
        return attempt(task(sweep, number, **settings))


def keep(sweep: Sweep, folder: Path, *numbers: int, **settings: object) -> None:
    """Run cells in this process and put their files where a sweep keeps them."""
    for number in numbers:
        cell = sweep.cells[number]
        with output_folder(folder / "cells" / f"{cell.readable}-{cell.digest(deciding_versions())}", force=True) as new:
            for name, content in run_here(sweep, number, **settings).files.items():
                (new / name).write_bytes(content)


def change_images(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the module in ``place`` give other images from now on."""
    source = place / "sweep_source.py"
    source.write_text(source.read_text().replace("manual_seed(1)", "manual_seed(2)"))
    monkeypatch.delitem(sys.modules, "sweep_source")
