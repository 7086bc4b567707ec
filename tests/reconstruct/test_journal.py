from __future__ import annotations

import json
import os
import resource
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import quiesce.pipeline
from quiesce.errors import OutputError
from quiesce.pipeline import run
from quiesce.preparation import Prepared, prepare
from quiesce.recipe import Recipe
from quiesce.reconstruct.journal import digest_of, discard, finished_units, open_journal
from quiesce.reconstruct.loop import Pass
from quiesce.result import MemoryRecord, Run
from tiny import DURATIONS, Chain, images, recipe, same_state

LOSS = recipe(granularity="loss")


class Interrupt(BaseException):
    """What Ctrl-C raises."""


def interrupted(prepared: Prepared, folder: Path, units: int, chosen: Recipe = LOSS) -> None:
    """Run until ``units`` units are finished and the next one has taken two steps."""
    reports = []

    def stop(stage: str, done: int, _total: int) -> None:
        reports.append((stage, done))
        if finished_units(folder) == units and [s for s, _ in reports[-3:]] == [stage] * 3:
            raise Interrupt

    with pytest.raises(Interrupt):
        run(prepared, chosen, progress=stop, progress_folder=folder)
    assert finished_units(folder) == units


def comparable(runs: list[Run]) -> list[Run]:
    """Runs without what tells of time and interruptions."""
    others = {**dict.fromkeys(DURATIONS, 0.0), "memory": MemoryRecord()}
    return [
        replace(r, **others, unit_records=[replace(u, seconds=0.0, resumed=False) for u in r.unit_records])  # type: ignore
        for r in runs
    ]


@pytest.fixture(scope="module")
def whole(chain: Prepared) -> tuple[list[Run], Pass]:
    """What comes out when nothing is kept and nothing goes wrong."""
    return run(chain, LOSS)


@pytest.fixture(scope="module")
def finished(chain: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The progress of a whole run."""
    folder = tmp_path_factory.mktemp("finished") / "progress"
    run(chain, LOSS, progress_folder=folder)
    return folder


def check_same(found: tuple[list[Run], Pass], whole: tuple[list[Run], Pass]) -> None:
    assert same_state(found[1].state, whole[1].state)
    assert comparable(found[0]) == comparable(whole[0])


@pytest.mark.parametrize(
    ("method", "overlap"), [("layer", 0), ("layer", 1), ("block", 0), ("block", 2), ("loss", 0), ("loss-descent", 0)]
)
def test_an_interrupted_run_goes_on_to_the_same_end(chain: Prepared, tmp_path: Path, method: str, overlap: int) -> None:
    chosen = recipe(granularity=method, overlap=overlap)
    expected = run(chain, chosen)
    interrupted(chain, tmp_path / "p", 2, chosen)
    interrupted(chain, tmp_path / "p", 5, chosen)
    found = run(chain, chosen, progress_folder=tmp_path / "p")
    check_same(found, expected)
    assert [record.resumed for record in found[0][0].unit_records][:6] == [True] * 5 + [False]


@pytest.mark.parametrize("units", [3, 7])
def test_passes_that_only_measure_are_kept_too(chain: Prepared, tmp_path: Path, units: int) -> None:
    chosen = recipe(granularity="loss", steps=25, measuring=0.8)
    expected = run(chain, chosen)
    interrupted(chain, tmp_path / "p", units, chosen)
    found = run(chain, chosen, progress_folder=tmp_path / "p")
    check_same(found, expected)
    assert found[0][-1].measuring_steps == 20 and found[0][-1].measuring_seconds > 0


def test_keeping_progress_changes_nothing_and_a_whole_run_is_taken_over_without_optimizing(
    chain: Prepared, whole: tuple[list[Run], Pass], finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = len((whole[0][-1].guard or {})["trials"])
    assert trials and finished_units(finished) >= len(chain.modules) + trials
    monkeypatch.delattr("quiesce.reconstruct.loop.optimize")
    found = run(chain, LOSS, progress_folder=finished)
    check_same(found, whole)
    assert all(record.resumed for r in found[0] for record in r.unit_records)


def test_seconds_count_the_units_that_were_taken_over(
    chain: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = 1000.0

    class SlowUnits:
        """A clock in whose time every unit takes long."""

        now = 0.0

        @classmethod
        def perf_counter(cls) -> float:
            cls.now += slow
            return cls.now

    monkeypatch.setattr("quiesce.reconstruct.loop.time", SlowUnits)
    run(chain, LOSS, progress_folder=tmp_path / "p")
    monkeypatch.undo()
    (block, merged), _ = run(chain, LOSS, progress_folder=tmp_path / "p")
    units, trials = len(block.unit_records), len((merged.guard or {})["trials"])
    assert all(record.seconds == slow for record in block.unit_records)
    assert 0 <= block.seconds - slow * units < slow
    assert merged.block_seconds + chain.seconds == pytest.approx(block.seconds)
    assert 0 <= merged.seconds - slow * finished_units(tmp_path / "p") < slow and trials


class TestDamage:
    """Whatever happens to a file of the folder, the end is the same."""

    @given(data=st.data())
    @settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_of_a_byte_a_piece_or_a_file(
        self, chain: Prepared, whole: tuple[list[Run], Pass], finished: Path, tmp_path: Path, data: st.DataObject
    ) -> None:
        folder = tmp_path / "p"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(finished, folder)
        path = data.draw(st.sampled_from(sorted(folder.iterdir())), "file")
        content = bytearray(path.read_bytes())
        kind = data.draw(st.sampled_from(["flip", "cut", "longer", "missing", "other"]), "damage")
        place = data.draw(st.integers(0, max(0, len(content) - 1)), "place")
        if kind == "flip" and content:
            content[place] ^= data.draw(st.integers(1, 255), "bits")
        elif kind == "cut":
            del content[place:]
        elif kind == "longer":
            content += data.draw(st.binary(min_size=1, max_size=9), "more")
        elif kind == "other":
            content = bytearray(data.draw(st.sampled_from(sorted(folder.iterdir())), "content").read_bytes())
        path.unlink()
        if kind != "missing":
            path.write_bytes(content)
        check_same(run(chain, LOSS, progress_folder=folder), whole)
        assert sorted(p.name[:4] for p in folder.iterdir()) == sorted(p.name[:4] for p in finished.iterdir())

    def test_the_last_good_unit_is_gone_on_from_and_told(
        self, chain: Prepared, whole: tuple[list[Run], Pass], finished: Path, tmp_path: Path, caplog: Any
    ) -> None:
        shutil.copytree(finished, tmp_path / "p")
        (third,) = (tmp_path / "p").glob("0003-*")
        third.write_bytes(third.read_bytes()[:-1])
        with caplog.at_level("INFO", "quiesce"):
            found = run(chain, LOSS, progress_folder=tmp_path / "p")
        check_same(found, whole)
        assert [r.resumed for r in found[0][0].unit_records] == [True] * 3 + [False] * (len(chain.modules) - 3)
        assert [record.getMessage() for record in caplog.records] == [
            f"finished unit 4 can't be used ({third.name} is not what was written); it and later ones are done again",
            f"continuing after 3 finished units ({tmp_path / 'p'})",
        ]

    def test_entries_of_another_run_are_not_taken_for_this_one(
        self, chain: Prepared, whole: tuple[list[Run], Pass], tmp_path: Path
    ) -> None:
        other = LOSS.with_settings(seed=1)
        run(chain, other, progress_folder=tmp_path / "p")
        (tmp_path / "p" / "run.json").unlink()
        check_same(run(chain, LOSS, progress_folder=tmp_path / "p"), whole)

    def test_an_intact_entry_of_another_unit_is_not_used(
        self, chain: Prepared, finished: Path, tmp_path: Path, caplog: Any
    ) -> None:
        """As when a network on a GPU has rounded otherwise, and other merges are tried."""
        shutil.copytree(finished, tmp_path / "p")
        about = json.loads((finished / "run.json").read_text())["run"]
        with open_journal(tmp_path / "p", about) as journal:
            extent = {"unit": "other", "start": 0, "stop": 1, "steps": 4, "warm": False}
            assert journal.take_over(chain.graph, extent) is None
            assert finished_units(tmp_path / "p") == 0
            assert "and {'unit': 'other', " in caplog.text


class TestAnotherRun:
    @pytest.mark.parametrize(
        ("changed", "told"),
        [
            ({"steps": 5}, "reconstruction.steps: 4 -> 5"),
            ({"seed": 3, "granularity": "modcap"}, 'seed: 0 -> 3; granularity.method: "loss" -> "modcap"'),
            ({"leave_float": "head"}, 'layers: [] -> [{"pattern": "head", '),
        ],
    )
    def test_another_recipe(self, chain: Prepared, finished: Path, changed: dict[str, Any], told: str) -> None:
        before = {path: path.read_bytes() for path in finished.iterdir()}
        with pytest.raises(OutputError) as error:
            run(chain, LOSS.with_settings(**changed), progress_folder=finished)
        assert f"holds the progress of another run ({told}" in str(error.value)
        assert "remove the folder (--restart)" in str(error.value)
        assert before == {path: path.read_bytes() for path in finished.iterdir()}

    @pytest.mark.parametrize(
        ("depth", "seed", "data", "told"),
        [
            (4, 1, 1, "(model.tensors changed);"),
            (3, 0, 1, "(model.structure changed; model.tensors changed);"),
            (4, 0, 2, "(calibration.values changed);"),
        ],
    )
    def test_another_model_and_other_data(self, finished: Path, depth: int, seed: int, data: int, told: str) -> None:
        other = prepare(Chain(depth, seed=seed), images(32, seed=data), recipe(), holdout=8)
        with pytest.raises(OutputError) as error:
            run(other, LOSS, progress_folder=finished)
        assert told in str(error.value)

    @pytest.mark.parametrize(
        ("function", "entry", "told"),
        [
            ("versions", {"torch": "1.0"}, 'versions.torch: ".*" -> "1.0"'),
            ("hardware", {"threads": 99}, "hardware.threads: 1 -> 99"),
        ],
    )
    def test_other_versions_and_hardware(
        self, finished: Path, monkeypatch: pytest.MonkeyPatch, function: str, entry: dict[str, Any], told: str
    ) -> None:
        """That is known before the network is captured: :func:`quiesce.quantize` tells it at once."""
        before = getattr(quiesce.pipeline, function)
        monkeypatch.setattr(quiesce.pipeline, function, lambda *a: before(*a) | entry)
        monkeypatch.delattr(quiesce.pipeline, "prepare")
        with pytest.raises(OutputError, match=told):
            quiesce.quantize(Chain(4), images(32), LOSS, progress_folder=finished)

    def test_the_same_one_elsewhere_in_memory(
        self, chain: Prepared, whole: tuple[list[Run], Pass], finished: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The same call in another process makes its tensors anew."""
        again = prepare(Chain(4), images(32).contiguous(memory_format=torch.channels_last), recipe(), holdout=8)
        monkeypatch.delattr("quiesce.reconstruct.loop.optimize")
        check_same(run(again, LOSS, progress_folder=finished), whole)


class TestFolder:
    def test_one_process_at_a_time(self, chain: Prepared, tmp_path: Path) -> None:
        with open_journal(tmp_path / "p", {}):
            with pytest.raises(OutputError, match="another process works with the progress in"):
                run(chain, LOSS, progress_folder=tmp_path / "p")
            with pytest.raises(OutputError, match="another process works with"):
                discard(tmp_path / "p")

    def test_discard_leaves_files_of_others(self, finished: Path, tmp_path: Path) -> None:
        shutil.copytree(finished, tmp_path / "p")
        for name in ("notes.txt", "weights.safetensors"):
            (tmp_path / "p" / name).write_text("precious")
        discard(tmp_path / "p")
        assert sorted(path.name for path in (tmp_path / "p").iterdir()) == ["notes.txt", "weights.safetensors"]
        shutil.copytree(finished, tmp_path / "q")
        discard(tmp_path / "q")
        assert not (tmp_path / "q").exists()
        discard(tmp_path / "q")

    def test_a_place_that_is_no_folder(self, chain: Prepared, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(OutputError, match=r"progress can't be kept in .*file \(File exists\)"):
            run(chain, LOSS, progress_folder=tmp_path / "file")

    def test_nearest_rounding_keeps_nothing(self, chain: Prepared, tmp_path: Path) -> None:
        run(chain, recipe("nearest"), progress_folder=tmp_path / "p")
        assert not (tmp_path / "p").exists()


DIGITS = 100


@pytest.fixture
def small_files(finished: Path) -> Iterator[int]:
    """Let the system refuse files as large as the first entry that is larger than all before; yield its number.

    Larger by more than the digits of seconds, which differ from run to run.
    """
    sizes = [path.stat().st_size for path in sorted(finished.glob("0*"))]
    refused = next(
        i for i, size in enumerate(sizes) if size > DIGITS + max([*sizes[:i], (finished / "run.json").stat().st_size])
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[refused] - DIGITS // 2, hard))
    yield refused
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_told_and_nothing_is_lost(
    chain: Prepared, whole: tuple[list[Run], Pass], small_files: int, tmp_path: Path
) -> None:
    told = rf"\(File too large\); free space or .* {small_files} finished units are kept: begin again to go on"
    for _ in range(2):
        with pytest.raises(OutputError, match=told):
            run(chain, LOSS, progress_folder=tmp_path / "p")
        assert finished_units(tmp_path / "p") == small_files
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    check_same(run(chain, LOSS, progress_folder=tmp_path / "p"), whole)


def test_a_clock_that_jumps_changes_nothing(
    chain: Prepared, whole: tuple[list[Run], Pass], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the time of day nor the times of files have a part in anything."""
    years = iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: 4e9 - 3e7 * next(years))
    interrupted(chain, tmp_path / "p", 3)
    for path in (tmp_path / "p").iterdir():
        os.utime(path, (4e9 - 3e7 * next(years),) * 2)
    found = run(chain, LOSS, progress_folder=tmp_path / "p")
    check_same(found, whole)
    for made in found[0]:
        durations = [made.seconds, made.block_seconds, made.reused_seconds, *(u.seconds for u in made.unit_records)]
        assert all(0 <= duration < 600 for duration in durations)


def test_digests_tell_values_names_shapes_and_dtypes_apart() -> None:
    x = torch.arange(6.0)
    kinds = [{"a": x}, {"b": x}, {"a": x.view(2, 3)}, {"a": x.double()}, {"a": x + 1}, {"a": x, "b": x}]
    assert len({digest_of(kind) for kind in kinds}) == len(kinds)
    assert digest_of({"a": x.view(2, 3).T}) == digest_of({"a": x.view(2, 3).T.contiguous()})
    assert digest_of({"a": torch.tensor(1.0)}) != digest_of({"a": torch.tensor(2.0)})
