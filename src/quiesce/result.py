"""Results as plain data: what a run measured, as JSON with a versioned schema (documented in docs/result.md)."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from importlib import metadata
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import torch

from quiesce.errors import FileFormatError
from quiesce.files import read_json
from quiesce.outputs import write_text

SCHEMA = 1
UNDECIDED = 0.05
"""Share of undecided roundings above which a unit is told of."""
Number = float | None


@dataclass
class UnitRecord:
    """What happened to one reconstruction unit."""

    modules: list[str]
    """Names of the original modules (or layers) that the unit holds, first to last."""
    steps: int
    seconds: float
    loss_curve: list[list[float]] = field(default_factory=list)
    """Pairs ``[step, loss]``: the reconstruction loss (no regularizer) averaged since the pair before."""
    reused: bool = False
    """True when the unit was taken over from the block pass instead of being optimized again."""
    returns: int = 0
    """Times that it went back some steps, as the loss was no longer finite, and on at a tenth of the rates."""
    undecided: float | None = None
    """Share of weights whose rounding was cut off before it was decided, more than a tenth of a step size away."""
    resumed: bool = False
    """True when the unit was optimized before the run was interrupted and begun again."""
    micro_batch: int | None = None
    """Images that its steps worked on at a time, adding up to the same batch, where memory had no room for a batch."""
    cuda_graph: str | None = None
    """How its steps were launched on a GPU: "captured", as a CUDA graph, or "eager", and why; None elsewhere."""


@dataclass
class MemoryRecord:
    """Memory that a run was given and took on its device, in bytes. All passes of a run share one record."""

    budget: int | None = None
    """What was stated, or most of what was free; None where the system does not say."""
    working: int = 0
    """The part that was kept for computing."""
    device: int = 0
    """The most that was kept at a time: streams, Fisher weights, and with a stated budget the network."""
    host: int = 0
    """The most that was kept in host memory, where the device is another one."""
    file: int = 0
    """The most that was kept in temporary files."""
    peak: int | None = None
    """The most that was measured, above what was taken when the run began; None where it can't be."""


@dataclass
class Run:
    """One quantization of the network by one preset at one granularity."""

    preset: str
    granularity: str | None
    weight_bits: int
    activation_bits: int | None
    """None means that activations stayed float."""
    seed: int
    top1: float | None = None
    """Share of correct labels in per cent; None without labels."""
    agreement: float | None = None
    """Share of images, in per cent, whose top-1 equals the float network's; None without evaluation data."""
    sqnr_db: float | None = None
    """10·log10(E‖y‖² / E‖y − ŷ‖²) of the outputs on the evaluation data."""
    seconds: float = 0.0
    """Wall time of everything this run needed, a block pass it relied on included."""
    units: list[list[str]] = field(default_factory=list)
    module_losses: dict[str, float] = field(default_factory=dict)
    """L_i of every original module: squared error summed over channels, averaged over images and positions."""
    relative_losses: dict[str, float] = field(default_factory=dict)
    """L_i / E‖f_i‖², same modules."""
    peak_loss: float = 0.0
    final_loss: float = 0.0
    oscillation: float = 0.0
    """Σ (L_i − L_{i+1})² over neighbouring modules."""
    relative_peak_loss: float = 0.0
    relative_final_loss: float = 0.0
    relative_oscillation: float = 0.0
    unit_records: list[UnitRecord] = field(default_factory=list)
    capacities: dict[str, float] = field(default_factory=dict)
    """The score of each module from which merges were chosen (empty for layer, block, nearest and scheme)."""
    differentials: list[float] = field(default_factory=list)
    """The differential of each pair of neighbours (i, i+1), divided by the largest."""
    proposed_merges: list[list[str]] = field(default_factory=list)
    """Merged units that selection asked for, before the guard."""
    guard: dict[str, Any] | None = None
    """What the guard tried: ``{"holdout": n, "trials": [{"modules", "merged_error", "unmerged_error",
    "accepted"}], "final": {"merged_error", "block_error"}, "kept": "merged" | "block"}``; None if it was off. With
    ``measuring_steps`` all errors are those of the short passes."""
    block_seconds: float = 0.0
    """Wall time of the block pass that this run relied on, part of ``seconds``; 0 if it needed none."""
    reused_seconds: float = 0.0
    """Optimization time saved by taking units over from the block pass."""
    kernels: str = "eager"
    """How elementwise maths of steps ran: "fused", as compiled kernels, or "eager", and why."""
    processes: int = 1
    """Processes that shared the images."""
    memory: MemoryRecord = field(default_factory=MemoryRecord)
    measuring_steps: int = 0
    """Steps of a module in the short passes that decided what is merged; 0 where full passes did, or nothing was."""
    measuring_seconds: float = 0.0
    """Wall time of these passes, part of ``seconds``."""

    def undecided_units(self) -> list[UnitRecord]:
        """Return the units that cut off more than :data:`UNDECIDED` of their roundings undecided."""
        return [u for u in self.unit_records if u.undecided is not None and u.undecided > UNDECIDED]


@dataclass
class ExportRecord:
    """A file that another program runs."""

    file: str
    """Its name, in the folder of the result."""
    format: str
    bytes: int
    runtime: str | None = None
    """Program and version in which it was run on the evaluation data."""
    top1: float | None = None
    """Share of correct labels there, in per cent."""
    notes: list[str] = field(default_factory=list)
    """Where a container is wider than the bits, or an operator was added: which tensors, and why."""


@dataclass
class Result:
    """Everything a run leaves to be read: ``result.json``."""

    model: str
    float: dict[str, Number]
    runs: list[Run]
    recipe: dict[str, Any]
    versions: dict[str, str]
    hardware: dict[str, Any]
    exports: list[ExportRecord] = field(default_factory=list)
    float_layers: dict[str, str] = field(default_factory=dict)
    """Weight layers that stayed float, with the reason of each."""
    schema: int = SCHEMA

    @property
    def run(self) -> Run:
        """The run that made the network this result belongs to (the last one)."""
        return self.runs[-1]

    def to_json(self) -> str:
        data = asdict(self)
        ordered = {"schema": data.pop("schema"), **data}
        return json.dumps(ordered, indent=2, allow_nan=False) + "\n"

    def write(self, path: Path) -> Path:
        """Write ``path`` aside and rename it, so that a half-written result never looks finished."""
        write_text(Path(path), self.to_json())
        return Path(path)

    @classmethod
    def read(cls, path: Path) -> Result:
        return cls.from_dict(read_json(Path(path)), str(path))

    @classmethod
    def from_dict(cls, data: Any, where: str = "result") -> Result:
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise FileFormatError(
                f"{where} is not a result of schema {SCHEMA}; it was written by another program or version."
            )
        try:
            lists = {
                "runs": [_run(r) for r in data["runs"]],
                "exports": [ExportRecord(**e) for e in data["exports"]],
            }
            result = cls(**{**{f.name: data[f.name] for f in fields(cls) if f.name not in lists}, **lists})
        except (KeyError, TypeError, AttributeError) as error:
            raise FileFormatError(
                f"{where} lacks or garbles the entry {error}; run again to get a whole result."
            ) from error
        wrong = [path for path in _misfits(result, cls, "") if path] + ([] if result.runs else [".runs"])
        if wrong:
            raise FileFormatError(
                f"{where} holds something else than it should at {wrong[0][1:]}; run again to get a whole result."
            )
        return result


def _misfits(value: Any, kind: Any, path: str) -> Iterator[str]:
    """Yield where nested data is not of the kinds that its annotations name."""
    origin, arguments = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        for name, inner in get_type_hints(kind).items():
            yield from _misfits(getattr(value, name), inner, f"{path}.{name}")
    elif origin is list and isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _misfits(inner, arguments[0], f"{path}[{i}]")
    elif origin is dict and isinstance(value, dict):
        for key, inner in value.items():
            yield from _misfits(inner, arguments[1], f"{path}.{key}")
    elif origin is UnionType:
        if all(any(_misfits(value, option, path)) for option in arguments):
            yield path
    elif kind is not Any and type(value) not in ((float, int) if kind is float else (kind,)):
        yield path


def _run(data: dict[str, Any]) -> Run:
    records = [UnitRecord(**u) for u in data["unit_records"]]
    return Run(**{**data, "unit_records": records, "memory": MemoryRecord(**data.get("memory", {}))})


def versions() -> dict[str, str]:
    """Versions of this package, Python, and the libraries that decide the numbers."""
    found = {"quiesce": metadata.version("quiesce"), "python": platform.python_version(), "torch": torch.__version__}
    for name in ("torchvision", "timm", "numpy", "safetensors"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware(device: torch.device) -> dict[str, Any]:
    """Where the run took place, in the words of the machine itself."""
    found: dict[str, Any] = {
        "device": device.type,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "cpu": _cpu_name(),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
