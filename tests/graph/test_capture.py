from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from quiesce.data import Samples
from quiesce.errors import ModelError
from quiesce.graph.capture import TensorForm, capture, images_together, interface_of
from small_nets import CASES, Lambda, OddNames, TwoInputs, VarKwargs, call, captured, conv

IMAGES = Samples((torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),))


def equal(a: Any, b: Any) -> bool:
    """Bit-identical results that nest alike."""
    leaves_a, nest_a = pytree.tree_flatten(a)
    leaves_b, nest_b = pytree.tree_flatten(b)
    same = (torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(leaves_a, leaves_b, strict=True))
    return nest_a == nest_b and all(same)


ROUNDED_OTHERWISE = {"gru", "rnn", "rnn with relu", "states of an lstm"}
"""Recurrent layers, whose last bits depend on how their tensors lie in memory, on some processors."""


@pytest.mark.parametrize("name", CASES)
def test_the_float_output_is_exactly_unchanged_at_any_batch_size(name: str) -> None:
    case, graph = CASES[name], call(captured(name))
    net = case.net()
    for count in (case.together, 2 * case.together, 7 * case.together):
        samples = case.samples(count, seed=count)
        with torch.no_grad():
            expected = net(*copy.deepcopy(samples.args), **copy.deepcopy(samples.kwargs))
            found = graph(*samples.args, **samples.kwargs)
        if name in ROUNDED_OTHERWISE:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)
        else:
            assert equal(found, expected), f"batch of {count}"


@pytest.mark.parametrize("name", CASES)
def test_the_graph_is_flat_and_functional(name: str) -> None:
    for node in captured(name).graph.nodes:
        assert node.op in {"placeholder", "get_attr", "call_function", "output"}
        if isinstance(node.target, torch._ops.OpOverload):
            assert not node.target._schema.is_mutable, f"{node.target} writes to its arguments"
            assert "dropout" not in str(node.target)


@pytest.mark.parametrize("name", ["conv-bn", "weight norm", "tied weights", "dropouts", "in-place views"])
def test_the_callers_model_is_unchanged(name: str) -> None:
    net = CASES[name].net()
    for i, module in enumerate(net.modules()):
        module.training = i % 2 == 0
    state, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    samples = CASES[name].samples(2)
    inputs = samples.args[0].clone()
    gm = capture(net, samples)
    for tensor in gm.buffers():
        tensor.zero_()
    assert [m.training for m in net.modules()] == modes
    after = net.state_dict()
    assert list(state) == list(after) and all(torch.equal(state[k], after[k]) for k in state)
    assert all(p.requires_grad for p in net.parameters())
    assert torch.equal(samples.args[0], inputs)


def test_the_model_is_unchanged_when_it_is_refused() -> None:
    net = Lambda(lambda self, x: self.drop(self.conv(x)) if x.sum() > 0 else x, conv=conv(), drop=nn.Dropout())
    net.train()
    with pytest.raises(ModelError):
        capture(net, IMAGES)
    assert all(m.training for m in net.modules())


def test_the_old_weight_norm_is_folded_too() -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        net = nn.Sequential(nn.utils.weight_norm(conv())).eval()
    with pytest.warns(UserWarning, match="assigned during export"):
        gm = capture(net, IMAGES)
    assert [n.op for n in gm.graph.nodes].count("call_function") == 1
    with torch.no_grad():
        assert torch.equal(call(gm)(*IMAGES.args), net(*IMAGES.args))


@pytest.mark.parametrize("name", ["weight norm", "spectral norm", "parametrized", "standardized weight"])
def test_a_computed_weight_becomes_a_constant(name: str) -> None:
    functions = [str(n.target) for n in captured(name).graph.nodes if n.op == "call_function"]
    assert functions == ["aten.conv2d.default", "aten.batch_norm.default"]


def test_random_numbers_do_not_become_constants() -> None:
    net = Lambda(
        lambda self, x: self.conv(x) + torch.rand_like(self.offset),
        conv=conv(),
        offset=nn.Parameter(torch.ones(6, 1, 1)),
    )
    graph = call(capture(net, IMAGES))
    assert not torch.equal(graph(*IMAGES.args), graph(*IMAGES.args))


def _flow(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    if y.sum() > 0:  # the line to be named
        return y
    return -y


def _counted(self: Any, x: Tensor) -> Tensor:
    self.bn.running_mean += 1
    return self.bn(self.conv(x))


def _written_input(self: Any, x: Tensor) -> Tensor:
    return self.conv(x.mul_(2))


def _cond(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    return torch.cond(y.sum() > 0, lambda t: t.sin(), lambda t: t.cos(), (y,))


REFUSED: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "a buffer is changed": (_counted, r"changes its buffers .*bn\.running_mean"),
    "an input is changed": (_written_input, r"changes its inputs in place \(x\)"),
    "a branch as an operator": (_cond, "not an ATen operator"),
    "a fixed batch size": (lambda self, x: self.conv(x).reshape(2, 6, 6, 6), r"batches of 2 only.*write x\.shape\[0\]"),
    "two rows whatever the batch": (lambda self, x: self.conv(x).reshape(2, -1), r"shape \[2, .*one row an image"),
    "rows that depend on data": (lambda self, x: self.conv(x)[x[:, 0, 0, 0] > 0], r"shape \[u0, .*one row an image"),
    "no tensor comes back": (lambda self, x: 3, "returns no tensor"),
    "a size comes back": (lambda self, x: (self.conv(x), x.shape[0]), "a size or a constant"),
    "a parameter comes back": (lambda self, x: (self.conv(x), self.conv.bias), "a size or a constant"),
    "one number for the whole batch": (lambda self, x: self.conv(x).mean(), r"shape \[\].*one row an image"),
    "images in the second dimension": (lambda self, x: self.conv(x).transpose(0, 1), r"shape \[6, .*one row an image"),
    "shapes that do not fit": (lambda self, x: self.conv(x[:, :2]), r"does not run on.*channels"),
    "gradients inside": (lambda self, x: torch.func.grad(lambda t: self.conv(t).sum())(x), "torch says"),
}


@pytest.mark.parametrize("reason", REFUSED)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_can_not_be_captured_is_refused_by_name(reason: str) -> None:
    function, message = REFUSED[reason]
    net = Lambda(function, conv=conv(), bn=nn.BatchNorm2d(6)).eval()
    with pytest.raises(ModelError, match=f"(?s){message}"):
        capture(net, IMAGES)


def test_control_flow_is_refused_with_torchs_reason_and_the_source_line() -> None:
    with pytest.raises(ModelError) as refused:
        capture(Lambda(_flow, conv=conv()), IMAGES)
    message = str(refused.value)
    source, first = inspect.getsourcelines(_flow)
    line = first + next(i for i, text in enumerate(source) if "to be named" in text)
    assert f"{__file__}:{line} (if y.sum() > 0:" in message
    assert "torch says: GuardOnDataDependentSymNode: Could not guard on data-dependent expression" in message
    assert message.startswith("Lambda can't be exported")


@pytest.mark.parametrize(
    ("net", "case"), [(OddNames, "conv-bn"), (VarKwargs, "keyword inputs")], ids=["names of GraphModule", "**kwargs"]
)
def test_what_some_versions_of_torch_trip_over_is_right_or_refused(net: type[nn.Module], case: str) -> None:
    model, samples = net(), CASES[case].samples(2)
    try:
        graph = call(capture(model, samples))
    except ModelError as error:
        assert "torch says" in str(error)
        return
    with torch.no_grad():
        assert equal(graph(*samples.args, **samples.kwargs), model(*samples.args, **samples.kwargs))


@pytest.mark.parametrize(("name", "together"), [("clips", 4), ("pairs", 2), ("conv-bn", 1), ("tokens and a mask", 1)])
def test_images_that_a_network_takes_together_are_counted(name: str, together: int) -> None:
    for count in (1, 2, 3):
        assert images_together(captured(name), CASES[name].samples(count)) == together


def test_a_network_that_can_not_take_one_image_takes_each_alone() -> None:
    net = Lambda(lambda self, x: self.head(x.squeeze().flatten(1)), head=nn.Linear(12, 2))
    samples = Samples((torch.randn(2, 3, 4, 1),))
    assert images_together(capture(net, samples), samples) == 1


def test_sizes_of_one_in_a_batch_of_two_are_no_constants() -> None:
    net = Lambda(lambda self, x: F.pad(self.conv(x)[1:], (0, 0, 0, 0, 0, 0, 1, 0)), conv=conv())
    images = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(call(capture(net, IMAGES))(images), net(images))


class TestPrograms:
    def net(self) -> nn.Module:
        return CASES["conv-bn"].net()

    def test_an_exported_program_is_taken_as_it_is(self) -> None:
        program = torch.export.export(self.net(), IMAGES.args, dynamic_shapes=({0: Dim.DYNAMIC},))
        graph = call(capture(program, IMAGES))
        images = torch.randn(5, 3, 8, 8)
        with torch.no_grad():
            assert torch.equal(graph(images), self.net()(images))

    def test_a_fixed_batch_size_is_refused(self) -> None:
        program = torch.export.export(self.net(), IMAGES.args)
        with pytest.raises(ModelError, match=r"fixed batch size.*\[2, 3, 8, 8\].*Dim.DYNAMIC"):
            capture(program, IMAGES)

    def test_a_program_in_training_mode_is_refused(self) -> None:
        program = torch.export.export(self.net().train(), IMAGES.args, dynamic_shapes=({0: Dim.DYNAMIC},))
        with pytest.raises(ModelError, match="changes its buffers"):
            capture(program, IMAGES)


class TestInterface:
    def test_keywords_may_come_in_any_order(self) -> None:
        graph, samples = call(captured("keyword inputs")), CASES["keyword inputs"].samples(3)
        backwards = dict(reversed(samples.kwargs.items()))
        assert torch.equal(graph(**backwards), graph(**samples.kwargs))

    def test_other_arguments_are_refused(self) -> None:
        interface = interface_of(captured("keyword inputs"))
        samples = CASES["keyword inputs"].samples(3)
        for args, kwargs in (
            ((), {"image": samples.kwargs["image"]}),
            (tuple(samples.kwargs.values()), {}),
            ((), samples.kwargs | {"other": torch.ones(3)}),
        ):
            with pytest.raises(ModelError, match="image, vector"):
                interface.flatten(args, kwargs)

    def test_positional_and_named_inputs_mix(self) -> None:
        net = TwoInputs().eval()
        image, vector = torch.randn(2, 3, 8, 8), torch.randn(2, 5)
        graph = call(capture(net, Samples((image,), {"vector": vector})))
        with torch.no_grad():
            assert torch.equal(graph(image, vector=vector), net(image, vector))


def test_sizes_are_read_where_they_are_used() -> None:
    """A batch size read once in front would be alive, as a number, at every boundary behind it."""
    gm = captured("batch sizes")
    position = {n: i for i, n in enumerate(gm.graph.nodes)}
    sizes = [n for n in gm.graph.nodes if n.target is torch.ops.aten.sym_size.int]
    assert sizes
    for size in sizes:
        assert all(position[user] - position[size] <= 3 for user in size.users)


def test_functional_dropout_follows_the_mode_it_is_given() -> None:
    net = Lambda(lambda self, x: F.dropout(self.conv(x), 0.9, training=self.training), conv=conv()).train()
    graph = call(capture(net, IMAGES))
    assert torch.equal(graph(*IMAGES.args), net.conv(*IMAGES.args).detach())


def test_forms_of_inputs_leave_the_batch_free() -> None:
    samples = Samples((torch.randn(2, 3, 8, 8), torch.ones(2, 1, dtype=torch.int64)))

    class Two(nn.Module):
        def forward(self, x: Tensor, n: Tensor) -> Tensor:
            return x.mean((1, 2, 3))[:, None] * n

    forms = interface_of(capture(Two(), samples)).forms
    assert forms == (TensorForm(torch.float32, (None, 3, 8, 8)), TensorForm(torch.int64, (None, 1)))


def test_forms_of_a_program_leave_free_what_it_leaves_free() -> None:
    shapes = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC},)
    program = torch.export.export(nn.Conv2d(3, 4, 3), (torch.randn(2, 3, 8, 8),), dynamic_shapes=shapes)
    assert interface_of(capture(program, IMAGES)).forms == (TensorForm(torch.float32, (None, 3, None, 8)),)


def test_a_program_that_takes_a_number_is_refused() -> None:
    class Power(nn.Module):
        def forward(self, x: Tensor, n: int) -> Tensor:
            return x**n

    program = torch.export.export(Power(), (torch.randn(2, 3), 2), dynamic_shapes={"x": {0: Dim.DYNAMIC}, "n": None})
    with pytest.raises(ModelError, match=r"input n of the network is no tensor"):
        capture(program, IMAGES)
