"""Measure whether short passes choose and judge merges as full ones do, and what a loss-guided run costs.

    apt install dataset-fashion-mnist
    pip install timm scipy
    python benchmarks/measuring.py [--networks demo vit] [--seeds 0 1 2] [--steps 500]
    python benchmarks/measuring.py --table

For each network and seed: a plain block run; granularity ``loss`` decided by full passes (``measuring = 1``) and by
short ones; then every pair of neighbours is tried as a merged unit on top of the block pass, by full and by short
passes, so that the guard's decisions can be compared pair by pair. 1,024 calibration images are drawn by seed from
Fashion-MNIST's training images. As in ``train_demo.py``, choices rest on 2,000 tuning images; the 10,000 test images
are only measured on. Costs are CPU seconds of one thread, of reconstruction alone. Rows are written as soon as they are
there, and a second run goes on behind the last one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from scipy.stats import kendalltau, spearmanr
from torch import Tensor, nn

from quiesce import Recipe
from quiesce.demo import load_network, normalize
from quiesce.graph.unit import extract
from quiesce.oscillation.granularity import Groups
from quiesce.outputs import write_text
from quiesce.pipeline import job_of
from quiesce.preparation import Prepared, prepare
from quiesce.progress import Progress
from quiesce.quant.fake_quantize import restore, snapshot
from quiesce.reconstruct.granular import Outcome, measuring_job, merged_pass, propose
from quiesce.reconstruct.guard import Guard, Trial
from quiesce.reconstruct.loop import Job, Pass, _GroupWalk, module_pass
from quiesce.reconstruct.streams import Network
from quiesce.result import hardware, versions
from train_demo import DATA, read_set, split, tensors
from vision_transformer import trained

OUT = Path(__file__).parent / "results" / "measuring.json"
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {"demo": (load_network, 2), "vit": (trained, 3)}
"""Networks, and the bits of their weights; activations have 4."""
CALIBRATION = 1_024
SHARES = (0.05, 0.1, 0.2)
WARM_SHARE = 0.1
"""Share at which the final pass is made a second time, starting from the short passes' rounding and step sizes."""
WHOLE = ((0.1, False, True), (0.1, False, False), (0.1, True, False), (1.0, False, False))
"""Whole runs that are timed: measuring, steps_per_module, guard."""
TRIALS = ("", ", usual rates")
"""Trials of merges as the package makes them, and at the rates of long passes: rows of an earlier form of the code."""
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=500, help="steps a module (default: the preset's)")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--whole", action="store_true", help="only time whole runs with the first seed, one by one")
    parser.add_argument("--table", action="store_true", help="only print the tables of the rows that are there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    record: dict[str, Any] = {"versions": versions(), "hardware": hardware(torch.device("cpu")), "rows": []}
    if options.out.exists():
        record["rows"] = json.loads(options.out.read_text(encoding="utf-8"))["rows"]
    known = {(row["network"], row["seed"]) for row in record["rows"] if row["method"] != "whole"}
    if options.whole:
        for network in options.networks:
            record["rows"] += Comparison(network, options.seeds[0], options.steps).whole_runs()
        write_text(options.out, json.dumps(record, indent=1) + "\n")
        return
    for network, seed in itertools.product(options.networks, options.seeds):
        if options.table or (network, seed) in known:
            continue
        record["rows"] += list(Comparison(network, seed, options.steps).rows())
        write_text(options.out, json.dumps(record, indent=1) + "\n")
    print(tables(record["rows"]))


class Comparison:
    """All rows of one network and seed."""

    def __init__(self, network: str, seed: int, steps: int) -> None:
        load, bits = NETWORKS[network]
        self.model = load()
        self.labels = {"network": network, "seed": seed, "steps": steps}
        self.recipe = Recipe.preset(
            "qdrop-fast",
            weight_bits=bits,
            activation_bits=4,
            steps=steps,
            seed=seed,
            granularity="loss",
            measuring=1.0,
            steps_per_module=False,
        )
        assert self.recipe.granularity is not None
        self.granularity = self.recipe.granularity
        self.finals: dict[str, tuple[Pass, float]] = {}
        images, labels = read_set(DATA, "train")
        parts = split(len(images), 0)
        drawn = torch.randperm(len(parts["training"]), generator=torch.Generator().manual_seed(seed))[:CALIBRATION]
        calibration = normalize(torch.from_numpy(images[parts["training"][drawn.numpy()]]))
        self.evaluation = {
            "tuning": tensors(images, labels, parts["tuning"]),
            "test": tensors(*read_set(DATA, "t10k"), slice(None)),
        }
        self.prepared: Prepared = prepare(self.model, calibration, self.recipe)
        self.job: Job = job_of(self.prepared, self.recipe)
        self.guard = Guard(Network(self.prepared.graph), self.job.inputs, self.job.images, 64)

    def rows(self) -> Iterator[Row]:
        block = self._final([[i] for i in range(len(self.job.modules))])
        yield self._row("block", *block)
        yield self._full(*block)
        yield self._pairs("pairs", 1.0, self.job, block[0])
        for share in SHARES:
            yield from self._measured(share)

    def whole_runs(self) -> list[Row]:
        """Time what a user would run, nothing shared: with the guard, and without, so that all merges are kept."""
        _, cost = timed(lambda: self._final([[i] for i in range(len(self.job.modules))]))
        found: list[Row] = [self.labels | {"method": "whole", "run": "block", "cpu_seconds": cost}]
        for share, per_module, guard in WHOLE:
            granularity = replace(self.granularity, measuring=share, steps_per_module=per_module, guard=guard)
            job = replace(self.job, recipe=replace(self.recipe, granularity=granularity))
            outcome, cost = timed(partial(merged_pass, job, granularity, Progress(), None))
            settings = {"measuring": share, "steps_per_module": per_module, "guard": guard}
            found.append(
                self.labels | settings | {"method": "whole", "cpu_seconds": cost, "units": len(outcome.kept.groups)}
            )
            self._say(found[-1] | {"times blocks": cost / found[0]["cpu_seconds"]})
        return found

    def _final(self, groups: Groups) -> tuple[Pass, float]:
        """Reconstruct at all steps from the calibrated state, and return the CPU seconds that it took; once for equal
        units, as the same seed gives the same pass."""
        key = str(groups)
        if key not in self.finals:
            self.finals[key] = timed(lambda: module_pass(self.job, groups, Progress()))
        return self.finals[key]

    def _full(self, block: Pass, before: float) -> Row:
        """The run that full passes decide."""
        outcome, cost = timed(lambda: merged_pass(self.job, self.granularity, Progress(), block))
        return self._row("loss", outcome.kept, before + cost) | self._choice(1.0, before + cost, outcome)

    def _measured(self, share: float) -> Iterator[Row]:
        """The runs that short passes decide, and each pair on top of their block pass."""
        short, granularity = measuring_job(self.job, share), replace(self.granularity, measuring=1.0)
        outcome, cost = timed(lambda: merged_pass(short, granularity, Progress(), None))
        assert outcome.block is not None
        done, after = self._final(outcome.kept.groups)
        choice = self._choice(share, cost, outcome)
        yield self._row("loss", done, cost + after) | choice
        if share == WARM_SHARE:
            warm, after = timed(lambda: self._warm(outcome.kept))
            yield self._row("loss, warm", warm, cost + after) | choice
        yield self._pairs("pairs", share, short, outcome.block) | self._scores(outcome.block)

    def _warm(self, short: Pass) -> Pass:
        """The final pass, with every unit started from what the short passes left."""
        walk = _WarmWalk(self.job, Progress(), short, None)
        for group in short.groups:
            walk.take(group)
        return Pass(snapshot(self.job.network.gm), walk.done, walk.records, walk.losses, 0.0)

    @staticmethod
    def _choice(share: float, cost: float, outcome: Outcome) -> Row:
        return {
            "measuring": share,
            "deciding_cpu_seconds": cost,
            "merges": outcome.merges,
            "guard": outcome.guard,
            "units": outcome.kept.groups,
        }

    def _row(self, method: str, done: Pass, cost: float) -> Row:
        """Evaluate the network in the state of ``done``."""
        restore(self.prepared.graph, done.state)
        row = self.labels | {"method": method, "cpu_seconds": cost, "held_out_error": self.guard.error_of_network()}
        for name, (images, labels) in self.evaluation.items():
            row[name] = self._top1(normalize(images), labels)
        return self._say(row | self._scores(done))

    def _scores(self, done: Pass) -> Row:
        losses = [loss.absolute for loss in done.losses]
        names = [m.name for m in self.job.modules]
        return {"losses": losses, "differentials": propose(names, self.granularity, losses).differentials}

    @torch.no_grad()
    def _top1(self, images: Tensor, labels: Tensor) -> float:
        graph = self.prepared.network(self.recipe)
        logits = torch.cat([graph(batch)[0] for batch in images.split(500)])
        return 100 * (logits.argmax(1) == labels).double().mean().item()

    def _pairs(self, method: str, share: float, job: Job, block: Pass) -> Row:
        """Try each pair of neighbours alone, as the guard does, on top of ``block``."""
        trials: list[Trial] = []
        restore(self.prepared.graph, block.state)
        walk = _GroupWalk(job, Progress(), block, self.guard)
        for i in range(len(job.modules) - 1):
            before, held = walk.streams, len(walk.losses)
            walk._try([i, i + 1])
            trials.append(walk.trials[-1])
            restore(self.prepared.graph, block.state)
            walk.streams, walk.losses, walk.changed = before, walk.losses[:held], False
            walk.advance(job.modules[i].stop)
        errors = [[t.merged_error, t.unmerged_error] for t in trials]
        return self._say(self.labels | {"method": method, "measuring": share, "errors": errors})

    def _say(self, row: Row) -> Row:
        print({k: v for k, v in row.items() if k not in ("losses", "differentials")}, flush=True)
        return row


class _WarmWalk(_GroupWalk):
    def take(self, group: list[int]) -> None:
        assert self.previous is not None
        unit = self.unit(group)
        restore(extract(self.job.network.gm, self.job.network.nodes, unit.start, unit.stop), self.previous.state)
        self._keep(group, self.optimize(unit, self._names(group), self._steps(group), True, self.progress))


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """Return what ``work`` returns, and the CPU seconds it took."""
    began = time.process_time()
    return work(), time.process_time() - began


def tables(rows: list[Row]) -> str:
    """How short passes agree with full ones, and what runs cost and give; means over the seeds."""
    rows = [row for row in rows if row["method"] != "whole"]
    networks = list(dict.fromkeys(row["network"] for row in rows))
    agreement = [line for network in networks for line in _agreement([r for r in rows if r["network"] == network])]
    runs = [line for network in networks for line in _runs([r for r in rows if r["network"] == network])]
    return "\n".join(
        [
            "| Network | Against full passes | ρ losses | ρ differentials | τ differentials | Same pairs chosen "
            "| ρ gains, all pairs | Same sign, all pairs | Same decisions of the guard |",
            "|---|---|--:|--:|--:|--:|--:|--:|--:|",
            *agreement,
            "",
            "| Network | Run | CPU s | × blocks | Deciding × | Hold-out error | Tuning % | Test % | Units, by seed |",
            "|---|---|--:|--:|--:|--:|--:|--:|---|",
            *runs,
        ]
    )


def _agreement(rows: list[Row]) -> list[str]:
    """Short against full passes of the same seed, and full passes of different seeds: as near as chance lets it be."""
    full = {seed: _found(rows, seed, 1.0, "") for seed in sorted({r["seed"] for r in rows})}
    sides = {
        f"{share:.0%} of the steps{trials}": [(_found(rows, seed, share, trials), full[seed]) for seed in full]
        for trials, share in itertools.product(TRIALS, SHARES)
        if any(r["method"] == "loss" + trials and r["measuring"] == share for r in rows)
    }
    if len(full) > 1:
        sides["full, another seed"] = [(full[a], full[b]) for a, b in itertools.combinations(full, 2)]
    return [_agreement_line(rows[0]["network"], name, pairs) for name, pairs in sides.items()]


def _found(rows: list[Row], seed: int, share: float, trials: str) -> Row:
    """Losses, differentials, merges and gains of trials, as passes with ``share`` of the steps found them."""
    mine = {(r["method"], r.get("measuring")): r for r in rows if r["seed"] == seed}
    pairs, chosen = mine["pairs" + trials, share], mine["loss" + trials, share]
    scores = mine["block", None] if share == 1 else pairs
    guarded = {tuple(t["modules"]): t["accepted"] for t in chosen["guard"]["trials"]}
    return {
        "losses": scores["losses"],
        "differentials": scores["differentials"],
        "pairs": {pair for merge in chosen["merges"] for pair in itertools.pairwise(merge)},
        "gains": [1 - merged / unmerged for merged, unmerged in pairs["errors"]],
        "guarded": guarded | {("kept",): chosen["guard"]["kept"] == "merged"},
    }


def _agreement_line(network: str, name: str, sides: list[tuple[Row, Row]]) -> str:
    def each(key: str, measure: Callable[[Any, Any], Any]) -> str:
        found = [measure(a[key], b[key])[0] for a, b in sides]
        return f"{statistics.mean(found):.2f} (≥ {min(found):.2f})"

    chosen = sum(len(a["pairs"] & b["pairs"]) for a, b in sides), sum(len(b["pairs"]) for _, b in sides)
    both = [(a["guarded"][key], b["guarded"][key]) for a, b in sides for key in a["guarded"].keys() & b["guarded"]]
    signs = [(x > 0) == (y > 0) for a, b in sides for x, y in zip(a["gains"], b["gains"], strict=True)]
    return (
        f"| {network} | {name} | {each('losses', spearmanr)} | {each('differentials', spearmanr)} "
        f"| {each('differentials', kendalltau)} | {chosen[0]} of {chosen[1]} | {each('gains', spearmanr)} "
        f"| {sum(signs)} of {len(signs)} | {sum(x == y for x, y in both)} of {len(both)} |"
    )


def _runs(rows: list[Row]) -> list[str]:
    kinds = [(r["method"], r.get("measuring")) for r in rows if not r["method"].startswith("pairs")]
    blocks = {r["seed"]: r["cpu_seconds"] for r in rows if r["method"] == "block"}
    lines = []
    for method, share in dict.fromkeys(kinds):
        some = [r for r in rows if (r["method"], r.get("measuring")) == (method, share)]
        name = method if share is None else f"{method}, decided at {share:.0%}"
        decided = [r["deciding_cpu_seconds"] / blocks[r["seed"]] for r in some if share is not None and share < 1]
        units = [str(len(r["units"])) if "units" in r else "–" for r in some]
        cells = [
            f"{statistics.mean(r['cpu_seconds'] for r in some):.0f}",
            f"{statistics.mean(r['cpu_seconds'] / blocks[r['seed']] for r in some):.2f}",
            f"{statistics.mean(decided):.2f}" if decided else "–",
            f"{statistics.mean(r['held_out_error'] for r in some):.4f}",
            _spread([r["tuning"] for r in some]),
            _spread([r["test"] for r in some]),
            ", ".join(units),
        ]
        lines.append(f"| {rows[0]['network']} | {name} | {' | '.join(cells)} |")
    return lines


def _spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


if __name__ == "__main__":
    main()
