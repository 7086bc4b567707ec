"""Random weights and statistics for networks of libraries, with which no layer is trivial."""

from __future__ import annotations

import torch
from torch import nn

from quiesce.data import Samples

FACTOR, OFFSET = (0.5, 1.5), (-0.3, 0.3)
"""Between what random values of a constant parameter lie: one that multiplies, and others."""


@torch.no_grad()
def randomized(model: nn.Module) -> nn.Module:
    """Put random values where training starts from a constant: there a wrong layer would change nothing."""
    for key, parameter in model.named_parameters():
        if parameter.min() == parameter.max():
            is_factor = parameter.numel() == max(parameter.shape, default=1) and not key.endswith("bias")
            parameter.uniform_(*(FACTOR if is_factor else OFFSET))
    return model.eval()


@torch.no_grad()
def with_statistics(model: nn.Module, samples: Samples) -> nn.Module:
    """Give batch-norms the statistics of ``samples``, so that values neither grow nor fade from layer to layer."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
            module.train()
    model(*samples.args, **samples.kwargs)
    return model.eval()
