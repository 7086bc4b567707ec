"""Detectors of torchvision: the networks in them, which are quantized, and the detector around the quantized ones.

A detector prepares images, runs a network of backbone, neck and heads on them, and makes boxes of what it returns. Only
the network is quantized; anchors, decoding of boxes and the choice among them stay torchvision's own, in float. A
two-stage detector has a second network, which classifies the features that are cut out for each proposed box.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from quiesce.errors import DataError, ModelError
from quiesce.graph.capture import interface_of
from quiesce.quantized import QuantizedModel


class Core(nn.Module):
    """The network of a detector: images [N, 3, H, W] to ``(features, said)``.

    ``features`` are maps [N, C, h, w] by name, ``said`` is what the detector's head returns of them, one row an image:
    ``cls_logits`` [N, anchors, classes], ``bbox_regression`` [N, anchors, 4], …; of a two-stage detector the lists of
    objectness [N, anchors, h, w] and of box deltas [N, 4 · anchors, h, w] of its region proposal network.

    Modules are those of ``detector``, not copies.

    Raises:
        ModelError: ``detector`` is none of torchvision's.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        _check_detector(detector)
        parts: Any = detector
        self.backbone: Any = parts.backbone
        self.head: Any = parts.rpn.head if _is_two_stage(detector) else parts.head

    def forward(self, images: Tensor) -> tuple[dict[str, Tensor], Any]:
        features = self.backbone(images)
        if isinstance(features, Tensor):
            features = {"0": features}
        return dict(features), self.head(list(features.values()))


class BoxHead(nn.Module):
    """The second network of a two-stage detector: pooled features [boxes, C, 7, 7] to class logits and box deltas.

    Modules are those of ``detector``, not copies.

    Raises:
        ModelError: ``detector`` is no two-stage detector of torchvision's.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        _check_two_stage(detector)
        self.box_head: Any = detector.roi_heads.box_head  # type: ignore[union-attr]
        self.box_predictor: Any = detector.roi_heads.box_predictor  # type: ignore[union-attr]

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        logits, deltas = self.box_predictor(self.box_head(pooled))
        return logits, deltas


@torch.no_grad()
def core_inputs(detector: nn.Module, images: list[Tensor], size: tuple[int, int] | None = None) -> Tensor:
    """Return what the detector's network is fed for ``images``: [N, 3, H, W], normalized, resized and padded.

    Args:
        images: tensors [3, h, w] with values in [0, 1], as the detector takes.
        size: (H, W) to pad to with zeros, at the right and below; None is what the largest of the images needs. The
            quantized network takes images of this size only, so it should hold all that are to come: 1344 × 1344 for
            detectors that resize to at most 1333.

    Raises:
        ModelError: ``detector`` is none of torchvision's.
        DataError: an image, resized, is larger than ``size``.
    """
    _check_detector(detector)
    prepared: Any = detector.transform
    batch, _ = (prepared if size is None else _Canvas(prepared, size))(images)
    tensors: Tensor = batch.tensors
    return tensors


@torch.no_grad()
def box_inputs(detector: nn.Module, images: list[Tensor]) -> Tensor:
    """Return what the second network of a two-stage detector is fed for ``images``: pooled features [boxes, C, 7, 7].

    Args:
        detector: the float one, or one with a quantized core, to fit the second network to what it will be fed.
        images: tensors [3, h, w] with values in [0, 1], as the detector takes.

    Raises:
        ModelError: ``detector`` is no two-stage detector of torchvision's.
    """
    _check_two_stage(detector)
    seen: list[Tensor] = []
    hook = detector.roi_heads.box_head.register_forward_pre_hook(  # type: ignore[union-attr]
        lambda _, args: seen.append(args[0])
    )
    try:
        detector.eval()(images)
    finally:
        hook.remove()
    return torch.cat(seen)


def with_networks(detector: nn.Module, core: nn.Module, boxes: nn.Module | None = None) -> nn.Module:
    """Return the detector with ``core`` in the place of its network: called as before, for inference only.

    Everything else is shared with ``detector``, which is not changed. A :class:`QuantizedModel` was captured for one
    image size; images are padded to it.

    Args:
        core: what :class:`Core` makes of ``detector``, quantized.
        boxes: what :class:`BoxHead` makes of it, quantized; None leaves that network float.

    Raises:
        ModelError: ``detector`` is none of torchvision's, or ``boxes`` is given to one that is not two-stage.
    """
    _check_detector(detector)
    network = _Network(core)
    changes: dict[str, nn.Module] = {"backbone": network}
    if isinstance(core, QuantizedModel):
        height, width = interface_of(core.graph_module).forms[0].shape[2:]
        assert height is not None and width is not None
        changes["transform"] = _Canvas(detector.transform, (height, width))
    if _is_two_stage(detector):
        changes["rpn"] = _changed(detector.rpn, {"head": _Said(network)})
    else:
        changes["head"] = _Said(network)
    if boxes is not None:
        _check_two_stage(detector)
        changes["roi_heads"] = _changed(detector.roi_heads, {"box_head": nn.Identity(), "box_predictor": boxes})
    return _changed(detector, changes).eval()


class _Network(nn.Module):
    """Stands for the backbone, and keeps what the heads said until they are asked."""

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core = core
        self.said: Any = None

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features: dict[str, Tensor]
        features, self.said = self.core(images)
        return features


class _Said(nn.Module):
    """Stands for the head."""

    def __init__(self, network: _Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, features: list[Tensor]) -> Any:
        said, self.network.said = self.network.said, None
        return said


class _Canvas(nn.Module):
    """The detector's transform, whose batches are padded to one size."""

    def __init__(self, transform: Any, size: tuple[int, int]) -> None:
        super().__init__()
        self.transform = transform
        self.size = size

    def forward(self, images: list[Tensor], targets: Any = None) -> tuple[Any, Any]:
        batch, targets = self.transform(images, targets)
        height, width = batch.tensors.shape[-2:]
        if height > self.size[0] or width > self.size[1]:
            raise DataError(
                f"images of {height} x {width}, as the detector resizes them, do not fit its network, which takes "
                f"{self.size[0]} x {self.size[1]}; quantize it with core_inputs of a larger size."
            )
        padding = (0, self.size[1] - width, 0, self.size[0] - height)
        batch.tensors = nn.functional.pad(batch.tensors, padding)
        return batch, targets

    def postprocess(self, *args: Any) -> Any:
        return self.transform.postprocess(*args)


def _changed(module: Any, changes: dict[str, nn.Module]) -> nn.Module:
    """A copy of the module that shares all but the submodules in ``changes``."""
    changed: nn.Module = copy.copy(module)
    changed._modules = {**module._modules, **changes}
    return changed


def _is_two_stage(detector: nn.Module) -> bool:
    return hasattr(detector, "rpn") and hasattr(detector, "roi_heads")


def _check_detector(detector: nn.Module) -> None:
    parts = ("transform", "backbone")
    if not all(hasattr(detector, part) for part in parts) or not (_is_two_stage(detector) or hasattr(detector, "head")):
        raise ModelError(
            f"{type(detector).__name__} is no detector of torchvision's (a transform, a backbone, and a head or rpn "
            "and roi_heads); quantize its network itself."
        )


def _check_two_stage(detector: nn.Module) -> None:
    if not _is_two_stage(detector):
        raise ModelError(
            f"{type(detector).__name__} is no two-stage detector of torchvision's, so it has no second network; "
            "leave boxes out."
        )
