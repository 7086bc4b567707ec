from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from quiesce.cli.commands import main
from quiesce.sweep.plan import Sweep
from sweeps import ONE_CELL, change_images, keep

Read = Callable[..., Sweep]
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["sweep", *arguments])
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def test_a_dry_run_counts_the_cells_and_writes_nothing(read: Read, place: Path, command: Command) -> None:
    read()
    code, out, err = command("../sweep.toml", "--out", "out", "--dry-run", "--address", "head:6379")
    assert code == 0, err
    expected = "8 cells (1 network, 2 bit-widths, 2 methods, 2 seeds): 0 finished, 8 to run at head:6379, 1 core each\n"
    assert out.startswith(expected) and out.count("to run") == 9
    assert not Path("out").exists()


@pytest.mark.usefixtures("without_ray")
class TestWithoutRay:
    def test_a_finished_sweep_is_shown(self, read: Read, place: Path, command: Command) -> None:
        keep(read(*ONE_CELL[1:]), place / "out", 0, 1)
        code, out, err = command("../sweep.toml", "--out", "../out")
        assert (code, err) == (0, "")
        rows = [json.loads(line) for line in (place / "out/results.jsonl").read_text().splitlines()]
        assert [row["bits"] for row in rows] == ["W2A4", "W4A32"]
        for row in rows:
            line = next(line for line in out.splitlines() if row["bits"] in line)
            assert f"{row['top1']:.2f}" in line and row["method"] in line
        assert "<svg" in (place / "out/report.html").read_text(encoding="utf-8")
        for name in ("results.csv", "results.jsonl", "report.html"):
            assert f"../out/{name}\n" in out

    def test_cells_of_other_settings_are_told(self, read: Read, place: Path, command: Command) -> None:
        keep(read(*ONE_CELL[1:]), place / "out", 0, 1)
        read(*ONE_CELL)
        code, out, _ = command("../sweep.toml", "--out", "../out")
        assert code == 0 and "1 finished cells in ../out are of other settings or versions, and in no table" in out

    def test_missing_cells_need_it(self, read: Read, place: Path, command: Command) -> None:
        read()
        code, _, err = command("../sweep.toml", "--out", "out")
        assert code == 1 and "error: ray is not installed; install it with: pip install quiesce[sweep]" in err
        assert not Path("out").exists()

    def test_data_that_has_changed_between_cells_is_an_error(
        self, read: Read, place: Path, command: Command, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sweep = read(*ONE_CELL[1:])
        keep(sweep, place / "out", 0)
        change_images(place, monkeypatch)
        keep(sweep, place / "out", 1)
        code, _, err = command("../sweep.toml", "--out", "../out")
        assert code == 1 and "error: the calibration of net is not the same in all cells" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("none.toml", "--out", "out"), "sweep file none.toml can't be read"),
        (("../sweep.toml", "--out", ".."), "holds other things than a sweep"),
        (("../sweep.toml", "--out", "../sweep.toml"), "is a file"),
    ],
)
def test_bad_input(place: Path, command: Command, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = command(*arguments)
    assert code == 1 and out == "" and err.startswith("error: ") and message in err and err.count("\n") == 1


def by_ctrl_c() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (by_ctrl_c, 130),
        (lambda: signal.raise_signal(signal.SIGINT), 130),
        (lambda: signal.raise_signal(signal.SIGTERM), 143),
    ],
    ids=["as an exception", "SIGINT", "SIGTERM"],
)
def test_an_interruption_says_how_to_go_on(
    read: Read,
    place: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    stop: Callable[[], None],
    expected: int,
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        stop()

    keep(read(*ONE_CELL[1:]), place / "out", 0)
    monkeypatch.setattr("quiesce.sweep.run.run_sweep", interrupted)
    code, _, err = command("../sweep.toml", "--out", "../out")
    assert code == expected and "Traceback" not in err
    assert "interrupted: 1 of 2 cells are finished and kept in ../out; the same command runs the others.\n" in err


@pytest.mark.long
def test_ctrl_c_and_the_same_command_again(read: Read, place: Path) -> None:
    """Ctrl-C reaches the process and all that Ray has started; nothing stays behind, and the same command goes on."""
    broken = '[[network]]\nname = "broken"\nmodel = "sweep_source:raises"\n[grid]'
    read(*ONE_CELL[1:], ("[grid]", broken), ("steps = 2", "steps = 400"))
    command = [sys.executable, "-m", "quiesce", "sweep", "sweep.toml", "--out", "out"]
    with (place / "said").open("w") as said:
        process = subprocess.Popen(command, cwd=place, stderr=said, stdout=said, start_new_session=True)
        wait_for(lambda: len(list(place.glob("out/cells/net*"))) == 1)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 130
    assert "interrupted: 1 of 4 cells are finished and kept in out" in (place / "said").read_text()
    wait_for(lambda: not sessions_of(process.pid))
    (kept,) = place.glob("out/cells/net*/result.json")
    before = kept.stat().st_mtime_ns
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "2 of 4 cells failed: calling 'sweep_source:raises' without arguments raised SystemError" in done.stderr
    assert "4 cells (2 networks, 2 bit-widths, 1 method, 1 seed): 1 finished, 3 to run" in done.stdout
    assert "worker" not in done.stdout  # what Ray says stays out of the results
    assert kept.stat().st_mtime_ns == before and len(list(place.glob("out/cells/net*"))) == 2


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def sessions_of(process: int) -> list[str]:
    """Processes of the session that ``process`` has led."""
    listed = subprocess.run(["ps", "-o", "pid=", "-s", str(process)], capture_output=True, text=True, check=False)
    return listed.stdout.split()
