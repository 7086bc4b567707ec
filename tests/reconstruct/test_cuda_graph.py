from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, fx

from quiesce.memory import Memory
from quiesce.pipeline import job_of
from quiesce.preparation import Prepared, prepare
from quiesce.processes import Processes
from quiesce.progress import Progress
from quiesce.quant.fake_quantize import restore
from quiesce.quant.rounding import ROUNDINGS
from quiesce.recipe import Recipe
from quiesce.reconstruct.batches import Batch, Batches, Problem
from quiesce.reconstruct.cuda_graph import LEAST_STEPS, WARM_STEPS, StepGraph, obstacle
from quiesce.reconstruct.granular import block_pass
from quiesce.reconstruct.loop import Pass, _Walk
from quiesce.reconstruct.optimize import Course, optimize
from quiesce.reconstruct.step import Learned, Step
from tiny import Assorted, Chain, images, recipe, same_state

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def walked(prepared: Prepared, settings: Recipe, memory: Memory, **job: object) -> Pass:
    restore(prepared.graph, prepared.initial)
    return block_pass(replace(job_of(prepared, settings, memory), **job), Progress())  # type: ignore[arg-type]


def launched(done: Pass) -> set[str | None]:
    return {record.cuda_graph for record in done.records}


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["eager", "fused"])
@pytest.mark.parametrize("rounding", sorted(ROUNDINGS))
def test_captured_steps_give_the_bits_of_those_that_are_not(rounding: str, kernels: str) -> None:
    settings = recipe(steps=60, rounding=rounding, warmup=0.5, fisher=True, decision_push=3.0)
    prepared = prepare(Assorted().to(GPU), images(32), settings)
    graph, eager = (walked(prepared, settings, Memory(GPU), graphs=graphs, kernels=kernels) for graphs in (True, False))
    assert launched(graph) == {"captured"}
    assert launched(eager) == {"eager: not asked for"}
    assert same_state(graph.state, eager.state)
    assert [r.loss_curve for r in graph.records] == [r.loss_curve for r in eager.records]


@pytest.mark.gpu
@pytest.mark.parametrize("place", ["device", "host", "file", "bfloat16 on the device"])
def test_captured_steps_read_images_from_anywhere(place: str) -> None:
    settings = recipe(steps=60)
    prepared = prepare(Chain(2).to(GPU), images(32), settings)
    memories: dict[str, Callable[[], Memory]] = {
        "device": lambda: Memory(GPU),
        "host": lambda: Memory(GPU, 0),
        "file": lambda: Memory(GPU, 0, 0),
        "bfloat16 on the device": lambda: Memory(GPU, narrow=True),
    }
    graph, eager = (walked(prepared, settings, memories[place](), graphs=graphs) for graphs in (True, False))
    assert launched(graph) == {"captured"}
    assert same_state(graph.state, eager.state)


@pytest.mark.gpu
@pytest.mark.parametrize("micro_batch", [None, 4])
def test_captured_steps_draw_from_a_window(micro_batch: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the images are: in the window they are on the GPU, so parts of a batch can be captured, too."""
    if micro_batch:
        monkeypatch.setattr("quiesce.reconstruct.loop.step_images", lambda *_: micro_batch)
    settings = recipe(steps=250, resident_images=12)
    prepared = prepare(Chain(2).to(GPU), images(64), settings)
    near = walked(prepared, settings, Memory(GPU), kernels="fused")
    for memory in (Memory(GPU, 0), Memory(GPU, 0, 0)):
        far = walked(prepared, settings, memory, kernels="fused")
        assert launched(far) == {"captured"}
        assert same_state(near.state, far.state)


@pytest.mark.gpu
def test_a_gpu_without_memory_for_a_batch_takes_parts_of_it() -> None:
    settings = recipe("brecq-fast", batch_size=256, steps=40, calibration_batch=16)
    prepared = prepare(Chain(1, channels=64).to(GPU), images(256, size=32), settings)
    torch.cuda.empty_cache()
    there, room = torch.cuda.mem_get_info(GPU)[1], 600 * 10**6
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(GPU) + room) / there)
    try:
        found = walked(prepared, settings, Memory(GPU))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert launched(found) == {"captured"}
    assert {r.micro_batch for r in found.records} & {32, 64, 128}
    assert all(math.isfinite(loss) for r in found.records for _, loss in r.loss_curve)


@pytest.mark.gpu
def test_a_run_on_a_gpu_is_repeated_bit_for_bit() -> None:
    settings = recipe(steps=60)
    prepared = prepare(Chain(2, channels=32).to(GPU), images(64, size=16), settings)
    first, second = (walked(prepared, settings, Memory(GPU)) for _ in range(2))
    assert same_state(first.state, second.state)


def problem_of(device: torch.device, settings: Recipe) -> Problem:
    """The second of a network's modules."""
    prepared = prepare(Chain(2).to(device), images(32), settings)
    walk = _Walk(job_of(prepared, settings, Memory(device)))
    walk.advance(prepared.modules[0].stop)
    return walk._problem(prepared.modules[1])


def learn(problem: Problem, settings: Recipe, steps: int, **more: object) -> Course:
    assert settings.reconstruction is not None
    return optimize(
        problem,
        settings.reconstruction,
        steps=steps,
        regularizer_weight=0.01,
        seed=0,
        on_step=lambda: None,
        **more,  # type: ignore[arg-type]
    )


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [False, True])
def test_captured_steps_learn_what_a_cpu_does(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses of some steps agree, draws included; what is rounded differently by then has not spread."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    settings = recipe(drop_prob=0.5)
    steps = WARM_STEPS + LEAST_STEPS
    cpu, gpu = (learn(problem_of(d, settings), settings, steps, fused=fused and d is GPU) for d in (CPU, GPU))
    assert (cpu.cuda_graph, gpu.cuda_graph) == (None, "captured")
    for (_, there), (_, here) in zip(cpu.curve[:10], gpu.curve[:10], strict=True):
        assert there == pytest.approx(here, rel=1e-3)


@pytest.mark.gpu
def test_parts_of_a_batch_are_captured_too() -> None:
    settings = recipe(steps=40)
    found = []
    for graphs in (True, False):
        course = learn(problem_of(GPU, settings), settings, 40, micro_batch=3, graphs=graphs)
        found.append(course.curve)
    assert found[0] == found[1]


class Spoiled(fx.GraphModule):
    """The problem's unit, whose outputs go through ``spoil``."""

    def __init__(self, problem: Problem, spoil: Callable[[Tensor], Tensor]) -> None:
        super().__init__(problem.module, problem.module.graph)
        self.unit, self.spoil = problem.module, spoil

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(self.spoil, self.unit(*inputs)))


@pytest.mark.gpu
def test_what_cannot_be_captured_runs_and_says_why() -> None:
    settings = recipe(steps=60)
    problem = problem_of(GPU, settings)
    read = replace(problem, module=Spoiled(problem, lambda t: t * (1.0 if t.sum().item() < math.inf else 0.0)))
    course = learn(read, settings, 60)
    assert course.cuda_graph is not None and course.cuda_graph.startswith("eager: ")
    assert "captur" in course.cuda_graph
    assert course.curve == learn(problem_of(GPU, settings), settings, 60, graphs=False).curve
    assert learn(problem_of(GPU, settings), settings, 60).cuda_graph == "captured"


@pytest.mark.gpu
def test_captured_steps_go_back_from_a_loss_that_is_not_finite() -> None:
    settings = recipe(steps=250)
    problem = problem_of(GPU, settings)
    calls = torch.zeros((), device=GPU)

    def spoil(output: Tensor) -> Tensor:
        calls.add_(1)
        return torch.where(calls == 150, math.inf, output)

    course = learn(replace(problem, module=Spoiled(problem, spoil)), settings, 250)
    assert (course.returns, course.cuda_graph) == (1, "captured")
    assert all(math.isfinite(value) for _, value in course.curve)
    assert calls.item() == 350


class Replayed:
    """A CUDA graph without a GPU: what would be captured is not run, and replaying runs it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        body = StepGraph._body
        bodies: list[StepGraph] = []
        monkeypatch.setattr(StepGraph, "_body", lambda graph: bodies.append(graph))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: body(bodies[-1])))
        monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
        monkeypatch.setattr("quiesce.reconstruct.optimize.obstacle", lambda _: None)
        self.bodies = bodies


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_a_replayed_step_takes_the_images_and_rates_of_its_number(
    micro_batch: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = recipe(steps=40, warmup=0.5)
    curves = []
    for replayed in (None, Replayed(monkeypatch)):
        course = learn(problem_of(CPU, settings), settings, 40, micro_batch=micro_batch, graphs=replayed is not None)
        curves.append(course.curve)
        assert replayed is None or len(replayed.bodies) == 1
    assert curves[0] == curves[1]


def test_replayed_steps_go_back_and_read_batches_that_were_gathered_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = recipe(steps=150)
    prepared = prepare(Chain(2), images(32), settings)
    eager = walked(prepared, settings, Memory(CPU, 0, 0), graphs=False)
    Replayed(monkeypatch)
    assert same_state(walked(prepared, settings, Memory(CPU, 0, 0)).state, eager.state)
    problem, calls = problem_of(CPU, settings), torch.zeros(())

    def spoil(output: Tensor) -> Tensor:
        calls.add_(1)
        return torch.where(calls == 120, math.inf, output)

    course = learn(replace(problem, module=Spoiled(problem, spoil)), settings, 150)
    assert course.returns == 1
    assert calls.item() == 200


def step_of(problem: Problem, settings: Recipe, batches: Batches) -> Step:
    assert settings.reconstruction is not None
    learned = Learned.attach(problem.module, settings.reconstruction, (), None)
    return Step(problem, settings.reconstruction, learned, None, 0.01, 100, batches)


def test_steps_on_a_cpu_are_not_captured() -> None:
    settings = recipe()
    problem = problem_of(CPU, settings)
    assert obstacle(step_of(problem, settings, Batches(problem))) == "no GPU"
    assert learn(problem, settings, 5).cuda_graph is None


def test_obstacles_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = recipe()
    problem = problem_of(CPU, settings)
    step = step_of(problem, settings, Batches(problem))
    monkeypatch.setattr(Problem, "device", GPU)  # nothing is run there

    def named(given: Problem = problem, ahead: bool = False, steps: int = 100, micro_batch: int = 8) -> str | None:
        monkeypatch.setattr(Batches, "ahead", ahead)
        step.problem, step.steps, step.micro_batch = given, steps, micro_batch
        return obstacle(step)

    assert named() is None
    assert named(replace(problem, processes=Processes(0, 2))) == "several processes"
    assert named(steps=WARM_STEPS + LEAST_STEPS - 1) == "few steps"
    assert named(micro_batch=4) is None
    assert named(ahead=True) is None
    assert named(ahead=True, micro_batch=4) == "parts of a batch come from elsewhere than the GPU"


def test_a_copy_of_a_batch_keeps_what_is_one_tensor_and_takes_over_values() -> None:
    settings = recipe()
    prepared = prepare(Chain(2), images(32), settings)
    problem = _Walk(job_of(prepared, settings, Memory()))._problem(prepared.modules[0])
    one, other = (Batch.of(problem, torch.arange(first, first + 4)) for first in (0, 8))
    copy = one.map(torch.clone)
    assert copy.quantized_inputs[0] is copy.float_inputs[0]
    assert all(torch.equal(a, b) and a is not b for a, b in zip(copy.tensors, one.tensors, strict=True))
    held = [t.data_ptr() for t in copy.tensors]
    copy.copy_(other)
    assert all(torch.equal(a, b) for a, b in zip(copy.tensors, other.tensors, strict=True))
    assert [t.data_ptr() for t in copy.tensors] == held
