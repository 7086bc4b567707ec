from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quiesce.errors import DataError, ModelError, RecipeError
from quiesce.recipe import Recipe
from quiesce.sweep.plan import Sweep, check_files, read_sweep
from sweeps import SWEEP

Read = Callable[..., Sweep]
AXES: dict[str, list[Any]] = {
    "bits": ["2/4", "3/3", "4/float", "8/8"],
    "preset": ["adaround", "brecq", "qdrop-fast"],
    "granularity": ["layer", "block", "loss", "modcap"],
    "seed": [0, 1, 7],
    "drop_prob": [0.0, 0.25],
    "granularity.k": [1, 2],
    "overlap": ["auto", 0],
    "leave_float": ["head", "type:linear"],
}


@st.composite
def grid(draw: st.DrawFn) -> dict[str, list[Any]]:
    names = draw(st.lists(st.sampled_from(list(AXES)), unique=True, max_size=5))
    return {n: draw(st.lists(st.sampled_from(AXES[n]), unique=True, min_size=1)) for n in names}


def sweep_of(folder: Path, *tables: str, networks: int = 1) -> Sweep:
    named = [f'[[network]]\nmodel = "m:net{i}"\ncalibration = "m:data"' for i in range(networks)]
    (folder / "sweep.toml").write_text("\n".join([*named, *tables]))
    return read_sweep(folder / "sweep.toml")


def table(head: str, values: dict[str, Any]) -> str:
    return "\n".join([head, *(f'"{key}" = {json.dumps(value)}' for key, value in values.items())])


class TestGrid:
    @given(grid=grid(), networks=st.integers(1, 3))
    def test_is_the_product_of_its_lists(
        self, tmp_path_factory: pytest.TempPathFactory, grid: dict[str, list[Any]], networks: int
    ) -> None:
        sweep = sweep_of(tmp_path_factory.mktemp("grid"), table("[grid]", grid), networks=networks)
        recipes = []
        for values in itertools.product(*grid.values()):
            settings = dict(zip(grid, values, strict=True))
            preset = settings.pop("preset", "best")
            if "bits" in settings:
                weights, activations = settings.pop("bits").split("/")
                settings |= {"weight_bits": int(weights)}
                settings |= {"activation_bits": None if activations == "float" else int(activations)}
            recipes.append(Recipe.preset(preset, **settings))
        models = [f"m:net{i}" for i in range(networks)]
        expected = [(model, recipe) for recipe in recipes for model in models]
        assert [(cell.network.model, cell.recipe) for cell in sweep.cells] == expected

    @given(grid=grid(), networks=st.integers(1, 2))
    def test_no_two_cells_share_a_digest_or_a_name(
        self, tmp_path_factory: pytest.TempPathFactory, grid: dict[str, list[Any]], networks: int
    ) -> None:
        sweep = sweep_of(tmp_path_factory.mktemp("grid"), table("[grid]", grid), networks=networks)
        assert len({cell.digest({}) for cell in sweep.cells}) == len(sweep.cells)
        assert len({cell.name for cell in sweep.cells}) == len(sweep.cells)

    def test_seeds_alone_make_a_group(self, read: Read) -> None:
        sweep = read()
        groups: dict[str, list[int]] = {}
        for cell in sweep.cells:
            groups.setdefault(cell.group, []).append(cell.recipe.seed)
        assert list(groups.values()) == [[0, 1]] * 4

    def test_several_grids_are_joined_and_what_they_share_is_taken_once(self, tmp_path: Path) -> None:
        nearest = table("[[grid]]", {"preset": "nearest", "bits": ["2/4", "4/4"]})
        first = table("[[grid]]", {"preset": ["brecq", "qdrop"], "steps": 50})
        second = table("[[grid]]", {"preset": "qdrop", "steps": 50, "drop_prob": [0.5, 0.25]})
        sweep = sweep_of(tmp_path, nearest, first, second)
        assert [(c.bits, c.method) for c in sweep.cells] == [
            ("W2A4", "nearest"),
            ("W4A4", "nearest"),
            ("W4A4", "brecq / block, drop_prob = 0.0"),
            ("W4A4", "qdrop / block, drop_prob = 0.5"),
            ("W4A4", "qdrop / block, drop_prob = 0.25"),
        ]

    def test_a_setting_that_one_grid_leaves_out_tells_them_apart(self, tmp_path: Path) -> None:
        grids = {"preset": ["nearest", "brecq"]}, {"preset": "brecq", "granularity": "loss", "k": 2}
        sweep = sweep_of(tmp_path, *[table("[[grid]]", given) for given in (*grids, {"granularity": "loss"})])
        assert [c.method for c in sweep.cells] == ["nearest", "brecq / block", "brecq / loss, k = 2", "best / loss"]

    def test_what_is_chosen_by_the_network_has_a_name(self, tmp_path: Path) -> None:
        sweep = sweep_of(tmp_path, table("[grid]", {"overlap": ["auto", 1]}))
        assert [c.method for c in sweep.cells] == [
            "best / loss-descent, overlap = auto",
            "best / loss-descent, overlap = 1",
        ]

    def test_tables_are_settings_too(self, tmp_path: Path) -> None:
        recipe = "[recipe]\nsteps = 7\n[recipe.weights]\nsymmetric = true\n"
        recipe += '[[recipe.layers]]\npattern = "head"\nweight_bits = 8'
        (cell,) = sweep_of(tmp_path, recipe).cells
        assert cell.recipe == Recipe.preset(
            "best", steps=7, weight_symmetric=True, layers=[{"pattern": "head", "weight_bits": 8}]
        )

    def test_networks_take_turns(self, tmp_path: Path) -> None:
        sweep = sweep_of(tmp_path, table("[grid]", {"seed": [0, 1]}), networks=2)
        assert [(c.network.model, c.recipe.seed) for c in sweep.cells] == [
            ("m:net0", 0),
            ("m:net1", 0),
            ("m:net0", 1),
            ("m:net1", 1),
        ]


class TestDigest:
    def test_is_the_same_in_another_process_and_another_place(self, read: Read, place: Path) -> None:
        digests = [cell.digest({"torch": "1"}) for cell in read().cells]
        (place / "moved").mkdir()
        (place / "sweep.toml").rename(place / "moved" / "other.toml")
        code = "from quiesce.sweep.plan import read_sweep; import sys\n"
        code += "print([c.digest({'torch': '1'}) for c in read_sweep(sys.argv[1]).cells])"
        command = [sys.executable, "-c", code, str(place / "moved" / "other.toml")]
        environment = os.environ | {"PYTHONHASHSEED": "5"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        assert done.stdout.strip() == str(digests)

    @pytest.mark.parametrize(
        "change",
        [
            ("steps = 2", "steps = 3"),
            ("[grid]", "[grid]\nbackend = 'openvino'"),
            ("[data]", "[data]\nimages = 16"),
            ("[data]", "[data]\nevaluate_images = 16"),
            ('evaluate = "sweep_source:images"', 'evaluate = "sweep_source:larger"'),
            ('model = "sweep_source:net"', 'model = "sweep_source:net2"'),
            ('name = "net"', "resize = 'none'"),
            ('name = "net"', "weights = 'w.pt'"),
            ('name = "net"', "weights = 'w.pt'\nweights_by_order = true"),
        ],
    )
    def test_changes_with_every_setting(self, read: Read, change: tuple[str, str]) -> None:
        base, changed = read(), read(change)
        assert len(base.cells) == len(changed.cells)
        pairs = zip(base.cells, changed.cells, strict=True)
        assert all(a.digest({}) != b.digest({}) for a, b in pairs)

    def test_changes_with_versions_and_not_with_names_or_the_cluster(self, read: Read) -> None:
        base = read().cells[0]
        assert base.digest({"torch": "1"}) != base.digest({"torch": "2"})
        other = read(('name = "net"', 'name = "another"'), ("[recipe]", "[ray]\ncpus = 2\n[recipe]")).cells[0]
        assert base.digest({}) == other.digest({}) and base.name != other.name


NETWORK = '[[network]]\nmodel = "m:net"\ncalibration = "m:data"\n'


class TestBadFiles:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("[grid", "is not valid TOML"),
            ("", "there is no [[network]]"),
            ("[grids]", "section [grids] is unknown. Did you mean 'grid'"),
            ("data = 3\n" + NETWORK, "[data] is 3; give a table"),
            ("[data]\ncalibraton = 'x'\n" + NETWORK, "[data]: key 'calibraton' is unknown. Did you mean 'calibration'"),
            ("[[network]]\ncalibration = 'x'", "[[network]] 1 has no model"),
            ("[[network]]\nmodel = 'm:n'", "[[network]] 1 has no calibration data"),
            (NETWORK + "wieghts = 'x'", "key 'wieghts' is unknown. Did you mean 'weights'"),
            (NETWORK + "images = 0", "network.images is 0; give 1 or more"),
            (NETWORK + "images = '3'", "network.images is '3'; give a whole number"),
            (NETWORK + "mean = 0.5", "network.mean is 0.5; give a list of numbers"),
            (NETWORK + "resize = 'no'", "network.resize is 'no'; give numbers of pixels, or 'none'"),
            (NETWORK + "crop = [1, 2, 3]", "network.crop is (1, 2, 3); give one number of pixels, or [height, width]"),
            (NETWORK + NETWORK, "two networks are called 'm:net'"),
            (NETWORK + "[ray]\naddres = 'x'", "[ray]: key 'addres' is unknown. Did you mean 'address'"),
            (NETWORK + "[ray]\ncpus = 0", "ray.cpus is 0; give 1 or more"),
            (NETWORK + "[ray]\ngpus = 1.5", "ray.gpus is 1.5; give a whole number, or a share below 1"),
            (NETWORK + "[ray]\ntries = 0", "ray.tries is 0"),
            (NETWORK + "[grid]\nstep = [1]", "setting 'step' is unknown. Did you mean 'steps'"),
            (NETWORK + "[grid]\npresets = ['qdrop']", "setting 'presets' is unknown. Did you mean 'preset'"),
            (NETWORK + "[grid]\nbit = ['2/4']", "setting 'bit' is unknown. Did you mean 'bits'"),
            (NETWORK + "[grid]\nseed = []", "[grid]: seed has no value"),
            (NETWORK + "[grid]\nseed = [0, 1, 0]", "[grid]: seed has 0 twice"),
            (NETWORK + "[grid]\nbits = ['2x4']", "bits is '2x4'; give those of weights and of activations"),
            (NETWORK + "[grid]\nbits = ['1/4']", "weights.bits is 1; give a whole number from 2 to 8"),
            (NETWORK + "[grid]\nbits = '2/4'\nweight_bits = 3", "'bits' and 'weight_bits' are one setting"),
            (NETWORK + "[grid]\ngranularity.method = 'loss'\n[recipe]\ngranularity = 'block'", "are one setting"),
            (NETWORK + "[grid]\nsteps = 3\n[recipe]\nsteps = 4", "'steps' is in [recipe] and in [grid]"),
            (NETWORK + "[grid]\npreset = 'qdorp'", "preset 'qdorp' is unknown. Did you mean 'qdrop'"),
            (
                NETWORK + "[grid]\npreset = ['qdrop', 'nearest']\n[recipe]\nsteps = 3",
                "the cell of steps = 3, preset = nearest: 'steps' is a setting of reconstruction, which recipe "
                "'nearest' does not have. (presets that need other settings can have a [[grid]] of their own)",
            ),
        ],
    )
    def test_one_sentence_says_what_and_where(self, tmp_path: Path, text: str, message: str) -> None:
        (tmp_path / "sweep.toml").write_text(text)
        with pytest.raises(RecipeError, match=re.escape(message)) as raised:
            read_sweep(tmp_path / "sweep.toml")
        assert str(raised.value).startswith(f"sweep file {tmp_path / 'sweep.toml'}") and "\n" not in str(raised.value)

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match="can't be read: No such file"):
            read_sweep(tmp_path / "none.toml")

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (('calibration = "sweep_source:images"', 'calibration = "photos"'), DataError, "calibration data .*photos"),
            (('evaluate = "sweep_source:images"', 'evaluate = "x.npz"'), DataError, "evaluate data .*x.npz"),
            (('name = "net"', 'weights = "w.pt"'), ModelError, "weight file .*w.pt is not there"),
            (('"sweep_source:net"', '"net.pt2"'), ModelError, "model .*net.pt2 is not there"),
        ],
    )
    def test_files_that_are_not_there(
        self, read: Read, place: Path, change: tuple[str, str], error: type[Exception], message: str
    ) -> None:
        sweep = read(change)
        with pytest.raises(error, match=message):
            check_files(sweep)
        for name in ("photos", "x.npz", "w.pt", "net.pt2"):
            (place / name).touch()
        check_files(sweep)  # beside the file, wherever the working folder is


def test_preparation_of_images_and_data_reach_the_network(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(
        SWEEP.replace('name = "net"', "resize = 9\ncrop = 8\nmean = [0.5]\nstd = [1]\nimages = 12\nweights = 'random'")
    )
    network = read_sweep(tmp_path / "s.toml").cells[0].network
    assert network.preparation == {"resize": 9, "crop": (8, 8), "mean": (0.5,), "std": (1,), "interpolation": None}
    assert (network.images, network.weights, network.label) == (12, "random", "sweep_source:net")
    assert network.calibration == network.evaluate == "sweep_source:images"
