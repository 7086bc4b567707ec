"""The pipeline from end to end on small networks: what goes in, what comes out, what is refused."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils.data import DataLoader, TensorDataset

import quiesce
from quiesce import Recipe, Result
from quiesce.analysis import analyze, choose_bits
from quiesce.data import Samples
from quiesce.errors import DataError, ModelError, QuiesceError, RecipeError
from quiesce.pipeline import FUSED_STEPS, job_of, run
from quiesce.preparation import prepare
from quiesce.quant import kernels
from quiesce.quant.fake_quantize import fake_quantizers
from quiesce.recipe import PRESETS
from tiny import Assorted, Chain, TiedPair, without_times
from tiny import recipe as small

QUICK = {"steps": 4, "batch_size": 8}
X, Y = torch.randn(24, 3, 8, 8), torch.arange(24) % 10


def recipe(preset: str = "qdrop", **settings: Any) -> Recipe:
    quick = {} if preset == "nearest" else QUICK
    return Recipe.preset(preset, **{**quick, **settings})


def test_result_has_the_documented_form(tmp_path: Path) -> None:
    network = quiesce.quantize(Chain(2), X, recipe(granularity="loss"), evaluate=[(X, Y)], name="chain")
    network.save(tmp_path / "out")
    data = json.loads((tmp_path / "out" / "result.json").read_text())
    assert data["schema"] == 1
    assert data["model"] == "chain"
    assert 0 <= data["float"]["top1"] <= 100
    assert [r["granularity"] for r in data["runs"]] == ["block", "loss"]
    last = data["runs"][-1]
    modules = ["stem", "blocks.0", "blocks.1", "head"]
    assert list(last["module_losses"]) == modules
    assert [m for unit in last["units"] for m in unit] == modules
    assert last["peak_loss"] == max(last["module_losses"].values())
    assert last["final_loss"] == last["module_losses"]["head"]
    assert {"preset", "weight_bits", "activation_bits", "seed", "top1", "agreement", "sqnr_db", "seconds"} <= set(last)
    assert last["guard"]["kept"] in ("merged", "block")
    assert data["recipe"]["name"] == "qdrop"
    assert data["versions"]["torch"] == torch.__version__
    assert data["hardware"]["device"] == "cpu"
    assert Result.read(tmp_path / "out" / "result.json") == network.result


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_runs_and_measures_every_module(preset: str) -> None:
    network = quiesce.quantize(Chain(2), X, recipe(preset), evaluate=X)
    made = network.result.run
    assert list(made.module_losses) == ["stem", "blocks.0", "blocks.1", "head"]
    assert made.top1 is None
    assert made.agreement is not None
    usual = {"nearest": None, "adaround": "layer", "best": "loss-descent"}
    assert made.granularity == usual.get(preset.removesuffix("-fast"), "block")
    assert network(X).shape == (24, 10)


def test_without_evaluation_data_nothing_is_measured() -> None:
    made = quiesce.quantize(Chain(1), X, recipe("nearest")).result
    assert made.float["top1"] is None
    assert (made.run.top1, made.run.agreement, made.run.sqnr_db) == (None, None, None)


def test_layers_left_float_are_told_with_the_reason_of_each(tmp_path: Path) -> None:
    chosen = small(leave_float=["stem", "type:Squeeze"])
    network = quiesce.quantize(Assorted(), X, chosen, evaluate=X)
    squeezes = [f"blocks.{i}.{name}" for i in (1, 3) for name in ("down", "up")]
    expected = {"stem": "the recipe asks for it (stem)"}
    expected |= dict.fromkeys(squeezes, "the recipe asks for it (type:Squeeze)")
    expected |= {"conv2d_9": "its weight is computed from the input"}
    assert network.result.float_layers == expected
    assert prepare(Assorted(), X, chosen).float_layers == expected
    assert analyze(Assorted(), Samples((X[:2],)), chosen).float_layers == expected
    network.save(tmp_path / "out")
    loaded = quiesce.load(tmp_path / "out")
    assert loaded.result.float_layers == expected
    assert torch.equal(loaded(X), network(X))
    assert not quiesce.quantize(Chain(1), X, recipe("nearest")).result.float_layers


def test_a_network_left_float_but_for_one_layer_answers_like_float() -> None:
    names = ["stem", "blocks.0.*", "blocks.1.conv1", "blocks.1.conv2"]
    chosen = small(weight_first_last_bits=8, activation_first_last_bits=8, leave_float=names)
    sqnr = quiesce.quantize(Chain(2), X, chosen, evaluate=X).result.run.sqnr_db
    assert sqnr is not None and sqnr > 35


@pytest.mark.parametrize("budget", [{"average_bits": 3}, {"size": 1800}, {"bops": 4.5e6}])
def test_chosen_bits_are_those_of_the_network_and_of_its_recipe(budget: dict[str, float], tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    base = small("qdrop", granularity="modcap", layers=[{"pattern": "blocks.1.conv2", "weight_bits": 5}])
    made = choose_bits(Chain(2), X, base, **budget)
    assert list(made.bits) == ["stem", "blocks.0.conv1", "blocks.0.conv2", "blocks.1.conv1", "blocks.1.conv2", "head"]
    assert (made.bits["stem"], made.bits["blocks.1.conv2"], made.bits["head"]) == (8, 5, 8)
    free = [made.bits[name] for name in list(made.bits)[1:4]]
    assert max(free) > min(free) or free == [3, 3, 3]
    sizes = {row.layer: row.weights * made.bits[row.layer] for row in made.sensitivity.layers}
    if "average_bits" in budget:
        assert sum(free) <= 9
    if "size" in budget:
        assert sum(sizes.values()) <= 8 * 1800
    network = quiesce.quantize(Chain(2), X, made.recipe)
    network.save(tmp_path / "out")
    stored = [q.spec.bits for q in fake_quantizers(quiesce.load(tmp_path / "out")).values() if hasattr(q, "quantized")]
    assert stored == list(made.bits.values())
    # Capacities follow the bits, and the stored recipe repeats the run.
    assert network.result.run.capacities["blocks.0"] == sizes["blocks.0.conv1"] + sizes["blocks.0.conv2"]
    again = quiesce.quantize(Chain(2), X, Recipe.from_toml(tmp_path / "out" / "recipe.toml"))
    assert torch.equal(again(X), network(X))


def test_one_weight_of_two_layers_gets_one_number_of_bits() -> None:
    pytest.importorskip("scipy")
    made = choose_bits(TiedPair(), X, small("nearest", weight_bits=6), average_bits=3)
    assert list(made.bits) == ["stem", "first", "third", "head"] and made.bits["first"] < 6
    network = quiesce.quantize(TiedPair(), X, made.recipe)
    stored = [q.spec.bits for q in fake_quantizers(network).values() if hasattr(q, "quantized")]
    assert stored == list(made.bits.values())


def test_without_scipy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ModelError, match=r"scipy is not installed.*quiesce\[mixed\]"):
        choose_bits(Chain(1), X, recipe(), average_bits=3)


def test_what_can_not_be_chosen_is_refused_early() -> None:
    pytest.importorskip("scipy")
    with pytest.raises(RecipeError, match="a budget is one of"):
        choose_bits(Chain(1), X, recipe(), size=3, bops=3)
    with pytest.raises(RecipeError, match="backend 'tensorrt' demands one number of bits"):
        choose_bits(Chain(1), X, recipe(backend="tensorrt"), average_bits=3)
    with pytest.raises(RecipeError, match="the number of bits is 9"):
        choose_bits(Chain(1), X, recipe(), average_bits=3, bits=(2, 9))


def test_calibration_may_come_in_any_form() -> None:
    outputs = []
    dictionaries = [{"x": X[:12]}, {"x": X[12:]}]
    for calibration in (X, [X[:16], X[16:]], DataLoader(TensorDataset(X, Y), batch_size=8), dictionaries):
        network = quiesce.quantize(Chain(1), calibration, recipe())
        outputs.append(network(x=X) if calibration is dictionaries else network(X))
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


def test_seed_fixes_the_run() -> None:
    def made(seed: int) -> tuple[Any, Tensor]:
        network = quiesce.quantize(Chain(2), X, recipe(seed=seed, granularity="modcap"), evaluate=[(X, Y)])
        return without_times(network.result), network(X)

    (first, outputs), (second, again), (other, _) = made(3), made(3), made(4)
    assert first == second
    assert torch.equal(outputs, again)
    assert first != other


def test_the_callers_model_is_not_changed() -> None:
    model = Chain(2).train()
    model.blocks[0].eval()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    quiesce.quantize(model, X, recipe())
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_saved_program_is_a_model(tmp_path: Path) -> None:
    model = Chain(1)
    program = torch.export.export(model, (X[:2],), dynamic_shapes=({0: Dim.DYNAMIC},))
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2")
    assert torch.equal(quiesce.quantize(loaded, X, recipe())(X), quiesce.quantize(model, X, recipe())(X))
    with pytest.raises(DataError, match=r"input x has shape \[24, 3, 9, 9\]"):
        quiesce.quantize(loaded, torch.randn(24, 3, 9, 9), recipe())


def test_progress_reaches_its_end() -> None:
    calls: list[tuple[str, int, int]] = []
    quiesce.quantize(Chain(2), X, recipe(granularity="loss"), progress=lambda *a: calls.append(a))
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)
    assert calls[-1][1] == calls[-1][2] > 0
    assert all(done <= total for _, done, total in calls)


def test_a_comparison_shares_its_block_pass() -> None:
    settings = recipe(granularity="loss", measuring=1.0)
    prepared = prepare(Chain(2), X, settings, evaluate=[(X, Y)])
    (plain,), block = run(prepared, recipe())
    shared, _ = run(prepared, settings, block=block)
    alone, _ = run(prepared, settings)
    assert [r.granularity for r in shared] == ["loss"]
    assert [r.granularity for r in alone] == ["block", "loss"]
    assert shared[0].module_losses == alone[1].module_losses
    assert alone[0].module_losses == plain.module_losses
    assert shared[0].seconds >= shared[0].block_seconds > 0


def test_two_bits_hurt_more_than_eight_and_reconstruction_helps() -> None:
    def error(preset: str, bits: int, **settings: Any) -> float:
        chosen = Recipe.preset(preset, weight_bits=bits, activation_bits=8, **settings)
        return quiesce.quantize(Chain(2), X, chosen).result.run.final_loss

    nearest = error("nearest", 2)
    assert error("nearest", 8) < nearest / 10
    assert error("brecq-fast", 2, steps=60, batch_size=16) < nearest


def test_analyze_needs_no_data() -> None:
    found = analyze(Chain(4), Samples((X[:1],)), recipe(granularity="modcap", k=1))
    assert found.modules == ["stem", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "head"]
    assert found.layers["blocks.1"] == ["blocks.1.conv1", "blocks.1.conv2"]
    assert found.capacities["stem"] == 8 * 3 * 9 * 8
    assert found.capacities["blocks.0"] == 2 * 8 * 8 * 9 * 4
    assert max(found.differentials) == 1.0
    assert [len(unit) for unit in found.merges] == [2]


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


BAD: dict[str, tuple[nn.Module, Any, dict[str, Any], type[QuiesceError], str]] = {
    "control flow": (Branching(), X, {}, ModelError, r"test_pipeline\.py:\d+ .*x\.sum\(\) > 0"),
    "no weight layer": (nn.ReLU(), X, {}, ModelError, "no convolution or linear layer"),
    "no images": (Chain(1), [], {}, DataError, "empty"),
    "NaN": (Chain(1), torch.full_like(X, torch.nan), {}, DataError, "NaN"),
    "infinity": (Chain(1), [X, X / 0], {}, DataError, "batch 1"),
    "too few images": (Chain(1), X[:4], {}, DataError, "4 images to optimize on, fewer than a batch of 8"),
    "too few behind the guard": (Chain(2), X[:8], {"granularity": "loss"}, DataError, "7 images to optimize on"),
    "wrong channels": (
        Chain(1),
        torch.randn(24, 5, 8, 8),
        {},
        ModelError,
        r"does not run on .*float32 \['N', 5, 8, 8\]",
    ),
    "ragged batches": (Chain(1), [X, X[:, :, :4]], {}, DataError, "batch 1"),
    "large k": (Chain(2), X, {"granularity": "modcap", "k": 9}, RecipeError, r"k is 9"),
    "unknown module": (
        Chain(2),
        X,
        {"granularity": "scheme", "scheme": [["blocks.0", "block.1"]]},
        RecipeError,
        "blocks.1",
    ),
    "not neighbours": (
        Chain(2),
        X,
        {"granularity": "scheme", "scheme": [["stem", "blocks.1"]]},
        RecipeError,
        "neighbours",
    ),
    "unknown scheme": (Chain(2), X, {"granularity": "scheme", "scheme": "resnet19"}, RecipeError, "resnet18"),
    "pattern without layer": (Chain(1), X, {"layers": [{"pattern": "stm", "weight_bits": 8}]}, RecipeError, "stem"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gives_one_clear_error(name: str) -> None:
    model, calibration, settings, kind, message = BAD[name]
    with pytest.raises(kind, match=message) as caught:
        quiesce.quantize(model, calibration, recipe(**settings))
    assert type(caught.value) is kind


def test_evaluation_data_must_fit_too() -> None:
    with pytest.raises(DataError, match="evaluation"):
        quiesce.quantize(Chain(1), X, recipe(), evaluate=torch.randn(4, 3, 9, 9))
    with pytest.raises(DataError, match="labels go from 30 to 39"):
        quiesce.quantize(Chain(1), X, recipe("nearest"), evaluate=[(X, Y + 30)])


def test_the_global_random_state_is_neither_read_nor_moved() -> None:
    outputs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        outputs.append(quiesce.quantize(Chain(1), X, small(granularity="loss"))(X))
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.is_grad_enabled()
    assert torch.equal(*outputs)


def test_one_image_is_enough_to_round_to_nearest() -> None:
    assert quiesce.quantize(Chain(1), X[:1], small("nearest"))(X).shape == (24, 10)


@pytest.fixture(scope="module")
def plain() -> quiesce.QuantizedModel:
    return quiesce.quantize(Chain(1), X, small("brecq-fast"))


@pytest.mark.parametrize(
    "settings",
    [
        {"weight_symmetric": True, "activation_symmetric": True},
        {"weight_per_channel": False},
        {"activation_bits": None},
        {"activations.second_layer_bits": 8},
        {"weight_range": "percentile", "activation_range": "percentile"},
        {"layers": [{"pattern": "blocks.0.*", "weight_bits": 3, "activation_bits": 6}]},
    ],
)
def test_settings_reach_the_network(settings: dict[str, Any], plain: quiesce.QuantizedModel) -> None:
    changed = quiesce.quantize(Chain(1), X, small("brecq-fast", **settings))
    assert not torch.equal(changed(X), plain(X))
    assert changed.recipe == small("brecq-fast", **settings)
    if settings.get("activation_bits", 0) is None:
        assert changed.result.run.activation_bits is None


def test_values_that_the_network_itself_breaks_are_named() -> None:
    class Logarithm(Chain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).log()

    with pytest.raises(ModelError, match=r"module head gives NaN or infinite values on the calibration images"):
        quiesce.quantize(Logarithm(1), X, small("nearest"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (X.double(), "does not run on the calibration inputs"),
        (X.int(), "does not run on the calibration inputs"),
        (X.flatten(1), "does not run on the calibration inputs"),
        ("images", "is a str"),
        (None, "is a NoneType"),
        ([X, {"x": X}], "batch 1"),
        ([[], []], "empty list"),
        ([{"label": Y}], "has no inputs"),
        ([{"y": X}], "does not run on the calibration inputs"),
        (torch.zeros(0, 3, 8, 8), "empty"),
    ],
)
def test_calibration_that_does_not_fit_is_refused(data: Any, message: str) -> None:
    with pytest.raises(QuiesceError, match=message):
        quiesce.quantize(Chain(1), data, small())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (X.double(), r"evaluation data is float64 \[N, 3, 8, 8\], but the network was captured with float32"),
        (X[:, :2], r"is float32 \[N, 2, 8, 8\]"),
        ([{"x": X}], "evaluation data has input 'x', but the network was captured with input 0"),
        ([], "evaluation data is empty"),
        (torch.full_like(X, torch.inf), "NaN or infinite"),
    ],
)
def test_evaluation_that_does_not_fit_is_refused_before_any_optimization(data: Any, message: str) -> None:
    steps: list[Any] = []
    with pytest.raises(DataError, match=message):
        quiesce.quantize(Chain(1), X, small(), evaluate=data, progress=lambda *a: steps.append(a))
    assert steps == []


def test_reports_of_evaluation_are_those_of_the_network_that_is_returned() -> None:
    model = Chain(2)
    network = quiesce.quantize(model, X, small(granularity="modcap"), evaluate=[(X, Y)])
    made, wanted = network(X), model(X)
    last = network.result.run
    assert last.top1 == pytest.approx(100 * (made.argmax(1) == Y).double().mean().item())
    assert network.result.float["top1"] == pytest.approx(100 * (wanted.argmax(1) == Y).double().mean().item())
    assert last.agreement == pytest.approx(100 * (made.argmax(1) == wanted.argmax(1)).double().mean().item())
    noise = (made - wanted).square().sum() / wanted.square().sum()
    assert last.sqnr_db == pytest.approx(-10 * noise.log10().item(), rel=1e-3)


def test_seconds_cover_what_a_run_relied_on() -> None:
    block, merged = quiesce.quantize(Chain(2), X, small(granularity="loss", measuring=1.0)).result.runs
    assert merged.block_seconds > 0
    assert merged.seconds >= merged.block_seconds
    assert block.seconds > sum(r.seconds for r in block.unit_records) > 0
    (merged,) = quiesce.quantize(Chain(2), X, small(granularity="loss", steps=21)).result.runs
    assert merged.block_seconds == 0 < merged.measuring_seconds
    assert merged.seconds > merged.measuring_seconds + sum(r.seconds for r in merged.unit_records)


@pytest.mark.parametrize("granularity", ["block", "loss-descent"])
def test_analyze_goes_by_modcap_where_losses_are_unknown(granularity: str) -> None:
    example = Samples((X[:2],))
    expected = analyze(Chain(2), example, small(granularity="modcap"))
    assert analyze(Chain(2), example, small(granularity=granularity)) == expected


def test_analyze_says_what_quantize_does() -> None:
    settings = small(granularity="modcap", alpha=2.0, guard=False, layers=[{"pattern": "blocks.0.*", "weight_bits": 8}])
    found = analyze(Chain(3), Samples((X[:2],)), settings)
    made = quiesce.quantize(Chain(3), X, settings).result.run
    assert found.capacities == made.capacities
    assert found.differentials == made.differentials
    assert found.merges == made.proposed_merges == [unit for unit in made.units if len(unit) > 1] != []


def test_analyze_takes_schemes_and_nearest_recipes() -> None:
    example = Samples((X[:2],))
    scheme = small(granularity="scheme", scheme=[["blocks.1", "head"]])
    assert analyze(Chain(2), example, scheme).merges == [["blocks.1", "head"]]
    assert analyze(Chain(2), example, small("nearest")).modules == ["stem", "blocks.0", "blocks.1", "head"]
    with pytest.raises(RecipeError, match="not neighbours"):
        analyze(Chain(2), example, small(granularity="scheme", scheme=[["blocks.0", "head"]]))


def test_kernels_are_compiled_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    few = prepare(Chain(2), X, recipe())
    runs, _ = run(few, recipe())
    assert runs[-1].kernels == f"eager: {4 * len(few.modules)} steps of all units are too few to pay for compiling"
    assert run(few, recipe(), fused=False)[0][-1].kernels == "eager: asked for"
    assert run(few, recipe("nearest"))[0][-1].kernels == "eager: nothing is optimized"

    monkeypatch.setitem(FUSED_STEPS, "cpu", 4 * len(few.modules))
    monkeypatch.setattr("quiesce.quant.kernels.problem", lambda device: "no compiler")
    assert run(few, recipe())[0][-1].kernels == "eager: no kernel could be compiled (no compiler)"
    with pytest.raises(ModelError, match=r"kernels can't be compiled for cpu \(no compiler\); install a C\+\+"):
        run(few, recipe(), fused=True)


@pytest.mark.skipif(kernels.problem(torch.device("cpu")) is not None, reason="no compiler")
def test_compiled_kernels_give_a_network_as_good() -> None:
    """Rounding differs, so integers may; losses are as low, and the same run gives the same bits again."""
    prepared = prepare(Chain(2), X, recipe(steps=100))
    made = {fused: run(prepared, recipe(steps=100), fused=fused) for fused in (False, True)}
    again = run(prepared, recipe(steps=100), fused=True)
    eager, fused = (made[key][0][-1] for key in (False, True))
    assert fused.kernels == "fused"
    assert fused.final_loss == pytest.approx(eager.final_loss, rel=0.3)
    assert all(torch.equal(made[True][1].state[n], t) for n, t in again[1].state.items())


@pytest.mark.parametrize(("groups", "overlap", "weight"), [(1, 1, 0.01), (2, 1, 0.01), (8, 2, 0.1)])
def test_what_is_left_to_it_goes_by_depthwise_convolutions(groups: int, overlap: int, weight: float) -> None:
    """λ and the overlap differ for networks with them; settings that are given hold for all."""
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=groups), nn.Flatten(), nn.Linear(128, 10)
    auto, told = recipe(overlap="auto"), recipe(overlap=3, regularizer_weight=0.5)
    prepared = prepare(nn.Sequential(*layers).eval(), X, auto)
    found = [job_of(prepared, settings) for settings in (auto, told, recipe())]
    assert [(job.overlap, job.regularizer_weight) for job in found] == [(overlap, weight), (3, 0.5), (0, weight)]
