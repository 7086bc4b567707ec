"""Results as files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quiesce.errors import FileFormatError, OutputError
from quiesce.result import Result, Run, UnitRecord


def result() -> Result:
    units = [UnitRecord(["a"], 10, 0.5, [[5, 2.0], [10, 1.0]]), UnitRecord(["b", "c"], 20, 1.5, [], True)]
    run = Run("qdrop", "loss", 2, None, 0, top1=50.0, units=[["a"], ["b", "c"]], unit_records=units)
    return Result("net", {"top1": 70.0}, [run], {"seed": 0}, {"torch": "2"}, {"device": "cpu"})


def test_round_trip(tmp_path: Path) -> None:
    path = result().write(tmp_path / "result.json")
    assert Result.read(path) == result()
    assert next(iter(json.loads(path.read_text()))) == "schema"
    assert Result.read(path).run.preset == "qdrop"


@pytest.mark.parametrize("change", [{"schema": 2}, {"runs": [{}]}, {"runs": None}])
def test_what_is_no_result_is_refused(change: dict[str, object], tmp_path: Path) -> None:
    data = json.loads(result().to_json()) | change
    (tmp_path / "result.json").write_text(json.dumps(data))
    with pytest.raises(FileFormatError, match=r"result\.json"):
        Result.read(tmp_path / "result.json")


def test_missing_and_truncated_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="can't be read"):
        Result.read(tmp_path / "result.json")
    (tmp_path / "result.json").write_text(result().to_json()[:40])
    with pytest.raises(FileFormatError, match="not valid JSON"):
        Result.read(tmp_path / "result.json")


def test_a_place_that_can_not_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        result().write(tmp_path / "absent" / "result.json")
    assert list(tmp_path.iterdir()) == []
