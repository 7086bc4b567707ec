"""What several processes gain and cost: steps of units, and the mean of their gradients; then the gain on paper.

    pip install ".[models]"
    python benchmarks/parallel.py resnet18 mobilenet_v2
    torchrun --nproc-per-node 2 benchmarks/parallel.py resnet18 mobilenet_v2
    torchrun --nproc-per-node 2 benchmarks/parallel.py --demo
    python benchmarks/parallel.py --paper

The first two time a step of each unit of the networks, with random weights, as only sizes matter; ``--demo`` quantizes
the demo's network, and compares it with what one process makes of it; ``--paper`` measures nothing.
"""

from __future__ import annotations

import argparse
import time

import torch
import torchvision

from quiesce import Recipe
from quiesce.demo.assets import load_images, load_network
from quiesce.graph.unit import Unit
from quiesce.memory import Memory
from quiesce.pipeline import job_of, quantize
from quiesce.preparation import prepare
from quiesce.processes import ALONE, Processes, process_group
from quiesce.quant.draws import Draws
from quiesce.quant.fake_quantize import Drop, snapshot
from quiesce.reconstruct.batches import Batches
from quiesce.reconstruct.loop import Job, _Walk
from quiesce.reconstruct.optimize import batch_order
from quiesce.reconstruct.step import Learned, Step

MEMORY = Memory()
LINKS = {8: (200e9, 5e-6), 64: (25e9, 15e-6)}
"""Of that many GPUs: bytes a second and seconds a message of the slowest link in the ring. 8 in one machine, joined by
NVLink; 64 in 8 machines, joined by a network of 200 Gbit/s for each GPU."""
STEPS_ON_A_GPU = (0.002, 0.005, 0.02)
"""Seconds of a step that are assumed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=["resnet18", "mobilenet_v2"])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--demo", action="store_true")
    parser.add_argument("--paper", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.paper:
        for name in ("resnet18", "resnet50", "mobilenet_v2"):
            on_paper(name)
        return
    with process_group(torch.device("cpu")) as processes:
        if options.demo:
            demo(processes)
        else:
            for name in options.networks:
                steps(name, processes, options.steps, options.images, options.size)


def ring(size: int, volume: float, bandwidth: float, latency: float) -> float:
    """Return the seconds of an all-reduce of ``volume`` bytes by ``size`` processes in a ring, each of which sends
    2 (size − 1) messages of volume / size bytes, one after another."""
    return 2 * (size - 1) * (latency + volume / size / bandwidth)


def efficiency(step: float, size: int, volume: float, bandwidth: float, latency: float) -> float:
    """Return the share of time that goes into steps of ``step`` seconds, if nothing of the all-reduce is hidden."""
    return step / (step + ring(size, volume, bandwidth, latency))


def gradient_bytes(job: Job, unit: Unit) -> int:
    inside = job.network.nodes[unit.start : unit.stop]
    read = {str(n.target) for node in inside for n in node.all_input_nodes if n.op == "call_module"}
    quantizers = [getattr(job.network.gm, name) for name in read]
    return sum(4 * q.quantized.numel() for q in quantizers if hasattr(q, "quantized"))


def network_job(name: str, processes: Processes, images: int, size: int) -> Job:
    recipe = Recipe.preset("qdrop-fast", weight_range="minmax", activation_range="minmax")
    given = torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    network = getattr(torchvision.models, name)(weights=None).eval()
    return job_of(prepare(network, given, recipe, processes=processes), recipe, MEMORY)


def on_paper(name: str) -> None:
    job = network_job(name, ALONE, 32, 64)
    unit = max(job.modules, key=lambda u: gradient_bytes(job, u))
    volume = gradient_bytes(job, unit)
    cells = []
    for size, (bandwidth, latency) in LINKS.items():
        cells.append(f"{1000 * ring(size, volume, bandwidth, latency):.2f}")
        cells += [f"{100 * efficiency(step, size, volume, bandwidth, latency):.0f}" for step in STEPS_ON_A_GPU]
    print(f"| {name} | {unit.name} | {volume / 1e6:.1f} | {' | '.join(cells)} |")


def steps(name: str, processes: Processes, count: int, images: int, size: int) -> None:
    """Take ``count`` steps of every unit; print the time of a step of each, of the processor and on the clock, and what
    the mean of gradients takes on the clock."""
    job = network_job(name, processes, images, size)
    walk, taken, worked, told = _Walk(job), 0.0, 0.0, 0.0
    for unit in job.modules:
        problem, learning = walk._problem(unit), job.reconstruction
        drop = Drop(learning.drop_prob, Draws(0, problem.device))
        learned = Learned.attach(problem.module, learning, (), drop)
        step = Step(problem, learning, learned, drop, 0.01, count, Batches(problem))
        order = batch_order(problem, count, learning.batch_size, 0).images
        step.take(0, order[0])
        processes.texts("")  # all begin together
        began, busy = time.perf_counter(), time.process_time()
        for number in range(1, count):
            step.take(number, order[number])
        taken += (time.perf_counter() - began) / (count - 1)
        worked += (time.process_time() - busy) / (count - 1)
        gradients = [v.grad for v in learned.variables() if v.grad is not None]
        processes.texts("")
        began = time.perf_counter()
        for _ in range(5):
            processes.mean_(gradients)
        told += (time.perf_counter() - began) / 5
        learned.harden()
        walk.advance(unit.stop)
    if processes.first:
        volume = sum(gradient_bytes(job, unit) for unit in job.modules)
        print(
            f"| {name} | {processes.size} | {job.reconstruction.batch_size} | {len(job.modules)} | {1000 * worked:.0f} "
            f"| {1000 * taken:.0f} | {volume / 1e6:.1f} | {1000 * told:.0f} |",
            flush=True,
        )


def demo(processes: Processes) -> None:
    """Quantize the demo's network together, and by each process alone with two seeds."""
    calibration, images, labels = load_images()
    found = []
    for seed, those in ((0, processes), (0, ALONE), (1, ALONE)):
        recipe = Recipe.preset("qdrop-fast", weight_bits=2, activation_bits=4, steps=250, seed=seed)
        began = time.perf_counter()
        made = quantize(load_network(), calibration, recipe, evaluate=[(images, labels)], processes=those)
        found.append((made, {k: t for k, t in snapshot(made.graph_module).items() if k.endswith(".quantized")}))
        run = made.result.run
        if processes.first:
            print(
                f"| {those.size} | {seed} | {run.top1:.2f} | {run.agreement:.2f} | {run.sqnr_db:.2f} "
                f"| {time.perf_counter() - began:.0f} | {differing(found[0][1], found[-1][1]):.2%} |",
                flush=True,
            )
    if processes.first:
        print(f"integers that differ between both seeds of one process: {differing(found[1][1], found[2][1]):.2%}")


def differing(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    pairs = [(first[name], second[name]) for name in first]
    return sum(int((a != b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)


if __name__ == "__main__":
    main()
