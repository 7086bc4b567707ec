"""The sweep file: networks, their data, and grids of recipe settings; read, checked, and expanded into cells."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from quiesce.dotted import DOTTED
from quiesce.errors import DataError, ModelError, RecipeError, nearest_name
from quiesce.files import flat
from quiesce.models import RANDOM
from quiesce.preprocess import OPTIONS
from quiesce.recipe import DEFAULT_PRESET, Recipe, build, check_kinds, locate, written

SECTIONS = ("data", "network", "grid", "recipe", "ray")
DATA_KEYS = ("calibration", "evaluate", "images", "evaluate_images")
_OWN_NAMES = ("preset", "bits")
"""Names in grids besides those of recipe settings."""
_COLUMNS = frozenset(
    {"preset", "bits", "weight_bits", "activation_bits", "weights.bits", "activations.bits", "granularity"}
    | {"granularity.method", "seed"}
)
"""Settings that have columns of their own in every table."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network of a sweep: where it and its data come from, and how its images are prepared."""

    model: str
    """As MODEL of the command line."""
    calibration: str
    """As DATA of the command line, and so is ``evaluate``."""
    name: str | None = None
    """What tables call it; None is ``model``."""
    evaluate: str | None = None
    images: int = 1024
    """Most calibration images; a cell's seed picks them."""
    evaluate_images: int | None = None
    """Most evaluation images: the same for all cells."""
    weights: str | None = None
    """A file, or "random"; None: the library's pretrained ones."""
    weights_by_order: bool = False
    trust: bool = False
    """Read a .pt2 file, which can run code stored in it."""
    resize: int | tuple[int, ...] | str | None = None
    """Pixels of the shorter side, (height, width), or "none"; None: the model's own, and so are the others."""
    crop: int | tuple[int, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str | None = None

    def __post_init__(self) -> None:
        check_kinds(self, "network.")
        for name in ("images", "evaluate_images"):
            count = getattr(self, name)
            _check(count is None or count >= 1, f"network.{name} is {count}; give 1 or more.")
        for name in ("resize", "crop"):
            sides = getattr(self, name)
            pair = not isinstance(sides, tuple) or len(sides) == 2
            _check(pair, f"network.{name} is {sides!r}; give one number of pixels, or [height, width].")
        worded = isinstance(self.resize, str) and self.resize != "none"
        _check(not worded, f"network.resize is {self.resize!r}; give numbers of pixels, or 'none'.")

    @property
    def label(self) -> str:
        return self.name or self.model

    @property
    def preparation(self) -> dict[str, Any]:
        """The arguments of :func:`quiesce.preprocess.override`."""
        given = {name: getattr(self, name) for name in OPTIONS}
        return given | {"crop": (self.crop, self.crop) if isinstance(self.crop, int) else self.crop}


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where cells run."""

    address: str | None = None
    """Of a Ray cluster; None starts Ray on this machine, for this sweep alone."""
    cpus: int = 1
    """Cores, and threads, of a cell."""
    gpus: float = 0
    """GPUs of a cell, or a share of one; 0 works on the CPU."""
    tries: int = 3
    """How often a cell is begun whose worker is lost, before it is given up."""

    def __post_init__(self) -> None:
        check_kinds(self, "ray.")
        _check(self.cpus >= 1, f"ray.cpus is {self.cpus}; give 1 or more.")
        whole = self.gpus <= 1 or self.gpus == int(self.gpus)
        _check(self.gpus >= 0 and whole, f"ray.gpus is {self.gpus}; give a whole number, or a share below 1.")
        _check(self.tries >= 1, f"ray.tries is {self.tries}; give 1 or more.")


@dataclass(frozen=True)
class Cell:
    """One run of a sweep: a network quantized by a recipe."""

    network: Network
    recipe: Recipe
    axes: dict[str, Any]
    """Settings that the sweep varies besides those with columns of their own (preset, bits, granularity, seed)."""

    @property
    def method(self) -> str:
        """What is compared: preset, granularity, and other settings that the sweep varies."""
        granularity = self.recipe.granularity
        base = self.recipe.name if granularity is None else f"{self.recipe.name} / {granularity.method}"
        return ", ".join([base, *(f"{k} = {_shown(v)}" for k, v in self.axes.items() if v is not None)])

    @property
    def bits(self) -> str:
        """In the field's notation, ``W2A4``; float activations are ``A32``."""
        return f"W{self.recipe.weights.bits}A{self.recipe.activations.bits or 32}"

    def settings(self, versions: Mapping[str, str]) -> dict[str, Any]:
        """Return all that decides the result, as plain data; a network's name in tables is no part of it."""
        network = {k: v for k, v in asdict(self.network).items() if k != "name"}
        # Through JSON, so that what is read back from a file compares equal.
        data: dict[str, Any] = json.loads(
            json.dumps({"network": network, "recipe": self.recipe.to_dict(), "versions": dict(versions)})
        )
        return data

    def digest(self, versions: Mapping[str, str]) -> str:
        """Return 12 hexadecimal digits that stand for :meth:`settings`."""
        text = json.dumps(self.settings(versions), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def group(self) -> str:
        """The same for cells that differ in their seeds alone."""
        return replace(self, recipe=replace(self.recipe, seed=0)).digest({})

    @property
    def name(self) -> str:
        return f"{self.network.label} {self.bits} {self.method} seed {self.recipe.seed}"

    @property
    def readable(self) -> str:
        """The first part of the name of the cell's folder, for people; the digest follows, by which it is found."""
        return re.sub(r"[^A-Za-z0-9_.]+", "-", self.name).strip("-.")[:100]


@dataclass(frozen=True)
class Sweep:
    """A checked sweep file."""

    folder: Path
    """Of the file: where relative paths begin and modules are looked for."""
    cells: tuple[Cell, ...]
    """No two are equal. The networks take turns, so that one that can't be loaded is seen early."""
    cluster: Cluster


def read_sweep(path: Path | str) -> Sweep:
    """Read a sweep file (docs/sweep.md), check every setting of every cell, and expand it.

    Raises:
        RecipeError: the file can't be read; a key is unknown, missing or given twice, or a value is refused.
    """
    path = Path(path)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"sweep file {path} can't be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"sweep file {path} is not valid TOML: {error}.") from error
    try:
        return Sweep(path.resolve().parent, _cells(data), build(Cluster, data.get("ray", {}), "[ray]"))
    except RecipeError as error:
        raise RecipeError(f"sweep file {path}: {error}") from error


def check_files(sweep: Sweep) -> None:
    """Check that the files that the sweep names are on this machine.

    Raises:
        ModelError, DataError: one is not.
    """
    for network in {cell.network for cell in sweep.cells}:
        if network.model.endswith(".pt2"):
            _check_there(sweep.folder, network.model, ModelError, "model")
        if network.weights not in (None, RANDOM):
            _check_there(sweep.folder, str(network.weights), ModelError, "weight file")
        for what in ("calibration", "evaluate"):
            spec = getattr(network, what)
            if spec is not None and not DOTTED.fullmatch(spec):
                _check_there(sweep.folder, spec, DataError, f"{what} data")


def _check_there(folder: Path, name: str, error: type[ModelError | DataError], what: str) -> None:
    if not (folder / name).exists():
        raise error(f"{what} {folder / name} is not there; paths in a sweep file begin at its folder.")


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise RecipeError(message)


def _cells(data: Mapping[str, Any]) -> tuple[Cell, ...]:
    for key in data:
        _check(key in SECTIONS, f"section [{key}] is unknown.{nearest_name(key, SECTIONS)}")
    networks = _networks(_table(data.get("data", {}), "[data]"), _tables(data.get("network", []), "[[network]]"))
    common = flat(_table(data.get("recipe", {}), "[recipe]"))
    grids = [_lists(flat(grid)) for grid in _tables(data.get("grid", {}), "[grid]")]
    _check_names(common, "[recipe]")
    for grid in grids:
        both = sorted(common.keys() & grid.keys())
        _check(not both, f"{''.join(both[:1])!r} is in [recipe] and in [grid]; give it in one of them.")
        _check_names([*common, *grid], "[recipe] and [grid]")
    recipes = [(_recipe(point), point) for grid in grids for point in _points(common, grid)]
    axes = _axes([recipe for recipe, _ in recipes], dict.fromkeys(key for grid in grids for key in grid))
    cells = [
        Cell(network, recipe, {key: _value(recipe, key, point) for key in axes})
        for recipe, point in recipes
        for network in networks
    ]
    unique = {cell.digest({}): cell for cell in cells}  # grids may overlap
    return tuple(unique.values())


def _networks(data: dict[str, Any], tables: Sequence[dict[str, Any]]) -> list[Network]:
    for key in data:
        _check(key in DATA_KEYS, f"[data]: key {key!r} is unknown.{nearest_name(key, DATA_KEYS)}")
    _check(bool(tables), "there is no [[network]]; name the networks to quantize, one table each.")
    networks = []
    for number, table in enumerate(tables, 1):
        where = f"[[network]] {number}"
        _check("model" in table, f"{where} has no model; name one, such as model = 'timm:resnet18'.")
        wanted = "calibration" in table or "calibration" in data
        _check(wanted, f"{where} has no calibration data; name it there, or in [data] for all networks.")
        networks.append(build(Network, data | table, where))
    labels = [network.label for network in networks]
    twice = [label for label in labels if labels.count(label) > 1]
    _check(not twice, f"two networks are called {''.join(twice[:1])!r}; give one of them another name.")
    return networks


def _table(value: Any, where: str) -> dict[str, Any]:
    _check(isinstance(value, dict), f"{where} is {value!r}; give a table of settings.")
    return dict(value)


def _tables(value: Any, where: str) -> list[dict[str, Any]]:
    return [_table(table, where) for table in (value if isinstance(value, list) else [value])]


def _lists(grid: dict[str, Any]) -> dict[str, list[Any]]:
    """Make every value of a grid a list of values."""
    lists = {key: value if isinstance(value, list) else [value] for key, value in grid.items()}
    for key, values in lists.items():
        _check(bool(values), f"[grid]: {key} has no value; give one or more, or leave it out.")
        twice = [value for i, value in enumerate(values) if value in values[:i]]
        _check(not twice, f"[grid]: {key} has {_shown(twice[0]) if twice else ''} twice; give each value once.")
    return lists


def _check_names(settings: Iterable[str], where: str) -> None:
    """Check that the names are known, and that no two stand for one setting."""
    taken: dict[tuple[str, str], str] = {}
    for key in settings:
        for place in _places(key):
            other = taken.setdefault(place, key)
            _check(other == key, f"{where}: {other!r} and {key!r} are one setting; give one of them.")


def _places(key: str) -> list[tuple[str, str]]:
    """Return the settings of a recipe that a name in a sweep file stands for."""
    if key == "bits":
        return [("weights", "bits"), ("activations", "bits")]
    return [("", key)] if key in ("preset", "leave_float") else [locate(key, _OWN_NAMES)]


def _points(common: dict[str, Any], grid: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*grid.values()):
        yield common | dict(zip(grid, values, strict=True))


def _recipe(point: dict[str, Any]) -> Recipe:
    settings = dict(point)
    preset = settings.pop("preset", DEFAULT_PRESET)
    try:
        if "bits" in settings:
            settings |= _bits(settings.pop("bits"))
        return Recipe.preset(preset, **settings)
    except RecipeError as error:
        named = ", ".join(f"{key} = {_shown(value)}" for key, value in point.items())
        advice = " (presets that need other settings can have a [[grid]] of their own)" if "preset" in point else ""
        raise RecipeError(f"the cell of {named}: {error}{advice}") from error


def _bits(text: Any) -> dict[str, Any]:
    found = re.fullmatch(r"(\d+)/(\d+|float)", str(text))
    if not found:
        raise RecipeError(f"bits is {text!r}; give those of weights and of activations, such as '2/4' or '4/float'.")
    weights, activations = found.groups()
    return {
        "weight_bits": int(weights),
        "activation_bits": activations if activations == "float" else int(activations),
    }


def _axes(recipes: Sequence[Recipe], keys: Mapping[str, None]) -> list[str]:
    """Return the settings of the grids that have no column of their own and that tell recipes apart.

    A recipe that lacks the section of a setting is not told apart by it.
    """
    others = [key for key in keys if key not in _COLUMNS]
    return [
        key
        for key in others
        if key == "leave_float" or len({_shown(_value(r, key, {})) for r in recipes if _has(r, key)}) > 1
    ]


def _has(recipe: Recipe, key: str) -> bool:
    section, _ = locate(key)
    return not section or getattr(recipe, section) is not None


def _value(recipe: Recipe, key: str, point: Mapping[str, Any]) -> Any:
    """Return what ``recipe`` has for ``key``, as plain data; None where it lacks the section."""
    if key == "leave_float":
        return point.get(key)
    section, name = locate(key)
    data = recipe.to_dict()
    part = data[section] if section else data
    return None if part is None else written(section, name, part[name])


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
