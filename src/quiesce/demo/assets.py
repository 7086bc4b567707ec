"""Reads the embedded demo network and its Fashion-MNIST images (Xiao et al., arXiv 1708.07747)."""

from __future__ import annotations

import hashlib
import io
import json
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from safetensors.torch import load
from torch import Tensor

from quiesce.demo.network import DemoNet
from quiesce.errors import FileFormatError
from quiesce.preprocess import Preprocessing

DATA = files("quiesce.demo") / "data"
SIZE = 28
MEAN, STD = 0.2860, 0.3530
"""Of the training images' pixels, scaled to [0, 1]."""


def load_network() -> DemoNet:
    """Return the trained network in eval mode: images [N, 1, 28, 28] to logits [N, 10].

    Raises:
        FileFormatError: an asset is missing or damaged.
    """
    network = DemoNet()
    network.load_state_dict(load(_read("network.safetensors")))
    return network.eval()


def load_images() -> tuple[Tensor, Tensor, Tensor]:
    """Return calibration images [1024, 1, 28, 28], test images [2000, 1, 28, 28], and the latter's labels [2000].

    Images are normalised float32 (see :func:`preprocessing`), labels int64 in [0, 10). The calibration images are from
    the training set, the test images are the first of the test set.

    Raises:
        FileFormatError: an asset is missing or damaged.
    """
    with np.load(io.BytesIO(_read("images.npz")), allow_pickle=False) as arrays:
        calibration, test, labels = (torch.from_numpy(arrays[name]) for name in ("calibration", "test", "labels"))
    return normalize(calibration), normalize(test), labels.long()


def preprocessing() -> dict[str, Any]:
    """Return what :func:`normalize` does as plain data: (pixels / 255 - mean) / std, one value per channel."""
    return Preprocessing(resize=None, crop=(SIZE, SIZE), mean=(MEAN,), std=(STD,), channels=1).to_dict()


def normalize(images: Tensor) -> Tensor:
    """Return uint8 ``images`` [N, 28, 28] as the network's input, float32 [N, 1, 28, 28]."""
    return ((images.float() / 255 - MEAN) / STD).unsqueeze(1)


def training() -> dict[str, Any]:
    """Return how the network was trained and its float top-1 in per cent (data/training.json).

    Raises:
        FileFormatError: the file is missing or damaged.
    """
    try:
        record = json.loads(_bytes("training.json"))
    except ValueError as error:
        raise _damaged("training.json") from error
    if not (isinstance(record, dict) and isinstance(record.get("sha256"), dict)):
        raise _damaged("training.json")
    return record


def _read(name: str) -> bytes:
    """Return the asset ``name`` if its checksum is that of training.json."""
    raw = _bytes(name)
    if hashlib.sha256(raw).hexdigest() != training()["sha256"].get(name):
        raise _damaged(name)
    return raw


def _bytes(name: str) -> bytes:
    try:
        return (DATA / name).read_bytes()
    except OSError as error:
        raise FileFormatError(f"demo asset {name} is missing in {DATA}; install quiesce again.") from error


def _damaged(name: str) -> FileFormatError:
    return FileFormatError(f"demo asset {name} in {DATA} is damaged; install quiesce again.")
