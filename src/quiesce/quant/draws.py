"""Random bytes for the optimization loop as a hash of what they are for, so that they need no state.

They depend on seed, step, tensor and image only: not on the images beside it in the batch, nor on the device, nor on
what was drawn before. Counter-based generators are those of Salmon et al., *Parallel random numbers: as easy as 1, 2,
3* (SC 2011); the hash is the finalizer of SplitMix64 (Steele et al., OOPSLA 2014).
"""

from __future__ import annotations

import torch
from torch import Tensor

from quiesce.quant import kernels


class Draws:
    """Random bytes of one unit. :meth:`begin` says which step and images the following ones are for."""

    def __init__(self, seed: int, device: torch.device, *, fused: bool = False) -> None:
        self.device = device
        self.fused = fused
        self._key = kernels.mix64(torch.tensor(_signed(seed), device=device))
        self._images = self._key.view(1)

    def begin(self, step: Tensor, images: Tensor) -> None:
        """Draw for ``step`` (int64, 0-dim) and ``images`` (their numbers, int64 [batch]) from now on."""
        self._images = kernels.image_keys(self._key, step, images, fused=self.fused)

    def key(self, number: int, like: Tensor) -> kernels.Key:
        """Return what the bytes of tensor ``number`` are made from: one for each element of ``like``, in the order of
        its memory.

        ``like`` holds the batch's images one after another; a tensor that does not shares its draws among them.
        """
        images = self._images
        if like.ndim == 0 or like.shape[0] % len(images) or not _is_outermost(like):
            images = images.sum().view(1)
        return kernels.Key(images, _signed(number * kernels.GOLDEN))


def _is_outermost(x: Tensor) -> bool:
    """Tell whether the first axis strides over all others, in a tensor that may lie in memory in any order."""
    return x.stride(0) == max(x.stride()) and x.stride(0) * x.shape[0] == x.numel()


def _signed(value: int) -> int:
    """The 64-bit number with the bits of ``value``."""
    return (value + 2**63) % 2**64 - 2**63
