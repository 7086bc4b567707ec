"""What holds over the whole package."""

from __future__ import annotations

import subprocess
import sys

from quiesce.graph.backends import BACKENDS
from quiesce.quant.rounding import ROUNDINGS
from quiesce.recipe import BACKENDS as BACKEND_NAMES
from quiesce.recipe import ROUNDING_NAMES

HEAVY = {"timm", "torchvision", "matplotlib", "jinja2", "onnx", "rich", "typer", "PIL"}


def test_import_is_light() -> None:
    new = "set(sys.modules) - before"
    code = f"import sys, torch; before = set(sys.modules); import quiesce; print(sorted({HEAVY!r} & ({new})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_names_in_recipes_are_those_of_the_tables() -> None:
    assert set(BACKEND_NAMES) == set(BACKENDS)
    assert set(ROUNDING_NAMES) == set(ROUNDINGS)
