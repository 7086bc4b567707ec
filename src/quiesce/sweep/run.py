"""Runs the cells of a sweep on Ray, keeps what is finished, and begins again what was lost."""

from __future__ import annotations

import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from quiesce.errors import ClusterError, FileFormatError, OutputError
from quiesce.export.export import require
from quiesce.files import read_json
from quiesce.outputs import output_folder, take_lock
from quiesce.progress import ProgressCallback
from quiesce.result import Result
from quiesce.sweep.cell import CELL_FILE, NETWORK_FILE, RESULT_FILE, Outcome, Task, attempt, deciding_versions
from quiesce.sweep.plan import Cell, Cluster, Sweep, check_files
from quiesce.sweep.table import Row, done_row, failed_row, write_table

CELLS, LOCK_FILE = "cells", ".lock"
Tell = Callable[[str], None]
_PARTS = 1000
"""Into which progress divides a cell."""
_POLL_SECONDS, _REACH_SECONDS = 1.0, 10.0
_LOCAL_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # By this, Ray keeps to the loopback address; else its ports are open to all who reach the machine.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}


def run_sweep(
    sweep: Sweep,
    folder: Path,
    *,
    save_networks: bool = False,
    progress: ProgressCallback | None = None,
    tell: Tell = lambda _: None,
) -> list[Row]:
    """Run the cells of ``sweep`` that ``folder`` does not have yet, and return the rows of all, in the sweep's order.

    Whenever a cell is finished its files are written to ``folder/cells``, and the table of all rows that there are is
    written again. What a cell needs is loaded by its worker; what it makes comes back through Ray, so that workers and
    this process need no common folder.

    Args:
        save_networks: keep the quantized networks, too.
        progress: called as ``progress(stage, done, total)``, in thousandths of cells.
        tell: called with a sentence when a cell is finished, has failed, or is begun again.

    Raises:
        OutputError: ``folder`` holds other things, another sweep is writing to it, or the system can't write.
        ModelError: ray is not installed, or a weight file is not there.
        ClusterError: the cluster can't be reached, or this machine lacks the cores or GPUs of a cell.
        QuiesceError: as for :func:`~quiesce.sweep.plan.check_files`.
    """
    versions = deciding_versions()
    cells = {cell.digest(versions): cell for cell in sweep.cells}
    check_folder(folder)
    if len(finished(sweep, folder, save_networks)) < len(cells):
        if sweep.cluster.address is None:
            check_files(sweep)
        else:
            _check_reachable(sweep.cluster.address)
        _import_ray(sweep.cluster)
    with _locked(folder):
        rows = finished(sweep, folder, save_networks)
        write_table(_ordered(rows, cells), folder)
        device = "cuda" if sweep.cluster.gpus else "cpu"
        tasks = {
            digest: Task(cell, sweep.folder, sweep.cluster.cpus, device, save_networks, versions)
            for digest, cell in cells.items()
            if digest not in rows
        }
        for digest, outcome, tries in _outcomes(tasks, sweep.cluster, progress, tell) if tasks else ():
            rows[digest] = _keep(cells[digest], digest, outcome, tries, folder)
            write_table(_ordered(rows, cells), folder)
            tell(_news(rows[digest]))
        return _ordered(rows, cells)


def check_folder(folder: Path) -> None:
    """Check that ``folder`` is that of a sweep, or can become one.

    Raises:
        OutputError: it is a file, or holds other things.
    """
    try:
        names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    except NotADirectoryError as error:
        raise OutputError(f"{folder} is a file; choose a folder for the results.") from error
    if names - {LOCK_FILE} and CELLS not in names:
        raise OutputError(f"folder {folder} holds other things than a sweep ({min(names)}); choose another folder.")


def finished(sweep: Sweep, folder: Path, save_networks: bool = False) -> dict[str, Row]:
    """Return the rows of the cells that ``folder`` has, by digest.

    A damaged cell does not count, nor does one without its network if networks are to be saved.
    """
    versions = deciding_versions()
    cells = {cell.digest(versions): cell for cell in sweep.cells}
    rows = {}
    for digest, path in _kept(folder).items():
        if digest in cells and (path / NETWORK_FILE if save_networks else path).exists():
            with suppress(FileFormatError, LookupError, TypeError):
                about, result = read_json(path / CELL_FILE), Result.read(path / RESULT_FILE)
                if {k: about[k] for k in ("network", "recipe", "versions")} == cells[digest].settings(versions):
                    rows[digest] = done_row(cells[digest], result, about["tries"], f"{CELLS}/{path.name}")
    return rows


def others(sweep: Sweep, folder: Path) -> int:
    """Return how many finished cells of other settings, or other versions, ``folder`` has."""
    versions = deciding_versions()
    return len(_kept(folder).keys() - {cell.digest(versions) for cell in sweep.cells})


def changed_inputs(sweep: Sweep, rows: list[Row], folder: Path) -> list[str]:
    """Compare what the finished cells were given, and return a sentence for each network or data that has changed.

    Cells name their networks and data by path or callable; by checksums it is seen that what is behind a name is the
    same for all of them (calibration images: for those of one seed).
    """
    first: dict[tuple[str, str, int | None], tuple[str, Row]] = {}
    found: dict[tuple[str, str, int | None], str] = {}
    for row in rows:
        if row.folder is None:
            continue
        for what, checksum in read_json(folder / row.folder / CELL_FILE)["inputs"].items():
            key = (what, row.network, row.seed if what == "calibration" else None)
            known, other = first.setdefault(key, (checksum, row))
            if known != checksum:
                found[key] = (
                    f"the {what} of {row.network} is not the same in all cells (another one in {other.folder} than in "
                    f"{row.folder}); remove the folders of the old cells, and run again."
                )
    return list(found.values())


def _ordered(rows: Mapping[str, Row], cells: Mapping[str, Cell]) -> list[Row]:
    return [rows[digest] for digest in cells if digest in rows]


def _kept(folder: Path) -> dict[str, Path]:
    """Return the folders of finished cells by digest."""
    place = folder / CELLS
    paths = sorted(place.iterdir()) if place.is_dir() else []
    return {path.name.rpartition("-")[2]: path for path in paths if not path.name.startswith(".")}


def _keep(cell: Cell, digest: str, outcome: Outcome, tries: int, folder: Path) -> Row:
    if outcome.error is not None:
        return failed_row(cell, outcome.error, tries)
    path = _kept(folder).get(digest, folder / CELLS / f"{cell.readable}-{digest}")
    with output_folder(path, force=True) as new:
        for name, data in outcome.files.items():
            (new / name).write_bytes(data)
    return done_row(cell, Result.read(path / RESULT_FILE), tries, f"{CELLS}/{path.name}")


def _news(row: Row) -> str:
    if row.error is not None:
        return f"{row.name}: failed: {row.error.strip()}"
    measured = {"top-1 %": row.top1, "agreement %": row.agreement, "SQNR dB": row.sqnr_db, "s": row.seconds}
    return f"{row.name}: " + ", ".join(f"{value:.2f} {unit}" for unit, value in measured.items() if value is not None)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep the folder from other sweeps, and remove what one that was killed has left half-written."""
    place = folder / CELLS
    try:
        place.mkdir(parents=True, exist_ok=True)
        lock = take_lock(
            folder / LOCK_FILE, f"another sweep is writing to {folder}; wait for it, or choose another folder."
        )
    except OSError as error:
        raise OutputError(f"{folder} can't be written ({error.strerror}); choose another place.") from error
    with lock:
        for path in place.glob(".*.partial-*"):
            shutil.rmtree(path, ignore_errors=True)
        yield


def _outcomes(
    tasks: Mapping[str, Task], cluster: Cluster, progress: ProgressCallback | None, tell: Tell
) -> Iterator[tuple[str, Outcome, int]]:
    """Yield digest, outcome and number of tries of each task as it ends."""
    with _connected(cluster) as ray:
        _check_resources(ray, cluster, tell)
        board = _board(ray)
        # One process a cell: what another one left (threads, modules, memory of a GPU) can't reach it. Ray itself does
        # not begin it again, so that there is one count of tries.
        work = ray.remote(num_cpus=cluster.cpus, num_gpus=cluster.gpus, max_retries=0, max_calls=1)(_work)
        tries = dict.fromkeys(tasks, 1)
        running = {work.remote(task, digest, board): digest for digest, task in tasks.items()}
        while running:
            if progress is not None:
                progress(*_standing(len(tasks), {*running.values()}, _shares(ray, board)))
            for reference in ray.wait(list(running), timeout=_POLL_SECONDS)[0]:
                digest = running.pop(reference)
                outcome = _fetch(ray, reference)
                if isinstance(outcome, Outcome):
                    yield digest, outcome, tries[digest]
                elif tries[digest] == cluster.tries:
                    yield digest, Outcome(error=f"given up after {tries[digest]} tries: {outcome}"), tries[digest]
                else:
                    tries[digest] += 1
                    task = replace(tasks[digest], tries=tries[digest])
                    board.write.remote(digest, 0.0)
                    running[work.remote(task, digest, board)] = digest
                    tell(f"{task.cell.name}: {outcome}; it is begun again, try {task.tries} of {cluster.tries}")
        if progress is not None:
            progress(*_standing(len(tasks), set(), {}))


def _fetch(ray: Any, reference: Any) -> Outcome | str:
    """Return what came of a task, or in words how its worker, its machine or what it has returned was lost."""
    try:
        outcome: Outcome = ray.get(reference)
        return outcome
    except ray.exceptions.RayTaskError as error:  # nothing is lost: the worker can't even begin
        return Outcome(error=str(error))
    except ray.exceptions.RayError as error:
        return f"its worker was lost ({str(error).partition('. ')[0].strip()})"


def _standing(tasks: int, running: set[str], shares: Mapping[str, float]) -> tuple[str, int, int]:
    """Return what progress is told: a stage, and thousandths of cells that are done, and of all."""
    done = tasks - len(running)
    parts = sum(int(_PARTS * share) for digest, share in shares.items() if digest in running)
    return f"{done} of {tasks} cells", _PARTS * done + parts, _PARTS * tasks


def _work(task: Task, digest: str, board: Any) -> Outcome:
    """Run a cell on a worker, and write to the board how far it is."""
    last = 0.0

    def report(_stage: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > _POLL_SECONDS:
            last = time.monotonic()
            board.write.remote(digest, done / max(1, total))

    return attempt(task, report)


def _board(ray: Any) -> Any:
    """Start a process to which workers write how far their cells are."""

    class Board:  # in here, so that Ray sends its code, and the process need not import this package
        def __init__(self) -> None:
            self.shares: dict[str, float] = {}

        def write(self, digest: str, share: float) -> None:
            self.shares[digest] = share

        def read(self) -> dict[str, float]:
            return self.shares

    return ray.remote(num_cpus=0)(Board).remote()


def _shares(ray: Any, board: Any) -> dict[str, float]:
    try:
        shares: dict[str, float] = ray.get(board.read.remote(), timeout=_POLL_SECONDS)
    except ray.exceptions.RayError:  # progress is not worth an error
        return {}
    return shares


@contextmanager
def _connected(cluster: Cluster) -> Iterator[Any]:
    """Yield ray, connected: as it is already, else to the cluster, or to one on this machine that ends with the block.

    Raises:
        ClusterError: the cluster can't be reached.
    """
    with _environment(cluster):
        ray = _import_ray(cluster)
        if ray.is_initialized():
            yield ray
            return
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "critical"}
        try:
            if cluster.address is None:
                ray.init(address="local", include_dashboard=False, **quiet)
            else:
                ray.init(address=cluster.address, **quiet)
        except Exception as error:  # ConnectionError, RuntimeError, ValueError, gRPC's own
            raise _unreachable(cluster.address, error) from error
        try:
            yield ray
        finally:
            ray.shutdown()


def _check_reachable(address: str) -> None:
    """Check that something answers at HOST:PORT: Ray itself would try for ever."""
    found = re.fullmatch(r"(?:ray://)?(.+):(\d+)", address)
    if found:
        try:
            socket.create_connection((found[1].strip("[]"), int(found[2])), timeout=_REACH_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise _unreachable(address, error) from error


def _unreachable(address: str | None, error: Exception) -> ClusterError:
    where = "be started on this machine" if address is None else f"be reached at {address}"
    return ClusterError(f"Ray can't {where} ({str(error).strip().partition(chr(10))[0]}).")


def _import_ray(cluster: Cluster) -> Any:
    with _environment(cluster):  # ray reads some of it when it is imported
        require(("ray",), "sweep")
        import ray
        import ray.exceptions

        return ray


@contextmanager
def _environment(cluster: Cluster) -> Iterator[None]:
    """Within the block, and in processes started there, Ray sends nothing about its use, and stays on this machine."""
    changes = _LOCAL_ENVIRONMENT if cluster.address is None else {"RAY_USAGE_STATS_ENABLED": "0"}
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _check_resources(ray: Any, cluster: Cluster, tell: Tell) -> None:
    """Check that a machine has what a cell needs: on a machine of its own Ray would wait for ever."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(m.get("CPU", 0) >= cluster.cpus and m.get("GPU", 0) >= cluster.gpus for m in machines):
        return
    lacking = f"no machine has the {cluster.cpus} cores and {cluster.gpus:g} GPUs that a cell is to have"
    if cluster.address is None:
        cores, gpus = machines[0].get("CPU", 0), machines[0].get("GPU", 0)
        raise ClusterError(f"{lacking}: this one has {cores:g} cores and {gpus:g} GPUs; lower cpus or gpus of [ray].")
    tell(f"{lacking}; waiting for one to join the cluster.")
