"""Results as files."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from quiesce.errors import FileFormatError, OutputError
from quiesce.result import Result, Run, UnitRecord, hardware, versions


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


def test_what_a_reader_must_know_comes_with_every_run() -> None:
    run = json.loads(result().to_json())["runs"][0]
    documented = {
        *("preset", "granularity", "weight_bits", "activation_bits", "seed", "top1", "agreement", "sqnr_db"),
        *("seconds", "units", "module_losses", "peak_loss", "oscillation", "guard"),
    }
    assert documented <= set(run)
    assert run["activation_bits"] is None
    assert run["unit_records"][1] == {
        "modules": ["b", "c"],
        "steps": 20,
        "seconds": 1.5,
        "loss_curve": [],
        "reused": True,
        "returns": 0,
        "undecided": None,
        "resumed": False,
        "micro_batch": None,
        "cuda_graph": None,
    }


def test_numbers_that_json_lacks_are_not_written(tmp_path: Path) -> None:
    broken = result()
    broken.runs[0].peak_loss = float("nan")
    with pytest.raises(ValueError, match="JSON"):
        broken.write(tmp_path / "result.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text", ["[]", "3", "null", "{}", "[" * 100_000, "\x00", '{"schema": 1}', '{"schema": 1, "runs": [3]}']
)
def test_foreign_json_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(FileFormatError, match=r"result\.json"):
        Result.read(tmp_path / "result.json")


@pytest.mark.parametrize("key", [f.name for f in dataclasses.fields(Result)])
def test_each_missing_entry_is_refused(key: str) -> None:
    data = json.loads(result().to_json())
    del data[key]
    with pytest.raises(FileFormatError):
        Result.from_dict(data)


@pytest.mark.parametrize("damage", [{"new": 1}, {"unit_records": None}, {"unit_records": [{}]}, {"unit_records": 3}])
def test_a_run_of_another_form_is_refused(damage: dict[str, object]) -> None:
    data = json.loads(result().to_json())
    data["runs"][0] |= damage
    with pytest.raises(FileFormatError):
        Result.from_dict(data)


WRONG = {
    "model": [3, None],
    "float": [[], 3, {"top1": "92"}],
    "runs": [[], {}],
    "versions": [{"torch": 3}],
    "hardware": ["x"],
    "runs[0].seed": ["0", 1.5, True, None],
    "runs[0].top1": ["92", []],
    "runs[0].units": [[3], ["a"], [[3]]],
    "runs[0].module_losses": [{"a": None}, []],
    "runs[0].guard": [3],
    "runs[0].unit_records[0].loss_curve": [[[None, 1]], [1]],
    "runs[0].unit_records[0].reused": [1],
}


@pytest.mark.parametrize("path", WRONG)
def test_values_of_another_kind_are_refused_and_named(path: str) -> None:
    *outer, name = re.findall(r"\w+", path)
    for value in WRONG[path]:
        data = inner = json.loads(result().to_json())
        for key in outer:
            inner = inner[int(key) if key.isdigit() else key]
        inner[name] = value
        with pytest.raises(FileFormatError, match=f"at {re.escape(path)}[.; []"):
            Result.from_dict(data)


def test_whole_numbers_do_for_floats() -> None:
    data = json.loads(result().to_json())
    data["runs"][0]["peak_loss"] = 3
    assert Result.from_dict(data).run.peak_loss == 3


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999", "9" * 30, "9" * 5000])
def test_numbers_that_json_lacks_are_not_read(number: str, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(result().to_json().replace('"seed": 0', f'"seed": {number}', 1))
    with pytest.raises(FileFormatError, match=r"result\.json is not valid JSON"):
        Result.read(tmp_path / "result.json")


def test_versions_and_hardware_name_what_decides_the_numbers() -> None:
    found = versions()
    assert found["torch"] == torch.__version__
    assert {"quiesce", "python", "torch", "numpy", "safetensors"} <= set(found)
    machine = hardware(torch.device("cpu"))
    assert machine["device"] == "cpu"
    assert machine["threads"] == torch.get_num_threads()
    assert machine["cpu"]
    json.dumps(machine, allow_nan=False)
