"""Measure what a memory budget costs: peak memory, and processor and wall time, with streams in memory and in files.

    pip install ".[models]"
    python benchmarks/memory.py

Each row is a process of its own: a torchvision network with random weights and random images is reconstructed for a few
steps a block. Memory is the process's anonymous memory above what it took when the images were made, or on a GPU what
torch allocated there. Rows alternate, so that whatever else the machine does falls on all of them. ``--plan`` only
computes where the streams of a large run would go; nothing is run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

import quiesce.reconstruct.optimize as optimizing
from quiesce import Recipe
from quiesce.memory import Memory, Peak, format_bytes, parse_bytes
from quiesce.pipeline import run
from quiesce.preparation import prepare
from quiesce.reconstruct.order import Order, draw_order
from quiesce.reconstruct.plan import Sizes, plan
from quiesce.reconstruct.resident import Residents
from quiesce.reconstruct.step import Step
from quiesce.reconstruct.streams import Network

FIRST_STEPS = optimizing.CHECKED_STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet18", help="a torchvision network")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--size", type=int, default=224, help="pixels of a side")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--budget", default="700MB", help="of the second row; the first has none")
    parser.add_argument("--resident", type=int, metavar="N", help="draw batches from a window of N images")
    parser.add_argument("--stream-dtype", default="same", choices=("same", "bf16"))
    parser.add_argument("--of", type=int, metavar="STEPS", help="take the first --steps of a run of so many")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--plan", action="store_true", help="plan for --images on a GPU with --budget, batch 32")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plan:
        show_plan(arguments)
    elif arguments.one:
        print(json.dumps(measured(arguments, None if arguments.one == "none" else arguments.one)))
    else:
        compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    rows: dict[str, list[dict[str, float]]] = {"none": [], arguments.budget: []}
    for _ in range(arguments.repeats):
        for budget, found in rows.items():
            done = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--one", budget],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            found.append(json.loads(done.stdout))
            print(f"budget {budget}: {found[-1]}", flush=True)
    if arguments.of:
        times = [statistics.median(whole_run(r, arguments) for r in found) for found in rows.values()]
        print(f"a run of {arguments.of} steps, computed: {times[0]:.0f} s without, {times[1]:.0f} s with, ", end="")
        print(f"ratio {times[1] / times[0]:.3f}")
    for key in ("peak", "cpu_seconds", "wall_seconds", "units_seconds"):
        none, some = (statistics.median(r[key] for r in found) for found in rows.values())
        shown = (format_bytes(none), format_bytes(some)) if key == "peak" else (f"{none:.1f}", f"{some:.1f}")
        print(f"{key}: without {shown[0]}, with {shown[1]}, ratio {some / none:.3f}")


def whole_run(row: dict[str, float], arguments: argparse.Namespace) -> float:
    """Return the seconds of a run of ``--of`` steps, from one that took the first ``--steps`` of each unit's."""
    return row["wall_seconds"] + row["step_of_all"] * float(arguments.of - arguments.steps)


def measured(arguments: argparse.Namespace, budget: str | None) -> dict[str, float]:
    recipe = recipe_of(arguments)
    # What torch loads when it is first used is no part of the run.
    prepare(torch.nn.Conv2d(3, 4, 3).eval(), torch.randn(2, 3, 8, 8), Recipe.preset("nearest"))
    images = torch.randn(arguments.images, 3, arguments.size, arguments.size)
    model = network(arguments.network)
    steps: list[float] = []
    if arguments.of:
        shorten(arguments, steps)
    with Peak(arguments.device) as peak:
        prepared = prepare(model, images, recipe, memory=budget, device=arguments.device)
        cpu, wall = time.process_time(), time.perf_counter()
        (report,), _ = run(prepared, recipe)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    assert peak.bytes is not None
    units = sum(record.seconds for record in report.unit_records)
    taken = {"cpu_seconds": cpu, "wall_seconds": wall, "units_seconds": units, "step_of_all": sum(steps)}
    return taken | {"peak": peak.bytes, "host": report.memory.host, "file": report.memory.file}


def shorten(arguments: argparse.Namespace, seconds: list[float]) -> None:
    """Have steps drawn as for a run of ``--of`` steps, so that images move through the window at its pace.

    The mean ``seconds`` of a unit's steps are kept, but of its first hundred, behind which the device is waited for.
    """
    learn = optimizing._run

    def draw(images: int, steps: int, *rest: Any, **settings: Any) -> Order:
        whole = draw_order(images, arguments.of, *rest, **settings)
        return replace(whole, images=whole.images[:steps], places=whole.places[:steps], first=whole.first[:steps])

    def timed(step: Step, order: Order, residents: Residents | None, on_step: Callable[[], None], graphs: bool) -> Any:
        ends: list[float] = []

        def tick() -> None:
            on_step()
            ends.append(time.perf_counter())

        course = learn(step, order, residents, tick, graphs)
        seconds.append((time.perf_counter() - ends[FIRST_STEPS]) / (arguments.steps - FIRST_STEPS - 1))
        return course

    optimizing.draw_order, optimizing._run = draw, timed  # type: ignore[attr-defined]


def show_plan(arguments: argparse.Namespace) -> None:
    prepared = prepare(
        network(arguments.network), torch.randn(2, 3, arguments.size, arguments.size), Recipe.preset("nearest")
    )
    memory = Memory(torch.device("cuda"), parse_bytes(arguments.budget), stated=True)
    sizes = Sizes(32, 64, 1, arguments.resident or 0)
    rows = plan(Network(prepared.graph, memory), prepared.modules, arguments.images, sizes)
    for row in rows:
        places = ", ".join(f"{format_bytes(size)} {place}" for place, size in row.streams.items() if size)
        print(f"{row.unit}: {format_bytes(row.working)} to work on {row.step_images} images; streams {places}")
    print(f"most on the device: {format_bytes(max(row.device for row in rows))}")


def network(name: str) -> torch.nn.Module:
    import torchvision

    torch.manual_seed(0)
    model: torch.nn.Module = getattr(torchvision.models, name)(weights=None).eval()
    return model


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    return Recipe.preset(
        "qdrop",
        steps=arguments.steps,
        batch_size=arguments.batch,
        calibration_batch=2 * arguments.batch,
        weight_range="minmax",
        activation_range="minmax",
        resident_images=arguments.resident,
        stream_dtype=arguments.stream_dtype,
    )


if __name__ == "__main__":
    main()
