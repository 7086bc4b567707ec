"""Damaged files of every kind are refused or read: no other error, no crash, no hang, no gigabytes of memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fuzz as fuzzing
import quiesce
from fuzz import KINDS, MEMORY, weighted
from tiny import images, recipe


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved network, and weights of another, in one folder."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten())
    network.append(nn.Linear(16, 3))
    folder = tmp_path_factory.mktemp("originals") / "net"
    quantized = quiesce.quantize(network.eval(), images(8, size=4), recipe("nearest", weight_bits=3))
    quantized.save(folder)
    quantized.export_onnx(folder / "network.onnx")
    state = weighted().state_dict()
    save_file(state, folder / "weights.safetensors")
    torch.save(state, folder / "weights.pt")
    torch.save({"state_dict": state, "epoch": 3}, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    return folder


def fuzz(originals: Path, folder: Path, first: int, count: int, *kinds: str) -> dict[str, Any]:
    command = [sys.executable, str(Path(fuzzing.__file__)), str(originals), str(first), str(count), *kinds]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment)
    last = (folder / "last").read_text() if (folder / "last").exists() else "nothing yet"
    assert done.returncode == 0, f"ended with {done.returncode} at {last}: {done.stderr[-2000:]}"
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def check(found: dict[str, Any], count: int) -> None:
    assert found["failures"] == []
    assert found["peak"] < MEMORY
    for kind, ends in found["ends"].items():
        assert sum(ends.values()) == count
        assert ends["refused"] > count // 4, f"{kind}: {ends}"


def test_damaged_files_are_refused_or_read(originals: Path, tmp_path: Path) -> None:
    count = -(-500 // len(KINDS))
    check(fuzz(originals, tmp_path, 0, count, *KINDS), count)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_many_damaged_files_are_refused_or_read(kind: str, originals: Path, tmp_path: Path) -> None:
    count = -(-10_000 // len(KINDS))
    check(fuzz(originals, tmp_path, 1000, count, kind), count)


def test_whole_files_are_read(originals: Path) -> None:
    for kind in KINDS.values():
        kind.read(originals / kind.file)
