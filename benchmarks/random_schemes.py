"""Write granularities.toml: random granularities of MobileNetV2, to see which are good (the paper's figures 3 and 4).

python benchmarks/random_schemes.py
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

SCHEMES, MOST_MODULES = 40, 3
MODULES = ("features.0+features.1", *[f"features.{i}" for i in range(2, 18)], "features.18+classifier")
TABLE = Path(__file__).parent / "granularities.toml"
HEAD = """\
# Random granularities: modules are merged at random into units of at most three, from hardly any to nearly all. All
# have the steps of their modules, start anew, and are kept whatever comes of them. Written by random_schemes.py.

[data]
calibration = "emoji1000.data:calibration"
evaluate = "emoji1000.data:test"
images = 1024

[[network]]
model = "emoji1000.networks:mobilenetv2_050"
weights = "weights/emoji1000_mobilenetv2_050.safetensors"
name = "MobileNetV2 x0.5"

[grid]
preset = "brecq-fast"
bits = "2/4"
granularity = "scheme"
guard = false
steps = 200
rounding_lr = 0.1
step_size_lr = 0.004
scheme = [
"""


def random_scheme(modules: Sequence[str], chance: float, draws: random.Random) -> list[list[str]]:
    """Return the units of several modules: each module joins the one before it with ``chance``, where it has room."""
    units: list[list[str]] = []
    for module in modules:
        if units and len(units[-1]) < MOST_MODULES and draws.random() < chance:
            units[-1].append(module)
        else:
            units.append([module])
    return [unit for unit in units if len(unit) > 1]


def text() -> str:
    """Return the table: a sweep file."""
    draws = random.Random(0)
    schemes: list[list[list[str]]] = []
    while len(schemes) < SCHEMES:
        scheme = random_scheme(MODULES, draws.uniform(0.1, 0.9), draws)
        if scheme and scheme not in schemes:
            schemes.append(scheme)
    return HEAD + "".join(f"    {json.dumps(scheme)},\n" for scheme in schemes) + "]\n"


if __name__ == "__main__":
    TABLE.write_text(text(), encoding="utf-8")
