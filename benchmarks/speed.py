"""Time reconstruction as the references write it against Quiesce's, side by side in one process.

    pip install ".[models]"
    python benchmarks/speed.py --quick
    python benchmarks/speed.py --networks demo mobilenetv2 resnet18 --steps 500
    python benchmarks/speed.py --device cuda --networks mobilenetv2 resnet18 resnet50_224 --steps 200

Both do the same work: every block of a network, the same number of steps, batch, bits, dtype and threads. The baseline
(benchmarks/plain_loop.py) is checked to give the same losses for the same draws. Weights are random, with batch-norm
statistics of random images, and so are images: they do not change the speed. Compilation is part of the time, from an
empty cache. What is not the same work, bfloat16 and fewer steps, has rows of its own. The last line printed is
``speedup R``: seconds of the baseline by seconds of Quiesce, over all networks.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from plain_loop import PlainLoop
from quiesce import Recipe
from quiesce.demo import load_images, load_network
from quiesce.memory import Memory
from quiesce.outputs import write_text
from quiesce.pipeline import job_of, regularizer_weight
from quiesce.preparation import Prepared, prepare
from quiesce.quant.draws import Draws
from quiesce.quant.fake_quantize import Drop, restore
from quiesce.reconstruct.batches import Batches, Problem
from quiesce.reconstruct.loop import _Walk
from quiesce.reconstruct.optimize import batch_order, optimize
from quiesce.reconstruct.step import Learned, Step
from quiesce.reconstruct.streams import Network
from quiesce.result import hardware, versions

OUT = Path(__file__).parent / "results" / "speed.json"
VARIANTS = ("baseline", "eager", "graph", "fused", "float32", "bf16", "fewer")
"""The loop of the references, and Quiesce's: as separate operators, these captured as a CUDA graph, as compiled kernels
(on a GPU captured as well), these with convolutions in float32 where a GPU would have taken TF32, with convolutions and
products in bfloat16, and with a part of the steps."""
FEWER = 4
"""Times fewer steps."""
FLOOR = re.compile("convolution|mm$|bmm|linear")
"""Operators that no loop can do without: their part of a step is the floor."""
FLOOR_ON_GPU = re.compile("conv|gemm|xmma|cutlass|wgrad|dgrad|fprop|winograd|nvjet", re.IGNORECASE)
"""Kernels that these launch, by their names…"""
MOVING = re.compile("nchwToNhwc|nhwcToNchw|transform|copy|convert", re.IGNORECASE)
"""…unless they only move or convert."""
CHECKED_STEPS, TOLERANCE = 5, 1e-6
PROFILED_STEPS = {"cpu": 3, "cuda": 25}
STAMPED_STEPS = {"cpu": 1, "cuda": 25}
"""Steps between two looks at the clock: a GPU is waited for at each."""


@dataclass
class Row:
    """One way to optimize one network."""

    network: str
    variant: str
    units: int
    steps: int
    """For each unit."""
    seconds: float
    """Of all steps of all units, compilation included."""
    steady_seconds: float
    """The same at the median time of each unit's steps: what is left when compilation is long past."""
    steps_per_second: float
    peak_mib: float
    """Most resident memory while it ran; on a GPU, what torch allocated there at most."""
    floor_share: float
    """Share of operators' time that convolutions and products took."""
    seconds_by_unit: dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=["mobilenetv2", "resnet18"])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--preset", default="qdrop-fast")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=("baseline", "fused", "bf16", "fewer"))
    parser.add_argument("--quick", action="store_true", help="one network, few steps: 5 minutes on two cores")
    parser.add_argument("--no-check", action="store_true", help="do not compare losses with the baseline's first")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--out", type=Path, help="default: speed.json or, on a GPU, speed_cuda.json in results/")
    options = parser.parse_args()
    options.out = options.out or OUT.with_name("speed_cuda.json" if options.device.type == "cuda" else OUT.name)
    if options.quick:
        options.networks, options.variants, options.steps = ["mobilenetv2"], ["baseline", "fused"], 100
        options.out = Path("runs/speed-quick.json")
    torch.set_num_threads(options.threads)
    record: dict[str, Any] = {
        "preset": options.preset,
        "bits": "2/4",
        "images": options.images,
        "threads": options.threads,
        "versions": versions(),
        "hardware": hardware(options.device),
        "rows": [],
        "checks": [],
        "caching": [],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with empty_compiler_cache():
        for name in options.networks:
            measure_network(name, options, record)
            write_text(options.out, json.dumps(record, indent=1) + "\n")
    rows = [Row(**row) for row in record["rows"]]
    totals = {v: sum(r.seconds for r in rows if r.variant == v) for v in ("baseline", "fused")}
    steady = {v: sum(r.steady_seconds for r in rows if r.variant == v) for v in ("baseline", "fused")}
    print(f"without compilation {steady['baseline'] / steady['fused']:.2f}")
    print(f"speedup {totals['baseline'] / totals['fused']:.2f}")


@contextmanager
def empty_compiler_cache() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        yield


def measure_network(name: str, options: argparse.Namespace, record: dict[str, Any]) -> None:
    network, images = NETWORKS[name](options.images, options.device)
    recipe = Recipe.preset(
        options.preset,
        weight_bits=2,
        activation_bits=4,
        steps=options.steps,
        weight_range="minmax",
        activation_range="minmax",
        relative_regularizer=None,  # both loops take the same λ for all units
    )
    prepared = prepare(network, images, recipe, name=name)
    weight = regularizer_weight(prepared.graph, recipe)
    assert weight is not None
    if not options.no_check:
        record["checks"] += check_losses(name, network, images, recipe)
    record["caching"].append(time_caching(name, prepared, recipe))
    times: dict[str, dict[str, list[float]]] = {v: {} for v in options.variants}
    peaks = dict.fromkeys(options.variants, 0.0)
    shares: dict[str, list[tuple[float, float]]] = {v: [] for v in options.variants}
    walk = _Walk(job_of(prepared, recipe, Memory(prepared.device)))
    for unit in prepared.modules:
        problem = walk._problem(unit)
        for variant in options.variants:
            forget_peak(options.device)
            own = recipe.with_settings(steps=steps_of(variant, options.steps))
            times[variant][unit.name] = time_steps(variant, problem, own, weight)
            peaks[variant] = max(peaks[variant], peak_mib(options.device))
            shares[variant].append(profile(variant, problem, recipe, weight))
            restore(prepared.graph, prepared.initial)
        walk.advance(unit.stop)
        print(name, unit.name, {v: f"{1e3 * statistics.median(times[v][unit.name]):.1f} ms" for v in times}, flush=True)
    for variant in options.variants:
        by_unit = {unit: sum(spent) for unit, spent in times[variant].items()}
        seconds = sum(by_unit.values())
        row = Row(
            network=name,
            variant=variant,
            units=len(by_unit),
            steps=steps_of(variant, options.steps),
            seconds=seconds,
            steady_seconds=sum(len(t) * statistics.median(t) for t in times[variant].values()),
            steps_per_second=sum(map(len, times[variant].values())) / seconds,
            peak_mib=peaks[variant],
            floor_share=sum(a for a, _ in shares[variant]) / sum(b for _, b in shares[variant]),
            seconds_by_unit=by_unit,
        )
        record["rows"].append(asdict(row))
        print(
            f"{name} {variant}: {row.seconds:.1f} s, {row.steps_per_second:.1f} steps/s, peak {row.peak_mib:.0f} MiB, "
            f"convolutions and products {100 * row.floor_share:.0f} %"
        )


def steps_of(variant: str, steps: int) -> int:
    return max(1, steps // FEWER) if variant == "fewer" else steps


class Stamps:
    """Time of steps, by the clock after each, or on a GPU after some."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.every = device, STAMPED_STEPS[device.type]
        self.steps, self.stamps = 0, [self.now()]

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def step(self) -> None:
        self.steps += 1
        if self.steps % self.every == 0:
            self.stamps.append(self.now())

    def seconds(self) -> list[float]:
        """Return the seconds of each step; of those between two looks at the clock, the mean."""
        return [(b - a) / self.every for a, b in pairwise(self.stamps) for _ in range(self.every)]


def time_steps(variant: str, problem: Problem, recipe: Recipe, weight: float) -> list[float]:
    """Return the seconds of each step."""
    assert recipe.reconstruction is not None
    steps, device = recipe.reconstruction.steps, problem.device.type
    stamps = Stamps(problem.device)
    if variant == "baseline":
        loop = PlainLoop(problem, recipe.reconstruction, steps, weight)
        for _ in range(steps):
            loop.take()
            stamps.step()
    else:
        with precision(variant, device):
            course = optimize(
                problem,
                recipe.reconstruction,
                steps=steps,
                regularizer_weight=weight,
                warm=(),
                seed=recipe.seed,
                on_step=stamps.step,
                fused=variant not in ("eager", "graph"),
                graphs=variant != "eager",
            )
        if device == "cuda" and variant != "eager" and course.cuda_graph != "captured":
            raise SystemExit(f"{problem.name}: its steps could not be captured: {course.cuda_graph}")
    return stamps.seconds()


@contextmanager
def precision(variant: str, device: str) -> Iterator[None]:
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = tf32 and variant != "float32"
    with torch.autocast(device, torch.bfloat16) if variant == "bf16" else nullcontext():
        yield
    torch.backends.cudnn.allow_tf32 = tf32


def profile(variant: str, problem: Problem, recipe: Recipe, weight: float) -> tuple[float, float]:
    """Return the time of convolutions and products in a few steps, and that of all operators, or kernels of a GPU."""
    few = recipe.with_settings(steps=PROFILED_STEPS[problem.device.type])
    on_gpu = problem.device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity], acc_events=True) as found:
        time_steps(variant, problem, few, weight)
    events = found.key_averages()
    spent = [(e.key, e.self_device_time_total if on_gpu else e.self_cpu_time_total) for e in events]
    return sum(t for name, t in spent if is_floor(name, on_gpu)), sum(t for _, t in spent)


def is_floor(name: str, on_gpu: bool) -> bool:
    if on_gpu:
        return FLOOR_ON_GPU.search(name) is not None and MOVING.search(name) is None
    return FLOOR.search(name) is not None


def check_losses(name: str, network: nn.Module, images: Tensor, recipe: Recipe) -> list[dict[str, Any]]:
    """Check, in float64 and on few images, that the baseline's losses are Quiesce's for the same images and drops."""
    settings = recipe.with_settings(warmup=0.0).reconstruction  # the regularizer takes part from the start
    assert settings is not None
    few = images[: 2 * settings.batch_size].double()
    prepared = prepare(copy.deepcopy(network).double(), few, recipe)
    weight = regularizer_weight(prepared.graph, recipe)
    assert weight is not None
    walk, rows = _Walk(job_of(prepared, recipe, Memory(prepared.device))), []
    for unit in prepared.modules:
        problem = walk._problem(unit)
        drop = Drop(settings.drop_prob, Draws(recipe.seed, problem.device)) if settings.drop_prob else None
        loop = PlainLoop(problem, settings, settings.steps, weight, drop)
        learned = Learned.attach(problem.module, settings, (), drop)
        step, differences = Step(problem, settings, learned, drop, weight, settings.steps, Batches(problem)), []
        order = batch_order(problem, CHECKED_STEPS, settings.batch_size, recipe.seed)
        for number, batch in enumerate(order.images):
            ours = step.take(number, batch).item()  # leaves the draws at this step
            differences.append(abs(loop.take(batch).item() - ours) / ours)
        learned.harden()
        restore(prepared.graph, prepared.initial)
        walk.advance(unit.stop)
        rows.append({"network": name, "unit": unit.name, "largest_difference": max(differences)})
        if max(differences) > TOLERANCE:
            raise SystemExit(f"{name}, {unit.name}: the baseline's losses differ, relatively by {differences}")
    return rows


def time_caching(name: str, prepared: Prepared, recipe: Recipe) -> dict[str, Any]:
    """Time what units are fed, made as the references do, from the network's start for each, and carried along."""
    job = job_of(prepared, recipe, Memory(prepared.device))
    began = time.perf_counter()
    walk = _Walk(job)
    for unit in prepared.modules:
        walk.advance(unit.stop)
    carried = time.perf_counter() - began
    network, batch = Network(prepared.graph, Memory(prepared.device)), recipe.calibration_batch
    began = time.perf_counter()
    for unit in prepared.modules:
        for quantized in (True, False):
            network.run(0, unit.start, job.inputs, batch, quantized=quantized) if unit.start else None
        network.run(0, unit.stop, job.inputs, batch, quantized=False)
    return {"network": name, "from_the_start": time.perf_counter() - began, "carried": carried}


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    line = next(t for t in Path("/proc/self/status").read_text().splitlines() if t.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def _demo(images: int, device: torch.device) -> tuple[nn.Module, Tensor]:
    return load_network().to(device), load_images()[0][:images].to(device)


def _with_statistics(network: nn.Module, side: int, images: int, device: torch.device) -> tuple[nn.Module, Tensor]:
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(images, 3, side, side, generator=generator).to(device)
    network.to(device).train()
    with torch.no_grad():
        for _ in range(20):
            network(given[:32])
    return network.eval(), given


def _mobilenetv2(side: int, images: int, device: torch.device) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return _with_statistics(torchvision.models.mobilenet_v2(num_classes=100), side, images, device)


def _resnet(depth: int, side: int, images: int, device: torch.device) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    network = getattr(torchvision.models, f"resnet{depth}")(num_classes=100)
    if side < 224:
        network.maxpool = nn.Identity()
    return _with_statistics(network, side, images, device)


NETWORKS: dict[str, Callable[[int, torch.device], tuple[nn.Module, Tensor]]] = {
    "demo": _demo,
    "mobilenetv2": partial(_mobilenetv2, 64),
    "resnet18": partial(_resnet, 18, 64),
    "mobilenetv2_224": partial(_mobilenetv2, 224),
    "resnet18_224": partial(_resnet, 18, 224),
    "resnet50_224": partial(_resnet, 50, 224),
}
"""Networks with their images: 28×28 for the demo, 64×64 with one early stride less than usual, and 224×224."""


if __name__ == "__main__":
    main()
