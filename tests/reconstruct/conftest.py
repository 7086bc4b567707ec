from __future__ import annotations

import pytest

from quiesce.preparation import Prepared, prepare
from tiny import Chain, images, recipe


@pytest.fixture(scope="session")
def chain() -> Prepared:
    """Four residual blocks at W2A4, calibrated; 24 images to optimize on and 8 held out. Every run restores it."""
    return prepare(Chain(4), images(32), recipe(), holdout=8)
