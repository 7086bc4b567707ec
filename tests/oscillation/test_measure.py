from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from quiesce.data import Samples
from quiesce.graph.capture import capture
from quiesce.graph.partition import partition
from quiesce.oscillation.measure import ModuleLoss, Oscillation, homogeneous, module_loss, summarize
from quiesce.preparation import prepare
from quiesce.reconstruct.loop import measure_pass
from tiny import Residual, images, job, recipe


def test_loss_sums_channels_and_averages_images_and_positions() -> None:
    teacher, student = torch.randn(5, 3, 4, 6), torch.randn(5, 3, 4, 6)
    loss = module_loss({"y": teacher}, {"y": student}, ["y"])
    error = (student - teacher).double()
    assert loss.absolute == pytest.approx(error.square().sum(1).mean().item(), rel=1e-6)
    assert loss.relative == pytest.approx((error.square().sum() / teacher.double().square().sum()).item(), rel=1e-6)


def test_loss_of_a_vector_output_sums_its_entries() -> None:
    teacher, student = torch.randn(7, 10), torch.randn(7, 10)
    loss = module_loss({"y": teacher}, {"y": student}, ["y"])
    assert loss.absolute == pytest.approx((student - teacher).square().sum(1).mean().item(), rel=1e-5)


def test_loss_adds_up_the_tensors_that_the_module_produced_and_no_others() -> None:
    teacher = {n: torch.randn(4, 2, 3, 3) for n in ("skip", "a", "b")}
    student = {n: torch.randn(4, 2, 3, 3) for n in ("skip", "a", "b")}
    both, a, b = (module_loss(teacher, student, names) for names in (["a", "b"], ["a"], ["b"]))
    assert both.absolute == pytest.approx(a.absolute + b.absolute)
    energies = [teacher[n].square().mean().item() * 2 for n in ("a", "b")]
    assert both.relative == pytest.approx(both.absolute / sum(energies), rel=1e-5)


def test_loss_of_equal_streams_and_of_silence_is_zero() -> None:
    zero = torch.zeros(2, 3)
    assert module_loss({"y": zero}, {"y": zero}, ["y"]) == ModuleLoss(0.0, 0.0)
    assert module_loss({}, {}, []) == ModuleLoss(0.0, 0.0)


def test_summary_is_peak_final_and_squared_swings() -> None:
    assert summarize([1.0, 4.0, 2.0]) == Oscillation(peak=4.0, final=2.0, oscillation=13.0)
    assert summarize([3.0]) == Oscillation(3.0, 3.0, 0.0)
    assert summarize([]) == Oscillation(0.0, 0.0, 0.0)


class LongSkip(nn.Module):
    """Blocks with a skip connection from the first to behind the last one: several tensors alive in between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.blocks = nn.ModuleList([Residual(6), Residual(6), Residual(6)])
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        first = torch.relu(self.stem(x))
        y = first
        for block in self.blocks:
            y = block(y)
        return self.head((y + first).mean((2, 3)))


def test_a_skip_passed_through_is_not_counted_again() -> None:
    """The stem's output is alive behind every block; its error belongs to the stem alone."""
    prepared = prepare(LongSkip().eval(), images(), recipe("nearest"))
    names = [m.name for m in prepared.modules]
    assert {"blocks.0", "blocks.1"} <= set(names)
    work = job(prepared, recipe("brecq-fast"))
    measured = measure_pass(work).losses
    x = prepared.samples.args[0]
    for index in (names.index("blocks.0"), names.index("blocks.1")):
        stop = prepared.modules[index].stop
        run = {q: work.network.run(0, stop, {work.network.inputs[0]: x}, 64, quantized=q) for q in (True, False)}
        assert len(run[True]) == 2, "the skip and the block's own output"
        own, through = sorted(run[True], key=lambda n: -[m.name for m in work.network.nodes].index(n))
        errors = {n: (run[True][n] - run[False][n]).square().sum(1).mean().item() for n in (own, through)}
        assert errors[through] > 0
        assert measured[index].absolute == pytest.approx(errors[own], rel=1e-4)


class Mixed(nn.Module):
    """Residual blocks that differ in one thing each from the first."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.same = Residual(8)
        self.wider_kernel = Residual(8)
        self.wider_kernel.conv1 = nn.Conv2d(8, 8, 5, 1, 2)
        self.wider = Residual(8)
        self.wider.conv1, self.wider.bn1 = nn.Conv2d(8, 16, 3, 1, 1), nn.BatchNorm2d(16)
        self.wider.conv2 = nn.Conv2d(16, 8, 3, 1, 1)
        self.grouped = Residual(8)
        self.grouped.conv1 = nn.Conv2d(8, 8, 3, 1, 1, groups=2)
        self.depthwise = Residual(8)
        self.depthwise.conv1 = nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.dilated = Residual(8)
        self.dilated.conv1 = nn.Conv2d(8, 8, 3, 1, 2, dilation=2)
        self.strided = Residual(8, 8, stride=2)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for name in ("same", "wider_kernel", "wider", "grouped", "depthwise", "dilated", "strided"):
            x = getattr(self, name)(x)
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def mixed() -> tuple:  # type: ignore[type-arg]
    graph = capture(Mixed().eval(), Samples((torch.randn(2, 3, 8, 8),)))
    return graph, {u.name: u for u in partition(graph, "block")}


@pytest.mark.parametrize(
    ("name", "alike"),
    [
        ("same", True),
        ("wider_kernel", True),
        ("wider", True),
        ("grouped", False),
        ("depthwise", False),
        ("dilated", False),
        ("strided", False),
        ("stem", False),
        ("head", False),
    ],
)
def test_homogeneous_means_alike_but_for_kernel_size_and_channels(mixed: tuple, name: str, alike: bool) -> None:  # type: ignore[type-arg]
    graph, units = mixed
    assert homogeneous(graph, units["same"], units[name]) is alike
    assert homogeneous(graph, units[name], units["same"]) is alike


def test_depthwise_layers_of_different_width_are_homogeneous() -> None:
    class Depthwise(nn.Module):
        def __init__(self, inputs: int, out: int) -> None:
            super().__init__()
            self.depthwise = nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs)
            self.pointwise = nn.Conv2d(inputs, out, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.pointwise(torch.relu(self.depthwise(x)))

    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), Depthwise(4, 8), Depthwise(8, 8), nn.Conv2d(8, 2, 1))
    graph = capture(net.eval(), Samples((torch.randn(2, 3, 6, 6),)))
    units = {u.name: u for u in partition(graph, "block")}
    assert homogeneous(graph, units["2"], units["3"])
