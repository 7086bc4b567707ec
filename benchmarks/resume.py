"""What it costs to keep finished units: time and bytes of a commit, beside the time of the unit's optimization.

    pip install ".[models]"
    python benchmarks/resume.py resnet18 mobilenet_v2

Times are those of one thread; networks have random weights, as only sizes matter. Then the finished run is begun again,
which shows what is computed a second time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torchvision

from quiesce import Recipe
from quiesce.pipeline import run
from quiesce.preparation import Prepared, prepare
from quiesce.reconstruct.journal import Journal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=["resnet18", "mobilenet_v2"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--size", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe = Recipe.preset("qdrop-fast", steps=options.steps, weight_range="minmax", activation_range="minmax")
    images = torch.randn(options.images, 3, options.size, options.size, generator=torch.Generator().manual_seed(0))
    print("| Network | Units | A step, ms | A commit, ms | …processor | A commit, steps | KB | Run | Again |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    for name in options.networks:
        network = getattr(torchvision.models, name)(weights=None).eval()
        print(row(name, prepare(network, images, recipe), recipe), flush=True)


def row(name: str, prepared: Prepared, recipe: Recipe) -> str:
    with TemporaryDirectory(dir=".") as folder, timed_commits() as commits:
        place = Path(folder) / "progress"
        began = time.perf_counter()
        (done,), _ = run(prepared, recipe, progress_folder=place)
        first = time.perf_counter() - began
        began = time.perf_counter()
        run(prepared, recipe, progress_folder=place)
        again = time.perf_counter() - began
        size = statistics.mean(path.stat().st_size for path in place.glob("*.safetensors")) / 1000
    step = 1000 * sum(u.seconds for u in done.unit_records) / sum(u.steps for u in done.unit_records)
    wall, processor = (1000 * statistics.mean(values) for values in zip(*commits, strict=True))
    return (
        f"| {name} | {len(commits)} | {step:.0f} | {wall:.1f} | {processor:.1f} | {wall / step:.2f} | {size:,.0f} "
        f"| {first:.1f} s | {again:.1f} s |"
    )


@contextmanager
def timed_commits() -> Any:
    """Yield a list that gets a pair for each commit: seconds that passed, and of the processor."""
    times: list[tuple[float, float]] = []
    commit = Journal.commit

    def timed(self: Journal, *arguments: Any) -> None:
        began = time.perf_counter(), time.process_time()
        commit(self, *arguments)
        times.append((time.perf_counter() - began[0], time.process_time() - began[1]))

    Journal.commit = timed  # type: ignore[method-assign, assignment]
    try:
        yield times
    finally:
        Journal.commit = commit  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
