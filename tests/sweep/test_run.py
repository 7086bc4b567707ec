from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from quiesce.errors import ClusterError, ModelError, OutputError
from quiesce.result import Result
from quiesce.sweep.plan import Cluster, Sweep
from quiesce.sweep.run import _connected, changed_inputs, finished, others, run_sweep
from sweeps import ONE_CELL, change_images, keep
from tiny import without_times

Read = Callable[..., Sweep]


def network(name: str, evaluate: str) -> str:
    return f'\n[[network]]\nname = "{name}"\nmodel = "sweep_source:net"\nevaluate = "sweep_source:{evaluate}"\n'


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    with _connected(Cluster()):
        yield


class TestOnRay:
    """On processes of this machine, as a sweep runs by default."""

    def test_cells_that_end_well_fail_or_die(self, ray: None, read: Read, place: Path) -> None:
        """A cell is killed while it runs, begun again, and ends with the bits of one that was left alone."""
        more = (
            network("killed", "waits_to_be_killed_once") + network("broken", "raises") + network("dies", "always_dies")
        )
        sweep = read(*ONE_CELL, ("[grid]", f"{more}[ray]\ntries = 2\n[grid]"))
        told: list[str] = []
        shown: list[tuple[str, int, int]] = []
        killer = threading.Thread(target=kill_when_written, args=(place / "pid",))
        killer.start()
        rows = run_sweep(
            sweep, place / "out", save_networks=True, progress=lambda *news: shown.append(news), tell=told.append
        )
        killer.join()
        assert [(r.network, r.status, r.tries) for r in rows] == [
            ("net", "done", 1),
            ("killed", "done", 2),
            ("broken", "failed", 1),
            ("dies", "failed", 2),
        ]
        alone, killed = (place / "out" / str(row.folder) for row in rows[:2])
        for name in ("quantized.safetensors", "recipe.toml"):
            assert (alone / name).read_bytes() == (killed / name).read_bytes()
        results = [Result.read(folder / "result.json") for folder in (alone, killed)]
        assert without_times(results[0]) == without_times(results[1])
        assert results[0].hardware["threads"] == 1
        assert rows[2].error == "calling 'sweep_source:raises' without arguments raised SystemError: out of luck."
        assert str(rows[3].error).startswith("given up after 2 tries: its worker was lost")
        assert (place / "deaths").read_text() == "xx"
        assert sum("begun again" in text for text in told) == 2 and sum("failed" in text for text in told) == 2
        assert shown[-1] == ("4 of 4 cells", 4000, 4000)
        assert [done for _, done, _ in shown] == sorted(done for _, done, _ in shown)
        lines = [json.loads(line) for line in (place / "out" / "results.jsonl").read_text().splitlines()]
        assert lines == [row.to_dict() for row in rows]

    def test_only_what_is_missing_runs(self, ray: None, read: Read, place: Path) -> None:
        """A damaged cell is run again, a whole one is not touched, and of a changed file what still matches is kept."""
        first = read(*ONE_CELL[1:])
        keep(first, place / "out", 0, 1)
        (damaged, whole) = (place / "out" / str(r.folder) for r in finished(first, place / "out").values())
        (damaged / "result.json").write_text('{"schema": 1')
        before = (whole / "result.json").stat().st_mtime_ns
        told: list[str] = []
        rows = run_sweep(first, place / "out", tell=told.append)
        assert [row.status for row in rows] == ["done", "done"]
        assert len(told) == 1 and told[0].startswith(f"{rows[0].name}: ")
        assert (whole / "result.json").stat().st_mtime_ns == before
        changed = read(*ONE_CELL[1:], ('"4/float"', '"4/4"'))
        assert [row.bits for row in finished(changed, place / "out").values()] == ["W2A4"]
        assert others(changed, place / "out") == 1

    def test_it_listens_on_this_machine_only(self, ray: None) -> None:
        import ray as engine

        assert [node["NodeManagerAddress"] for node in engine.nodes()] == ["127.0.0.1"]

    @pytest.mark.parametrize("wanted", ["cpus = 4096", "gpus = 512"])
    def test_a_cell_that_fits_on_no_machine(self, ray: None, read: Read, place: Path, wanted: str) -> None:
        with pytest.raises(ClusterError, match=r"no machine has the .* lower cpus or gpus"):
            run_sweep(read(("[grid]", f"[ray]\n{wanted}\n[grid]")), place / "out")


def kill_when_written(path: Path) -> None:
    """Kill the process whose number is written to ``path``."""
    until = time.monotonic() + 120
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(int(path.read_text()), signal.SIGKILL)


@pytest.mark.usefixtures("without_ray")
class TestWithoutRay:
    def test_it_is_asked_for_before_anything_is_written(self, read: Read, place: Path) -> None:
        with pytest.raises(ModelError, match=r"ray is not installed; install it with: pip install quiesce\[sweep\]"):
            run_sweep(read(), place / "out")
        assert not (place / "out").exists()

    def test_a_finished_sweep_needs_none(self, read: Read, place: Path) -> None:
        sweep = read(*ONE_CELL)
        keep(sweep, place / "out", 0)
        (row,) = run_sweep(sweep, place / "out")
        assert row.status == "done" and json.loads((place / "out/results.jsonl").read_text()) == row.to_dict()


class TestFinished:
    def test_a_network_is_kept_or_the_cell_is_missing(self, read: Read, place: Path) -> None:
        sweep = read(*ONE_CELL[1:])
        keep(sweep, place / "out", 0)
        keep(sweep, place / "out", 1, save_network=True)
        assert len(finished(sweep, place / "out")) == 2
        assert [row.bits for row in finished(sweep, place / "out", save_networks=True).values()] == ["W4A32"]

    @pytest.mark.parametrize("name", ["cell.json", "result.json"])
    @pytest.mark.parametrize("content", [None, "", "{}", "[]", '{"schema": 1}'])
    def test_a_damaged_cell_is_missing(self, read: Read, place: Path, name: str, content: str | None) -> None:
        sweep = read(*ONE_CELL)
        keep(sweep, place / "out", 0)
        (row,) = finished(sweep, place / "out").values()
        path = place / "out" / str(row.folder) / name
        path.unlink() if content is None else path.write_text(content)
        assert finished(sweep, place / "out") == {}

    def test_a_cell_under_the_name_of_another_is_missing(self, read: Read, place: Path) -> None:
        sweep = read(*ONE_CELL)
        keep(sweep, place / "out", 0)
        (row,) = finished(sweep, place / "out").values()
        path = place / "out" / str(row.folder) / "cell.json"
        path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
        assert finished(sweep, place / "out") == {}

    def test_a_folder_is_found_by_its_digest(self, read: Read, place: Path) -> None:
        keep(read(*ONE_CELL), place / "out", 0)
        renamed = read(*ONE_CELL, ('name = "net"', 'name = "ResNet"'))
        assert [row.network for row in finished(renamed, place / "out").values()] == ["ResNet"]


def test_changed_inputs_are_told(read: Read, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = read(*ONE_CELL[1:])
    keep(sweep, place / "out", 0)
    change_images(place, monkeypatch)
    keep(sweep, place / "out", 1)
    found = changed_inputs(sweep, list(finished(sweep, place / "out").values()), place / "out")
    assert [text.partition(" is not the same")[0] for text in found] == [
        "the calibration of net",
        "the evaluate of net",
    ]


class TestFolder:
    def test_one_that_holds_other_things(self, read: Read, place: Path) -> None:
        (place / "out").mkdir()
        (place / "out" / "thesis.tex").touch()
        with pytest.raises(OutputError, match=r"holds other things than a sweep \(thesis.tex\)"):
            run_sweep(read(), place / "out")
        assert [p.name for p in (place / "out").iterdir()] == ["thesis.tex"]

    def test_a_file(self, read: Read, place: Path) -> None:
        with pytest.raises(OutputError, match="is a file"):
            run_sweep(read(), place / "sweep.toml")

    def test_one_that_another_sweep_writes_to(self, read: Read, place: Path) -> None:
        sweep = read(*ONE_CELL)
        keep(sweep, place / "out", 0)
        code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print('held'); input()"
        command = [sys.executable, "-c", code, str(place / "out/.lock")]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            assert other.stdout is not None and other.stdout.readline()
            with pytest.raises(OutputError, match="another sweep is writing to"):
                run_sweep(sweep, place / "out")
            other.kill()
        assert run_sweep(sweep, place / "out")  # the lock of a process that is gone is free

    def test_what_a_killed_sweep_has_left_half_written_is_removed(self, read: Read, place: Path) -> None:
        sweep = read(*ONE_CELL)
        keep(sweep, place / "out", 0)
        half = place / "out" / "cells" / ".net-0123.partial-89ab"
        half.mkdir()
        (half / "result.json").write_text("{")
        run_sweep(sweep, place / "out")
        assert not half.exists()


@pytest.mark.long
def test_a_machine_of_a_cluster_is_lost(read: Read, place: Path) -> None:
    """The cell that ran there is begun again on another one, and its network comes back without a common folder."""
    sweep = read(*ONE_CELL, ('evaluate = "sweep_source:images"', 'evaluate = "sweep_source:waits_to_be_killed_once"'))
    code = """
import subprocess, sys, time, pathlib
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
lost = cluster.add_node(num_cpus=1)
command = [sys.executable, "-m", "quiesce", "sweep", "sweep.toml", "--out", "out"]
process = subprocess.Popen([*command, "--save-networks", "--address", cluster.address])
while not pathlib.Path("pid").exists():
    time.sleep(0.1)
cluster.remove_node(lost, allow_graceful=False)
cluster.add_node(num_cpus=1)
code = process.wait()
cluster.shutdown()
sys.exit(code)
"""
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=place, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (row,) = finished(sweep, place / "out", save_networks=True).values()
    assert (row.status, row.tries) == ("done", 2)
    assert re.search(r"its worker was lost \(.*\); it is begun again, try 2 of 3", done.stderr)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:70000"])
def test_a_cluster_that_is_not_there(read: Read, place: Path, address: str) -> None:
    sweep = read(("[grid]", f"[ray]\naddress = '{address}'\n[grid]"))
    with pytest.raises(ClusterError, match=rf"Ray can't be reached at {address} \(.*\)\."):
        run_sweep(sweep, place / "out")
    assert not (place / "out").exists()
