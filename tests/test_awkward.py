"""Any network: each one is quantized rightly, or refused in a sentence that says what to do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import quiesce
from quiesce.data import Samples
from quiesce.errors import DataError, ModelError
from quiesce.evaluate import outputs_of, sqnr_db
from quiesce.graph.ops import is_weight_op
from quiesce.pipeline import run
from quiesce.preparation import prepare
from small_nets import CASES, Clips, Lambda, Maps, Pairs, Returning, conv, nearest, trained
from tiny import images, recipe

LEARNED = recipe("qdrop", weight_bits=8, activation_bits=8, steps=3, batch_size=8)


def worst_sqnr(network: Callable[..., Any], reference: Callable[..., Any], samples: Samples) -> float:
    """The least SQNR, in dB, of all outputs that are floats."""
    pairs = zip(outputs_of(network, samples, 16), outputs_of(reference, samples, 16), strict=True)
    found = [sqnr_db([y], [wanted]) for y, wanted in pairs if wanted.is_floating_point()]
    return min(float("inf") if sqnr is None else sqnr for sqnr in found)


@pytest.mark.parametrize("name", CASES)
def test_close_to_float_on_other_images_and_still_after_reconstruction(name: str, tmp_path: Path) -> None:
    if name == "states of an lstm" and torch.__version__.startswith("2.11."):
        pytest.skip("torch 2.11 exports states of recurrent layers with a wrong shape")
    case, settings = CASES[name], nearest(weight_bits=8, activation_bits=8)
    net, others = case.net(), case.samples(32, seed=5)
    prepared = prepare(net, case.samples(128), settings)
    for asked in (settings, LEARNED):
        runs, _ = run(prepared, asked)
        network = quiesce.QuantizedModel(prepared.network(asked), prepared.result(runs, asked), asked, None)
        assert worst_sqnr(network, net, others) > 25
    assert len(runs[-1].unit_records) == len(prepared.modules)
    loaded = quiesce.load(network.save(tmp_path / "saved"))
    if name not in OTHER_CONTAINERS:
        kept = zip(outputs_of(loaded, others), outputs_of(network, others), strict=True)
        assert all(torch.equal(a, b) for a, b in kept)


OTHER_CONTAINERS = {"dataclass in"}
"""A saved network takes a dict in place of a dataclass, as the class may not be there."""


def test_a_saved_network_takes_and_gives_a_dict_for_a_dataclass(tmp_path: Path) -> None:
    settings = nearest(weight_bits=8, activation_bits=8)
    for name in ("dataclass in", "dataclass out", "named tuple out"):
        case = CASES[name]
        network = quiesce.quantize(case.net(), case.samples(16), settings)
        loaded = quiesce.load(network.save(tmp_path / name))
        (given,) = case.samples(3).args
        plain = {f.name: getattr(given, f.name) for f in dataclasses.fields(given)} if name == "dataclass in" else given
        found, wanted = loaded(plain), network(given)
        if name == "dataclass in":
            assert torch.equal(found, wanted)
        elif name == "dataclass out":
            assert isinstance(wanted, Maps) and list(found) == ["logits", "features", "loss"]
            assert torch.equal(found["features"], wanted.features) and found["loss"] is None
        else:
            assert type(found) is tuple and torch.equal(found[0], wanted.logits)


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn", "lstm both ways"])
def test_layers_around_a_recurrent_one_are_quantized(name: str) -> None:
    case = CASES[name]
    network = quiesce.quantize(case.net(), case.samples(16), nearest(weight_bits=8, activation_bits=8))
    assert sum(is_weight_op(n) for n in network.graph_module.graph.nodes) == 2


def _summed(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    return y if y.sum() > 0 else -y


def _maximum(self: Any, x: Tensor) -> Tensor:
    return self.conv(x) * float(x.max())


def _counting(self: Any, x: Tensor) -> Tensor:
    self.bn.running_mean += 1
    return self.bn(self.conv(x))


def _autocast(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return self.conv(x).float()


@dataclasses.dataclass
class Unknown:
    features: Tensor


def lambda_net(function: Callable[[Any, Tensor], Any]) -> nn.Module:
    return Lambda(function, conv=conv(), bn=nn.BatchNorm2d(6))


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.middle, self.head = conv(), conv(6, 6, 1).half(), conv(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.conv(x).half()).float())


REFUSED: dict[str, tuple[Callable[[], nn.Module], Tensor, str]] = {
    "half precision": (
        lambda: conv().half(), images().half(), "weight is torch.float16.*give the network in float32"
    ),
    "bfloat16": (
        lambda: conv().bfloat16(), images().bfloat16(), "weight is torch.bfloat16.*network in float32"
    ),
    "half images": (conv, images().half(), r"does not run on the calibration inputs \(float16 .*give inputs of"),
    "autocast inside": (lambda: lambda_net(_autocast), images(), "torch.bfloat16, .*give the network in float32"),
    "a fixed batch": (
        lambda: lambda_net(lambda self, x: self.conv(x).reshape(2, 6, 6, 6)),
        images(),
        r"Lambda takes batches of 2 only, .*write x\.shape\[0\]",
    ),
    "another fixed batch": (
        lambda: lambda_net(lambda self, x: self.conv(x).reshape(5, 6, 6, 6)),
        images(),
        r"does not run on .*let it take any number of them. torch says: .*shape \'\[5, 6, 6, 6\]",
    ),
    "a branch on data": (
        lambda: lambda_net(_summed), images(), rf"{__file__}.*if y.sum\(\) > 0.*torch says: .*data-dependent"
    ),
    "a number from data": (
        lambda: lambda_net(_maximum), images(), rf"{__file__}.*float\(x.max\(\)\).*torch says: .*data-dependent"
    ),
    "a buffer is updated": (lambda: lambda_net(_counting), images(), r"changes its buffers .*\(bn.running_mean"),
    "rows that depend on data": (
        lambda: lambda_net(lambda self, x: self.conv(x)[x[:, 0, 0, 0] > 0]), images(), "return .*one row an image"
    ),
    "a container that torch does not know": (
        lambda: Returning(lambda _, y: Unknown(y)), images(), "Unknown"
    ),
    "nothing with weights": (nn.ReLU, images(), "has no convolution or linear layer"),
}  # fmt: skip


def test_a_layer_in_half_precision_is_left_float_and_told() -> None:
    model = Mixed().eval()
    network = quiesce.quantize(model, images(), nearest(), evaluate=images())
    assert list(network.result.float_layers) == ["middle"]
    assert "torch.float16" in network.result.float_layers["middle"]
    assert network.result.run.sqnr_db is not None and network.result.run.sqnr_db > 25


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_right_is_refused_by_name(name: str) -> None:
    make, data, message = REFUSED[name]
    with pytest.raises(ModelError, match=f"(?s){message}"):
        quiesce.quantize(make().eval(), data, nearest())


@pytest.mark.parametrize(
    ("make", "count", "settings", "wrong"),
    [
        (Clips, 30, nearest(), r"takes 4 images together; .*multiple of 4 of: calibration images \(30\)"),
        (Clips, 32, nearest(calibration_batch=6), r"of: calibration_batch \(6\)"),
        (Clips, 32, recipe(batch_size=6), r"of: batch_size \(6\)"),
        (Pairs, 32, recipe(granularity="modcap", holdout=0.1), r"of: .*held-out images \(3\)"),
    ],
)
def test_batches_that_tear_clips_apart_are_refused(
    make: type[nn.Module], count: int, settings: quiesce.Recipe, wrong: str
) -> None:
    with pytest.raises(DataError, match=wrong):
        quiesce.quantize(make(), images(count), settings)
    with pytest.raises(DataError, match=r"evaluation images \(6\)"):
        quiesce.quantize(Clips(), images(32), nearest(), evaluate=images(6))


def test_images_of_a_clip_stay_together_in_every_step() -> None:
    """With clips torn apart the targets would be those of other frames, and the loss far from that of rounding."""
    torch.manual_seed(7)
    net = trained(Clips())
    network = quiesce.quantize(net, images(32), LEARNED)
    (record,) = network.result.run.unit_records
    assert max(loss for _, loss in record.loss_curve) < 1e-2


@pytest.mark.filterwarnings("ignore:The tensor attribute:UserWarning")
def test_pruned_layers_keep_their_zeros() -> None:
    net = trained(nn.Sequential(prune.random_unstructured(conv(), "weight", 0.5), nn.ReLU(), conv(6, 2)))
    network = quiesce.quantize(net, images(64), nearest(weight_bits=8, activation_bits=8))
    assert worst_sqnr(network, net, Samples((images(32, seed=5),))) > 25


def test_inputs_in_containers_come_from_a_loader() -> None:
    batches = [
        ({"image": images(8, seed=i), "vector": torch.randn(8, 5)}, torch.zeros(8, dtype=torch.int64)) for i in (1, 2)
    ]
    net = CASES["dict in"].net()
    network = quiesce.quantize(net, batches, nearest(weight_bits=8, activation_bits=8))
    assert network(batches[0][0]).shape == (8, 4, 8, 8)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["conv-bn", "lstm", "tokens and a mask", "u-net", "clips", "spectrogram"])
def test_a_network_on_a_gpu_stays_there(name: str) -> None:
    case = CASES[name]
    device = torch.device("cuda")
    net = case.net().to(device)
    others = case.samples(32, seed=5).to(device)
    for settings in (nearest(weight_bits=8, activation_bits=8), LEARNED):
        network = quiesce.quantize(net, case.samples(64), settings)
        assert all(t.device.type == "cuda" for t in outputs_of(network, others))
        assert worst_sqnr(network, net, others) > 25
