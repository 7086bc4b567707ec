"""Reconstruction at a granularity: score modules, merge neighbours, reconstruct, and check what was gained."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from quiesce.errors import RecipeError
from quiesce.oscillation.capacity import modcap
from quiesce.oscillation.granularity import (
    Groups,
    default_k,
    descent,
    differentials,
    merge,
    most_merges,
    scheme_groups,
    select,
)
from quiesce.oscillation.schemes import resolve_scheme
from quiesce.progress import Progress
from quiesce.quant.fake_quantize import restore
from quiesce.recipe import GranularityRecipe
from quiesce.reconstruct.guard import Guard
from quiesce.reconstruct.loop import Job, Pass, module_pass
from quiesce.reconstruct.streams import Network

DATA_DEPENDENT = ("loss", "loss-descent", "log-ratio")
"""Methods whose scores are the losses of a block pass."""
FEWEST_STEPS = 20
"""Steps below which a pass tells little about a longer one."""
FASTEST_ROUNDING = 0.1
"""Largest learning rate of V that a measuring pass is given, unless the recipe's is larger: higher ones rank no better
(docs/performance.md)."""


@dataclass
class Proposal:
    """The merges that a method asks for, and the numbers they come from."""

    groups: Groups
    capacities: list[float] = field(default_factory=list)
    differentials: list[float] = field(default_factory=list)


@dataclass
class Outcome:
    """A granularity's final pass, and how it came about.

    Merges are decided either by full passes, of which ``kept`` is the last or ``block``, or by measuring passes, behind
    which ``kept`` is the only full one.
    """

    kept: Pass
    seconds: float
    proposal: Proposal
    merges: list[list[str]]
    """All merged units that were asked for, by module names, over all passes."""
    guard: dict[str, Any] | None
    block: Pass | None
    """The full block pass it relied on, if there is one."""
    block_seconds: float
    """The part of ``seconds`` that the block pass took."""
    reused_seconds: float
    measuring_steps: int = 0
    """Steps of a module in measuring passes; 0 where there were none."""
    measuring_seconds: float = 0.0
    """The part of ``seconds`` that the measuring passes took."""


def propose(job_modules: list[str], recipe: GranularityRecipe, capacities: list[float]) -> Proposal:
    """Return the units that ``recipe`` asks for, from the modules' capacities (pure; capacities are losses or ModCap).

    Raises:
        RecipeError: the scheme does not fit the network, or k is too large for it.
    """
    single: Groups = [[i] for i in range(len(job_modules))]
    if recipe.method == "scheme":
        assert recipe.scheme is not None
        return Proposal(scheme_groups(job_modules, resolve_scheme(recipe.scheme)))
    pairs = differentials(capacities, recipe.method)
    if recipe.method == "loss-descent":
        mask = descent(capacities, recipe.tolerance, [1] * len(single), recipe.max_modules)
    else:
        most = most_merges(len(single), recipe.max_modules)
        k = min(default_k(len(pairs)), most) if recipe.k is None else recipe.k
        if k > len(pairs):
            raise RecipeError(
                f"granularity.k is {k}, and {len(single)} modules have {len(pairs)} pairs; give a smaller k."
            )
        mask = select(pairs, k, recipe.lam, recipe.max_modules)
    return Proposal(merge(single, mask), capacities, pairs)


def check_granularity(job_modules: list[str], recipe: GranularityRecipe) -> None:
    """Raise what :func:`propose` would raise, before any optimization."""
    if recipe.method not in ("layer", "block"):
        propose(job_modules, recipe, [float(i) for i in range(len(job_modules))])


def block_pass(job: Job, progress: Progress) -> Pass:
    """Reconstruct every module as a unit of its own."""
    return module_pass(job, [[i] for i in range(len(job.modules))], progress)


def merged_pass(job: Job, recipe: GranularityRecipe, progress: Progress, block: Pass | None) -> Outcome:
    """Reconstruct at the granularity of ``recipe``, on top of ``block``, a block pass of the same job, if there is one,
    without overlap.

    When the scores or the guard need a block pass and there is none, a short one is made, merges are chosen and tried
    by passes as short (``recipe.measuring``), and what came of it is reconstructed from the calibrated state, once, on
    all images: there is nothing left to decide, so none is held out. Passes that decide have no overlap. The network
    is left in the state of the outcome's ``kept`` pass.
    """
    began = job.clock()
    if not (recipe.guard or recipe.method in DATA_DEPENDENT):
        return _decide(job, recipe, progress, None if job.overlap else block)
    deciding = measuring_job(job, recipe.measuring) if block is None else job
    if deciding.reconstruction.steps == job.reconstruction.steps and not job.overlap:
        return _decide(job, recipe, progress, block)
    progress.later = job.reconstruction.steps * sum(job.learns(module) for module in job.modules)
    decided = _decide(replace(deciding, overlap=0), recipe, progress, block)
    progress.later, measured = 0, job.clock()
    return replace(
        decided,
        kept=module_pass(replace(job, images=job.all_images), decided.kept.groups, progress),
        block=None,
        seconds=job.clock() - began,
        block_seconds=0.0,
        reused_seconds=0.0,
        measuring_steps=deciding.reconstruction.steps,
        measuring_seconds=measured - began,
    )


def measuring_job(job: Job, share: float) -> Job:
    """Return ``job`` with that ``share`` of the steps, at rates as many times higher, so that all still travels as far;
    within the bounds of :data:`FEWEST_STEPS` and :data:`FASTEST_ROUNDING`."""
    recipe = job.reconstruction
    steps = min(recipe.steps, max(FEWEST_STEPS, round(share * recipe.steps)))
    faster = max(1.0, min(recipe.steps / steps, FASTEST_ROUNDING / recipe.rounding_lr))
    return replace(job, reconstruction=recipe.at_pace(steps, faster))


def _decide(job: Job, recipe: GranularityRecipe, progress: Progress, block: Pass | None) -> Outcome:
    """Score, merge, reconstruct, and keep what the guard keeps, all at the job's steps."""
    began = job.clock()
    given_seconds = 0.0 if block is None else block.seconds
    if block is None and (recipe.guard or recipe.method in DATA_DEPENDENT):
        block = block_pass(job, progress)
    scores = modcap(job.network.gm, job.modules, recipe.alpha)
    if recipe.method in DATA_DEPENDENT and block is not None:
        scores = [loss.absolute for loss in block.losses]
    proposal = propose([m.name for m in job.modules], recipe, scores)
    guard = None
    if recipe.guard:
        view = Network(job.network.gm, processes=job.network.processes)
        guard = Guard(view, job.inputs, job.images, job.recipe.calibration_batch)
    final, merges, trials = _passes(job, recipe, progress, proposal.groups, block, guard)
    report, kept = _final_comparison(job, guard, trials, final, block)
    restore(job.network.gm, kept.state)
    seconds = job.clock() - began + given_seconds
    names = [[job.modules[i].name for i in group] for group in merges]
    block_seconds = 0.0 if block is None else block.seconds
    return Outcome(kept, seconds, proposal, names, report, block, block_seconds, final.reused_seconds)


def _passes(
    job: Job, recipe: GranularityRecipe, progress: Progress, groups: Groups, block: Pass | None, guard: Guard | None
) -> tuple[Pass, Groups, list[Any]]:
    """One pass, or for loss-descent as many as it takes until no loss falls from a unit to the next."""
    result = module_pass(job, groups, progress, block, guard)
    merges, trials = _merged(groups), list(result.trials)
    tried = {tuple(group) for group in merges}
    while recipe.method == "loss-descent":
        losses = [result.losses[group[-1]].absolute for group in result.groups]
        sizes = [len(group) for group in result.groups]
        again = merge(result.groups, descent(losses, recipe.tolerance, sizes, recipe.max_modules))
        again = _without(again, tried, result.groups)
        new = [g for g in _merged(again) if tuple(g) not in tried]
        if not new:
            break
        result = module_pass(job, again, progress, result, guard)
        merges, trials = merges + new, trials + result.trials
        tried |= {tuple(group) for group in new}
    return result, merges, trials


def _without(groups: Groups, tried: set[tuple[int, ...]], parts: Groups) -> Groups:
    """Split groups again that were tried, and are not part of the network, into the parts it has."""
    kept: Groups = []
    for group in groups:
        if tuple(group) in tried and group not in parts:
            kept += [part for part in parts if part[0] in group]
        else:
            kept.append(group)
    return kept


def _merged(groups: Groups) -> Groups:
    return [group for group in groups if len(group) > 1]


def _final_comparison(
    job: Job, guard: Guard | None, trials: list[Any], final: Pass, block: Pass | None
) -> tuple[dict[str, Any] | None, Pass]:
    """Compare the finished network with the plain block result on held-out images; the better one is kept."""
    if guard is None or block is None:
        return None, final
    restore(job.network.gm, final.state)
    merged_error = guard.error_of_network()
    restore(job.network.gm, block.state)
    block_error = guard.error_of_network()
    keep_merged = merged_error < block_error
    report = {
        "holdout": guard.images,
        "trials": [
            {
                "modules": t.modules,
                "merged_error": t.merged_error,
                "unmerged_error": t.unmerged_error,
                "accepted": t.accepted,
            }
            for t in trials
        ],
        "final": {"merged_error": merged_error, "block_error": block_error},
        "kept": "merged" if keep_merged else "block",
    }
    return report, final if keep_merged else block
