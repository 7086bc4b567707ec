import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import quiesce.reconstruct.loop
from quiesce.cli.commands import app, main
from quiesce.recipe import GRANULARITIES, PRESETS, Recipe
from quiesce.result import Result
from tiny import example_result, without_times

SOURCE = """
import pathlib
import torch
from torch import nn

def net():
    pathlib.Path("loaded").touch()
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU()]
    layers += [nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()

def no_weights():
    return nn.Sequential(nn.ReLU())

def images(size=8, count=3):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.randn(16, 3, size, size, generator=generator), torch.randint(3, (16,), generator=generator)

def larger():
    return images(9)

def other_dtype():
    return [x.double() for x, _ in images()]

def nothing():
    return []

def infinite():
    return [torch.full((2, 3, 8, 8), float("inf"))]
"""

Command = Callable[..., tuple[int, str, str]]


def write_source(folder: Path) -> Path:
    (folder / "cli_source.py").write_text(SOURCE)
    return folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a network and data."""
    monkeypatch.chdir(write_source(tmp_path))
    monkeypatch.delitem(sys.modules, "cli_source", raising=False)
    return tmp_path


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


QUANTIZE = ("quantize", "cli_source:net", "--calibration", "cli_source:images")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of one whole run, shared by the tests that only read it."""
    folder = write_source(tmp_path_factory.mktemp("quantized"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delitem(sys.modules, "cli_source", raising=False)
        recipe = ("--preset", "qdrop-fast", "--weight-bits", "3", "--steps", "3", "--seed", "7", "--images", "40")
        more = ("--activation-bits", "float", "--evaluate", "cli_source:images", "--evaluate-images", "20")
        with pytest.raises(SystemExit) as ended:
            main([*QUANTIZE, *recipe, *more, "--set", "batch_size=8", "--out", "out"])
        assert ended.value.code == 0
    yield folder / "out"


class TestHelp:
    def test_all_commands_are_listed(self) -> None:
        result = CliRunner().invoke(app, ["--help"])
        assert result.exit_code == 0
        for name in ("demo", "quantize", "sweep", "evaluate", "analyze", "report"):
            assert re.search(rf"{name} +\S", result.output)

    @pytest.mark.parametrize("name", ["demo", "quantize", "sweep", "evaluate", "analyze", "report"])
    def test_every_option_is_explained(self, name: str) -> None:
        result = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"})
        assert result.exit_code == 0
        for line in result.output.splitlines():
            if re.match(r"│ \*? *--", line):
                assert re.search(r"[A-Z][^│]{4,}\.", line), line

    def test_names_come_from_the_recipe(self) -> None:
        text = CliRunner().invoke(app, ["quantize", "--help"], env={"COLUMNS": "300"}).output
        assert all(name in text for name in (*PRESETS, *GRANULARITIES))

    def test_version(self, command: Command) -> None:
        code, out, _ = command("--version")
        assert code == 0 and re.fullmatch(r"quiesce \d+\.\d+\.\d+\S*\n", out)

    def test_wrong_usage(self, command: Command) -> None:
        code, _, err = command("quantize", "cli_source:net", "--calibation", "x")
        assert code == 2 and "--calibration" in err


class TestQuantize:
    def test_writes_everything(self, quantized: Path) -> None:
        names = {p.name for p in quantized.iterdir()}
        assert names == {"quantized.json", "quantized.safetensors", "result.json", "recipe.toml", "report.html"}
        assert not [p for p in quantized.parent.iterdir() if "partial" in p.name]

    def test_options_reach_the_recipe_and_the_result(self, quantized: Path) -> None:
        recipe = Recipe.from_toml(quantized / "recipe.toml")
        expected = Recipe.preset("qdrop-fast", weight_bits=3, activation_bits=None, steps=3, seed=7, batch_size=8)
        assert recipe == expected
        result = Result.read(quantized / "result.json")
        assert result.model == "cli_source:net" and result.recipe == expected.to_dict()
        assert (result.run.weight_bits, result.run.activation_bits, result.run.seed) == (3, None, 7)
        assert result.run.top1 is not None and (result.run.top1 / 5) % 1 == 0  # a share of 20 images

    def test_a_folder_of_images_is_prepared_as_told_and_the_network_remembers(
        self, place: Path, command: Command
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        for i in range(8):
            pixels = torch.randint(256, (12, 10, 3), generator=generator, dtype=torch.uint8)
            folder = place / "photos" / f"class{i % 3}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
        how = ("--resize", "9", "--crop", "8", "--mean", "0.5,0.4,0.3", "--std", "0.2,0.2,0.2")
        arguments = ("quantize", "cli_source:net", "--calibration", "photos", "--preset", "nearest", "--out", "out")
        code, _, err = command(*arguments, *how)
        assert code == 1 and "--interpolation is missing" in err
        code, out, err = command(*arguments, *how, "--interpolation", "bilinear", "--evaluate", "photos")
        assert code == 0, err
        assert "nearest" in out and str(Path("out/report.html")) in out
        result = Result.read(place / "out" / "result.json")
        code, out, err = command("evaluate", "out", "--data", "photos")
        assert code == 0, err
        assert result.run.top1 is not None and f"{result.run.top1:.2f}" in out

    def test_units_cut_off_undecided_are_told(self, place: Path, command: Command) -> None:
        told = "units more than 5 % of the roundings were undecided when they were cut off, most in "
        few = (*QUANTIZE, "--preset", "qdrop-fast", "--steps", "2", "--set", "batch_size=8")
        code, out, err = command(*few, "--out", "few")
        assert code == 0, err
        run = Result.read(place / "few" / "result.json").run
        assert run.undecided_units() and f"qdrop-fast block: in {len(run.undecided_units())} of" in out and told in out
        code, out, err = command(*QUANTIZE, "--preset", "nearest", "--out", "nearest")
        assert code == 0 and told not in out, err

    def test_layers_left_float_are_counted_with_their_reason(self, place: Path, command: Command) -> None:
        chosen = ("--preset", "nearest", "--leave-float", "type:linear", "--leave-float", "[35]")
        code, out, err = command(*QUANTIZE, *chosen, "--out", "out")
        assert code == 0, err
        assert "1 weight layer is left float, as the recipe asks for it (type:linear): 9\n" in out
        assert "2 weight layers are left float, as the recipe asks for it ([35]): 3, 5\n" in out
        assert "3, 5" in (place / "out" / "report.html").read_text()
        assert list(Result.read(place / "out" / "result.json").float_layers) == ["3", "5", "9"]
        code, out, err = command("analyze", "cli_source:net", "--input-shape", "3,8,8", *chosen[2:])
        assert code == 0 and "2 weight layers are left float" in out
        code, out, err = command(*QUANTIZE, "--leave-float", "Linear", "--out", "other")
        assert code == 1 and "error: layers: pattern 'Linear' fits no weight layer" in err

    def test_progress_goes_to_stderr_and_the_table_to_stdout(self, place: Path, command: Command) -> None:
        settings = ("--preset", "brecq-fast", "--steps", "2", "--set", "batch_size=4")
        code, out, err = command(*QUANTIZE, *settings, "--out", "out")
        assert code == 0, err
        assert "brecq-fast" in out and "100%" in err and "100%" not in out


class TestInterrupted:
    BRECQ = (*QUANTIZE, "--preset", "brecq-fast", "--steps", "4", "--set", "batch_size=8", "--out", "out")

    @pytest.fixture
    def stop_third_unit(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
        """Let the process get a signal while it optimizes the third unit of the next command."""
        optimize = quiesce.reconstruct.loop.optimize

        def arm(number: int) -> None:
            units = []

            def signalled(*args: Any, on_step: Callable[[], None], **settings: Any) -> Any:
                units.append(0)

                def step() -> None:
                    on_step()
                    if len(units) == 3:
                        signal.raise_signal(number)

                return optimize(*args, on_step=step, **settings)

            monkeypatch.setattr(quiesce.reconstruct.loop, "optimize", signalled)

        return arm

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_stops_cleanly_and_the_same_command_goes_on(
        self, place: Path, command: Command, stop_third_unit: Callable[[int], None], number: int
    ) -> None:
        handler = signal.getsignal(number)
        code, _, err = command(*self.BRECQ)
        assert code == 0, err
        (place / "out").rename(place / "whole")
        stop_third_unit(number)
        code, _, err = command(*self.BRECQ)
        assert code == 128 + number and signal.getsignal(number) is handler
        assert err.splitlines()[-1] == (
            f"stopped after 2 finished units, kept in {place / 'out.progress'}; "
            "the same command (without --restart) goes on behind them"
        )
        assert "Traceback" not in err and not (place / "out").exists()
        assert not [path for path in place.rglob("*") if "partial" in path.name]
        code, _, err = command(*self.BRECQ, "--steps", "5")
        assert code == 1 and "(reconstruction.steps: 4 -> 5)" in err and "--restart" in err
        code, _, err = command(*self.BRECQ)
        assert code == 0 and f"continuing after 2 finished units ({place / 'out.progress'})\n" in err
        assert not (place / "out.progress").exists()
        whole, resumed = (without_times(Result.read(place / name / "result.json")) for name in ("whole", "out"))
        assert whole == resumed
        for name in ("quantized.json", "quantized.safetensors", "recipe.toml"):
            assert (place / "whole" / name).read_bytes() == (place / "out" / name).read_bytes()

    def test_restart_throws_progress_away(
        self, place: Path, command: Command, stop_third_unit: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stop_third_unit(signal.SIGINT)
        command(*self.BRECQ)
        monkeypatch.undo()
        monkeypatch.chdir(place)
        code, _, err = command(*self.BRECQ, "--steps", "5", "--restart")
        assert code == 0 and "continuing" not in err
        run = Result.read(place / "out" / "result.json").run
        assert {(record.steps, record.resumed) for record in run.unit_records} == {(5, False)}
        assert not (place / "out.progress").exists()

    def test_progress_is_kept_until_the_results_are(
        self, place: Path, command: Command, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A disk that is full when all is optimized costs nothing but the writing."""
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def fails(*_: object) -> None:
            raise full

        with monkeypatch.context() as patch:
            patch.setattr("quiesce.report.html.write_report", fails)
            code, _, err = command(*self.BRECQ)
        assert code == 1 and "out can't be written (No space left on device)" in err
        with monkeypatch.context() as patch:
            patch.delattr("quiesce.reconstruct.loop.optimize")
            code, _, err = command(*self.BRECQ)
        assert code == 0, err

    def test_stopped_in_front_of_any_work(self, place: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("quiesce.models.load_model", lambda *_, **__: signal.raise_signal(signal.SIGINT))
        code, _, err = command(*self.BRECQ)
        assert code == 130 and err.splitlines()[-1] == "stopped"


class TestOutputFolder:
    def test_other_results_are_refused_before_any_work(self, place: Path, command: Command) -> None:
        (place / "out").mkdir()
        (place / "out" / "result.json").write_text("earlier")
        code, _, err = command(*QUANTIZE, "--preset", "nearest", "--out", "out")
        assert code == 1 and "holds other results; choose another folder, or --force" in err
        assert not (place / "loaded").exists()
        assert (place / "out" / "result.json").read_text() == "earlier"
        code, _, err = command(*QUANTIZE, "--preset", "nearest", "--force", "--out", "out")
        assert code == 0, err
        # What a run writes can itself be replaced: every file of it is known.
        code, _, err = command(*QUANTIZE, "--preset", "nearest", "--force", "--out", "out")
        assert code == 0, err
        assert Result.read(place / "out" / "result.json").run.preset == "nearest"

    def test_a_full_disk(self, place: Path) -> None:
        """In a process of its own, whose files the system keeps below 3,000 bytes."""
        arguments = [*QUANTIZE, "--preset", "nearest", "--out", "runs/out"]
        done = subprocess.run(
            [sys.executable, "-m", "quiesce", *arguments],
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)),
            env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1, done.stderr
        assert re.search(r"^error: .*out.* can't be written \(.*File too large.*\); free space", done.stderr, re.M)
        assert "Traceback" not in done.stderr
        assert not (place / "runs").exists()


class TestBadInput:
    """One clear error, exit code 1, and nothing written."""

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--calibration", "cli_source:nothing"), "calibration data is empty"),
            (("--calibration", "cli_source:infinite"), "batch 0, input 0, holds NaN or infinite"),
            (("--calibration", "missing"), "calibration data 'missing' is not there"),
            (("--calibration", "cli_source:imags"), "Did you mean 'images'"),
            (("--evaluate", "cli_source:larger"), r"evaluation data is float32 \[N, 3, 9, 9\]"),
            (("--evaluate", "cli_source:other_dtype"), r"evaluation data is float64"),
            (("--evaluate", "cli_source:nothing"), "evaluation data is empty"),
            (("--preset", "qdorp"), "preset 'qdorp' is unknown. Did you mean 'qdrop'"),
            (("--granularity", "modcp"), "granularity 'modcp' is unknown. Did you mean 'modcap'"),
            (("--set", "backend=academik"), "backend 'academik' is unknown. Did you mean 'academic'"),
            (("--set", "stps=3"), "setting 'stps' is unknown. Did you mean 'steps'"),
            (("--set", "steps"), "'steps' is not of the form key=value"),
            (("--set", "steps=[1"), "not valid TOML"),
            (("--weight-bits", "1"), "weights.bits is 1; give a whole number from 2 to 8"),
            (("--activation-bits", "9"), "activations.bits is 9; give a whole number from 2 to 8"),
            (("--activation-bits", "four"), "--activation-bits is 'four'"),
            (("--seed", "-1"), "seed is -1"),
            (("--steps", "0"), "steps is 0"),
            (("--recipe", "none.toml"), "recipe file none.toml can't be read"),
            (("--weights", "none.pt"), "weight file none.pt is not there"),
            (("--weights", "random"), "makes its own weights"),
            (("--weights-by-order",), "only from a file"),
            (("--device", "gpu"), "device 'gpu' can't be used"),
            (("--crop", "a"), "--crop is 'a'; give whole numbers"),
            (("--resize", "1,2,3"), "--resize is '1,2,3'"),
            (("--interpolation", "bicubic"), "--resize, --crop, --mean, --std are missing"),
            (("--out", "cli_source.py"), "is a file; choose a folder"),
        ],
    )
    def test_options(self, place: Path, command: Command, arguments: tuple[str, ...], message: str) -> None:
        code, out, err = command(*QUANTIZE, "--steps", "1", "--out", "out", *arguments)
        assert code == 1 and out == ""
        (line,) = (line for line in err.splitlines() if line.startswith("error: "))
        assert re.search(message, line) and "Traceback" not in err
        self.assert_nothing_written(place)

    @pytest.mark.parametrize(
        ("model", "message"),
        [
            ("cli_source:no_weights", "."),
            ("cli_source:nett", "Did you mean 'net'"),
            ("timm:mobilenetv2_O50", "Did you mean 'mobilenetv2_050'"),
            ("resnet18", "is none of timm:NAME"),
            ("net.pt2", "add --trust"),
        ],
    )
    def test_models(self, place: Path, command: Command, model: str, message: str) -> None:
        code, out, err = command("quantize", model, "--calibration", "cli_source:images", "--out", "out")
        assert code == 1 and out == ""
        assert re.search(rf"^error: .*{message}", err, re.M) and "Traceback" not in err
        self.assert_nothing_written(place)

    def test_a_weight_file_that_does_not_fit(self, place: Path, command: Command) -> None:
        torch.save({"0.weight": torch.ones(4, 3, 5, 5), "head": torch.ones(1)}, place / "w.pt")
        code, _, err = command(*QUANTIZE, "--weights", "w.pt", "--out", "out")
        assert code == 1 and "w.pt does not fit the network" in err
        assert "1 unexpected (head)" in err and "[4, 3, 5, 5] in the file, [4, 3, 3, 3] in the network" in err
        self.assert_nothing_written(place)

    def test_a_recipe_file_with_an_unknown_key(self, place: Path, command: Command) -> None:
        (place / "r.toml").write_text("[weights]\nbit = 3\n")
        code, _, err = command(*QUANTIZE, "--recipe", "r.toml", "--out", "out")
        assert code == 1 and "key 'bit' is unknown. Did you mean 'bits'" in err

    @pytest.mark.parametrize("arguments", [("evaluate", "none", "--data", "x"), ("report", "none")])
    def test_a_folder_without_results(self, place: Path, command: Command, arguments: tuple[str, ...]) -> None:
        code, _, err = command(*arguments)
        assert code == 1 and err.startswith("error: ") and "none" in err
        assert not (place / "none").exists()

    def test_interruption(self, place: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("quiesce.quantize", interrupted)
        code, _, err = command(*QUANTIZE, "--out", "out")
        assert code == 130 and "Traceback" not in err
        self.assert_nothing_written(place)

    @staticmethod
    def assert_nothing_written(place: Path) -> None:
        known = {"cli_source.py", "__pycache__", "loaded", "w.pt"}
        assert {p.name for p in place.iterdir()} <= known


class TestEvaluateAndReport:
    def test_evaluate_repeats_the_result(
        self, quantized: Path, command: Command, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(quantized.parent)
        code, out, err = command("evaluate", "out", "--data", "cli_source:images", "--images", "20")
        assert code == 0, err
        run = Result.read(quantized / "result.json").run
        assert "cli_source:net" in out and f"{run.top1:.2f}" in out and "20" in out

    def test_evaluate_without_labels(self, quantized: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
        import numpy as np

        monkeypatch.chdir(quantized.parent)
        np.savez("x.npz", x=np.zeros((4, 3, 8, 8), np.float32))
        code, out, err = command("evaluate", "out", "--data", "x.npz")
        assert code == 0, err
        assert "no labels" in out

    def test_evaluate_on_data_of_another_shape(
        self, quantized: Path, command: Command, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import numpy as np

        monkeypatch.chdir(quantized.parent)
        np.savez("wrong.npz", x=np.zeros((4, 2, 8, 8), np.float32))
        code, _, err = command("evaluate", "out", "--data", "wrong.npz")
        assert code == 1 and re.match(r"error: the network of out can't be run on wrong.npz \(.*2 channels.*\);", err)

    def test_report_is_written_again(self, quantized: Path, command: Command) -> None:
        report = quantized / "report.html"
        before = report.read_text(encoding="utf-8")
        report.write_text("")
        code, out, err = command("report", str(quantized))
        assert code == 0, err
        assert report.read_text(encoding="utf-8") == before and "report.html" in out


class TestAnalyze:
    def test_table_and_json(self, place: Path, command: Command) -> None:
        code, out, err = command("analyze", "cli_source:net", "--input-shape", "3,8,8", "--json", "a.json")
        assert code == 0, err
        data = json.loads((place / "a.json").read_text())
        assert all(re.search(rf"│ {module} +│", out) for module in data["modules"])
        assert len(data["differentials"]) == len(data["modules"]) - 1
        assert sum(len(layers) for layers in data["layers"].values()) == 4

    def test_bits_change_capacities_in_proportion(self, place: Path, command: Command) -> None:
        capacities = []
        for bits in ("2", "4"):
            command("analyze", "cli_source:net", "--input-shape", "3,8,8", "--weight-bits", bits, "--json", "a.json")
            data = json.loads((place / "a.json").read_text())
            capacities.append(data["capacities"][data["modules"][1]])
        assert capacities[1] == 2 * capacities[0]

    def test_the_input_shape_has_to_be_known(self, place: Path, command: Command) -> None:
        code, _, err = command("analyze", "cli_source:net")
        assert code == 1 and "give --input-shape, such as 3,224,224" in err
        code, _, err = command("analyze", "cli_source:net", "--input-shape", "3,0,8")
        assert code == 1 and "numbers above 0" in err

    def test_what_needs_optimization_is_refused(self, place: Path, command: Command) -> None:
        code, _, err = command("analyze", "cli_source:net", "--input-shape", "3,8,8", "--granularity", "loss")
        assert code == 1 and "'loss' needs optimization" in err

    def test_sensitivities_as_table_figure_and_numbers(self, place: Path, command: Command) -> None:
        data = ("--sensitivity", "--calibration", "cli_source:images", "--images", "40")
        chosen = ("--weight-bits", "3", "--bits", "2,5", "--json", "a.json", "--figure", "a.svg")
        code, out, err = command("analyze", "cli_source:net", *data, *chosen)
        assert code == 0, err
        found = json.loads((place / "a.json").read_text())["sensitivity"]
        assert [row["layer"] for row in found["layers"]] == ["0", "3", "5", "9"]
        assert [list(row["weight_errors"]) for row in found["layers"][:2]] == [["2", "5", "8"], ["2", "3", "5"]]
        assert found["images"] == 10 and found["calibration_images"] == 30
        ranked = [row["layer"] for row in sorted(found["layers"], key=lambda row: -row["error"])]
        assert re.findall(r"^│ (\d) +│ +\d+ │ +\d/4|^│ (\d) +│ +\d+ │ +8/8", out, re.M)
        assert [
            re.search(r"\d", line)[0] for line in out.splitlines() if re.match(r"│ \d .* │ +\d/\d │", line)
        ] == ranked
        assert "forward passes over these images" in out and "100%" in err
        assert (place / "a.svg").read_text().startswith("<svg ")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--sensitivity",), "--sensitivity, --calibration and --figure go together"),
            (("--calibration", "cli_source:images"), "go together"),
            (("--figure", "a.svg"), "go together"),
            (("--sensitivity", "--calibration", "cli_source:images", "--bits", "1"), "the number of bits is 1"),
            (
                ("--sensitivity", "--calibration", "cli_source:images", "--bits", "a"),
                "--bits is 'a'; give whole numbers",
            ),
            (("--sensitivity", "--calibration", "none"), "calibration data 'none' is not there"),
            (
                ("--sensitivity", "--calibration", "cli_source:images", "--figure", "no/a.svg"),
                "folder .*no is not there",
            ),
        ],
    )
    def test_what_does_not_fit_a_sensitivity(
        self, place: Path, command: Command, arguments: tuple[str, ...], message: str
    ) -> None:
        code, _, err = command("analyze", "cli_source:net", "--input-shape", "3,8,8", *arguments)
        assert code == 1 and re.search(rf"^error: .*{message}", err, re.M)
        assert not list(place.glob("*.svg"))


class TestMixed:
    @pytest.mark.parametrize("budget", ["3", "250B", "0.25kB", "2.5MBOP"])
    def test_bits_are_chosen_and_stored_in_the_recipe(self, place: Path, command: Command, budget: str) -> None:
        pytest.importorskip("scipy")
        chosen = ("--preset", "nearest", "--mixed", budget, "--mixed-bits", "2,3,4")
        code, out, err = command(*QUANTIZE, *chosen, "--out", "out")
        assert code == 0, err
        assert "Chosen bits: " in out and "nearest, mixed bits" in out
        recipe = Recipe.from_toml(place / "out" / "recipe.toml")
        assert [o.pattern for o in recipe.layers] == ["0", "3", "5", "9"]
        assert {o.weight_bits for o in recipe.layers[1:3]} <= {2, 3, 4}
        code, _, err = command(*QUANTIZE, "--recipe", "out/recipe.toml", "--out", "again")
        assert code == 0, err
        files = [(place / folder / "quantized.safetensors").read_bytes() for folder in ("out", "again")]
        assert files[0] == files[1]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--mixed", "three"), "--mixed is 'three'; give mean bits such as 3"),
            (("--mixed", "3kb"), "--mixed is '3kb'"),
            (("--mixed", "3M"), "--mixed is '3M'"),
            (("--mixed", "1.5"), "budget of 1.5 bits a weight is too small: 2 bits .* take 2 bits a weight"),
            (("--mixed", "0"), "a number above 0"),
            (("--mixed-bits", "2,3"), "give --mixed too"),
            (("--mixed", "3", "--mixed-bits", "2,9"), "the number of bits is 9"),
        ],
    )
    def test_budgets_that_can_not_be_kept(
        self, place: Path, command: Command, arguments: tuple[str, ...], message: str
    ) -> None:
        pytest.importorskip("scipy")
        code, _, err = command(*QUANTIZE, *arguments, "--out", "out")
        assert code == 1 and re.search(rf"^error: .*{message}", err, re.M), err
        assert not (place / "out").exists()


def test_demo(place: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command's own part: the folder, the progress and the table; the demo itself has tests of its own."""
    stand_in = ModuleType("quiesce.demo.run")

    def run_demo(out: Path, seed: int, progress: Callable[[str, int, int], None]) -> Result:
        assert list(out.iterdir()) == [] and seed == 3
        progress("working", 1, 2)
        (out / "result.json").write_text("{}")
        return example_result()

    stand_in.run_demo = run_demo  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "quiesce.demo.run", stand_in)
    code, out, err = command("demo", "--seed", "3")
    assert code == 0, err
    assert "qdrop" in out and str(Path("runs/demo/result.json")) in out
    code, _, err = command("demo", "--seed", "3")
    assert code == 1 and "holds other results" in err
    code, _, err = command("demo", "--seed", "3", "--force")
    assert code == 0, err
