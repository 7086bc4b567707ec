"""Runs that are killed and begun again end as one that was left alone, bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from killed import STEPS_OF_A_COMMIT
from quiesce.result import Result
from tiny import without_times

KILLED = Path(__file__).with_name("killed.py")


def killed(*arguments: object) -> dict[str, Any]:
    command = [sys.executable, str(KILLED), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def check_killed_at_random(folder: Path, seed: int, kills: int) -> None:
    told = killed("commands", folder, seed, kills)
    # Kills hit it in the middle: behind some units, and at a time of which no later one knows anything.
    assert len(told["finished"]) == kills and told["rounds"] >= 1
    assert sum(after > 0 for _, after in told["finished"]) >= kills / 2
    assert any(after > before for before, after in told["finished"])
    whole = folder / "whole" / "out"
    names = {path.name for path in whole.iterdir()}
    expected = Result.read(whole / "result.json")
    assert expected.run.guard is not None and expected.run.guard["trials"]
    for number in range(told["rounds"]):
        place = folder / f"{number}"
        assert {path.name for path in (place / "out").iterdir()} == names
        for name in names - {"result.json", "report.html"}:
            assert (place / "out" / name).read_bytes() == (whole / name).read_bytes(), name
        found = Result.read(place / "out" / "result.json")
        assert without_times(found) == without_times(expected)
        assert any(record.resumed for record in found.run.unit_records)


def test_ten_kills_at_random_moments(tmp_path: Path) -> None:
    check_killed_at_random(tmp_path, seed=0, kills=10)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 11))
def test_a_hundred_kills_at_random_moments(tmp_path: Path, seed: int) -> None:
    check_killed_at_random(tmp_path, seed, kills=10)


def test_death_at_each_step_of_a_commit(tmp_path: Path) -> None:
    told = killed("commits", tmp_path)
    assert told["codes"] == [0, 0], told["log"]
    # run.json, then the first and the second commit of each process; the last step is behind the renaming.
    expected = [0] * STEPS_OF_A_COMMIT + [0, 0, 0, 1] + [2, 3, 4, 6]
    assert told["finished"] == [[9, count] for count in expected], told["log"]
    died, whole = ((tmp_path / f"{name}.safetensors").read_bytes() for name in ("died", "whole"))
    assert died == whole
