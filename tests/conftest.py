"""What every test starts from: one thread, a fixed seed, and property tests that draw the same examples each time."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("quiesce", derandomize=True, deadline=None, max_examples=60, database=None)
settings.load_profile("quiesce")


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
