from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from quiesce.data import Samples
from quiesce.errors import ModelError, RecipeError
from quiesce.evaluate import compare
from quiesce.graph.backends import BACKENDS
from quiesce.graph.backends.backend import Backend
from quiesce.graph.capture import capture
from quiesce.graph.fold import fold
from quiesce.graph.ops import WEIGHT_OPS, input_node, is_weight_op, weight_node
from quiesce.graph.place import (
    annotate,
    float_layers,
    insert,
    never_quantized_layers,
    weight_layers,
    weight_quantizer,
)
from quiesce.quant.fake_quantize import ActivationFakeQuantize, WeightFakeQuantize, float_mode
from quiesce.recipe import LayerOverride, Recipe
from small_nets import CASES, FromInput, Lambda, call, captured, conv, nearest, outputs, placed, quantized, trained
from tiny import Assorted, TiedPair

IMAGES = Samples((torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),))
LOW = nearest(weight_bits=2, activation_bits=4)


class Skip(nn.Module):
    """Four convolutions; the output of the first feeds the second and a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = conv(3, 4), conv(4, 4, padding=1), conv(4, 4, padding=1), conv(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.head(self.b(self.a(x).relu()) + x)


class Fork(nn.Module):
    """One tensor feeds three layers, the last layer among them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right, self.last = conv(3, 4), conv(4, 4), conv(4, 4), conv(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.left(x) + self.right(x) + self.last(x)


@cache
def graph_of(net: type[nn.Module]) -> fx.GraphModule:
    return capture(net().eval(), IMAGES)


def skip(recipe: Recipe) -> fx.GraphModule:
    return placed(graph_of(Skip), recipe)


@cache
def assorted() -> fx.GraphModule:
    return capture(Assorted(), IMAGES)


def bits(gm: fx.GraphModule) -> dict[str, tuple[int | None, int | None]]:
    """Bits of each layer's weight and input (None: float)."""
    found = {}
    for name, layer in weight_layers(gm).items():
        source = input_node(layer)
        quantizer = getattr(gm, str(source.target)) if source.op == "call_module" else None
        weight = weight_quantizer(gm, layer)
        found[name] = (weight and weight.spec.bits, quantizer and quantizer.spec.bits)
    return found


def quantizer_nodes(gm: fx.GraphModule, kind: type[nn.Module]) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if n.op == "call_module" and isinstance(getattr(gm, str(n.target)), kind)]


@pytest.mark.parametrize("name", CASES)
def test_each_quantized_tensor_has_one_quantizer_seen_by_all_its_users(name: str) -> None:
    gm = placed(captured(name), LOW)
    nodes = quantizer_nodes(gm, nn.Module)
    assert len({n.target for n in nodes}) == len(nodes)
    for node in nodes:
        (source,) = node.args
        assert list(source.users) == [node], f"{source} is also read unquantized"
    for layer in gm.graph.nodes:
        if is_weight_op(layer):
            assert weight_node(layer) in quantizer_nodes(gm, WeightFakeQuantize)
            assert input_node(layer) in quantizer_nodes(gm, ActivationFakeQuantize)
    inputs = {input_node(n) for n in gm.graph.nodes if is_weight_op(n)}
    assert set(quantizer_nodes(gm, ActivationFakeQuantize)) == inputs, "something else than layer inputs is quantized"


@pytest.mark.parametrize("name", CASES)
def test_switched_off_the_placed_network_is_the_folded_one(name: str) -> None:
    gm, samples = placed(captured(name), LOW), CASES[name].samples(4)
    folded, _ = fold(captured(name))
    with float_mode(gm):
        got = outputs(call(gm), samples)
    assert all(torch.equal(a, b) for a, b in zip(got, outputs(call(folded), samples), strict=True))


@pytest.mark.parametrize(
    "settings", [{}, {"weight_symmetric": True, "activation_symmetric": True}], ids=["", "symmetric"]
)
@pytest.mark.parametrize("name", CASES)
def test_at_8_bits_the_whole_network_stays_close_to_float(name: str, settings: dict[str, Any]) -> None:
    case = CASES[name]
    samples = case.samples(64, seed=3)
    gm = quantized(captured(name), samples, nearest(weight_bits=8, activation_bits=8, **settings))
    sqnr = compare(outputs(call(gm), samples), None, outputs(case.net(), samples)).sqnr_db
    assert sqnr is not None and 25 < sqnr < 80


class TestBits:
    def test_first_and_last_layer_have_8_bits_and_so_have_their_inputs(self) -> None:
        assert bits(skip(LOW)) == {"stem": (8, 8), "a": (2, 4), "b": (2, 4), "head": (8, 8)}

    def test_other_bits_for_both_ends(self) -> None:
        recipe = LOW.with_settings(weight_first_last_bits=5, activation_first_last_bits=6)
        assert bits(skip(recipe)) == {"stem": (5, 6), "a": (2, 4), "b": (2, 4), "head": (5, 6)}

    def test_the_second_layers_input_has_a_setting(self) -> None:
        assert bits(skip(LOW.with_settings(activation_second_layer_bits=8)))["a"] == (2, 8)

    def test_a_single_layer_is_first_and_last(self) -> None:
        gm = placed(captured("conv-bn"), LOW)
        assert bits(gm) == {"0": (8, 8)}

    def test_activations_may_stay_float(self) -> None:
        gm = skip(nearest(weight_bits=2, activation_bits=None))
        assert bits(gm) == {"stem": (8, None), "a": (2, None), "b": (2, None), "head": (8, None)}
        assert not quantizer_nodes(gm, ActivationFakeQuantize)

    def test_a_tensor_that_feeds_several_layers_takes_the_largest_bits(self) -> None:
        gm = placed(graph_of(Fork), LOW)
        assert bits(gm) == {"stem": (8, 8), "left": (2, 8), "right": (2, 8), "last": (8, 8)}
        assert len(quantizer_nodes(gm, ActivationFakeQuantize)) == 2
        overrides = (LayerOverride(pattern="left", activation_bits=3), LayerOverride(pattern="last", activation_bits=2))
        gm = placed(graph_of(Fork), replace(LOW, layers=overrides))
        assert [b for _, b in bits(gm).values()] == [8, 4, 4, 4]

    def test_the_skip_connection_reads_the_quantized_tensor(self) -> None:
        gm = skip(LOW)
        add = next(n for n in gm.graph.nodes if n.target is torch.ops.aten.add.Tensor)
        assert input_node(weight_layers(gm)["a"]) in add.all_input_nodes


class TestOverrides:
    def place(self, *overrides: LayerOverride) -> dict[str, tuple[int, int | None]]:
        return bits(skip(replace(LOW, layers=overrides)))

    def test_patterns_give_other_bits_also_to_the_ends(self) -> None:
        found = self.place(
            LayerOverride(pattern="[ab]", weight_bits=3), LayerOverride(pattern="stem", activation_bits=5)
        )
        assert found == {"stem": (8, 5), "a": (3, 4), "b": (3, 4), "head": (8, 8)}

    def test_the_last_pattern_that_gives_a_number_holds(self) -> None:
        found = self.place(
            LayerOverride(pattern="*", weight_bits=6, activation_bits=7),
            LayerOverride(pattern="a", weight_bits=3),
            LayerOverride(pattern="b", activation_bits=2),
        )
        assert found == {"stem": (6, 7), "a": (3, 7), "b": (6, 2), "head": (6, 7)}
        assert self.place(LayerOverride(pattern="a", weight_bits=3), LayerOverride(pattern="*", weight_bits=5))[
            "a"
        ] == (5, 4)

    def test_they_can_quantize_an_input_of_a_network_with_float_activations(self) -> None:
        recipe = replace(
            nearest(weight_bits=2, activation_bits=None), layers=(LayerOverride(pattern="b", activation_bits=4),)
        )
        assert [b for _, b in bits(skip(recipe)).values()] == [None, None, 4, None]

    def test_a_pattern_that_fits_nothing_is_refused_with_the_nearest_name(self) -> None:
        with pytest.raises(RecipeError, match=r"'hed' fits no weight layer.*Did you mean 'head'"):
            self.place(LayerOverride(pattern="hed", weight_bits=3))

    def test_a_module_called_twice_is_fitted_whole(self) -> None:
        recipe = replace(LOW, layers=(LayerOverride(pattern="conv", weight_bits=3),))
        found = bits(placed(captured("conv called twice"), recipe))
        assert list(found) == ["conv", "conv:conv2d_1"] and [w for w, _ in found.values()] == [3, 3]


def float_reasons(gm: fx.GraphModule, recipe: Recipe) -> dict[str, str]:
    return float_layers(fold(gm)[0], BACKENDS[recipe.backend], recipe)


class TestLeftFloat:
    def test_a_layer_and_its_input_stay_float_and_the_others_keep_their_bits(self) -> None:
        assert bits(skip(LOW.with_settings(leave_float="stem"))) == {
            "stem": (None, None),
            "a": (2, 4),
            "b": (2, 4),
            "head": (8, 8),
        }
        assert bits(skip(LOW.with_settings(leave_float=["b", "head"]))) == {
            "stem": (8, 8),
            "a": (2, 4),
            "b": (None, None),
            "head": (None, None),
        }

    def test_an_input_that_others_read_is_quantized_for_them(self) -> None:
        gm = placed(graph_of(Fork), LOW.with_settings(leave_float="right"))
        assert bits(gm) == {"stem": (8, 8), "left": (2, 8), "right": (None, 8), "last": (8, 8)}

    def test_the_last_override_decides(self) -> None:
        def place(*overrides: LayerOverride) -> dict[str, tuple[int | None, int | None]]:
            return bits(skip(replace(LOW, layers=overrides)))

        whole, back = LayerOverride(pattern="*", leave_float=True), LayerOverride(pattern="a", activation_bits=5)
        assert place(whole, back) == {"stem": (None, None), "a": (2, 5), "b": (None, None), "head": (None, None)}
        narrow, left = LayerOverride(pattern="[ab]", weight_bits=3), LayerOverride(pattern="b", leave_float=True)
        assert place(narrow, left) == {"stem": (8, 8), "a": (3, 4), "b": (None, None), "head": (8, 8)}

    @pytest.mark.parametrize(
        ("pattern", "names"),
        [
            ("type:Squeeze", ["blocks.1.down", "blocks.1.up", "blocks.3.down", "blocks.3.up"]),
            ("type:Sq*", ["blocks.1.down", "blocks.1.up", "blocks.3.down", "blocks.3.up"]),
            ("type:Linear", ["make", "head"]),
            ("type:linear", ["make", "head"]),
            ("type:[Rr]esidual", ["blocks.0.conv1", "blocks.0.conv2", "blocks.2.conv1", "blocks.2.conv2"]),
            ("blocks.?.conv1", ["blocks.0.conv1", "blocks.2.conv1"]),
        ],
    )
    def test_layers_are_chosen_by_name_or_by_type(self, pattern: str, names: list[str]) -> None:
        reasons = float_reasons(assorted(), LOW.with_settings(leave_float=pattern))
        assert reasons.pop("conv2d_9") == "its weight is computed from the input"
        assert reasons == dict.fromkeys(names, f"the recipe asks for it ({pattern})")

    def test_types_choose_bits_too(self) -> None:
        recipe = replace(LOW, layers=(LayerOverride(pattern="type:Squeeze", weight_bits=7),))
        assert [w for w, _ in bits(placed(assorted(), recipe)).values()] == [8, 2, 2, 7, 7, 2, 2, 7, 7, 2, None, 8]

    @pytest.mark.parametrize("pattern", ["hed", "type:Squeze", "type:linaer"])
    def test_what_fits_nothing_is_refused_with_the_nearest(self, pattern: str) -> None:
        near = {"hed": "head", "type:Squeze": "type:Squeeze", "type:linaer": "type:linear"}[pattern]
        with pytest.raises(RecipeError, match=rf"'{pattern}' fits no weight layer.*Did you mean '{near}'"):
            placed(assorted(), LOW.with_settings(leave_float=pattern))

    def test_a_weight_computed_from_the_input_is_told(self) -> None:
        gm = placed(capture(FromInput().eval(), IMAGES), LOW)
        assert bits(gm) == {"make": (8, 8), "conv2d": (None, None)}
        reasons = float_reasons(capture(FromInput().eval(), IMAGES), LOW)
        assert reasons == {"conv2d": "its weight is computed from the input"}

    def test_a_weight_in_half_precision_among_others_is_told(self) -> None:
        def half_inside(self: Any, x: Tensor) -> Tensor:
            return self.head(self.coarse(x.bfloat16()).float())

        net = Lambda(half_inside, coarse=conv(3, 4).bfloat16(), head=conv(4, 2)).eval()
        assert bits(placed(capture(net, IMAGES), LOW)) == {"coarse": (None, None), "head": (8, 8)}
        reasons = float_reasons(capture(net, IMAGES), LOW)
        assert reasons == {"coarse": "its weight is torch.bfloat16, too coarse to round; give the network in float32"}

    def test_layers_that_share_a_weight_are_left_float_together(self) -> None:
        gm = capture(TiedPair(), IMAGES)
        assert list(float_reasons(gm, LOW.with_settings(leave_float=["first", "second"]))) == ["first", "second"]
        found = bits(placed(gm, LOW.with_settings(leave_float=["first", "second"])))
        assert [w for w, _ in found.values()] == [8, None, None, 2, 8]
        with pytest.raises(RecipeError, match="second is left float, and first, which has the same weight, is not"):
            placed(gm, LOW.with_settings(leave_float="second"))

    def test_a_backend_does_not_quantize_what_a_float_layer_returns(self) -> None:
        net = trained(nn.Sequential(conv(3, 4), nn.Sigmoid(), conv(4, 4)))
        gm = placed(capture(net, IMAGES), Recipe.preset("nearest", backend="onnxruntime", leave_float="0"))
        assert [str(n.args[0]) for n in quantizer_nodes(gm, ActivationFakeQuantize)] == ["sigmoid", "conv2d_1"]


class TestNames:
    def test_a_layer_is_called_as_its_module(self) -> None:
        assert list(weight_layers(skip(LOW))) == ["stem", "a", "b", "head"]

    def test_modules_with_one_weight_keep_their_own_names(self) -> None:
        assert list(weight_layers(fold(captured("tied weights"))[0])) == ["first", "second"]

    @pytest.mark.parametrize("name", ["weight norm", "standardized weight", "parametrized"])
    def test_computed_weights_do_not_lose_the_name(self, name: str) -> None:
        assert list(weight_layers(fold(captured(name))[0])) == ["conv" if name == "parametrized" else "0"]

    def test_projections_of_attention_are_told_apart(self) -> None:
        def attend(self: Any, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

        net = Lambda(attend, attention=nn.MultiheadAttention(8, 2, batch_first=True)).eval()
        gm = capture(net, Samples((torch.randn(2, 5, 8),)))
        assert list(weight_layers(gm)) == ["attention", "attention.out_proj"]


class TestSpecs:
    def test_weights_per_output_channel(self) -> None:
        gm = placed(captured("transposed 2d"), LOW)
        (node,) = quantizer_nodes(gm, WeightFakeQuantize)
        quantizer = getattr(gm, str(node.target))
        assert (
            quantizer.spec.ch_axis == 1 and quantizer.scale.shape == (6,) and quantizer.quantized.shape == (4, 6, 3, 3)
        )

    def test_weights_per_tensor(self) -> None:
        gm = skip(LOW.with_settings(weight_per_channel=False))
        for node in quantizer_nodes(gm, WeightFakeQuantize):
            assert getattr(gm, str(node.target)).scale.shape == ()

    @pytest.mark.parametrize("symmetric", [False, True])
    def test_symmetry_is_set_apart_for_weights_and_activations(self, symmetric: bool) -> None:
        gm = skip(LOW.with_settings(weight_symmetric=symmetric, activation_symmetric=not symmetric))
        for kind, expected in ((WeightFakeQuantize, symmetric), (ActivationFakeQuantize, not symmetric)):
            assert {getattr(gm, str(n.target)).spec.symmetric for n in quantizer_nodes(gm, kind)} == {expected}

    def test_quantizers_have_the_dtype_of_their_tensors(self) -> None:
        double = Samples((IMAGES.args[0].double(),))
        gm = placed(capture(Skip().eval().double(), double), LOW)
        for node in quantizer_nodes(gm, nn.Module):
            assert getattr(gm, str(node.target)).scale.dtype == torch.float64


class TestRefused:
    def refuse(self, net: nn.Module, message: str, samples: Samples = IMAGES) -> None:
        with pytest.raises(ModelError, match=message):
            placed(capture(net.eval(), samples), LOW)

    def test_a_network_with_nothing_left_to_quantize(self) -> None:
        message = r"every weight layer is left float, such as make \(the recipe asks for it \(type:Linear\)\)"
        with pytest.raises(ModelError, match=message):
            placed(capture(FromInput().eval(), IMAGES), LOW.with_settings(leave_float="type:Linear"))

    def test_a_network_without_layers(self) -> None:
        self.refuse(nn.Sequential(nn.BatchNorm2d(3), nn.MaxPool2d(2)), "no convolution or linear layer")

    def test_half_precision(self) -> None:
        half = Samples((IMAGES.args[0].bfloat16(),))
        self.refuse(Skip().bfloat16(), r"such as stem \(its weight is torch.bfloat16, too coarse to round", half)


def test_the_captured_graph_is_not_changed() -> None:
    gm = graph_of(Skip)
    before = [str(n) for n in gm.graph.nodes]
    annotations = annotate(gm, BACKENDS["academic"], LOW)
    inserted = insert(gm, annotations)
    assert [str(n) for n in gm.graph.nodes] == before
    assert len(quantizer_nodes(inserted, nn.Module)) == len(annotations)


def test_a_backend_is_a_description() -> None:
    """Another backend may quantize what additions read, and leave linear layers alone."""
    net = trained(
        Lambda(
            lambda self, x: self.head((self.conv(x) + x).mean((2, 3))), conv=conv(3, 3, padding=1), head=nn.Linear(3, 2)
        )
    )
    gm = capture(net, IMAGES)
    convs = frozenset(op for op in WEIGHT_OPS if "conv" in str(op))
    backend = Backend("other", weight_ops=convs, input_ops=frozenset({torch.ops.aten.add.Tensor}))
    inserted = insert(gm, annotate(gm, backend, LOW))
    sources = {str(n.args[0]) for n in quantizer_nodes(inserted, ActivationFakeQuantize)}
    assert sources == {"x", "conv2d"} and len(quantizer_nodes(inserted, WeightFakeQuantize)) == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    {
        "lstm": {"memory": "recurrent layers are not quantized"},
        "bilinear": {"pairs": "products of this form with constants are not quantized"},
        "embedding bag": {"0": "embeddings are not quantized"},
        "conv-bn": {},
    }.items(),
)
def test_layers_that_are_never_quantized_are_told(name: str, expected: dict[str, str]) -> None:
    assert never_quantized_layers(captured(name)) == expected


def test_products_of_positions_stay_float() -> None:
    """They are the same for all images, though their batch is as large as the input's."""

    def rotated(self: Any, x: Tensor) -> Tensor:
        places = torch.arange(8.0).view(1, 8, 1).expand(x.shape[0], -1, -1)
        y = self.conv(x)
        return y @ y.transpose(-1, -2) + (places @ self.waves.expand(x.shape[0], -1, -1))[:, None]

    net = Lambda(rotated, conv=conv(3, 3, padding=1), waves=nn.Parameter(torch.randn(1, 1, 8)))
    gm = capture(net.eval(), Samples((torch.randn(2, 3, 8, 8),)))
    quantized = annotate(gm, BACKENDS["academic"], nearest(activation_bits=8))
    products = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.matmul.default)
    assert len(products) == 2
    assert [sum(n in quantized for n in product.all_input_nodes) for product in products] == [2, 0]
