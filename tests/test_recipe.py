import dataclasses
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quiesce.errors import RecipeError
from quiesce.recipe import (
    BACKENDS,
    PRESETS,
    ActivationRecipe,
    GranularityRecipe,
    LayerOverride,
    Recipe,
    ReconstructionRecipe,
    WeightRecipe,
)

SECTIONS = {
    "weights": WeightRecipe,
    "activations": ActivationRecipe,
    "granularity": GranularityRecipe,
    "reconstruction": ReconstructionRecipe,
}


def from_toml(text: str, folder: Path) -> Recipe:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return Recipe.from_toml(path)


class TestPresets:
    def test_they_differ_as_the_references_do(self) -> None:
        nearest, adaround, brecq, qdrop = (Recipe.preset(n) for n in ("nearest", "adaround", "brecq", "qdrop"))
        assert nearest.reconstruction is None and nearest.granularity is None
        assert adaround.granularity is not None and adaround.granularity.method == "layer"
        assert adaround.reconstruction is not None and not adaround.reconstruction.learn_step_sizes
        assert brecq.reconstruction is not None and qdrop.reconstruction is not None
        assert brecq.reconstruction.drop_prob == 0
        assert dataclasses.replace(qdrop.reconstruction, drop_prob=0.0) == brecq.reconstruction
        assert qdrop.reconstruction.drop_prob == 0.5

    @pytest.mark.parametrize("name", ["adaround", "brecq", "qdrop"])
    def test_fast_ones_differ_in_steps_rates_and_regularizer_only(self, name: str) -> None:
        slow, fast = Recipe.preset(name).reconstruction, Recipe.preset(f"{name}-fast").reconstruction
        assert slow is not None and fast is not None and fast.steps < slow.steps
        others = ("steps", "rounding_lr", "step_size_lr", "weight_step_size_lr", "relative_regularizer")
        assert dataclasses.replace(fast, **{name: getattr(slow, name) for name in others}) == slow

    @pytest.mark.parametrize("name", PRESETS)
    def test_carry_their_name(self, name: str) -> None:
        assert Recipe.preset(name).name == name

    @pytest.mark.parametrize("name", ["qdorp", None, 3, ["qdrop"]])
    def test_unknown(self, name: Any) -> None:
        with pytest.raises(RecipeError, match=r"preset .* is unknown"):
            Recipe.preset(name)

    def test_the_nearest_name_is_given(self) -> None:
        with pytest.raises(RecipeError, match=r"'qdorp' is unknown. Did you mean 'qdrop'"):
            Recipe.preset("qdorp")


class TestSettings:
    def test_flat_names(self) -> None:
        recipe = Recipe.preset(
            "qdrop", weight_bits=2, activation_bits=None, granularity="loss", k=3, steps=7, seed=5, guard=False
        )
        assert (recipe.weights.bits, recipe.activations.bits, recipe.seed) == (2, None, 5)
        assert recipe.granularity == GranularityRecipe(method="loss", k=3, guard=False)
        assert recipe.reconstruction == ReconstructionRecipe(drop_prob=0.5, steps=7)

    def test_names_of_a_recipe_file(self) -> None:
        settings = {"granularity.k": 2, "weights.bits": 3, "reconstruction.batch_size": 8}
        assert Recipe.preset("qdrop", **settings) == Recipe.preset("qdrop", k=2, weight_bits=3, batch_size=8)

    def test_plain_data_becomes_what_the_fields_hold(self) -> None:
        recipe = Recipe.preset(
            "qdrop",
            activation_bits="float",
            granularity="scheme",
            scheme=[["a", "b"]],
            layers=[{"pattern": "fc", "weight_bits": 8}],
        )
        assert recipe.activations.bits is None
        assert recipe.granularity is not None and recipe.granularity.scheme == (("a", "b"),)
        assert recipe.layers == (LayerOverride(pattern="fc", weight_bits=8),)
        assert recipe.with_settings(layers=recipe.layers) == recipe

    @pytest.mark.parametrize(
        ("wrong", "right"),
        [("weigth_bits", "weight_bits"), ("granularty", "granularity"), ("weights.bit", "weights.bits")],
    )
    def test_unknown(self, wrong: str, right: str) -> None:
        with pytest.raises(RecipeError, match=f"setting '{wrong}' is unknown. Did you mean '{right}'"):
            Recipe.preset("qdrop", **{wrong: 2})

    def test_layers_to_leave_float(self) -> None:
        left = [LayerOverride(pattern=p, leave_float=True) for p in ("a", "type:Conv2d", "b")]
        recipe = Recipe.preset("qdrop", leave_float=["a", "type:Conv2d"])
        assert recipe.layers == tuple(left[:2])
        assert recipe.with_settings(leave_float="b").layers == tuple(left)
        assert Recipe.preset("qdrop", layers=left[:1], leave_float=("b",)).layers == (left[0], left[2])
        assert recipe.with_settings(leave_float=[]) == recipe

    @pytest.mark.parametrize("patterns", [3, [3], True, {"a": 1}])
    def test_patterns_are_texts(self, patterns: Any) -> None:
        with pytest.raises(RecipeError, match=r"leave_float is|layers.pattern is 3; give a text"):
            Recipe.preset("qdrop", leave_float=patterns)

    def test_a_float_layer_has_no_bits(self) -> None:
        with pytest.raises(
            RecipeError, match=r"layers\['fc'\] has leave_float and weight_bits; a layer left float has"
        ):
            LayerOverride(pattern="fc", leave_float=True, weight_bits=4)

    def test_nearest_has_no_granularity(self) -> None:
        with pytest.raises(RecipeError, match="setting of granularity, which recipe 'nearest' does not have"):
            Recipe.preset("nearest", granularity="block")

    def test_recipes_are_frozen(self) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            Recipe.preset("qdrop").seed = 3  # type: ignore[misc]


class TestValues:
    @pytest.mark.parametrize("bits", [1, 9, 0, -4, 2.5, 4.0, "4", True, None])
    @pytest.mark.parametrize("setting", ["weight_bits", "weight_first_last_bits", "activation_first_last_bits"])
    def test_bits_outside_2_to_8(self, setting: str, bits: Any) -> None:
        with pytest.raises(RecipeError, match=r"bits is .*; give a whole number from 2 to 8"):
            Recipe.preset("qdrop", **{setting: bits})

    @pytest.mark.parametrize("bits", [1, 9, "four", 4.0])
    def test_optional_bits(self, bits: Any) -> None:
        with pytest.raises(RecipeError, match=r"activations.bits is"):
            Recipe.preset("qdrop", activation_bits=bits)
        with pytest.raises(RecipeError, match=r"layers\['fc'\].weight_bits is"):
            LayerOverride(pattern="fc", weight_bits=bits)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"granularity": "lossy"}, "granularity 'lossy' is unknown. Did you mean 'loss'"),
            ({"backend": "academik"}, "backend 'academik' is unknown. Did you mean 'academic'"),
            ({"weight_range": "lq"}, "weights.range 'lq' is unknown"),
            ({"activation_range": ["lp"]}, r"activations.range \('lp',\) is unknown"),
            ({"activation_percentile": 50}, r"activations.percentile is 50"),
            ({"k": -1}, r"granularity.k is -1"),
            ({"lam": -0.1}, r"granularity.lam is -0.1"),
            ({"alpha": 0}, r"granularity.alpha is 0"),
            ({"max_modules": 0}, r"granularity.max_modules is 0"),
            ({"tolerance": 1}, r"granularity.tolerance is 1"),
            ({"holdout": 0.9}, r"granularity.holdout is 0.9"),
            ({"granularity": "scheme"}, "granularity.scheme goes with method 'scheme'"),
            ({"scheme": "resnet18"}, "granularity.scheme goes with method 'scheme'"),
            ({"steps": 0}, r"reconstruction.steps is 0"),
            ({"batch_size": 0}, r"reconstruction.batch_size is 0"),
            ({"rounding_lr": 0.0}, r"reconstruction.rounding_lr is 0"),
            ({"beta_start": 1.0}, "beta_start is below beta_end"),
            ({"warmup": 1.0}, r"reconstruction.warmup is 1"),
            ({"drop_prob": 1.0}, r"reconstruction.drop_prob is 1"),
            ({"regularizer_weight": -1}, r"reconstruction.regularizer_weight is -1"),
            ({"relative_regularizer": -1}, r"reconstruction.relative_regularizer is -1"),
            ({"seed": -1}, "seed is -1"),
            ({"calibration_batch": 0}, "calibration_batch is 0"),
            (
                {"scheme": [["a"], 3], "granularity": "scheme"},
                r"granularity.scheme is .*; give a list of lists of names",
            ),
            ({"scheme": ["a", "b"], "granularity": "scheme"}, r"granularity.scheme is"),
            ({"layers": "fc"}, "layers is 'fc'; give a list of tables"),
            ({"layers": 3}, "layers is 3; give a list of tables"),
            ({"layers": [3]}, "layers should be a table of settings"),
            ({"layers": [{"weight_bits": 3}]}, "layers: .* missing .*pattern"),
            ({"layers": [{"pattern": "a", "bits": 3}]}, "layers: key 'bits' is unknown"),
        ],
    )
    def test_out_of_range(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(RecipeError, match=message):
            Recipe.preset("qdrop", **settings)

    @pytest.mark.parametrize("value", ["text", "7", True, 1.5, None, [1], {"a": 1}, float("nan"), float("inf"), -1])
    @pytest.mark.parametrize(
        ("section", "name"), [(s, f.name) for s, part in SECTIONS.items() for f in dataclasses.fields(part)]
    )
    def test_any_value_is_taken_or_a_recipe_error_that_names_the_setting(
        self, section: str, name: str, value: Any
    ) -> None:
        """No value makes another kind of error, and none is taken whose type is not the field's."""
        try:
            recipe = Recipe.preset("qdrop", **{f"{section}.{name}": value})
        except RecipeError as error:
            assert name in str(error) or (section == "granularity" and name == "method")
            return
        taken = getattr(getattr(recipe, section), name)
        kind = str(get_type_hints(SECTIONS[section])[name])
        words = {bool: "bool", int: "int", float: "float", str: "str", type(None): "None"}
        assert words[type(taken)] in kind or (type(taken) is int and "float" in kind)

    @pytest.mark.parametrize("name", ["name", "seed", "backend", "calibration_batch", "layers", "weights"])
    @pytest.mark.parametrize("value", [1.5, {"a": 1}, None, [None], True])
    def test_the_same_at_the_top(self, name: str, value: Any) -> None:
        with pytest.raises(RecipeError):
            Recipe.from_dict({name: value})


class TestBackends:
    """A backend brings what it demands; what contradicts it is refused."""

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_brings_its_settings_whatever_the_way_it_is_chosen(self, backend: str, tmp_path: Path) -> None:
        recipe = Recipe.preset("qdrop", backend=backend)
        for key, value in BACKENDS[backend].items():
            section, name = key.split(".")
            assert getattr(getattr(recipe, section), name) == value
        assert Recipe.preset("qdrop").with_settings(backend=backend) == recipe
        assert from_toml(f'preset = "qdrop"\nbackend = "{backend}"', tmp_path) == recipe
        assert from_toml(recipe.to_toml(), tmp_path) == recipe
        assert Recipe.from_dict({"backend": backend, "weights": {"range": "minmax"}}) == Recipe().with_settings(
            backend=backend, weight_range="minmax"
        )

    def test_brings_nothing_else(self) -> None:
        plain, recipe = Recipe.preset("qdrop"), Recipe.preset("qdrop", backend="onnxruntime")
        assert recipe == dataclasses.replace(
            plain, backend="onnxruntime", weights=dataclasses.replace(plain.weights, symmetric=True)
        )

    @pytest.mark.parametrize(
        ("backend", "settings", "message"),
        [
            ("onnxruntime", {"weight_symmetric": False}, "weights.symmetric is false, .*'onnxruntime' demands true"),
            ("onnxruntime", {"activation_symmetric": True}, "activations.symmetric is true, .* demands false; give"),
            ("openvino", {"weights.symmetric": False}, "weights.symmetric is false, and backend 'openvino'"),
            (
                "tensorrt",
                {"weight_bits": 4},
                "weights.bits is 4, and backend 'tensorrt' demands 8; give that, or leave",
            ),
            ("tensorrt", {"activation_bits": None}, "activations.bits is float, .* demands 8"),
            ("tensorrt", {"activation_bits": 7}, "activations.bits is 7, .* demands 8"),
            ("tensorrt", {"weight_first_last_bits": 6}, "weights.first_last_bits is 6"),
            ("tensorrt", {"activation_second_layer_bits": 4}, "activations.second_layer_bits is 4"),
            ("tensorrt", {"layers": [{"pattern": "fc", "weight_bits": 4}]}, r"layers\['fc'\].weight_bits is 4"),
            ("tensorrt", {"layers": [{"pattern": "fc", "activation_bits": 4}]}, r"layers\['fc'\].activation_bits is 4"),
        ],
    )
    def test_a_contradiction_is_refused(
        self, backend: str, settings: dict[str, Any], message: str, tmp_path: Path
    ) -> None:
        with pytest.raises(RecipeError, match=message):
            Recipe.preset("qdrop", backend=backend, **settings)
        with pytest.raises(RecipeError, match=message):
            Recipe.preset("qdrop", backend=backend).with_settings(**settings)

    def test_what_was_changed_before_is_not_changed_again(self) -> None:
        with pytest.raises(RecipeError, match=r"weights.bits is 2"):
            Recipe.preset("qdrop", weight_bits=2).with_settings(backend="tensorrt")
        with pytest.raises(RecipeError, match=r"activations.symmetric is true"):
            Recipe.preset("qdrop", activation_symmetric=True).with_settings(backend="onnxruntime")

    def test_in_a_file(self, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match=r"weights.symmetric is false"):
            from_toml('preset = "qdrop"\nbackend = "onnxruntime"\n[weights]\nsymmetric = false', tmp_path)
        with pytest.raises(RecipeError, match=r"weights.bits is 4"):
            from_toml('backend = "tensorrt"\n[weights]\nbits = 4', tmp_path)

    def test_eight_bits_by_name_are_no_contradiction(self) -> None:
        layers = [{"pattern": "fc", "weight_bits": 8, "activation_bits": 8}]
        recipe = Recipe.preset(
            "qdrop", backend="tensorrt", weight_bits=8, activation_second_layer_bits=8, layers=layers
        )
        assert recipe.weights.bits == 8


class TestPowersOfTwo:
    def test_a_learned_step_size_is_none(self) -> None:
        with pytest.raises(RecipeError, match=r"power_of_two is true.*set reconstruction.learn_step_sizes = false"):
            Recipe.preset("qdrop", activation_power_of_two=True)
        with pytest.raises(RecipeError, match=r"weights.power_of_two is true, and rounding 'joint' learns"):
            Recipe.preset("adaround", weight_power_of_two=True, rounding="joint")

    @pytest.mark.parametrize(
        ("preset", "settings"),
        [
            ("nearest", {}),
            ("adaround", {}),
            ("qdrop", {"learn_step_sizes": False}),
            ("qdrop", {"activation_bits": None}),
        ],
    )
    def test_without_learning_they_are_fine(self, preset: str, settings: dict[str, Any]) -> None:
        recipe = Recipe.preset(preset, activation_power_of_two=True, weight_power_of_two=True, **settings)
        assert recipe.weights.power_of_two and recipe.activations.power_of_two


class TestToml:
    @pytest.mark.parametrize("name", PRESETS)
    def test_presets_round_trip(self, name: str, tmp_path: Path) -> None:
        recipe = Recipe.preset(name)
        assert from_toml(recipe.to_toml(), tmp_path) == recipe
        assert Recipe.from_dict(recipe.to_dict()) == recipe

    @given(
        text=st.text(st.characters(exclude_categories=["Cs"])),
        bits=st.none() | st.integers(2, 8),
        lam=st.none() | st.floats(0, 1e300),
        rate=st.floats(1e-300, 1e300, exclude_min=True),
        scheme=st.lists(st.lists(st.text("ab.0\"'\\\n", min_size=1)), min_size=1),
        layers=st.lists(
            st.builds(LayerOverride, pattern=st.text('a*[]:"\\'), weight_bits=st.none() | st.integers(2, 8))
            | st.builds(LayerOverride, pattern=st.text("type:a*"), leave_float=st.booleans())
        ),
    )
    def test_any_recipe_round_trips(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        text: str,
        bits: int | None,
        lam: float | None,
        rate: float,
        scheme: list[list[str]],
        layers: list[LayerOverride],
    ) -> None:
        recipe = Recipe.preset(
            "qdrop",
            name=text,
            activation_bits=bits,
            activation_second_layer_bits=bits,
            overlap=bits,
            lam=lam,
            rounding_lr=rate,
            granularity="scheme",
            scheme=scheme,
            layers=layers,
        )
        assert from_toml(recipe.to_toml(), tmp_path_factory.mktemp("recipe")) == recipe

    def test_a_preset_to_start_from(self, tmp_path: Path) -> None:
        recipe = from_toml('preset = "qdrop"\nseed = 3\n[weights]\nbits = 2\n[activations]\nbits = "float"\n', tmp_path)
        assert recipe == Recipe.preset("qdrop", seed=3, weight_bits=2, activation_bits=None)

    def test_without_a_preset_the_defaults(self, tmp_path: Path) -> None:
        assert from_toml("seed = 3", tmp_path) == Recipe(seed=3)

    def test_sections_can_be_left_out_by_word(self, tmp_path: Path) -> None:
        recipe = from_toml('granularity = "none"\nreconstruction = "none"', tmp_path)
        assert recipe == Recipe(granularity=None, reconstruction=None)
        with pytest.raises(RecipeError, match="give both sections, or neither"):
            from_toml('granularity = "none"', tmp_path)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("sede = 3", "recipe: key 'sede' is unknown. Did you mean 'seed'"),
            ("[weights]\nbit = 3", "weights: key 'bit' is unknown. Did you mean 'bits'"),
            ("weights = 3", "weights should be a table of settings, not 3"),
            ('weights = "none"', "weights is None; give a table of settings"),
            ("layers = 3", "layers is 3; give a list of tables"),
            ('seed = "3"', "seed is '3'; give a whole number"),
            ('[reconstruction]\nsteps = "many"', "reconstruction.steps is 'many'; give a whole number"),
            ("[weights]\nsymmetric = 1", "weights.symmetric is 1; give true or false"),
            ('preset = "qdorp"', "Did you mean 'qdrop'"),
            ("preset = []", "preset .* is unknown"),
            ("seed = ", "is not valid TOML"),
        ],
    )
    def test_errors(self, tmp_path: Path, text: str, message: str) -> None:
        with pytest.raises(RecipeError, match=message):
            from_toml(text, tmp_path)

    def test_unreadable_files(self, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match="can't be read: No such file"):
            Recipe.from_toml(tmp_path / "none.toml")
        (tmp_path / "latin.toml").write_bytes(b'name = "caf\xe9"')
        with pytest.raises(RecipeError, match="is not valid TOML"):
            Recipe.from_toml(tmp_path / "latin.toml")
