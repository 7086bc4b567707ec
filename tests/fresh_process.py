"""Saved networks in a process of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from quiesce import QuantizedModel

LOAD = """
import sys, torch, quiesce
torch.set_num_threads(1)
network = quiesce.load(sys.argv[1])
case = torch.load(sys.argv[2], weights_only=True)
made = torch.utils._pytree.tree_leaves(network(*case["args"], **case["kwargs"]))
flat = [leaf for leaf in made if torch.is_tensor(leaf)]
assert all(torch.equal(a, b) for a, b in zip(flat, case["outputs"], strict=True))
assert "user_model" not in sys.modules
print("identical")
"""


def check_identical(network: QuantizedModel, folder: Path, *args: Tensor, **kwargs: Tensor) -> None:
    """Load ``network`` from ``folder`` in another process, and compare the tensors it returns there, bit by bit."""
    made = torch.utils._pytree.tree_leaves(network(*args, **kwargs))
    outputs = [leaf for leaf in made if torch.is_tensor(leaf)]
    case = {"args": list(args), "kwargs": kwargs, "outputs": outputs}
    torch.save(case, folder.parent / "case.pt")
    command = [sys.executable, "-c", LOAD, str(folder), str(folder.parent / "case.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "identical\n", done.stderr
