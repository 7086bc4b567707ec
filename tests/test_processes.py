"""Several processes that share the images: two real ones, compared with one that does all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import together
from quiesce.errors import ClusterError, DataError, RecipeError
from quiesce.preparation import prepare
from quiesce.processes import ALONE, Processes, process_group
from quiesce.reconstruct import optimize as optimizing
from quiesce.result import Result
from tiny import Chain, images, recipe, without_times

ROOT = Path(__file__).parents[1]


class Both:
    """What each process left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.about: list[dict[str, Any]] = [json.loads((folder / f"{r}.json").read_text()) for r in range(2)]
        self.tensors = [load_file(folder / f"{r}.safetensors") for r in range(2)]

    def of(self, name: str) -> dict[str, Tensor]:
        """The first one's tensors below ``name``."""
        return {k.removeprefix(f"{name}."): t for k, t in self.tensors[0].items() if k.startswith(f"{name}.")}

    def result(self, name: str, rank: int = 0) -> Result:
        return without_times(Result.from_dict(self.about[rank][name]))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    folder = tmp_path_factory.mktemp("together")
    done = subprocess.run([sys.executable, together.__file__, str(folder)], capture_output=True, text=True, timeout=300)
    logs = [path.read_text() for path in sorted(folder.glob("log-*"))]
    assert (done.returncode, logs) == (0, ["", ""]), done.stderr
    return Both(folder)


def test_losses_and_gradients_are_those_of_one_process(both: Both) -> None:
    alone = together.steps(*together.problem(ALONE, together.exact()))
    shared = both.of("steps")
    assert alone["losses"].shape == (together.STEPS,) and alone["losses"].dtype == torch.float64
    for name, tensor in alone.items():
        assert tensor.abs().max() > 0
        assert torch.allclose(shared[name], tensor, rtol=1e-9, atol=1e-9 * float(tensor.abs().max())), name


def test_processes_end_with_the_same_bits(both: Both) -> None:
    first, second = both.tensors
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    for name in ("plain", "merged", "resumed"):
        assert both.result(name, 0) == both.result(name, 1)


def test_ranges_are_those_of_one_process(both: Both) -> None:
    shared, alone = both.of("calibrated"), together.calibrated(ALONE)
    assert shared.keys() == alone.keys() and any("_gain" in name for name in shared)
    for name, tensor in alone.items():
        assert torch.allclose(shared[name].double(), tensor.double(), rtol=1e-5, atol=1e-6), name


def differing(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """The share of weight integers that differ."""
    pairs = [(first[k], second[k]) for k in first if k.endswith(".quantized")]
    return sum(int((a != b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)


def test_a_whole_run_learns_what_one_process_learns_from_the_same_batches(
    both: Both, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = together.prepared(ALONE, "block")
    _, other = together.made(start, together.whole("block", seed=1))
    original = optimizing.batch_order
    alone = lambda *a: original(*a) if a[0].processes.size > 1 else together.orders(*a)  # noqa: E731
    monkeypatch.setattr(optimizing, "batch_order", alone)
    result, state = together.made(start, together.whole("block"))
    assert differing(both.of("plain"), state) < 0.002 < 0.01 < differing(other, state)  # measured: 0 and 0.023
    run, shared = result.run, both.result("plain").run
    assert list(shared.module_losses.values()) == pytest.approx(list(run.module_losses.values()), rel=0.05)
    assert shared.agreement == pytest.approx(run.agreement, abs=1.0)


def test_accuracy_is_that_of_one_process_within_noise(both: Both) -> None:
    start = together.prepared(ALONE, "loss")
    noise = [together.made(start, together.whole("loss", seed))[0].run.sqnr_db for seed in range(3)]
    found = both.result("merged").run
    assert found.processes == 2 and found.guard is not None and found.guard["holdout"] == 8
    assert min(noise) - 1.5 < found.sqnr_db < max(noise) + 1.5  # type: ignore[operator, type-var]


def test_an_interrupted_run_goes_on_to_the_same_bits(both: Both) -> None:
    whole, resumed = both.of("merged"), both.of("resumed")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert both.result("merged") == both.result("resumed")
    for about in both.about:
        assert [u["resumed"] for u in about["resumed"]["runs"][0]["unit_records"]] == [True] * 3 + [False] * 3
    assert [path.name for path in both.folder.glob("progress-*")] == ["progress-0"]


def test_fisher_weights_have_mean_one_over_all_processes(both: Both) -> None:
    assert max(about["fisher"] for about in both.about) < 1e-5


def test_collective_operations(both: Both) -> None:
    assert [about["processes"] for about in both.about] == [[0, 2], [1, 2]]
    assert max(about["collectives"] for about in both.about) < 1e-6


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("not finite", "ModelError: unit blocks.1: the loss gets NaN or infinite behind step 0"),
        ("unlike", "ClusterError: tensor stem_weight is another one in process"),
    ],
)
def test_errors_are_told_by_all_processes(both: Both, case: str, message: str) -> None:
    assert all(about[case].startswith(message) for about in both.about)


def test_a_process_that_is_gone_ends_the_others(both: Both) -> None:
    assert both.about[0]["lost"].startswith("ClusterError: process 0 lost the others (")


@pytest.mark.parametrize(
    ("settings", "count", "error", "message"),
    [
        ({"batch_size": 9}, 32, RecipeError, "a batch_size of 9 can't be shared equally by 2 processes"),
        ({"granularity": "loss"}, 4, DataError, "held-out images: 1, fewer than 2 processes can share"),
        (
            {"batch_size": 16},
            14,
            DataError,
            "7 images to optimize on in process 1 .* fewer than a batch of 8",
        ),
    ],
)
def test_what_can_not_be_shared_is_refused(
    settings: dict[str, Any], count: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        prepare(Chain(1), images(count), recipe(**settings), processes=Processes(1, 2))


def test_more_processes_than_images_are_refused() -> None:
    with pytest.raises(DataError, match="calibration images: 3, fewer than 4 processes can share"):
        prepare(Chain(1), images(3), recipe("nearest"), processes=Processes(0, 4))


@given(st.integers(1, 9), st.integers(0, 100), st.integers(1, 4))
def test_shares_cover_all_images_once_and_evenly(size: int, clips: int, together: int) -> None:
    shares = [Processes(rank, size).share(clips * together, together) for rank in range(size)]
    assert [i for s in shares for i in range(s.start, s.stop)] == list(range(clips * together))
    lengths = [s.stop - s.start for s in shares]
    assert all(length % together == 0 for length in lengths) and max(lengths) - min(lengths) <= together


@given(st.integers(0, 2**63 - 1), st.integers(2, 64))
def test_each_process_has_a_seed_of_its_own(seed: int, size: int) -> None:
    seeds = [Processes(rank, size).seed(seed) for rank in range(size)]
    assert seeds[0] == seed and len({s % 2**32 for s in seeds}) == size and max(seeds) < 2**63


@given(st.lists(st.integers(0, 5), max_size=3), st.integers(0, 2**32))
def test_alone_every_operation_is_the_identity(shape: list[int], seed: int) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    before = tensor.clone()
    ALONE.mean_([tensor])
    ALONE.copy_first_([tensor])
    ALONE.check_alike({"a": "b"})
    assert torch.equal(tensor, before) and ALONE.sum(tensor) is tensor and ALONE.gather(tensor) is tensor
    assert ALONE.texts("x") == ["x"] and ALONE.from_first({"a": 1}) == {"a": 1} and ALONE.place(7) == (0, 7)


def test_without_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with process_group(torch.device("cpu")) as processes:
        assert processes is ALONE and Processes.current() == ALONE and processes.first


def test_others_that_can_not_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with (
        pytest.raises(ClusterError, match=r"can't be brought together .*start all of them by torchrun"),
        process_group(torch.device("cpu")),
    ):
        pass


def torchrun(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "quiesce"]
    return subprocess.run(
        [*command, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def test_the_command_under_torchrun(tmp_path: Path) -> None:
    said = "quantize tiny:Chain --calibration tiny:images --preset qdrop-fast --steps 5 --set batch_size=8 --out made"
    done = torchrun(*said.split(), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tiny:Chain, seed 0") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert Result.read(tmp_path / "made/result.json").run.processes == 2


@pytest.mark.long
def test_commands_for_one_process_are_refused_under_torchrun(tmp_path: Path) -> None:
    done = torchrun("demo", folder=tmp_path)
    assert done.returncode != 0 and not list(tmp_path.iterdir())
    assert "demo is work for one process; start it without torchrun." in done.stderr
