from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import quiesce
from quiesce.result import Result
from quiesce.sweep.cell import Outcome, attempt, deciding_versions
from quiesce.sweep.plan import Sweep
from sweeps import run_here, task
from tiny import without_times

Read = Callable[..., Sweep]


def result_of(outcome: Outcome, folder: Path) -> Result:
    assert outcome.error is None, outcome.error
    (folder / "result.json").write_bytes(outcome.files["result.json"])
    return Result.read(folder / "result.json")


def test_a_cell_is_what_the_library_makes_of_its_settings(read: Read, place: Path) -> None:
    sweep = read()
    outcome = run_here(sweep, 1)
    assert set(outcome.files) == {"cell.json", "result.json", "recipe.toml"}
    import sweep_source

    cell = sweep.cells[1]
    data = sweep_source.images()
    expected = quiesce.quantize(sweep_source.net(), data, cell.recipe, evaluate=data, name="sweep_source:net")
    assert without_times(result_of(outcome, place)) == without_times(expected.result)
    about = json.loads(outcome.files["cell.json"])
    assert {k: about[k] for k in ("network", "recipe", "versions")} == cell.settings(deciding_versions())


def test_the_network_comes_along_if_it_is_to_be_saved(read: Read, place: Path) -> None:
    outcome = run_here(read(), save_network=True)
    (place / "out").mkdir()
    for name, content in outcome.files.items():
        (place / "out" / name).write_bytes(content)
    network = quiesce.load(place / "out")
    assert network(torch.zeros(2, 3, 8, 8)).shape == (2, 3)


def test_it_takes_the_threads_that_it_is_given(read: Read, place: Path) -> None:
    before = torch.get_num_threads()
    try:
        result = result_of(run_here(read(), threads=2), place)
        assert torch.get_num_threads() == result.hardware["threads"] == 2
    finally:
        torch.set_num_threads(before)


def test_progress(read: Read) -> None:
    seen: list[tuple[int, int]] = []
    attempt(task(read()), lambda _, done, total: seen.append((done, total)))
    assert seen and seen[-1][0] == seen[-1][1] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('model = "sweep_source:net"', 'model = "sweep_source:nett"'), "no 'nett'. Did you mean 'net'?"),
        (('evaluate = "sweep_source:images"', 'evaluate = "sweep_source:larger"'), "evaluation data is float32"),
        (('name = "net"', 'weights = "none.pt"'), "weight file none.pt is not there"),
        (('name = "net"', "resize = 9"), "--crop, --mean, --std, --interpolation are missing"),
    ],
)
def test_an_error_of_the_users_is_one_sentence(read: Read, change: tuple[str, str], message: str) -> None:
    outcome = run_here(read(change))
    assert outcome.files == {} and outcome.error is not None
    assert message in outcome.error and "\n" not in outcome.error


def test_any_other_error_is_a_traceback(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise MemoryError("all of it")

    monkeypatch.setattr("quiesce.sweep.cell.quantize", fails)
    outcome = run_here(read())
    assert outcome.error is not None and outcome.error.startswith("Traceback")
    assert outcome.error.strip().endswith("MemoryError: all of it")


def test_a_worker_with_other_versions_refuses(read: Read) -> None:
    outcome = run_here(read(), versions={"quiesce": "0.0.1", "torch": "1.0"})
    assert outcome.error is not None and "install the same" in outcome.error


def test_evaluation_images_do_not_depend_on_the_seed_and_calibration_images_do(read: Read, place: Path) -> None:
    import numpy as np

    x = np.random.default_rng(0).standard_normal((48, 3, 8, 8), dtype=np.float32)
    np.savez(place / "data.npz", x=x, y=np.arange(48) % 3)
    sweep = read(('"sweep_source:images"', '"data.npz"'), ("[data]", "[data]\nimages = 24\nevaluate_images = 24"))
    inputs = [json.loads(run_here(sweep, i).files["cell.json"])["inputs"] for i in (0, 1)]
    assert inputs[0]["model"] == inputs[1]["model"] and inputs[0]["evaluate"] == inputs[1]["evaluate"]
    assert inputs[0]["calibration"] != inputs[1]["calibration"]
