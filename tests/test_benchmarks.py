"""The evidence: its page shows its results, a cell can be repeated, and Emoji-1000 is what it says."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from PIL import Image

from quiesce.recipe import Recipe

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TABLES = [p.stem for p in BENCHMARKS.glob("*.toml")]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / "bench.py"), *arguments], capture_output=True, text=True, timeout=600
    )


def rows(table: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((BENCHMARKS / "results" / f"{table}.json").read_text("utf-8"))["rows"]
    return found


class TestPage:
    def test_it_shows_the_results(self) -> None:
        done = bench("page", "--check")
        assert done.returncode == 0, done.stderr

    def test_means_of_the_rows_are_on_it(self) -> None:
        page = (BENCHMARKS.parent / "docs" / "results.md").read_text("utf-8")
        chosen = [r for r in rows("quick") if (r["cell"]["preset"], r["cell"]["bits"]) == ("nearest", "W2A4")]
        values = [row["measured"]["top1"] for row in chosen]
        assert len(values) == 3
        assert f"| `nearest` | – | {statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f} |" in page

    def test_the_readme_shows_best_which_is_brecq_with_other_units_a_drop_and_a_push(self) -> None:
        settings = {
            "granularity.method": "loss-descent",
            "reconstruction.drop_prob": 0.25,
            "reconstruction.decision_push": 3.0,
        }
        best = Recipe.preset("best-fast")
        same = Recipe.preset("brecq-fast", **settings | {"granularity.overlap": "auto"})
        assert dataclasses.replace(best, name="") == dataclasses.replace(same, name="")
        settings["granularity.overlap"] = 2
        own = [r["cell"] | r["measured"] for r in rows("emoji_mobilenetv2_050") if r["cell"]["bits"] == "W2A4"]
        chosen = [r["top1"] for r in own if r["preset"] == "brecq-fast" and settings.items() <= r["settings"].items()]
        lines = (BENCHMARKS.parent / "README.md").read_text("utf-8").splitlines()
        names = next(line for line in lines if line.startswith("| Network | W/A |")).split(" | ")
        values = next(line for line in lines if line.startswith("| MobileNetV2 x0.5 | W2A4 |")).split(" | ")
        shown = dict(zip([name.strip("| `") for name in names], [value.strip("| ") for value in values], strict=True))
        assert shown["best-fast"] == f"{statistics.fmean(chosen):.2f} ± {statistics.stdev(chosen):.2f}"

    def test_the_lites_are_on_it(self) -> None:
        page = (BENCHMARKS.parent / "docs" / "results.md").read_text("utf-8")
        found = sorted((BENCHMARKS / "results").glob("efficientnet_lite*.json"))
        assert found
        for path in found:
            for row in json.loads(path.read_text("utf-8"))["rows"]:
                values = (
                    f"{row['agreement']:.1f} ± {row['agreement_standard_error']:.1f} | {row['agreement_confident']:.1f}"
                )
                assert f"| Lite{path.stem[-1]} | 4/4 | {row['method']} | {values} |" in page

    def test_a_page_without_places_for_the_parts_is_refused(self, load: Any) -> None:
        page = load("bench_page")
        assert page.replaced("<!-- a -->\nold\n<!-- end of a -->", "a", "new") == "<!-- a -->\nnew\n<!-- end of a -->"
        with pytest.raises(SystemExit, match="no place for 'b'"):
            page.replaced("<!-- a -->\nold\n<!-- end of a -->", "b", "new")


class TestVerdicts:
    def test_seeds_are_paired(self, load: Any) -> None:
        mean, error = load("bench_page").paired({0: 1.0, 1: 5.0, 2: 9.0}, {0: 2.0, 1: 6.5, 2: 9.5, 3: 99.0})
        assert mean == pytest.approx(1.0)
        assert error == pytest.approx(0.5 / 3**0.5)

    @pytest.mark.parametrize(
        ("mean", "error", "verdict"), [(0.5, 0.2, True), (-0.5, 0.2, True), (0.5, 0.3, False), (0.2, 0.01, False)]
    )
    def test_noise_is_two_standard_errors_and_a_third_of_a_point(
        self, load: Any, mean: float, error: float, verdict: bool
    ) -> None:
        assert load("bench_page").differs(mean, error) is verdict

    def test_one_seed_is_no_verdict(self, load: Any) -> None:
        page = load("bench_page")
        assert page.gain({0: 50.0}, {0: 60.0}, 70.0) == "+10.0, 50 %"
        assert page.gain({0: 50.0, 1: 52.0}, {0: 55.0, 1: 58.0}, 71.0) == "**+5.5 ± 0.5, 28 %**"
        assert page.gain({0: 50.0}, {1: 60.0}, 70.0) == ""


class TestStudies:
    def test_the_peak_leaves_out_the_logits(self, load: Any) -> None:
        assert load("bench_studies").peak({"a": 1.0, "b": 3.0, "c": 2.0, "logits": 9.0}) == 3.0

    def test_ranks_of_capacities_and_losses(self, load: Any) -> None:
        ranking = load("bench_studies").ranking
        assert ranking([1, 2, 4, 8, 16], [1, 2, 4, 8, 16]) == ["+1.00", "+1.00", "+1.00", "1 of 1"]
        # Sizes of differences 1, 2, 4, 8 and 8, 4, 2, 1; all rise.
        assert ranking([1, 2, 4, 8, 16], [1, 9, 13, 15, 16]) == ["+1.00", "−1.00", "−1.00", "0 of 1"]

    def test_amounts_are_told_apart_by_images_and_batch(self, load: Any) -> None:
        done = rows("images")
        found = load("bench_studies").amounts(done)
        assert set(found) == {(row["cell"]["images"], 32) for row in done}
        chosen = next(r for r in done if r["cell"]["images"] == 256 and "granularity.method" in r["cell"]["settings"])
        assert found[256, 32]["loss-descent"] == [chosen["measured"]["top1"]]

    def test_random_granularities_are_those_of_the_table(self, load: Any) -> None:
        module = load("random_schemes")
        assert module.TABLE.read_text("utf-8") == module.text()
        schemes = [
            list(map(list, cell.recipe.granularity.scheme)) for cell in load("bench").read_table("granularities").cells
        ]
        assert len(schemes) == module.SCHEMES == len({json.dumps(scheme) for scheme in schemes})
        places = {name: i for i, name in enumerate(module.MODULES)}
        for unit in (unit for scheme in schemes for unit in scheme):
            first = places[unit[0]]
            assert [places[name] for name in unit] == list(range(first, first + len(unit)))
            assert 2 <= len(unit) <= module.MOST_MODULES


class TestCells:
    @pytest.mark.parametrize("table", TABLES)
    def test_tables_can_be_read_and_cells_have_one_row_at_most(self, load: Any, table: str) -> None:
        module = load("bench")
        assert table in module.TABLES
        cells = [json.dumps(module.identity(cell), sort_keys=True) for cell in module.read_table(table).cells]
        recorded = [json.dumps(row["cell"], sort_keys=True) for row in module.read_rows(module.rows_file(table))]
        assert len(set(cells)) == len(cells) and len(set(recorded)) == len(recorded)
        assert set(recorded) <= set(cells), "results of cells that the table does not have"

    def test_the_smallest_one_can_be_repeated(self, load: Any) -> None:
        chosen = next(r for r in rows("quick") if r["cell"]["preset"] == "nearest")
        done = bench("repeat", "quick", load("bench").key(chosen["cell"]))
        assert done.returncode == 0, done.stdout + done.stderr
        assert "is within 3 pooled standard deviations" in done.stdout

    def test_an_unknown_one(self) -> None:
        done = bench("repeat", "quick", "0" * 12)
        assert done.returncode == 1 and "quick has no cell 000000000000" in done.stderr


class TestEmoji:
    @pytest.fixture
    def art(self) -> torch.Tensor:
        return torch.randint(256, (1000, 2, 4, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)

    def test_an_image_is_decided_by_its_number(self, load: Any, art: torch.Tensor) -> None:
        render = load("emoji1000.render").render
        first, labels = render(art, "test", 0)
        again, same = render(art, "test", 0)
        assert first.shape == (250, 3, 16, 16) and first.dtype == torch.uint8
        assert torch.equal(first, again) and torch.equal(labels, same)
        assert labels.min() >= 0 and labels.max() < 1000
        for part, index in (("test", 1), ("tuning", 0), ("calibration", 0), ("training", 0)):
            other, other_labels = render(art, part, index)
            assert not torch.equal(first, other) and not torch.equal(labels, other_labels)

    def test_no_two_parts_share_a_seed(self, load: Any) -> None:
        """Of a seed, torch's generator takes the lower 32 bits."""
        module, drawn = load("emoji1000.render"), {}
        for part, number in module.PARTS.items():
            for index in (0, 1, 10**6, module._PART - 1):
                generator = torch.Generator().manual_seed(number * module._PART + index)
                drawn[part, index] = tuple(torch.randint(2**31, (4,), generator=generator).tolist())
        assert len(set(drawn.values())) == len(drawn)

    def test_the_class_is_that_of_the_large_one(self, load: Any) -> None:
        """Glyphs of one grey value each: the most frequent value of an easy image is that of its class."""
        render = load("emoji1000.render").render
        shades = (torch.arange(1000) % 250).to(torch.uint8)
        art = shades.view(1000, 1, 1, 1, 1).repeat(1, 2, 4, 16, 16)
        art[:, :, 3] = 255
        images, labels = render(art, "test", 0, strength=0.01)
        found = torch.stack([image[0].flatten().mode().values for image in images]).int()
        assert ((found - shades[labels].int()).abs() <= 3).float().mean() > 0.95

    def test_weights_are_halved_but_for_statistics(self, load: Any) -> None:
        state = load("train_emoji").half(
            torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).state_dict()
        )
        kept = {name for name, tensor in state.items() if tensor.dtype != torch.float16}
        assert kept == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}

    def test_the_stride_taken_out_for_training_changes_nothing(self, load: Any) -> None:
        load("train_emoji")
        network = load("emoji1000.networks").mobilenetv2_035()
        x = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            plain = network(x)
            with load("train_emoji").subsampled(network):
                torch.testing.assert_close(network(x), plain, rtol=1e-4, atol=1e-5)
            assert torch.equal(network(x), plain)

    @pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100", "mobilenetv2_035", "regnetx_600mf"])
    def test_last_features_have_four_by_four_places(self, load: Any, name: str) -> None:
        network, sizes = load("emoji1000.networks").NETWORKS[name](), []
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_hook(lambda _, __, out: sizes.append(out.shape[-1]))
        with torch.no_grad():
            assert network(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)
        assert min(sizes) == sizes[-1] == 4


class TestImageNet:
    def test_the_published_numbers_are_of_known_networks_and_methods(self, load: Any) -> None:
        module = load("imagenet")
        published = json.loads(module.PUBLISHED.read_text("utf-8"))
        assert set(published["float"]) == set(module.NETWORKS)
        printed = {module.PRINTED_AS.get(method, method) for method in module.METHODS}
        for methods in published["top1"].values():
            assert set(methods) <= printed
            for values in methods.values():
                assert set(values) <= set(module.NETWORKS)
                assert all(0 < value < published["float"][name] for name, value in values.items())

    @pytest.mark.parametrize("steps", [500, 20_000])
    def test_every_network_and_method_has_cells(self, load: Any, tmp_path: Path, steps: int) -> None:
        module = load("imagenet")
        options = module.parse(["--imagenet", str(tmp_path), "--out", str(tmp_path), "--steps", str(steps)])
        for name in module.NETWORKS:
            (tmp_path / f"{name}.toml").write_text(module.sweep_text(name, options))
            cells = load("quiesce.sweep.plan").read_sweep(tmp_path / f"{name}.toml").cells
            assert len(cells) == len(module.METHODS) * len(options.bits) * len(options.seeds)

    @pytest.mark.long
    def test_a_folder_of_its_form_from_end_to_end(self, tmp_path: Path) -> None:
        generator = torch.Generator().manual_seed(0)
        for part in ("train", "val"):
            for name in ("n01440764", "n01443537"):
                (tmp_path / part / name).mkdir(parents=True)
                for i in range(4):
                    pixels = torch.randint(256, (260, 300, 3), generator=generator).to(torch.uint8)
                    Image.fromarray(pixels.numpy()).save(tmp_path / part / name / f"{i}.JPEG")
        torch.manual_seed(0)
        torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pth")
        done = subprocess.run(
            [
                *(sys.executable, str(BENCHMARKS / "imagenet.py"), "--imagenet", str(tmp_path)),
                *("--out", str(tmp_path / "out"), "--weights", f"resnet18={tmp_path / 'resnet18.pth'}"),
                *("--networks", "resnet18", "--bits", "2/4", "--seeds", "0", "--images", "8", "--batch-size", "4"),
                *("--steps", "2", "--methods", "nearest", "BRECQ", "QDrop + scheme"),
            ],
            capture_output=True,
            text=True,
            timeout=900,
            env=os.environ | {"COLUMNS": "120"},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        lines = {line.split("│")[1].strip(): line for line in done.stdout.splitlines() if line.startswith("│")}
        assert set(lines) == {"nearest", "AdaRound", "BRECQ", "QDrop", "QDrop + scheme", "BRECQ + loss", "QDrop + loss"}
        assert "63.71" in lines["BRECQ"] and "7.30" in lines["BRECQ"]
        top1 = float(lines["QDrop + scheme"].split("│")[2])
        assert 0 <= top1 <= 100


def test_memory_is_measured_and_a_longer_run_computed() -> None:
    few = ("--network", "squeezenet1_1", "--images", "64", "--size", "64", "--batch", "2", "--resident", "4")
    command = [sys.executable, str(BENCHMARKS / "memory.py"), *few, "--steps", "102", "--of", "200"]
    done = subprocess.run([*command, "--one", "120MB"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert 0 < found["peak"] < 240e6
    assert 0 < found["step_of_all"] < found["units_seconds"] < found["wall_seconds"]
