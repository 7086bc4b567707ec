from __future__ import annotations

import copy
import math
from collections.abc import Collection
from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx

from quiesce.errors import ModelError
from quiesce.graph.unit import boundary, extract
from quiesce.preparation import Prepared
from quiesce.quant.fake_quantize import (
    ActivationFakeQuantize,
    WeightFakeQuantize,
    fake_quantizers,
    restore,
    snapshot,
)
from quiesce.quant.rounding import ROUNDINGS
from quiesce.recipe import PRESETS, ReconstructionRecipe
from quiesce.reconstruct.batches import Problem
from quiesce.reconstruct.losses import squared_error
from quiesce.reconstruct.optimize import error_per_weight, optimize
from quiesce.reconstruct.step import Learned, Schedule, Step
from quiesce.reconstruct.streams import Network, Streams

LEARNING = sorted(name for name, row in PRESETS.items() if row.reconstruction is not None)


def problem_of(prepared: Prepared, index: int) -> Problem:
    """Module ``index`` behind a network that is rounded to nearest."""
    restore(prepared.graph, prepared.initial)
    network, module = Network(prepared.graph), prepared.modules[index]
    streams = Streams.at_input({network.inputs[0]: prepared.samples.args[0]})
    streams = streams.advance(network, module.start, 64) if module.start else streams
    ends = boundary(network.nodes, module.start, module.stop)
    targets = streams.targets(network, module.stop, 64)
    return Problem(
        module=extract(network.gm, network.nodes, module.start, module.stop),
        images=len(prepared.samples),
        quantized_inputs=[streams.quantized[n] for n in ends.inputs],
        float_inputs=[streams.float[n] for n in ends.inputs],
        targets=[targets[n] for n in ends.outputs],
    )


@torch.no_grad()
def loss_of(problem: Problem) -> float:
    """The unit's loss as it is now, on all images, without drop."""
    outputs = problem.module(*problem.quantized_inputs)
    return sum(squared_error(o, t).item() for o, t in zip(outputs, problem.targets, strict=True))


def learn(
    problem: Problem,
    settings: ReconstructionRecipe,
    steps: int = 120,
    seed: int = 0,
    warm: Collection[WeightFakeQuantize] = (),
    fused: bool = False,
) -> list[list[float]]:
    return optimize(
        problem,
        settings,
        fused=fused,
        steps=steps,
        regularizer_weight=0.01,
        warm=warm,
        seed=seed,
        on_step=lambda: None,
    ).curve


def weight_quantizers(module: fx.GraphModule) -> list[WeightFakeQuantize]:
    return [q for q in fake_quantizers(module).values() if isinstance(q, WeightFakeQuantize)]


def settings_of(preset: str, **changes: object) -> ReconstructionRecipe:
    found = PRESETS[preset].reconstruction
    assert found is not None
    # Full presets take 20,000 steps at 1e-3; here fewer steps go further.
    return replace(found, **{"batch_size": 16, "rounding_lr": 2e-2, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("rounding", sorted(ROUNDINGS))
@pytest.mark.parametrize("preset", LEARNING)
def test_every_preset_beats_nearest_rounding(chain: Prepared, preset: str, rounding: str) -> None:
    problem = problem_of(chain, 2)
    nearest = loss_of(problem)
    learn(problem, settings_of(preset, rounding=rounding))
    assert loss_of(problem) < 0.8 * nearest


def test_the_first_and_last_units_are_learned_too(chain: Prepared) -> None:
    for index in (0, len(chain.modules) - 1):
        problem = problem_of(chain, index)
        nearest = loss_of(problem)
        learn(problem, settings_of("brecq"))
        assert loss_of(problem) < nearest


def test_a_unit_is_left_hard_and_detached(chain: Prepared) -> None:
    problem = problem_of(chain, 2)
    learn(problem, settings_of("qdrop"), steps=5)
    quantizers = fake_quantizers(problem.module)
    assert {type(q) for q in quantizers.values()} == {WeightFakeQuantize, ActivationFakeQuantize}
    for quantizer in quantizers.values():
        assert not any(t.requires_grad for t in (*quantizer.buffers(), *quantizer.parameters()))
        if isinstance(quantizer, WeightFakeQuantize):
            assert quantizer.rounding is None
            integers = quantizer.quantized
            assert integers.dtype == torch.uint8 and integers.min() >= 0 and integers.max() <= 3
        else:
            assert not quantizer.learning and quantizer.scale > 0
    assert list(problem.module.parameters()) == []


def test_a_failing_step_leaves_the_unit_usable(chain: Prepared) -> None:
    problem = problem_of(chain, 2)

    def fail() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimize(
            problem,
            settings_of("qdrop"),
            steps=5,
            regularizer_weight=0.01,
            warm=(),
            seed=0,
            on_step=fail,
        )
    assert all(q.rounding is None for q in problem.module.modules() if isinstance(q, WeightFakeQuantize))
    assert not any(q.learning for q in problem.module.modules() if isinstance(q, ActivationFakeQuantize))


def test_only_the_units_own_state_changes(chain: Prepared) -> None:
    problem = problem_of(chain, 2)
    before = snapshot(chain.graph)
    floats = {n: b.clone() for n, b in chain.graph.named_buffers(recurse=False)}
    learn(problem, settings_of("brecq"), steps=60)
    after = snapshot(chain.graph)
    own = tuple(fake_quantizers(problem.module))
    changed = {n for n in after if not torch.equal(after[n], before[n])}
    assert changed and all(n.startswith(own) for n in changed)
    assert not any(n.endswith("zero_point") for n in changed)
    assert any(n.endswith("quantized") for n in changed)
    assert all(torch.equal(b, floats[n]) for n, b in chain.graph.named_buffers(recurse=False))


def test_step_sizes_are_learned_only_when_asked(chain: Prepared) -> None:
    problem = problem_of(chain, 2)
    scales = {n: q.scale.clone() for n, q in fake_quantizers(problem.module).items()}
    learn(problem, settings_of("adaround"), steps=20)
    assert all(torch.equal(q.scale, scales[n]) for n, q in fake_quantizers(problem.module).items())
    learn(problem, settings_of("brecq"), steps=20)
    for name, quantizer in fake_quantizers(problem.module).items():
        learned = isinstance(quantizer, ActivationFakeQuantize)
        assert torch.equal(quantizer.scale, scales[name]) is not learned


def test_step_sizes_of_weights_are_learned_by_the_joint_rounding(chain: Prepared) -> None:
    problem = problem_of(chain, 2)
    scales = {n: q.scale.clone() for n, q in fake_quantizers(problem.module).items()}
    learn(problem, settings_of("brecq", rounding="joint", weight_step_size_lr=2e-2, learn_step_sizes=False))
    for name, quantizer in fake_quantizers(problem.module).items():
        change = (quantizer.scale / scales[name]).log2().abs()
        if isinstance(quantizer, ActivationFakeQuantize):
            assert change == 0
        else:
            assert (change > 0).any() and (change <= 0.5).all()


def test_the_joint_rounding_without_a_rate_is_adaround(chain: Prepared) -> None:
    curves = {}
    for rounding in ("adaround", "joint"):
        restore(chain.graph, chain.initial)
        settings = settings_of("qdrop", rounding=rounding, weight_step_size_lr=1e-30)
        curves[rounding] = learn(doubled(problem_of(chain, 2)), settings, steps=6)
    for (_, plain), (_, joint) in zip(*curves.values(), strict=True):
        assert joint == pytest.approx(plain, rel=1e-9)


def test_the_seed_decides(chain: Prepared) -> None:
    states = []
    for seed in (0, 0, 1):
        problem = problem_of(chain, 2)
        learn(problem, settings_of("qdrop"), steps=40, seed=seed)
        states.append(snapshot(problem.module))
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])
    assert any(not torch.equal(states[0][n], states[2][n]) for n in states[0])


def test_the_loss_curve_is_the_loss_without_regularizer(chain: Prepared) -> None:
    """Without drop and with all images in a batch, its first point is the loss of the soft weights at their start."""
    problem = problem_of(chain, 2)
    soft = {}
    for node in problem.module.graph.nodes:
        quantizer = getattr(problem.module, str(node.target)) if node.op == "call_module" else None
        if isinstance(quantizer, WeightFakeQuantize):
            soft[quantizer] = getattr(problem.module, str(node.args[0].target))
    for quantizer, weight in soft.items():
        quantizer.start_rounding("adaround", weight, warm=False)
    expected = loss_of(problem)
    restore(chain.graph, chain.initial)
    for quantizer in soft:
        quantizer.rounding = None
    settings = settings_of("adaround", batch_size=problem.targets[0].shape[0], warmup=0.0)
    for weight in (0.0, 1e3):
        curve = optimize(
            problem,
            settings,
            steps=1,
            regularizer_weight=weight,
            warm=(),
            seed=0,
            on_step=lambda: None,
        ).curve
        assert curve == [[1, pytest.approx(expected, rel=1e-4)]]


def test_the_loss_curve_is_averaged_over_fifty_stretches_at_most(chain: Prepared) -> None:
    curve = learn(problem_of(chain, 2), settings_of("brecq"), steps=120)
    assert [step for step, _ in curve] == [*range(3, 121, 3)]
    assert all(value > 0 for _, value in curve)
    assert [step for step, _ in learn(problem_of(chain, 2), settings_of("brecq"), steps=7)] == [1, 2, 3, 4, 5, 6, 7]


def test_batches_are_never_larger_than_the_images(chain: Prepared) -> None:
    problem = problem_of(chain, 2)
    learn(problem, settings_of("brecq", batch_size=1000), steps=2)


def test_the_regularizer_and_the_push_decide_the_rounding(chain: Prepared) -> None:
    """With a strong λ or a push soft weights end where hardening leaves them: the last loss is the hardened unit's."""
    problem = problem_of(chain, 2)
    count = problem.targets[0].shape[0]
    gaps, undecided = {}, {}
    for weight, push in ((0.0, 0.0), (0.1, 0.0), (0.0, 5.0)):
        restore(chain.graph, chain.initial)
        course = optimize(
            problem,
            settings_of("adaround", batch_size=count, rounding_lr=5e-2, decision_push=push),
            steps=150,
            regularizer_weight=weight,
            warm=(),
            seed=0,
            on_step=lambda: None,
        )
        gaps[weight, push] = abs(loss_of(problem) - course.curve[-1][1]) / loss_of(problem)
        undecided[weight, push] = course.undecided
    assert gaps[0.1, 0.0] < 0.1 < gaps[0.0, 0.0]
    assert gaps[0.0, 5.0] < 0.1
    assert undecided[0.1, 0.0] < undecided[0.0, 5.0] < 0.2 < undecided[0.0, 0.0]


def test_the_push_rises_over_the_last_fifth() -> None:
    schedule = Schedule(settings_of("brecq", decision_push=3.0), 0.0, 100, torch.zeros(1))
    assert (schedule.warmup, schedule.unpushed) == (100, 80)
    pushes = [schedule.at(step).push.item() for step in range(100)]
    assert pushes[:80] == [0.0] * 80
    assert pushes[80:] == pytest.approx([3.0 * (t - 80) / 20 for t in range(80, 100)], abs=1e-6)
    assert Schedule(settings_of("brecq"), 0.0, 100, torch.zeros(1)).unpushed == 100


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_pushes_behind_the_optimizer(chain: Prepared, fused: bool) -> None:
    """The same step with and without a push differs by rate · push · the regularizer's gradient at β = 2."""
    ends, roundings = {}, []
    for push in (0.0, 4.0):
        restore(chain.graph, chain.initial)
        problem = problem_of(chain, 2)
        settings = settings_of("brecq", decision_push=push)
        learned = Learned.attach(problem.module, settings, (), None, fused=fused)
        step = Step(problem, settings, learned, None, 0.01, 20, fused=fused)
        step.take(18, torch.arange(16))
        roundings = learned.roundings()
        ends[push] = [rounding.V.detach().clone() for rounding in roundings]
        learned.harden()
    for rounding, plain, pushed in zip(roundings, ends[0.0], ends[4.0], strict=True):
        with torch.no_grad():
            rounding.V.copy_(plain)
        rounding.push(torch.tensor(settings.rounding_lr * 2.0))  # half of it at 90 % of the steps
        assert (pushed != plain).any()
        assert torch.allclose(rounding.V, pushed, atol=1e-6)


class TestErrorPerWeight:
    def test_is_the_loss_of_rounding_to_nearest_alone(self, chain: Prepared) -> None:
        """Against float64: float inputs, float activations, weights on their grids."""
        problem = problem_of(chain, 2)
        quantizers = fake_quantizers(problem.module).values()
        number = sum(q.quantized.numel() for q in quantizers if isinstance(q, WeightFakeQuantize))
        exact = doubled(problem)
        for quantizer in fake_quantizers(exact.module).values():
            quantizer.enabled = isinstance(quantizer, WeightFakeQuantize)
        with torch.no_grad():
            outputs = exact.module(*[t[:8] for t in exact.float_inputs])
        squares = [(o - t[:8]).square().sum(1).mean() for o, t in zip(outputs, exact.targets, strict=True)]
        assert error_per_weight(problem, 8) == pytest.approx(float(sum(squares)) / number, rel=1e-4)

    def test_leaves_a_learned_unit_as_it_is_and_does_not_depend_on_it(self, chain: Prepared) -> None:
        problem = problem_of(chain, 2)
        before = error_per_weight(problem, 16)
        learn(problem, settings_of("brecq"))
        state = snapshot(problem.module)
        assert error_per_weight(problem, 16) == pytest.approx(before, rel=1e-5)
        assert all(torch.equal(t, state[name]) for name, t in snapshot(problem.module).items())
        assert all(q.enabled for q in fake_quantizers(problem.module).values())

    def test_is_the_same_in_parts(self, chain: Prepared) -> None:
        problem = problem_of(chain, 2)
        assert error_per_weight(problem, 16, 6) == pytest.approx(error_per_weight(problem, 16), rel=1e-5)


def test_a_relative_regularizer_is_that_multiple_of_the_error_per_weight(chain: Prepared) -> None:
    problem = problem_of(chain, 2)
    settings = settings_of("brecq", relative_regularizer=300.0, warmup=0.0)
    curves = []
    for weight in (None, 300.0 * error_per_weight(problem, settings.batch_size), 0.0):
        restore(chain.graph, chain.initial)
        restore(problem.module, chain.initial)
        course = optimize(problem, settings, steps=20, regularizer_weight=weight, warm=(), seed=0, on_step=lambda: None)
        curves.append(course.curve)
    assert curves[0] == curves[1] != curves[2]


def test_a_warm_start_keeps_the_rounding_it_starts_from(chain: Prepared) -> None:
    problem = problem_of(chain, 2)
    learn(problem, settings_of("brecq"))
    learned = snapshot(problem.module)
    still = settings_of("brecq", rounding_lr=1e-9, step_size_lr=1e-12)
    learn(problem, still, steps=2, warm=weight_quantizers(problem.module))
    after = snapshot(problem.module)
    weights = [n for n in learned if n.endswith("quantized")]
    assert all(torch.equal(after[n], learned[n]) for n in weights)
    learn(problem, still, steps=2)
    assert any(not torch.equal(snapshot(problem.module)[n], learned[n]) for n in weights)


@pytest.mark.parametrize("rounding", sorted(ROUNDINGS))
def test_compiled_kernels_learn_what_operators_do(chain: Prepared, rounding: str) -> None:
    """In float64 the losses of a few steps agree; what is rounded differently by then has not spread."""
    curves = {}
    for fused in (False, True):
        restore(chain.graph, chain.initial)
        problem = doubled(problem_of(chain, 2))
        curves[fused] = learn(problem, settings_of("qdrop", warmup=0.0, rounding=rounding), steps=6, fused=fused)
    for (_, plain), (_, fused_loss) in zip(curves[False], curves[True], strict=True):
        assert fused_loss == pytest.approx(plain, rel=1e-9)


def test_a_loss_that_is_not_finite_is_gone_back_from(chain: Prepared) -> None:
    """A rate that is far too large: the unit goes back, learns at a smaller one, and still gains."""
    problem = problem_of(chain, 2)
    nearest = loss_of(problem)
    poisoned = Poison(problem, times=2)
    course = optimize(
        replace(problem, module=poisoned),
        settings_of("brecq"),
        steps=150,
        regularizer_weight=0.01,
        warm=(),
        seed=0,
        on_step=lambda: None,
    )
    assert course.returns == 2
    assert all(math.isfinite(value) for _, value in course.curve)
    assert loss_of(problem) < nearest


def test_a_unit_whose_loss_is_never_finite_is_named_and_left_usable(chain: Prepared) -> None:
    problem = problem_of(chain, 2)
    ticks = []
    with pytest.raises(ModelError, match=r"unit second: the loss gets NaN or infinite behind step 0, .*rounding_lr"):
        optimize(
            replace(problem, module=Poison(problem, times=99), name="second"),
            settings_of("brecq"),
            steps=120,
            regularizer_weight=0.01,
            warm=(),
            seed=0,
            on_step=lambda: ticks.append(1),
        )
    assert len(ticks) <= 120
    assert all(torch.isfinite(t.float()).all() for t in snapshot(problem.module).values())
    assert all(q.rounding is None for q in problem.module.modules() if isinstance(q, WeightFakeQuantize))


class Poison(fx.GraphModule):
    """The problem's unit, whose 60th forward pass since the last failure returns infinities, ``times`` times."""

    def __init__(self, problem: Problem, times: int) -> None:
        super().__init__(problem.module, problem.module.graph)
        self.calls, self.times, self.unit = 0, times, problem.module

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        self.calls += 1
        outputs = self.unit(*inputs)
        if self.times and self.calls == 60:
            self.calls, self.times = 0, self.times - 1
            return tuple(output * math.inf for output in outputs)
        return tuple(outputs)


def doubled(problem: Problem) -> Problem:
    """The problem in float64, with quantizers of its own."""
    module = copy.deepcopy(problem.module).double()

    def all_of(tensors: list[Tensor]) -> list[Tensor]:
        return [t.double() for t in tensors]

    return replace(
        problem,
        module=module,
        quantized_inputs=all_of(problem.quantized_inputs),
        float_inputs=all_of(problem.float_inputs),
        targets=all_of(problem.targets),
    )
