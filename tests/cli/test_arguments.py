from __future__ import annotations

from pathlib import Path

import pytest

from quiesce.cli.arguments import read_recipe
from quiesce.errors import RecipeError
from quiesce.recipe import Recipe


class TestReadRecipe:
    def test_best_unless_told(self) -> None:
        assert read_recipe(None, None, []) == Recipe.preset("best")

    def test_options_win_over_settings_and_these_over_the_file(self, tmp_path: Path) -> None:
        (tmp_path / "r.toml").write_text(
            'preset = "brecq"\nseed = 1\n[weights]\nbits = 2\n[reconstruction]\nsteps = 5\n'
        )
        settings = ["weight_bits=3", "steps=6"]
        recipe = read_recipe(tmp_path / "r.toml", None, settings, weight_bits=5, granularity=None)
        assert recipe == Recipe.preset("brecq", seed=1, weight_bits=5, steps=6)

    def test_layers_are_left_float_by_settings_and_options_alike(self, tmp_path: Path) -> None:
        expected = Recipe.preset("best", leave_float=["a", "type:Conv2d"])
        assert read_recipe(None, None, ['leave_float=["a", "type:Conv2d"]']) == expected
        assert read_recipe(None, None, [], leave_float=["a", "type:Conv2d"]) == expected
        assert read_recipe(None, None, ["leave_float=a"]) == Recipe.preset("best", leave_float="a")
        (tmp_path / "r.toml").write_text(expected.to_toml())
        assert read_recipe(tmp_path / "r.toml", None, []) == expected

    def test_a_backend_brings_its_settings_also_to_a_file_with_every_setting(self, tmp_path: Path) -> None:
        expected = Recipe.preset("best", backend="onnxruntime")
        assert expected.weights.symmetric
        assert read_recipe(None, None, [], backend="onnxruntime") == expected
        assert read_recipe(None, None, ["backend=onnxruntime"]) == expected
        (tmp_path / "r.toml").write_text(Recipe.preset("best").to_toml())
        assert read_recipe(tmp_path / "r.toml", None, [], backend="onnxruntime") == expected
        with pytest.raises(RecipeError, match=r"weights.bits is 4, and backend 'tensorrt' demands 8"):
            read_recipe(None, None, [], backend="tensorrt", weight_bits=4)
        with pytest.raises(RecipeError, match=r"weights.symmetric is false"):
            read_recipe(None, None, ["weight_symmetric=false"], backend="openvino")

    def test_a_file_and_a_preset_contradict(self, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match="--recipe and --preset both"):
            read_recipe(tmp_path / "r.toml", "qdrop", [])

    def test_values_are_toml_or_bare_words(self) -> None:
        settings = [
            "weight_range = minmax",
            'activation_range="percentile"',
            "guard=false",
            "drop_prob=0.25",
            "lam=1e-3",
        ]
        settings += ["granularity=scheme", 'granularity.scheme=[["a", "b"]]', 'layers=[{pattern="fc", weight_bits=8}]']
        recipe = read_recipe(None, None, [*settings, "activations.bits=float"])
        assert recipe == Recipe.preset(
            "best",
            weight_range="minmax",
            activation_range="percentile",
            guard=False,
            drop_prob=0.25,
            lam=0.001,
            granularity="scheme",
            scheme=[["a", "b"]],
            layers=[{"pattern": "fc", "weight_bits": 8}],
            activation_bits=None,
        )
