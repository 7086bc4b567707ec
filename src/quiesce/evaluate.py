"""Evaluation: accuracy with labels, agreement with the float network without."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from quiesce.data import Samples
from quiesce.errors import DataError

Network = Callable[..., Any]


@dataclass(frozen=True)
class Metrics:
    """How a network does on some samples."""

    top1: float | None
    """Correct labels in per cent; None without labels, or when the output is not logits [images, classes]."""
    agreement: float | None
    """Images in per cent whose top-1 equals the reference's; None without a reference or logits."""
    sqnr_db: float | None
    """10·log10(E‖y‖² / E‖y − ŷ‖²) over all outputs, y the reference's; None without one or when both are equal."""
    images: int


@torch.no_grad()
def outputs_of(
    network: Network, samples: Samples, batch_size: int = 64, device: torch.device | None = None
) -> list[Tensor]:
    """Return the network's output tensors [images, ...] on all samples, in the order of its result.

    Batches are moved to ``device`` (None: they are fed from where they are).
    """
    parts: list[list[Tensor]] = []
    for batch in samples.batches(batch_size, device):
        leaves = pytree.tree_leaves(network(*batch.args, **batch.kwargs))
        parts.append([t for t in leaves if isinstance(t, Tensor)])
    return [torch.cat(tensors) for tensors in zip(*parts, strict=True)]


def evaluate(
    network: Network, samples: Samples, *, reference: list[Tensor] | None = None, batch_size: int = 64
) -> Metrics:
    """Measure ``network`` on ``samples``; ``reference`` are the float network's :func:`outputs_of` them."""
    return compare(outputs_of(network, samples, batch_size), samples.labels, reference)


def compare(outputs: list[Tensor], labels: Tensor | None, reference: list[Tensor] | None) -> Metrics:
    """Measure outputs that are there already."""
    top1 = agreement = None
    first = outputs[0]
    if len(outputs) == 1 and first.ndim == 2:
        chosen = first.argmax(1)
        if labels is not None:
            _check_labels(labels, first)
            top1 = _per_cent(chosen == labels.to(chosen.device))
        if reference is not None:
            agreement = _per_cent(chosen == reference[0].argmax(1))
    return Metrics(top1, agreement, None if reference is None else sqnr_db(outputs, reference), first.shape[0])


def _check_labels(labels: Tensor, logits: Tensor) -> None:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= logits.shape[1]:
        raise DataError(
            f"labels go from {low} to {high}, and the network has {logits.shape[1]} classes; "
            "check that the data's classes are the network's."
        )


def _per_cent(hits: Tensor) -> float:
    return 100.0 * hits.double().mean().item()


def sqnr_db(outputs: list[Tensor], reference: list[Tensor]) -> float | None:
    noise = sum((o.double() - r.double()).square().sum().item() for o, r in zip(outputs, reference, strict=True))
    signal = sum(r.double().square().sum().item() for r in reference)
    return 10 * math.log10(signal / noise) if 0 < noise < math.inf and signal > 0 else None
