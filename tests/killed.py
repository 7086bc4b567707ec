"""Runs that die: in children of a process that has imported everything, at random, or at each step of a commit.

As a program, it prints what happened as JSON: ``killed.py commands FOLDER SEED KILLS`` or ``killed.py commits FOLDER``.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from quiesce.cli.commands import main
from quiesce.pipeline import run
from quiesce.preparation import prepare
from quiesce.reconstruct.journal import finished_units
from tiny import Chain, images, recipe

COMMAND = (
    "quantize tiny:Chain --calibration tiny:images --preset qdrop-fast --weight-bits 2 --granularity loss --seed 2 "
    "--steps 40 --set batch_size=8 --set weights.range=minmax --set activations.range=minmax"
)
STEPS_OF_A_COMMIT = 4
"""Write aside, force to the disk, rename, force the folder to the disk; ``run.json`` is written so, too."""


def child(work: Callable[[], object], log: Path) -> int:
    """Begin ``work`` in a child process, whose output goes to ``log``, and return its process id."""
    process = os.fork()
    if process:
        return process
    code: object = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        torch.set_num_threads(1)  # also makes torch notice that it was forked, before it has threads that race for that
        work()
        code = 0
    except SystemExit as ended:
        code = ended.code or 0
    finally:
        os._exit(code if isinstance(code, int) else 1)


def ended(process: int) -> bool:
    """Tell whether a child has ended, which stays to be waited for."""
    return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def wait(process: int) -> int:
    """Return the exit code of a child, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def quantize(place: Path) -> None:
    main([*COMMAND.split(), "--out", str(place / "out")])


def killed_commands(folder: Path, seed: int, kills: int) -> dict[str, Any]:
    """Quantize to ``folder/whole/out`` at one go, and to ``folder/0/out``, … with SIGKILLs on the way.

    A kill comes at a random moment of the time of preparation; or of a unit's time behind the opening of the journal,
    or behind the next commit. When a network is finished before all kills are done, another one is begun.
    """
    prepare(Chain(1), images(32), recipe())  # imports all that is imported late
    log = folder / "log"
    first, unit = _durations(folder / "whole", log)
    draw, found, rounds = random.Random(seed), [], 0
    while True:
        place = folder / f"{rounds}"
        if len(found) < kills:
            found.append(_kill(place, log, draw, first, unit))
        elif wait(child(lambda: quantize(place), log)):  # noqa: B023
            raise RuntimeError(log.read_text())
        if (place / "out").exists():
            rounds += 1
            if len(found) == kills:
                return {"finished": found, "rounds": rounds}


def _durations(place: Path, log: Path) -> tuple[float, float]:
    """Quantize, and return the seconds until the first unit was finished, and those of each other unit."""
    began, progress = time.monotonic(), place / "out.progress"
    process, first, units = child(lambda: quantize(place), log), 0.0, 0
    while not ended(process):
        units = max(units, finished_units(progress))
        first = first if units else time.monotonic() - began
        time.sleep(0.002)
    if wait(process):
        raise RuntimeError(log.read_text())
    return first, (time.monotonic() - began - first) / units


def _kill(place: Path, log: Path, draw: random.Random, first: float, unit: float) -> list[int]:
    """Begin to quantize and kill it; return the number of finished units before and after. It may end before."""
    progress = place / "out.progress"
    before = finished_units(progress)
    opened = progress / "run.json"
    earlier = opened.stat().st_ino if opened.exists() else 0
    events: list[Callable[[], bool]] = [
        lambda: True,
        lambda: opened.exists() and opened.stat().st_ino != earlier,
        lambda: finished_units(progress) > before,
    ]
    (event,) = draw.choices(events, (0.2, 0.4, 0.4))
    delay = draw.uniform(0, first if event is events[0] else unit)
    process = child(lambda: quantize(place), log)
    while not (event() or ended(process)):
        time.sleep(0.002)
    time.sleep(delay)
    os.kill(process, signal.SIGKILL)
    wait(process)
    return [before, finished_units(progress)]


def die_at(step: int) -> None:
    """Let this process end in front of a step of its writing, or in the middle of it where it writes a file."""
    counter = count(1)

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            if next(counter) == step:
                if function is write_bytes:
                    write_bytes(arguments[0], arguments[1][: len(arguments[1]) // 2])
                os._exit(9)
            return function(*arguments)

        return wrapped

    write_bytes = Path.write_bytes
    Path.write_bytes, Path.replace, os.fsync = dying(Path.write_bytes), dying(Path.replace), dying(os.fsync)  # type: ignore


def died_in_commits(folder: Path) -> dict[str, Any]:
    """Let processes die at each step of writing ``run.json`` and of the next two commits, one step further each."""
    settings = recipe(granularity="loss", steps=3)
    prepared = prepare(Chain(6), images(32), settings)

    def work(name: str, step: int = 0) -> None:
        die_at(step)
        _, done = run(prepared, settings, progress_folder=folder / name)
        losses = torch.tensor([loss.absolute for loss in done.losses], dtype=torch.float64)
        save_file({**done.state, "losses": losses}, folder / f"{name}.safetensors")

    found = []
    for step in range(1, 3 * STEPS_OF_A_COMMIT + 1):
        code = wait(child(lambda: work("died", step), folder / "log"))  # noqa: B023
        found.append([code, finished_units(folder / "died")])
    codes = [wait(child(lambda: work(name), folder / "log")) for name in ("died", "whole")]  # noqa: B023
    return {"finished": found, "codes": codes, "log": (folder / "log").read_text()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    mode, place, *numbers = sys.argv[1:]
    done = died_in_commits(Path(place)) if mode == "commits" else killed_commands(Path(place), *map(int, numbers))
    sys.stdout.write(json.dumps(done))
