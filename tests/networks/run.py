"""Hold every network of catalogue.toml to the contract and write what was found as docs/coverage.md.

    make test-all-networks
    python tests/networks/run.py [--jobs N] [--only PATTERN …] [--keep] [--page]

Each network has a process of its own, with one thread, and its row is stored in benchmarks/results/coverage.json as
soon as it is there: a run that was stopped goes on where it was. Rows of another state of the package's source are
made again; --keep takes over those that passed. The exit status is 0 when no network failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from catalogue import Entry, read_catalogue  # noqa: E402
from quiesce.outputs import write_text  # noqa: E402

RESULTS, PAGE = ROOT / "benchmarks/results/coverage.json", ROOT / "docs/coverage.md"
LIMIT = 1800
"""Seconds a network may take."""
TITLES = {
    "timm": "timm",
    "torchvision": "torchvision, classification",
    "dense": "torchvision, segmentation and networks in detectors",
    "transformers": "Hugging Face transformers",
}
HEADER = (
    "| Family | Network | Parameters, M | Weight layers | Units | Block types | Largest unit | Seconds | Verdict |\n"
    "|---|---|--:|--:|--:|---|--:|--:|---|"
)
INTRODUCTION = """# Coverage

Written by `make test-all-networks`; don't edit it.

**{passed} of {total}** families of networks are quantized as they come from their library ({missing} not run): the
smallest network of every family of timm, of torchvision's networks for classification, segmentation and detection
([without their post-processing](detection.md)), and vision models of Hugging Face transformers. Weights and batch-norm
statistics are random, images are small, weights and activations have 4 bits.
What is checked of each:

- The network is captured with a free batch size, and captured and folded computes what it did.
- Every convolution and linear layer that runs is in the graph, and its weight is quantized; each is in one unit.
- Units, a layer or a block each, chain: what one reads is returned in front of it.
- No unit holds more than a quarter of the weight layers (three are always allowed).
- Every rounding and every step size gets a finite gradient that is not all zeros.
- Three steps can be taken on every unit; fifty lower the loss of one member of each block type, at one of five settings
  of learning rates, where its rounding matters.
- Hardened weights are on their integer grids.
- Saved, and loaded in another process, the network gives the same bits.

What is excepted is told under [Remarks](#remarks). Seconds are of one thread of a shared machine. The contract is
`tests/networks/contract.py`, the networks are `tests/networks/catalogue.toml`.
"""


def hold_one(name: str) -> None:
    """In a process of its own: hold a network to the contract and print its row as the last line."""
    from contract import hold

    entry = next(e for e in read_catalogue() if e.name == name)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row = hold(entry, Path(folder))
    print(json.dumps(asdict(row)))


def run_one(entry: Entry) -> dict[str, Any]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--hold", entry.name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return {"verdict": "failed", "reason": f"took more than {LIMIT} s"}
    if done.returncode == 0:
        return {"verdict": "passed", **json.loads(done.stdout.splitlines()[-1])}
    print(done.stderr[-4000:], file=sys.stderr)
    last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return {"verdict": "failed", "reason": last}


def source_digest() -> str:
    """A digest of the package's source and of the contract: rows made by others are out of date."""
    files = [*sorted((ROOT / "src/quiesce").rglob("*.py")), Path(__file__).parent / "contract.py"]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def run_all(entries: list[Entry], rows: dict[str, Any], jobs: int, keep: bool) -> None:
    digest, lock = source_digest(), threading.Lock()
    todo = [e for e in entries if not _is_known(rows.get(e.name), digest, keep)]

    def work(entry: Entry) -> None:
        row = run_one(entry) | {"source": digest}
        with lock:
            rows[entry.name] = row
            write_text(RESULTS, json.dumps(rows, indent=1, sort_keys=True) + "\n")
            left = sum(rows.get(e.name, {}).get("source") != digest for e in todo)
            print(f"{entry.name}: {row['verdict']} {row.get('reason', '')} ({left} to go)", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(work, todo))


def _is_known(row: dict[str, Any] | None, digest: str, keep: bool) -> bool:
    return row is not None and row["verdict"] == "passed" and (keep or row["source"] == digest)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Hold every network of catalogue.toml to the contract.")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="networks at a time (default: %(default)s)")
    parser.add_argument("--only", nargs="*", default=["*"], help="shell patterns of networks: timm-v*")
    parser.add_argument("--keep", action="store_true", help="keep rows that passed with another state of the source")
    parser.add_argument("--page", action="store_true", help="only write the page again")
    parser.add_argument("--hold", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = parse()
    if options.hold:
        hold_one(options.hold)
        return 0
    entries = read_catalogue()
    rows = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    chosen = [e for e in entries if any(fnmatchcase(e.name, pattern) for pattern in options.only)]
    if not options.page:
        run_all(chosen, rows, options.jobs, options.keep)
    write_text(PAGE, page(entries, rows))
    return int(any(rows.get(e.name, {}).get("verdict") != "passed" for e in chosen))


def page(entries: list[Entry], rows: dict[str, Any]) -> str:
    known = {e.name: rows[e.name] for e in entries if e.name in rows}
    passed = sum(row["verdict"] == "passed" for row in known.values())
    parts = [INTRODUCTION.format(passed=passed, total=len(entries), missing=len(entries) - len(known))]
    for library, title in TITLES.items():
        parts.append(f"\n## {title}\n\n{HEADER}")
        parts += [_line(e, known.get(e.name)) for e in entries if e.library == library]
    remarks = [line for e in entries for line in _remarks(e, known.get(e.name))]
    return "\n".join([*parts, "\n## Remarks\n", *(remarks or ["None."])]) + "\n"


def _line(entry: Entry, row: dict[str, Any] | None) -> str:
    name = entry.model_name.partition(":")[2]
    if row is None or row["verdict"] != "passed":
        return f"| {entry.family} | {name} | | | | | | | {'not run' if row is None else '**failed**'} |"
    cells = [
        entry.family,
        name,
        f"{row['parameters'] / 1e6:.1f}",
        f"{row['layers']}" + (f" ({len(row['float_layers'])} float)" if row["float_layers"] else ""),
        f"{row['units']}",
        _shortened(row["block_types"]),
        f"{row['largest']} ({row['largest'] / row['layers']:.0%})",
        f"{row['seconds']:.0f}",
        "passed",
    ]
    return f"| {' | '.join(cells)} |"


def _shortened(types: list[str]) -> str:
    """The first block types, and how many more there are."""
    shown = types[:1] + [t for i, t in enumerate(types[1:], 2) if len(", ".join(types[:i])) <= 20]
    return ", ".join(shown) + (f" +{len(types) - len(shown)}" if len(shown) < len(types) else "") or "–"


def _remarks(entry: Entry, row: dict[str, Any] | None) -> list[str]:
    """What is known of a network beforehand, and why it failed."""
    failed = {} if row is None or row["verdict"] == "passed" else {"failed": row["reason"]}
    large = {"large unit": entry.large_unit} if entry.large_unit else {}
    note = {"network": entry.note} if entry.note else {}
    excused = {f"`{pattern}`": why for pattern, why in {**entry.exceptions, **entry.no_gradient}.items()}
    floats = {"left float": "; ".join(row["float_layers"])} if row and row.get("float_layers") else {}
    said = {**failed, **note, **large, **floats, **excused}
    lines = [f"- {entry.name}, {what}: {why}." for what, why in said.items()]
    return [part for line in lines for part in textwrap.wrap(line, 118, subsequent_indent="  ")]


if __name__ == "__main__":
    sys.exit(main())
