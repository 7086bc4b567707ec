"""Reconstruction of a whole network: units in order, both streams carried from one to the next."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace

from torch import Tensor, fx

from quiesce.errors import MemoryLimitError, ModelError
from quiesce.graph.rewrite import let_gradients_through
from quiesce.graph.unit import Unit, boundary, joined, reach
from quiesce.memory import halved, is_out_of_memory
from quiesce.oscillation.granularity import Groups
from quiesce.oscillation.measure import ModuleLoss, module_loss
from quiesce.progress import Progress
from quiesce.quant.fake_quantize import WeightFakeQuantize, restore, snapshot
from quiesce.recipe import Recipe, ReconstructionRecipe
from quiesce.reconstruct.batches import Problem
from quiesce.reconstruct.guard import Guard, Trial
from quiesce.reconstruct.journal import Extent, Journal, digest_of
from quiesce.reconstruct.optimize import Course, optimize
from quiesce.reconstruct.plan import Needs, Sizes, reserve, step_images
from quiesce.reconstruct.streams import Network, Streams, Tensors
from quiesce.result import UnitRecord


@dataclass(frozen=True)
class Job:
    """What stays the same over all passes on one network."""

    network: Network
    modules: list[Unit]
    """The original modules: what losses are reported for and merged units are made of."""
    inputs: Tensors
    """All calibration images; the first ``images`` of them are optimized on, the rest is held out."""
    images: int
    together: int
    """Images that the network takes together."""
    initial: dict[str, Tensor]
    """The calibrated state with nearest rounding."""
    recipe: Recipe
    reconstruction: ReconstructionRecipe
    regularizer_weight: float | None
    """λ, or None where each unit has its own."""
    fisher: Tensors | None = None
    kernels: str = "eager"
    """How elementwise maths of steps runs: "fused", as compiled kernels, or "eager", and why."""
    graphs: bool = True
    """Steps on a GPU are captured as CUDA graphs where they can be."""
    journal: Journal | None = None
    """Where finished units are kept, and taken over from; None keeps nothing, as in all processes but the first."""
    first: int = 0
    """The number of the first image among those of all processes."""
    overlap: int = 0
    """Modules, or layers where units are layers, behind each unit that are optimized along with it."""

    def clock(self) -> float:
        """Return seconds, of which differences count: a unit that is taken over takes what it took at its time."""
        return time.perf_counter() + (0.0 if self.journal is None else self.journal.seconds)

    @property
    def all_images(self) -> int:
        """Images to optimize on where none is held out."""
        return len(next(iter(self.inputs.values())))

    @property
    def sizes(self) -> Sizes:
        return Sizes.of(self.recipe, self.together)

    def make_room(self, units: Iterable[Unit]) -> None:
        """Keep memory for work on any of ``units``; raises ``MemoryLimitError`` if a stated budget does not suffice."""
        reserve(self.network, units, self.sizes)

    def learns(self, unit: Unit) -> bool:
        """False for a unit that is left float: it has nothing to optimize."""
        return self.network.learns(unit.start, unit.stop, self.reconstruction.learn_step_sizes)


@dataclass
class Pass:
    """One walk over the network and the state it left."""

    state: dict[str, Tensor]
    groups: Groups
    """The units as optimized, as indices of modules (empty for units finer than modules)."""
    records: list[UnitRecord]
    losses: list[ModuleLoss]
    """Of the original modules, in order."""
    seconds: float
    trials: list[Trial] = field(default_factory=list)

    @property
    def reused_seconds(self) -> float:
        return sum(r.seconds for r in self.records if r.reused)


def measure_pass(job: Job) -> Pass:
    """Measure the network as it is now, optimizing nothing."""
    began = job.clock()
    job.make_room(job.modules)
    walk = _Walk(job)
    for module in job.modules:
        walk.advance(module.stop)
    return Pass(snapshot(job.network.gm), [], [], walk.losses, job.clock() - began)


def layer_pass(job: Job, layers: Sequence[Unit], progress: Progress) -> Pass:
    """Reconstruct units that are finer than modules, one after another."""
    began = job.clock()
    steps = [job.reconstruction.steps * job.learns(layer) for layer in layers]
    progress.plan(sum(steps))
    walk = _Walk(job, layers)
    job.make_room(map(walk.reach, layers))
    restore(job.network.gm, job.initial)
    records = [
        walk.optimize(layer, list(layer.layers), number, False, progress)
        for layer, number in zip(layers, steps, strict=True)
    ]
    return Pass(snapshot(job.network.gm), [], records, walk.losses, job.clock() - began)


def module_pass(
    job: Job, groups: Groups, progress: Progress, previous: Pass | None = None, guard: Guard | None = None
) -> Pass:
    """Reconstruct modules in ``groups``, one unit a group.

    With a ``previous`` pass, units in front of the first change are taken over from it, and a merged unit that it did
    not have can start from its state. With a ``guard`` too, such a unit is kept only if it leaves the network's
    held-out output closer to the float one than the previous state of the same modules does.
    """
    began = job.clock()
    walk = _GroupWalk(job, progress, previous, guard)
    job.make_room(walk.reach(walk.unit(group)) for group in groups)
    restore(job.network.gm, job.initial if previous is None else previous.state)
    for position, group in enumerate(groups):
        walk.plan(groups[position:])
        walk.take(group)
    walk.plan([])
    progress.enter(progress.stage)  # shows that steps planned for what was reused in the end are not to come
    return Pass(snapshot(job.network.gm), walk.done, walk.records, walk.losses, job.clock() - began, walk.trials)


class _Walk:
    """The two streams on their way through the network, and the module losses measured on the way."""

    def __init__(self, job: Job, parts: Sequence[Unit] | None = None) -> None:
        """``parts`` are what overlap counts; None: the modules."""
        self.job = job
        self.parts = job.modules if parts is None else parts
        self.streams = Streams.at_input(job.inputs)
        self.losses: list[ModuleLoss] = []
        self.reached = 0
        """How far what was optimized last extends: with overlap, behind the end of its unit."""

    def advance(self, stop: int) -> None:
        """Move both streams to ``stop``, measuring each module that ends on the way."""
        job, network = self.job, self.job.network
        while self.streams.position < stop:
            module = job.modules[len(self.losses)]
            self.streams = self.streams.advance(network, min(stop, module.stop), job.recipe.calibration_batch)
            if self.streams.position == module.stop:
                produced = boundary(network.nodes, module.start, module.stop).outputs
                loss = module_loss(self.streams.float, self.streams.quantized, produced, network.processes)
                if not math.isfinite(loss.absolute):
                    raise ModelError(
                        f"module {module.name} gives NaN or infinite values on the calibration images; "
                        "check the network on them, and its normalization of inputs."
                    )
                self.losses.append(loss)
        network.memory.trim()

    def optimize(self, unit: Unit, names: list[str], steps: int, warm: bool, progress: Progress) -> UnitRecord:
        """Optimize the unit that starts here, for no steps if it has nothing to learn, and move behind it.

        With overlap, so is what is behind it. All of it starts from its rounding if it is ``warm``, else only what the
        unit before has optimized already. A unit that was finished before the run was interrupted is taken over from
        the journal.
        """
        progress.enter(unit.name)
        whole = self.reach(unit)
        module = self.job.network.module(whole.start, whole.stop)
        extent = {"unit": whole.name, "start": whole.start, "stop": whole.stop, "steps": steps, "warm": warm}
        journal = self.job.journal if steps else None
        record = self._finished(journal, module, extent)
        if record is None:
            began = time.perf_counter()
            course, images = self._learn(whole, steps, warm, progress) if steps else (Course([]), None)
            seconds = time.perf_counter() - began
            record = UnitRecord(
                names,
                steps,
                seconds,
                course.curve,
                returns=course.returns,
                undecided=course.undecided,
                micro_batch=images,
                cuda_graph=course.cuda_graph,
            )
            processes = self.job.network.processes
            if processes.size > 1:
                processes.check_alike({name: digest_of({name: t}) for name, t in snapshot(module).items()})
            if journal is not None:
                journal.commit(module, extent, record)
        else:
            progress.plan(-steps)
        if steps:
            self.reached = whole.stop
        self.advance(unit.stop)
        return record

    def reach(self, unit: Unit) -> Unit:
        """Return ``unit`` with what is behind it and optimized along with it."""
        return reach(unit, self.parts, self.job.overlap)

    def _warm(self, unit: Unit, warm: bool) -> Collection[WeightFakeQuantize]:
        """Return the quantizers in ``unit`` whose weights start from the rounding they have."""
        return self.job.network.weight_quantizers(unit.start, unit.stop if warm else self.reached)

    def _finished(self, journal: Journal | None, module: fx.GraphModule, extent: Extent) -> UnitRecord | None:
        """Take over a unit that was finished before an interruption: the first process's, on all of them."""
        processes = self.job.network.processes
        found = None if journal is None else journal.take_over(module, extent)
        told = processes.from_first(None if found is None else asdict(found))
        if told is None:
            return None
        state = snapshot(module)
        processes.copy_first_(list(state.values()))
        restore(module, state)
        return UnitRecord(**told)

    def _learn(self, unit: Unit, steps: int, warm: bool, progress: Progress) -> tuple[Course, int | None]:
        """Optimize on as many images at a time as memory has room for, and tell how many if that is not a batch."""
        job, memory = self.job, self.job.network.memory
        problem = self._problem(unit)
        before, batch = snapshot(problem.module), job.reconstruction.batch_size
        images = step_images(memory, Needs.of(job.network, unit, job.sizes), job.sizes)
        while True:
            done = progress.done
            try:
                course = self._optimize(problem, unit, steps, warm, progress, images)
                return course, None if images == batch else images
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if job.network.processes.size > 1:  # the others are at some step of this unit, and wait for this one
                    raise MemoryLimitError(
                        f"unit {unit.name} does not fit the memory of {memory.device} at {images} images at a time; "
                        "state a memory budget (--memory), so that all processes take fewer, or start more of them."
                    ) from error
                if images <= job.together:
                    raise MemoryLimitError(
                        f"unit {unit.name} does not fit the memory of {memory.device}, even at {images} images at a "
                        "time; free some, or choose smaller units."
                    ) from error
            # Outside of the handler, where nothing holds the tensors of the failed step any more.
            images = halved(images, job.together)
            restore(problem.module, before)
            progress.plan(progress.done - done)

    def _optimize(
        self, problem: Problem, unit: Unit, steps: int, warm: bool, progress: Progress, micro_batch: int
    ) -> Course:
        job = self.job
        return optimize(
            problem,
            job.reconstruction,
            steps=steps,
            regularizer_weight=job.regularizer_weight,
            warm=self._warm(unit, warm),
            # A seed per unit: a unit's draws do not depend on what was optimized, or reused, before it.
            seed=(job.recipe.seed * 1_000_003 + unit.start) % 2**63,
            on_step=progress.tick,
            fused=job.kernels == "fused",
            micro_batch=micro_batch,
            graphs=job.graphs,
        )

    def _problem(self, unit: Unit) -> Problem:
        job, network = self.job, self.job.network
        ends = boundary(network.nodes, unit.start, unit.stop)
        wanted = self.streams.targets(network, unit.stop, job.recipe.calibration_batch)
        # Masks and indices have no gradient.
        outputs = [name for name in ends.outputs if wanted[name].is_floating_point()]
        if not outputs:
            raise ModelError(
                f"unit {unit.name} returns no floating-point tensor, so there is nothing to compare; "
                "let the network return what it computes its choice (argmax, comparison) from."
            )
        quantized = [self.streams.quantized[name] for name in ends.inputs]
        # Masks and indices are not mixed by QDrop's drop, nor are inputs that both streams share.
        float_inputs = [
            self.streams.float[name] if q.is_floating_point() else q
            for name, q in zip(ends.inputs, quantized, strict=True)
        ]
        return Problem(
            module=let_gradients_through(_returning(network.module(unit.start, unit.stop), outputs)),
            images=job.images,
            quantized_inputs=quantized,
            float_inputs=float_inputs,
            targets=[wanted[name] for name in outputs],
            weights=None if job.fisher is None else [job.fisher[name] for name in outputs],
            together=job.together,
            name=unit.name,
            processes=network.processes,
            first=job.first,
        )


def _returning(module: fx.GraphModule, names: list[str]) -> fx.GraphModule:
    """Leave only ``names`` of the module's outputs."""
    output = next(n for n in module.graph.nodes if n.op == "output")
    kept = tuple(n for n in output.args[0] if n.name in names)
    if len(kept) < len(output.args[0]):
        output.args = (kept,)
        module.recompile()
    return module


class _GroupWalk(_Walk):
    """A walk over groups of modules that reuses, merges, and takes merges back."""

    def __init__(self, job: Job, progress: Progress, previous: Pass | None, guard: Guard | None) -> None:
        super().__init__(job)
        self.progress = progress
        self.previous = previous
        self.guard = guard
        self.changed = previous is None
        """True once something in front of here differs from the previous pass."""
        self.done: Groups = []
        self.records: list[UnitRecord] = []
        self.trials: list[Trial] = []

    def plan(self, groups: Groups) -> None:
        """Announce the steps that ``groups``, all that are left, will take if every merge in them is accepted."""
        changed, steps = self.changed, 0
        for group in groups:
            changed = changed or not self._known(group)
            steps += self._steps(group) if changed else 0
        self.progress.plan(self.progress.done + steps - self.progress.total)

    def take(self, group: list[int]) -> None:
        known = self._known(group)
        if known and not self.changed:
            self._reuse(group)
        elif known or self.previous is None or self.guard is None:
            self._reconstruct(group)
        else:
            self._try(group)

    def _known(self, group: list[int]) -> bool:
        return self.previous is not None and group in self.previous.groups

    def _reuse(self, group: list[int]) -> None:
        assert self.previous is not None
        record = self.previous.records[self.previous.groups.index(group)]
        self.advance(self.unit(group).stop)
        self._keep(group, replace(record, reused=True))

    def _reconstruct(self, group: list[int]) -> None:
        """Optimize a group on the streams as they are; a merged unit starts from the previous pass if it may."""
        unit = self.unit(group)
        granularity = self.job.recipe.granularity
        warm = len(group) > 1 and self.previous is not None and granularity is not None and granularity.warm_start
        if self.previous is not None:
            start = self.previous.state if warm else self.job.initial
            restore(self.job.network.module(unit.start, unit.stop), start)
        self._keep(group, self.optimize(unit, self._names(group), self._steps(group), warm, self.progress))
        self.changed = True

    def _try(self, group: list[int]) -> None:
        """Optimize a merged unit, and keep it only if the guard finds the network closer to its float self."""
        assert self.previous is not None and self.guard is not None
        before, unit = self.streams, self.unit(group)
        held, reached = len(self.losses), self.reached
        restore(self.job.network.module(unit.start, unit.stop), self.previous.state)
        unmerged = self.guard.error_behind(before, unit.stop)
        changed = self.changed
        self._reconstruct(group)
        trial = Trial(self._names(group), self.guard.error_behind(before, unit.stop), unmerged)
        self.trials.append(trial)
        if not trial.accepted:
            self.streams, self.losses, self.changed, self.reached = before, self.losses[:held], changed, reached
            self.done.pop()
            self.records.pop()
            restore(self.job.network.module(unit.start, unit.stop), self.previous.state)
            for part in self.previous.groups:
                if part[0] in group:
                    self.progress.plan(self._steps(part) if self.changed else 0)
                    self.take(part)

    def _keep(self, group: list[int], record: UnitRecord) -> None:
        self.done.append(group)
        self.records.append(record)

    def _steps(self, group: list[int]) -> int:
        """Steps of all its modules, or of one; modules with nothing to learn do not count."""
        granularity = self.job.recipe.granularity
        learning = sum(self.job.learns(self.job.modules[i]) for i in group)
        per_module = granularity is not None and granularity.steps_per_module
        return self.job.reconstruction.steps * (learning if per_module else min(learning, 1))

    def unit(self, group: list[int]) -> Unit:
        return joined([self.job.modules[i] for i in group])

    def _names(self, group: list[int]) -> list[str]:
        return [self.job.modules[i].name for i in group]
