"""The recipe: every setting of a run, frozen, validated when made, to and from TOML. Presets are rows of data."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from quiesce.errors import RecipeError, nearest_name

RANGES = ("minmax", "percentile", "lp")
_UNIFORM = {"activations.softmax": "uniform", "activations.gelu": "uniform"}
BACKENDS: dict[str, dict[str, Any]] = {
    "academic": {},
    "onnxruntime": {"weights.symmetric": True, "activations.symmetric": False, **_UNIFORM},
    "openvino": {"weights.symmetric": True, **_UNIFORM},
    "tensorrt": {
        "weights.bits": 8,
        "weights.first_last_bits": 8,
        "weights.symmetric": True,
        "activations.bits": 8,
        "activations.first_last_bits": 8,
        "activations.symmetric": True,
        **_UNIFORM,
    },
}
"""Backends by name, and the settings that each demands."""
STREAM_DTYPES = ("same", "bf16")
ROUNDING_NAMES = ("adaround", "joint")
SOFTMAX_GRIDS = ("uniform", "log2", "log-sqrt2")
GELU_GRIDS = ("uniform", "twin")
LAYER_NORMS = ("per-tensor", "reparameterized")
GRANULARITIES = ("layer", "block", "modcap", "loss", "loss-descent", "log-ratio", "scheme")


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise RecipeError(message)


def _one_of(setting: str, value: Any, known: Collection[str]) -> None:
    _check(isinstance(value, str) and value in known, f"{setting} {value!r} is unknown.{nearest_name(value, known)}")


def check_bits(setting: str, value: Any) -> None:
    """Raise a RecipeError about ``setting`` if ``value`` is no number of bits that tensors can be quantized to."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    _check(whole and 2 <= value <= 8, f"{setting} is {value!r}; give a whole number from 2 to 8.")


def check_kinds(part: Any, where: str) -> None:
    """Check that each field of ``part`` holds what its annotation says: no text for a number, no 1 for true.

    Raises:
        RecipeError: one does not; ``where`` goes in front of its name.
    """
    for name, kind in get_type_hints(type(part)).items():
        value = getattr(part, name)
        _check(_fits(value, kind), f"{where}{name} is {value!r}; give {_words(kind)}.")


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_fits(v, get_args(kind)[0]) for v in value)
    if get_args(kind):
        return any(_fits(value, k) for k in get_args(kind))
    if kind in (int, float):
        number = isinstance(value, int) or (kind is float and isinstance(value, float) and math.isfinite(value))
        return number and not isinstance(value, bool)
    return isinstance(value, kind)


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def _words(kind: Any) -> str:
    if get_origin(kind) is tuple:
        inner = get_args(kind)[0]
        if get_origin(inner) is tuple:
            return "a list of lists of names"
        return f"a list of {_KINDS.get(inner, 'a table').split(' ', 1)[1]}s"
    if get_args(kind):
        return " or ".join(_words(k) for k in get_args(kind) if k is not type(None))
    return _KINDS.get(kind, "a table of settings")


@dataclass(frozen=True, kw_only=True)
class WeightRecipe:
    """How weights are quantized."""

    bits: int = 4
    first_last_bits: int = 8
    """Bits of the first and the last weight layer (all published tables use 8)."""
    symmetric: bool = False
    per_channel: bool = True
    """One scale per output channel; False is one per tensor."""
    power_of_two: bool = False
    """Scales are powers of two, so that rescaling is a shift."""
    range: str = "lp"
    """How the clipping range is found: minmax, percentile, or lp (L_p search, p = 2.4 as in the references)."""

    def __post_init__(self) -> None:
        check_bits("weights.bits", self.bits)
        check_bits("weights.first_last_bits", self.first_last_bits)
        _one_of("weights.range", self.range, RANGES)
        check_kinds(self, "weights.")


@dataclass(frozen=True, kw_only=True)
class ActivationRecipe:
    """How activations are quantized (one scale per tensor)."""

    bits: int | None = 4
    """None leaves activations float (in TOML: ``bits = "float"``)."""
    first_last_bits: int = 8
    """Bits of the network's input and of the last weight layer's input."""
    second_layer_bits: int | None = None
    """Bits of the second weight layer's input: BRECQ keeps 8, QDrop does not (None: like all others)."""
    symmetric: bool = False
    power_of_two: bool = False
    """As for weights; such a scale can't be learned."""
    range: str = "lp"
    percentile: float = 99.99
    """Share of values inside the range, in per cent, when range is percentile."""
    softmax: str = "uniform"
    """Grid of probabilities: uniform, log2 or log-sqrt2 (rows of quiesce.quant.grids.GRIDS)."""
    gelu: str = "uniform"
    """Grid of what a GELU returns: uniform, or twin."""
    layer_norm: str = "per-tensor"
    """per-tensor, or reparameterized: channels are brought to one range, which linear layers behind take back."""

    def __post_init__(self) -> None:
        for name in ("bits", "second_layer_bits"):
            if getattr(self, name) is not None:
                check_bits(f"activations.{name}", getattr(self, name))
        check_bits("activations.first_last_bits", self.first_last_bits)
        _one_of("activations.range", self.range, RANGES)
        _one_of("activations.softmax", self.softmax, SOFTMAX_GRIDS)
        _one_of("activations.gelu", self.gelu, GELU_GRIDS)
        _one_of("activations.layer_norm", self.layer_norm, LAYER_NORMS)
        check_kinds(self, "activations.")
        _check(50 < self.percentile <= 100, f"activations.percentile is {self.percentile}; give a value in (50, 100].")


@dataclass(frozen=True, kw_only=True)
class LayerOverride:
    """Other bits, or none, for the weight layers that fit a shell pattern."""

    pattern: str
    """Of names of modules (``features.1*``), or behind ``type:`` of a class of one of the modules that the layer is in
    (``type:SqueezeExcite``) or of its operator (``type:linear``)."""
    weight_bits: int | None = None
    activation_bits: int | None = None
    """Bits of the layer's input."""
    leave_float: bool = False
    """Quantize neither the weight nor, for this layer, its input."""

    def __post_init__(self) -> None:
        given = [name for name in ("weight_bits", "activation_bits") if getattr(self, name) is not None]
        for name in given:
            check_bits(f"layers[{self.pattern!r}].{name}", getattr(self, name))
        check_kinds(self, "layers.")
        _check(
            not (self.leave_float and given),
            f"layers[{self.pattern!r}] has leave_float and {' and '.join(given)}; a layer left float has no bits.",
        )


@dataclass(frozen=True, kw_only=True)
class GranularityRecipe:
    """Which modules are optimized jointly (arXiv 2303.11906, section 3.3)."""

    method: str = "block"
    """layer, block, or block modules merged by: modcap, loss, loss-descent, log-ratio, scheme."""
    k: int | None = None
    """Number of neighbouring pairs to merge; None is a quarter of all pairs, rounded up."""
    lam: float | None = None
    """Price λ of (number of merges − k)²; None is infinite, which is plain top-k."""
    alpha: float = 1.6
    """Factor on the capacity of weight layers with a stride above 1 (modcap)."""
    max_modules: int = 3
    """Most modules in one unit (3 in the authors' code)."""
    tolerance: float = 0.0
    """Relative drop of the loss below which loss-descent leaves a pair alone."""
    scheme: tuple[tuple[str, ...], ...] | str | None = None
    """Merged units by hand, as lists of module names, or the name of a published list."""
    guard: bool = True
    """Check each merge on held-out calibration images and take it back when it does not help."""
    holdout: float = 0.125
    """Share of the calibration images that the guard holds out while merges are decided."""
    steps_per_module: bool = True
    """Give a merged unit the steps of all its modules; False gives it those of one unit."""
    warm_start: bool = True
    """Start a merged unit from the rounding and step sizes of the block pass, where there is one."""
    overlap: int | None = 0
    """Modules (method layer: layers) behind each unit that are optimized along with it, and then again in units of
    their own; None (in TOML: ``overlap = "auto"``) is 2 for networks with depthwise convolutions, whose modules are
    small, and 1 for others. Merges are decided without."""
    measuring: float = 0.1
    """Share of the steps, but at least 20, that passes get which only decide what is merged; 1 decides by full ones."""

    def __post_init__(self) -> None:
        _one_of("granularity", self.method, GRANULARITIES)
        check_kinds(self, "granularity.")
        _check(self.k is None or self.k >= 0, f"granularity.k is {self.k}; give 0 or more, or leave it out.")
        _check(self.lam is None or self.lam >= 0, f"granularity.lam is {self.lam}; give 0 or more, or leave it out.")
        _check(self.alpha > 0, f"granularity.alpha is {self.alpha}; give a number above 0.")
        _check(self.max_modules >= 1, f"granularity.max_modules is {self.max_modules}; give 1 or more.")
        _check(0 <= self.tolerance < 1, f"granularity.tolerance is {self.tolerance}; give a value in [0, 1).")
        _check(0 < self.holdout < 0.9, f"granularity.holdout is {self.holdout}; give a share in (0, 0.9).")
        _check(self.overlap is None or self.overlap >= 0, f"granularity.overlap is {self.overlap}; give 0 or more.")
        _check(0 < self.measuring <= 1, f"granularity.measuring is {self.measuring}; give a share in (0, 1].")
        needs = self.method == "scheme"
        _check(needs == (self.scheme is not None), "granularity.scheme goes with method 'scheme', and only with it.")


@dataclass(frozen=True, kw_only=True)
class ReconstructionRecipe:
    """How a unit's rounding and step sizes are learned (AdaRound, BRECQ, QDrop)."""

    rounding: str = "adaround"
    """How weights are rounded: a row of quiesce.quant.rounding.ROUNDINGS."""
    steps: int = 20_000
    batch_size: int = 32
    rounding_lr: float = 1e-3
    step_size_lr: float = 4e-5
    """Learning rate of activation step sizes, cosine decay to 0; not used when they are not learned."""
    weight_step_size_lr: float = 1e-4
    """Learning rate of weight step sizes, cosine decay to 0; not used when the rounding does not learn them. A rate of
    r moves a step size by about a third of r, relative to it, in a step."""
    learn_step_sizes: bool = True
    regularizer_weight: float | None = None
    """λ of Σ(1 − |2h − 1|^β). None: as relative_regularizer says; if that is None, too, 0.01, or 0.1 for networks with
    depthwise convolutions, whose few weights per channel otherwise stay undecided."""
    relative_regularizer: float | None = None
    """λ of each unit as a multiple of L/N, where regularizer_weight is not set: L is the unit's loss when nothing but
    its weights is quantized, to nearest, and N their number. So one value fits units and networks of all sizes."""
    warmup: float = 0.2
    """Share of the steps without the regularizer."""
    beta_start: float = 20.0
    beta_end: float = 2.0
    drop_prob: float = 0.0
    """Chance that an element is *not* quantized while optimizing (QDrop: 0.5; its code's ``prob`` is 1 − this)."""
    decision_push: float = 0.0
    """How far, at the last step and in multiples of Adam's steps, roundings are pushed to a decision beside Adam; it
    rises from 0 over the last fifth of the steps. (The regularizer acts through Adam, where the loss can outweigh it.)
    0: no push."""
    resident_images: int | None = None
    """Batches are drawn from a window of so many images, which takes in all of them as steps go on, so that no more
    have to be on the device where they do not all fit; None draws from all."""
    fisher: bool = False
    """Weight squared errors by the diagonal of the Fisher information (BRECQ, eq. 10)."""

    def __post_init__(self) -> None:
        where = "reconstruction."
        _one_of("reconstruction.rounding", self.rounding, ROUNDING_NAMES)
        check_kinds(self, where)
        _check(self.steps >= 1, f"{where}steps is {self.steps}; give 1 or more.")
        _check(self.batch_size >= 1, f"{where}batch_size is {self.batch_size}; give 1 or more.")
        resident = self.resident_images
        _check(
            resident is None or resident >= self.batch_size,
            f"{where}resident_images is {resident}; give batch_size ({self.batch_size}) or more.",
        )
        for name in ("rounding_lr", "step_size_lr", "weight_step_size_lr", "beta_end"):
            _check(getattr(self, name) > 0, f"{where}{name} is {getattr(self, name)}; give a number above 0.")
        _check(self.beta_start >= self.beta_end, f"{where}beta_start is below beta_end; β falls during the run.")
        _check(self.decision_push >= 0, f"{where}decision_push is {self.decision_push}; give 0 or more.")
        _check(0 <= self.warmup < 1, f"{where}warmup is {self.warmup}; give a share in [0, 1).")
        _check(0 <= self.drop_prob < 1, f"{where}drop_prob is {self.drop_prob}; give a probability in [0, 1).")
        weight = self.regularizer_weight
        _check(weight is None or weight >= 0, f"{where}regularizer_weight is {weight}; give 0 or more.")
        relative = self.relative_regularizer
        _check(relative is None or relative >= 0, f"{where}relative_regularizer is {relative}; give 0 or more.")

    def at_pace(self, steps: int, faster: float) -> ReconstructionRecipe:
        """Return a copy with ``steps``, and all learning rates ``faster`` times as high."""
        return replace(
            self,
            steps=steps,
            rounding_lr=self.rounding_lr * faster,
            step_size_lr=self.step_size_lr * faster,
            weight_step_size_lr=self.weight_step_size_lr * faster,
        )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every setting of a run. ``reconstruction=None`` is nearest rounding, which has no granularity."""

    name: str = "custom"
    seed: int = 0
    backend: str = "academic"
    calibration_batch: int = 64
    """Images per forward pass outside of optimization; changes memory and speed, not results."""
    stream_dtype: str = "same"
    """How activations of all images are kept between units: same (as they are computed) or bf16 (half of float32)."""
    weights: WeightRecipe = field(default_factory=WeightRecipe)
    activations: ActivationRecipe = field(default_factory=ActivationRecipe)
    layers: tuple[LayerOverride, ...] = ()
    granularity: GranularityRecipe | None = field(default_factory=GranularityRecipe)
    reconstruction: ReconstructionRecipe | None = field(default_factory=ReconstructionRecipe)

    def __post_init__(self) -> None:
        _one_of("backend", self.backend, BACKENDS)
        _one_of("stream_dtype", self.stream_dtype, STREAM_DTYPES)
        check_kinds(self, "")
        _check(self.calibration_batch >= 1, f"calibration_batch is {self.calibration_batch}; give 1 or more.")
        _check(0 <= self.seed < 2**63, f"seed is {self.seed!r}; give a whole number from 0 to 2^63 − 1.")
        paired = (self.granularity is None) == (self.reconstruction is None)
        _check(paired, "granularity is for reconstruction: give both sections, or neither for nearest rounding.")
        learned = self.reconstruction is not None and self.reconstruction.learn_step_sizes
        _check(
            not (learned and self.activations.power_of_two and self.activations.bits is not None),
            "activations.power_of_two is true, and a step size that is learned is no power of two; "
            "set reconstruction.learn_step_sizes = false.",
        )
        joint = self.reconstruction is not None and self.reconstruction.rounding == "joint"
        _check(
            not (joint and self.weights.power_of_two),
            "weights.power_of_two is true, and rounding 'joint' learns step sizes, which are then no powers of two; "
            "set reconstruction.rounding = 'adaround'.",
        )
        self._check_backend()

    def _check_backend(self) -> None:
        for key, wanted in BACKENDS[self.backend].items():
            section, name = key.split(".")
            values = {key: getattr(getattr(self, section), name)}
            if name == "bits":
                flat = f"{section.removesuffix('s')}_bits"
                values |= {f"layers[{o.pattern!r}].{flat}": getattr(o, flat) or wanted for o in self.layers}
            if key == "activations.bits":
                values["activations.second_layer_bits"] = self.activations.second_layer_bits or wanted
            for setting, value in values.items():
                _check(
                    value == wanted,
                    f"{setting} is {_shown(value)}, and backend {self.backend!r} demands {_shown(wanted)}; "
                    "give that, or leave the setting out when you choose the backend, or take another one.",
                )

    @classmethod
    def preset(cls, preset: str, **settings: Any) -> Recipe:
        """Return the recipe called ``preset`` with ``settings`` changed.

        Settings are named ``weight_*``, ``activation_*`` (``weight_bits``, ``activation_symmetric``, …),
        ``granularity`` (the method's name), or by any field of the granularity, reconstruction or recipe itself;
        or as in a recipe file, by section and key (``granularity.k``). ``leave_float``, a pattern or a list of them,
        adds overrides to ``layers`` (:class:`LayerOverride`). A ``backend`` brings the settings that it demands
        (:data:`BACKENDS`), where nothing else is given for them.

        Raises:
            RecipeError: an unknown preset or setting (the nearest name is given), or a value out of range.
        """
        if not isinstance(preset, str) or preset not in PRESETS:
            raise RecipeError(f"preset {preset!r} is unknown.{nearest_name(preset, PRESETS)}")
        return replace(PRESETS[preset], name=preset).with_settings(**settings)

    def with_settings(self, **settings: Any) -> Recipe:
        """Return a copy with flat ``settings`` changed; see :meth:`preset` for their names."""
        changes: dict[str, dict[str, Any]] = {}
        left_float = _left_float(settings.pop("leave_float", ()))
        for key, value in settings.items():
            section, name = locate(key)
            changes.setdefault(section, {})[name] = _value(section, name, value)
        top = changes.pop("", {})
        if left_float:
            top["layers"] = (*top.get("layers", self.layers), *left_float)
        for section, demanded in _demanded(top.get("backend")).items():
            missing = {name: v for name, v in demanded.items() if _is_default(getattr(self, section), name)}
            changes[section] = missing | changes.get(section, {})
        for section, values in changes.items():
            part = getattr(self, section)
            if part is None:
                raise RecipeError(
                    f"{next(iter(values))!r} is a setting of {section}, which recipe {self.name!r} does not have."
                )
            top[section] = replace(part, **values)
        return replace(self, **top)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """Build a recipe from nested plain data; keys left out take their defaults, unknown keys are errors."""
        if isinstance(data, Mapping):
            data = _overlay(_demanded(data.get("backend")), data)
        recipe: Recipe = build(cls, data, "recipe")
        return recipe

    def to_dict(self) -> dict[str, Any]:
        """Return nested plain data (JSON types only)."""
        data: dict[str, Any] = _plain(asdict(self))
        return data

    @classmethod
    def from_toml(cls, path: Path | str) -> Recipe:
        """Read a TOML file. ``preset = "name"`` at its top starts from that preset instead of from the defaults."""
        path = Path(path)
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise RecipeError(f"recipe file {path} can't be read: {error.strerror}.") from error
        except (ValueError, RecursionError) as error:  # integers of thousands of digits and deep nesting, too
            raise RecipeError(f"recipe file {path} is not valid TOML: {error}.") from error
        preset = data.pop("preset", None)
        if preset is not None:
            base = _overlay(cls.preset(preset).to_dict(), _demanded(data.get("backend")))
            data = _overlay(base, data)
        return cls.from_dict(data)

    def to_toml(self) -> str:
        """Return the recipe as TOML that :meth:`from_toml` reads back to an equal recipe."""
        return _toml(self.to_dict())


_SECTIONS: dict[str, type] = {
    "weights": WeightRecipe,
    "activations": ActivationRecipe,
    "granularity": GranularityRecipe,
    "reconstruction": ReconstructionRecipe,
}
# None in a nullable setting, as it is written in TOML, which has no null.
_NULL_WORDS = {("activations", "bits"): "float", ("granularity", "overlap"): "auto"}


def _demanded(backend: Any) -> dict[str, Any]:
    """Return what ``backend`` demands, by section and key: nothing for a name that is checked later, or for None."""
    nested: dict[str, Any] = {}
    for key, value in (BACKENDS.get(backend, {}) if isinstance(backend, str) else {}).items():
        section, name = key.split(".")
        nested.setdefault(section, {})[name] = value
    return nested


def _is_default(part: Any, name: str) -> bool:
    return bool(getattr(part, name) == getattr(type(part)(), name))


def _shown(value: Any) -> str:
    """A value as in a recipe file."""
    return "float" if value is None else _toml_value(value)


def locate(key: str, also: Collection[str] = ()) -> tuple[str, str]:
    """Map a flat setting name to (section, field); the section is "" for the recipe's own fields.

    Raises:
        RecipeError: the name is unknown; the nearest one, of ``also`` too, is given.
    """
    if key == "granularity":
        return "granularity", "method"
    names = {f.name: ("", f.name) for f in fields(Recipe) if f.name not in _SECTIONS}
    for section in ("granularity", "reconstruction"):
        names |= {f.name: (section, f.name) for f in fields(_SECTIONS[section])}
    names |= {f"weight_{f.name}": ("weights", f.name) for f in fields(WeightRecipe)}
    names |= {f"activation_{f.name}": ("activations", f.name) for f in fields(ActivationRecipe)}
    names |= {f"{section}.{f.name}": (section, f.name) for section, part in _SECTIONS.items() for f in fields(part)}
    if key not in names:
        alike = [n for n in (*also, "granularity", "leave_float", *names) if ("." in n) == ("." in key)]
        raise RecipeError(f"setting {key!r} is unknown.{nearest_name(key, alike)}")
    return names[key]


def _value(section: str, name: str, value: Any) -> Any:
    """Turn plain data into the value of a field: lists into tuples, tables into overrides, null words into None."""
    if name == "layers" and isinstance(value, list | tuple):
        return tuple(v if isinstance(v, LayerOverride) else build(LayerOverride, v, "layers") for v in value)
    null_word = _NULL_WORDS.get((section, name))
    return None if null_word is not None and value == null_word else _tuples(value)


def written(section: str, name: str, value: Any) -> Any:
    """Return the plain ``value`` of a setting as in a recipe file: None is a word there, or stays None."""
    return _NULL_WORDS.get((section, name)) if value is None else value


def _left_float(patterns: Any) -> tuple[LayerOverride, ...]:
    """Return the overrides that ``leave_float`` stands for: a pattern, or a list of them."""
    listed = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(listed, list | tuple):
        raise RecipeError(f"leave_float is {patterns!r}; give a pattern of layers, or a list of them.")
    return tuple(LayerOverride(pattern=pattern, leave_float=True) for pattern in listed)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _overlay(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        under = merged.get(key)
        merged[key] = _overlay(under, value) if isinstance(under, dict) and isinstance(value, Mapping) else value
    return merged


def build(cls: type, data: Any, where: str) -> Any:
    """Make the frozen settings ``cls`` from plain data; keys left out take their defaults.

    Raises:
        RecipeError: an unknown key (the nearest one is given), one that is missing, or a value that ``cls`` refuses.
    """
    if not isinstance(data, Mapping):
        raise RecipeError(f"{where} should be a table of settings, not {data!r}.")
    known = {f.name for f in fields(cls)}
    values: dict[str, Any] = {}
    for key, value in data.items():
        if key not in known:
            raise RecipeError(f"{where}: key {key!r} is unknown.{nearest_name(key, sorted(known))}")
        section = _SECTIONS.get(key) if cls is Recipe else None
        if section is not None:
            values[key] = None if value is None or value == "none" else build(section, value, key)
        else:
            values[key] = _value(where, key, value)
    try:
        return cls(**values)
    except TypeError as error:
        raise RecipeError(f"{where}: a setting has a value of the wrong kind or is missing ({error}).") from error


def _toml(data: Mapping[str, Any]) -> str:
    scalars = {k: v for k, v in data.items() if not isinstance(v, dict) and k != "layers"}
    lines = [f"{k} = {_toml_value(v)}" for k, v in scalars.items() if v is not None]
    lines += [f'{k} = "none"' for k, v in scalars.items() if v is None and k in _SECTIONS]
    for name, table in data.items():
        if isinstance(table, dict):
            lines += ["", f"[{name}]"]
            for key, value in table.items():
                value = written(name, key, value)
                lines += [] if value is None else [f"{key} = {_toml_value(value)}"]
    for override in data.get("layers", []):
        lines += ["", "[[layers]]"] + [f"{k} = {_toml_value(v)}" for k, v in override.items() if v not in (None, False)]
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"
    return repr(value)


_DECISIVE = 300.0
"""Relative regularizer, chosen on tuning images (docs/results.md)."""


def _fast(recipe: Recipe) -> Recipe:
    """A fortieth of the steps at forty times the rates, so that each variable can still travel as far as it needs, and
    a λ that decides roundings in these steps."""
    assert recipe.reconstruction is not None
    part = recipe.reconstruction.at_pace(recipe.reconstruction.steps // 40, faster=40)
    return replace(recipe, reconstruction=replace(part, relative_regularizer=_DECISIVE))


_ADAROUND = Recipe(
    granularity=GranularityRecipe(method="layer"), reconstruction=ReconstructionRecipe(learn_step_sizes=False)
)
_BRECQ = Recipe()
_QDROP = Recipe(reconstruction=ReconstructionRecipe(drop_prob=0.5))
_BEST = Recipe(
    granularity=GranularityRecipe(method="loss-descent", overlap=None),
    reconstruction=ReconstructionRecipe(relative_regularizer=_DECISIVE, drop_prob=0.25, decision_push=3.0),
)

PRESETS: dict[str, Recipe] = {
    "nearest": Recipe(granularity=None, reconstruction=None),
    "adaround": _ADAROUND,
    "brecq": _BRECQ,
    "qdrop": _QDROP,
    "best": _BEST,
    "adaround-fast": _fast(_ADAROUND),
    "brecq-fast": _fast(_BRECQ),
    "qdrop-fast": _fast(_QDROP),
    "best-fast": _fast(_BEST),
}
"""Presets by name. ``brecq`` is BRECQ as MRECG configures it: plain squared error, no drop, rounding and activation
step sizes learned together. ``best`` is what measured best beside it (docs/results.md). The ``-fast`` ones take 500
steps a unit instead of 20,000."""
DEFAULT_PRESET = "best"
"""Where the command line and sweeps start when they are not told."""
