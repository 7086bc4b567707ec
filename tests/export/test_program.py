"""The torch.export program: it holds integers, runs without this package, and computes what the simulation does."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

import quiesce
from quiesce.data import Samples
from quiesce.demo import load_images, load_network, preprocessing
from quiesce.errors import ModelError, OutputError
from quiesce.export.program import EXTRA_FILE, as_program, export_program
from quiesce.graph.capture import capture
from quiesce.quant.fake_quantize import WeightFakeQuantize, fake_quantizers
from small_nets import CASES, call, captured, nearest, quantized
from tiny import Chain, images, recipe, run_examples

LAYERS = {
    "conv": lambda i: nn.Conv2d(3 if i == 0 else 4, 4, 3, padding=1),
    "depthwise": lambda i: nn.Conv2d(3 if i == 0 else 6, 6, 3, padding=1, groups=3 if i == 0 else 6),
    "linear": lambda i: nn.Linear(8, 8),
}


@cache
def chain(kind: str) -> Any:
    """Four layers of a kind, captured: nothing, ReLU and ReLU6 between them."""
    a, b, c, d = (LAYERS[kind](i) for i in range(4))
    return capture(nn.Sequential(a, b, nn.ReLU(), c, nn.ReLU6(), d), Samples((images(2),)))


def small(kind: str, weights: int, activations: int | str, **settings: Any) -> Any:
    """The same, calibrated, all layers with the same bits."""
    settings |= {"weight_bits": weights, "weight_first_last_bits": weights, "activation_bits": activations}
    if isinstance(activations, int):
        settings["activation_first_last_bits"] = activations
    settings |= {"weight_range": "minmax", "activation_range": "minmax"}
    return quantized(chain(kind), Samples((images(6),)), nearest(**settings))


def reloaded(program: ExportedProgram) -> ExportedProgram:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def same(first: Any, second: Any) -> bool:
    pairs = zip(pytree.tree_leaves(first), pytree.tree_leaves(second), strict=True)
    return pytree.tree_structure(first) == pytree.tree_structure(second) and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs
    )


def check_integers(program: ExportedProgram, graph: Any) -> None:
    """Every quantized weight is there as its integers, and no other tensor is as large as a weight."""
    weights = [q.quantized_weight() for q in fake_quantizers(graph).values() if isinstance(q, WeightFakeQuantize)]
    stored = [t for t in program.state_dict.values() if not t.is_floating_point() and t.ndim > 1]
    assert sorted(map(_key, stored)) == sorted(map(_key, weights))
    assert not any(t.is_floating_point() and t.shape in {w.shape for w in weights} for t in program.state_dict.values())


def _key(integers: Tensor) -> tuple[str, list[int], list[int]]:
    return str(integers.dtype), list(integers.shape), integers.flatten().tolist()


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("activations", [2, 4, 8, "float"])
@pytest.mark.parametrize("weights", [2, 3, 4, 8])
def test_the_program_computes_what_the_simulation_does(weights: int, activations: int | str, kind: str) -> None:
    graph = small(kind, weights, activations)
    program = as_program(graph)
    check_integers(program, graph)
    for x in (images(1, seed=2), 3 * images(5, seed=3)):
        assert torch.equal(program.module()(x), graph(x)[0])


@pytest.mark.parametrize("pt2e", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("weights", [2, 8])
def test_every_grid(weights: int, kind: str, per_channel: bool, symmetric: bool, pt2e: bool) -> None:
    settings = {"weight_symmetric": symmetric, "activation_symmetric": symmetric, "weight_per_channel": per_channel}
    graph = small(kind, weights, 4, **settings)
    program = reloaded(as_program(graph, pt2e=pt2e))
    check_integers(program, graph)
    x = 3 * images(5, seed=3)
    assert torch.equal(program.module()(x), graph(x)[0])


def test_ties_are_rounded_half_to_even_and_pt2e_operators_differ_only_there() -> None:
    """x · (1 / scale) instead of x / scale: another integer only for x within rounding errors of a tie, and by one."""
    graph = small("conv", 8, 8)
    quantizer = fake_quantizers(graph)["input_1_quantizer"]
    scale, zero_point = quantizer.scale, quantizer.zero_point
    middle = (torch.arange(192) + 0.5).view(1, 3, 8, 8)
    x = (middle - zero_point) * scale
    assert (torch.round(x / scale) != torch.round(x * (1 / scale))).any()
    plain, pt2e = (_first_quantized(as_program(graph, pt2e=way), x) for way in (False, True))
    assert torch.equal(plain, quantizer(x))
    assert not torch.equal(pt2e, plain)
    assert ((pt2e - plain).abs() <= 1.001 * scale).all()
    random = images(200, seed=4)
    assert torch.equal(_first_quantized(as_program(graph, pt2e=True), random), quantizer(random))


def _first_quantized(program: ExportedProgram, x: Tensor) -> Tensor:
    """What the first layer reads."""
    module = program.module()
    layer = next(n for n in module.graph.nodes if n.target is torch.ops.aten.conv2d.default)
    module.graph.output_node().args = ((layer.args[0],),)
    module.graph.eliminate_dead_code()
    module.recompile()
    result: Tensor = module(x)
    return result


@pytest.mark.parametrize(
    "name",
    [
        "two inputs",
        "keyword inputs in another order",
        "*args",
        "one input and *args",
        "nested outputs",
        "batch sizes",
        "in-place views",
        "tied weights",
        "transposed 2d grouped",
        "bn of each batch",
        "bias from the input",
    ],
)
def test_programs_take_and_return_what_the_model_does_at_any_batch_size(name: str) -> None:
    case = CASES[name]
    graph = quantized(captured(name), case.samples(6), nearest(weight_bits=3, activation_bits=4))
    program = reloaded(as_program(graph))
    for count in (1, 3, 8):
        samples = case.samples(count)
        assert same(program.module()(*samples.args, **samples.kwargs), call(graph)(*samples.args, **samples.kwargs))


def test_other_dimensions_may_be_free_too() -> None:
    exported = torch.export.export(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval(),
        (images(2),),
        dynamic_shapes=(dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC),),
    )
    graph = quantized(capture(exported, Samples((images(2),))), Samples((images(6),)), nearest(weight_bits=4))
    program = as_program(graph)
    x = torch.randn(3, 3, 11, 17)
    assert torch.equal(program.module()(x), graph(x)[0])


def test_the_examples_of_the_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run_examples("docs/deploy.md", "torch.export program")
    assert capsys.readouterr().out == "4\n"


@pytest.fixture(scope="module")
def demo() -> tuple[quiesce.QuantizedModel, Tensor]:
    calibration, test, _ = load_images()
    network = quiesce.quantize(load_network(), calibration[:64], recipe("nearest"), preprocessing=preprocessing())
    return network, test[:100]


FRESH = """
import sys, torch
{imports}
program = torch.export.load("net.pt2")
x, expected = torch.load("data.pt")
result = program.module()(x)
assert torch.equal(result, expected), (result - expected).abs().max()
assert not any(name.split(".")[0] == "quiesce" for name in sys.modules)
print("same")
"""


@pytest.mark.parametrize(
    ("pt2e", "imports"), [(False, ""), (True, "import torch.ao.quantization.fx._decomposed")], ids=["plain", "pt2e"]
)
def test_plain_torch_runs_the_demo_network_in_a_fresh_process(
    pt2e: bool, imports: str, demo: tuple[quiesce.QuantizedModel, Tensor], tmp_path: Path
) -> None:
    network, test = demo
    path = network.export_program(tmp_path / "net.pt2", pt2e=pt2e).path
    assert path == tmp_path / "net.pt2"
    threads = f"torch.set_num_threads({torch.get_num_threads()})"
    torch.save((test, network(test)), tmp_path / "data.pt")
    code = FRESH.format(imports=f"{imports}\n{threads}")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "same\n", done.stderr


def test_a_loaded_network_is_exported_as_the_saved_one_with_where_it_comes_from(tmp_path: Path) -> None:
    network = quiesce.quantize(Chain(2), images(12), recipe("nearest", seed=7), preprocessing={"resize": 8})
    loaded = quiesce.load(network.save(tmp_path / "net"))
    loaded.export_program(tmp_path / "net.pt2")
    extra = {EXTRA_FILE: ""}
    program = torch.export.load(tmp_path / "net.pt2", extra_files=extra)
    assert torch.equal(program.module()(images(5, seed=2)), network(images(5, seed=2)))
    about = json.loads(extra[EXTRA_FILE])
    assert quiesce.Recipe.from_dict(about["recipe"]) == network.recipe
    assert about["recipe"]["seed"] == 7 and about["preprocessing"] == {"resize": 8}
    assert about["versions"]["quiesce"] == network.result.versions["quiesce"]
    content = (tmp_path / "net.pt2").read_bytes()
    assert str(Path(quiesce.__file__).parent).encode() not in content  # no stack traces


def test_the_network_itself_is_not_changed() -> None:
    graph = small("conv", 4, 4)
    code, names, before = graph.code, set(dict(graph.named_buffers())), graph(images(3))
    as_program(graph, pt2e=True)
    assert graph.code == code and set(dict(graph.named_buffers())) == names
    assert torch.equal(graph(images(3))[0], before[0])


def test_double_precision_has_no_pt2e_operators() -> None:
    graph = quantized(
        capture(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)).double(), Samples((images(2).double(),))),
        Samples((images(6).double(),)),
        nearest(weight_bits=4),
    )
    x = images(3).double()
    assert torch.equal(as_program(graph).module()(x), graph(x)[0])
    with pytest.raises(ModelError, match=r"has a scale in torch.float64, and PT2E operators take float32 only"):
        as_program(graph, pt2e=True)


def test_a_file_is_replaced_only_when_asked_and_nothing_is_left_behind(tmp_path: Path) -> None:
    graph, path = small("linear", 4, 4), tmp_path / "net.pt2"
    path.write_text("other")
    with pytest.raises(OutputError, match="is there already"):
        export_program(graph, nearest(), path)
    assert path.read_text() == "other"
    export_program(graph, nearest(), path, force=True)
    assert torch.export.load(path).module()(images(2)).shape == (2, 3, 8, 8)
    assert [p.name for p in tmp_path.iterdir()] == ["net.pt2"]
