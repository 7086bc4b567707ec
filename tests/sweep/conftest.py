"""Fixtures of the sweep tests."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from quiesce.sweep.plan import Sweep, read_sweep
from sweeps import SOURCE, SWEEP


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with sweep_source.py and sweep.toml; the working folder is another one."""
    (tmp_path / "sweep_source.py").write_text(SOURCE)
    (tmp_path / "sweep.toml").write_text(SWEEP)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.delitem(sys.modules, "sweep_source", raising=False)
    return tmp_path


@pytest.fixture
def read(place: Path) -> Callable[..., Sweep]:
    """Read the sweep file with texts in it replaced, each of which has to be there."""

    def read(*changes: tuple[str, str]) -> Sweep:
        text = SWEEP
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        (place / "sweep.toml").write_text(text)
        return read_sweep(place / "sweep.toml")

    return read


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
