"""Detectors and segmentation networks of torchvision with random weights, on small images."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import quiesce
from quiesce import detection
from quiesce.data import Samples
from quiesce.errors import DataError, ModelError
from quiesce.evaluate import outputs_of
from quiesce.graph.capture import capture
from quiesce.graph.fold import fold
from quiesce.graph.partition import partition
from quiesce.graph.place import weight_layers
from quiesce.recipe import Recipe
from small_nets import call, outputs, relative_error, trained
from test_awkward import worst_sqnr
from tiny import recipe, run_examples

pytest.importorskip("torchvision")
W8A8 = recipe("nearest", weight_bits=8, activation_bits=8)
LEARNED = recipe("qdrop", weight_bits=4, activation_bits=8, steps=3, batch_size=4)
SMALL = {"min_size": 64, "max_size": 96}


def maps(**layers: str) -> nn.ModuleDict:
    """The features of a narrow MobileNetV2 at ``layers`` (name of the map → number of the layer)."""
    from torchvision.models import mobilenet_v2
    from torchvision.models._utils import IntermediateLayerGetter

    found: nn.ModuleDict = IntermediateLayerGetter(
        mobilenet_v2(width_mult=0.25).features, {number: name for name, number in layers.items()}
    )
    return found


def pyramid() -> nn.Module:
    from torchvision.models import mobilenet_v2
    from torchvision.models.detection.backbone_utils import BackboneWithFPN

    features = mobilenet_v2(width_mult=0.25).features
    backbone: nn.Module = BackboneWithFPN(features, {"3": "0", "6": "1", "13": "2"}, [8, 8, 24], 32)
    return backbone


def anchors() -> Any:
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    return AnchorGenerator(((16,), (32,), (64,), (96,)), ((0.5, 1.0, 2.0),) * 4)


def retinanet() -> nn.Module:
    from torchvision.models.detection import RetinaNet

    net: nn.Module = RetinaNet(pyramid(), 5, anchor_generator=anchors(), score_thresh=0.0, **SMALL)
    return net


def faster_rcnn() -> nn.Module:
    from torchvision.models.detection import FasterRCNN

    net: nn.Module = FasterRCNN(pyramid(), 5, rpn_anchor_generator=anchors(), box_score_thresh=0.0, **SMALL)
    return net


def ssd() -> nn.Module:
    from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
    from torchvision.models.detection.ssd import SSD

    net: nn.Module = SSD(maps(a="6", b="13", c="17"), DefaultBoxGenerator([[2], [2], [2]]), (96, 96), 5)
    return net


DETECTORS: dict[str, Callable[[], nn.Module]] = {"retinanet": retinanet, "faster_rcnn": faster_rcnn, "ssd": ssd}
NAMED = ("retinanet_resnet50_fpn_v2", "fasterrcnn_mobilenet_v3_large_320_fpn", "ssdlite320_mobilenet_v3_large")


def fcn() -> nn.Module:
    from torchvision.models.segmentation.fcn import FCN, FCNHead

    net: nn.Module = FCN(maps(out="17", aux="13"), FCNHead(80, 5), FCNHead(24, 5))
    return net


def deeplab() -> nn.Module:
    from torchvision.models.segmentation.deeplabv3 import DeepLabHead, DeepLabV3

    net: nn.Module = DeepLabV3(maps(out="13"), DeepLabHead(24, 5))
    return net


def lraspp() -> nn.Module:
    from torchvision.models.segmentation.lraspp import LRASPP

    net: nn.Module = LRASPP(maps(low="3", high="13"), 8, 24, 5)
    return net


SEGMENTATION: dict[str, Callable[[], nn.Module]] = {"fcn": fcn, "deeplab": deeplab, "lraspp": lraspp}


def photos(count: int, seed: int = 0) -> list[Tensor]:
    """Images of several sizes [3, h, w] in [0, 1], smooth as photographs are."""
    generator = torch.Generator().manual_seed(seed)
    coarse = [torch.rand(1, 3, 5, 6, generator=generator) for _ in range(count)]
    return [nn.functional.interpolate(c, (48 + 4 * (i % 3), 64), mode="bilinear")[0] for i, c in enumerate(coarse)]


def calm(net: nn.Module) -> nn.Module:
    """Random weights with batch-norms as after training, and gains so small that features do not explode."""
    net = trained(net)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.mul_(0.5)
    return net


@cache
def detector(name: str) -> Any:
    from torchvision.models import get_model

    torch.manual_seed(0)
    make = DETECTORS.get(name, lambda: get_model(name, weights=None, weights_backbone=None, num_classes=5))
    return calm(make())


def inputs(name: str, images: list[Tensor]) -> Tensor:
    return detection.core_inputs(detector(name), images, (96, 96) if name in DETECTORS else None)


@cache
def quantized(name: str, settings: Recipe) -> quiesce.QuantizedModel:
    return quiesce.quantize(detection.Core(detector(name)), inputs(name, photos(16)), settings)


@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_around_its_own_network_is_the_detector(name: str) -> None:
    whole, images = detector(name), photos(3, seed=1)
    again = detection.with_networks(whole, detection.Core(whole))
    with torch.no_grad():
        found, expected = again(images), whole(images)
    same = zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True)
    assert all(torch.equal(a, b) for a, b in same)
    assert sum(len(row["boxes"]) for row in found) > 0


WITH_NAMED = [*DETECTORS, *(pytest.param(name, marks=pytest.mark.long) for name in NAMED)]


@pytest.mark.parametrize("name", WITH_NAMED)
def test_folding_keeps_the_float_output_and_the_size(name: str) -> None:
    core = detection.Core(detector(name)).eval()
    samples = Samples((inputs(name, photos(2)),))
    folded, left = fold(capture(core, samples))
    assert not left
    assert relative_error(outputs(call(folded), samples), outputs(core, samples)) <= 1e-4
    numbers = sum(p.numel() for p in core.parameters())
    assert sum(b.numel() for b in folded.buffers()) < 1.02 * numbers, "a head of several levels is stored once"


@pytest.mark.parametrize("name", WITH_NAMED)
def test_units_of_a_detector_are_modest(name: str) -> None:
    folded, _ = fold(capture(detection.Core(detector(name)).eval(), Samples((inputs(name, photos(2)),))))
    units = partition(folded, "block")
    layers = len(weight_layers(folded))
    assert max(len(unit.layers) for unit in units) <= 0.25 * layers
    heads = [unit.name for unit in units if unit.name.startswith("head")]
    if name.startswith("retinanet"):
        assert heads == ["head.classification_head", "head.regression_head"] and units[-3].name == "backbone.fpn"


@pytest.mark.parametrize("name", DETECTORS)
def test_at_8_bits_every_output_is_close_and_so_are_the_boxes(name: str) -> None:
    whole, images = detector(name), photos(6, seed=1)
    network = quantized(name, W8A8)
    assert worst_sqnr(network, detection.Core(whole).eval(), Samples((inputs(name, images),))) > 25
    with torch.no_grad():
        found, expected = detection.with_networks(whole, network)(images), whole(images)
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        assert abs(a["scores"][0] - b["scores"][0]) < 0.05
        assert all(t.isfinite().all() for t in (a["boxes"], a["scores"]))


@pytest.mark.parametrize("name", DETECTORS)
def test_reconstruction_and_saving(name: str, tmp_path: Path) -> None:
    whole, images = detector(name), photos(3, seed=1)
    network = quantized(name, LEARNED)
    assert all(len(record.loss_curve) == 3 for record in network.result.run.unit_records)
    loaded = quiesce.load(network.save(tmp_path / "saved"))
    samples = Samples((inputs(name, images),))
    pairs = zip(outputs_of(loaded, samples), outputs_of(network, samples), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    found, expected = (detection.with_networks(whole, n)(images) for n in (loaded, network))
    same = zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True)
    assert all(torch.equal(a, b) for a, b in same)


def test_the_second_network_of_a_two_stage_detector() -> None:
    name = "faster_rcnn"
    whole, images = detector(name), photos(4)
    first = detection.with_networks(whole, quantized(name, W8A8))
    pooled = detection.box_inputs(first, images)
    assert pooled.shape[1:] == (32, 7, 7) and len(pooled) > 100
    boxes = quiesce.quantize(detection.BoxHead(whole), pooled, W8A8)
    fed = Samples((detection.box_inputs(whole, photos(2, seed=1)),))
    assert worst_sqnr(boxes, detection.BoxHead(whole).eval(), fed) > 25
    assert boxes(pooled[:0])[0].shape == (0, 5), "an image without proposals"
    both = detection.with_networks(whole, quantized(name, W8A8), boxes)
    found, expected = both(photos(2, seed=1)), first(photos(2, seed=1))
    for a, b in zip(found, expected, strict=True):
        assert abs(a["scores"][0] - b["scores"][0]) < 0.02


def test_the_detector_that_was_given_is_not_changed() -> None:
    name = "ssd"
    whole = detector(name)
    parts = dict(whole.named_modules())
    changed = detection.with_networks(whole, quantized(name, W8A8))
    assert dict(whole.named_modules()) == parts
    assert changed.anchor_generator is whole.anchor_generator and type(changed) is type(whole)


def test_frozen_batch_norms_of_pretrained_detectors_are_folded() -> None:
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.ops import FrozenBatchNorm2d

    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=FrozenBatchNorm2d).eval()
    for module in backbone.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.running_var.uniform_(0.5, 2.0)
            module.running_mean.uniform_(-0.5, 0.5)
    samples = Samples((torch.randn(2, 3, 64, 64),))
    folded, _ = fold(capture(backbone, samples))
    assert torch.ops.aten.mul.Tensor not in [n.target for n in folded.graph.nodes]
    assert relative_error(outputs(call(folded), samples), outputs(backbone, samples)) <= 1e-4


def test_images_that_do_not_fit_are_refused() -> None:
    name = "retinanet"
    whole = detector(name)
    with pytest.raises(DataError, match=r"images of 64 x 96, as the detector resizes them, .* 64 x 64"):
        detection.core_inputs(whole, photos(1), (64, 64))
    narrow = detection.core_inputs(whole, [torch.rand(3, 64, 64)])
    assert narrow.shape == (1, 3, 64, 64)
    wide = quiesce.quantize(detection.Core(whole), detection.core_inputs(whole, photos(2)), W8A8)
    with pytest.raises(DataError, match=r"images of 96 x 64, .* core_inputs of a larger size"):
        detection.with_networks(whole, wide)([torch.rand(3, 96, 64)])


def test_what_is_no_detector_is_refused() -> None:
    net, one_stage = nn.Conv2d(3, 4, 3), detector("ssd")
    attempts: list[tuple[Callable[[], Any], str]] = [
        (lambda: detection.Core(net), "Conv2d is no detector"),
        (lambda: detection.core_inputs(net, photos(1)), "Conv2d is no detector"),
        (lambda: detection.with_networks(net, net), "Conv2d is no detector"),
        (lambda: detection.BoxHead(one_stage), "SSD is no two-stage detector"),
        (lambda: detection.box_inputs(one_stage, photos(1)), "SSD is no two-stage detector"),
        (lambda: detection.with_networks(one_stage, net, net), "SSD is no two-stage detector"),
    ]
    for attempt, message in attempts:
        with pytest.raises(ModelError, match=message):
            attempt()


@pytest.mark.parametrize("name", SEGMENTATION)
def test_segmentation(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = calm(SEGMENTATION[name]())
    images = torch.stack([nn.functional.interpolate(p[None], (64, 64))[0] for p in photos(24)])
    others = Samples((torch.stack([nn.functional.interpolate(p[None], (64, 64))[0] for p in photos(6, seed=1)]),))
    assert worst_sqnr(quiesce.quantize(net, images, W8A8), net, others) > 25
    network = quiesce.quantize(net, images[:8], LEARNED)
    assert max(len(unit.layers) for unit in partition(network.graph_module, "block")) <= 6
    loaded = quiesce.load(network.save(tmp_path / "saved"))
    assert torch.equal(loaded(images[:2])["out"], network(images[:2])["out"])


def test_example_of_the_page_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    run_examples("docs/detection.md", "In Python")
