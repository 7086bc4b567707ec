"""Every export format, in Python and on the command line, and the examples of the deployment page."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import quiesce
from quiesce.cli.commands import main
from quiesce.errors import ModelError, OutputError
from quiesce.export.export import EXPORT_OPTIONS, Export
from quiesce.outputs import RESULT_FILES
from quiesce.quantized import EXPORTS, QuantizedModel
from tiny import Chain, images, recipe, run_examples

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def network() -> QuantizedModel:
    settings = recipe("nearest", weight_bits=4, activation_bits=8, backend="onnxruntime")
    return quiesce.quantize(Chain(1), images(16), settings)


@pytest.fixture
def folder(network: QuantizedModel, tmp_path: Path) -> Path:
    return network.save(tmp_path / "net")


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main([str(a) for a in arguments])
            raise SystemExit(0)
        shown = capsys.readouterr()
        return int(stopped.value.code or 0), shown.out, shown.err

    return run


def installed(form: str) -> None:
    if form == "executorch":
        pytest.importorskip("executorch.exir", exc_type=ImportError)


def test_the_command_line_knows_the_formats() -> None:
    assert list(EXPORT_OPTIONS) == list(EXPORTS)
    assert {f"quantized{f.suffix}" for f in EXPORTS.values()} <= RESULT_FILES


@pytest.mark.parametrize("form", EXPORTS)
def test_every_format_writes_whole_files_and_keeps_what_is_there(
    form: str, network: QuantizedModel, tmp_path: Path
) -> None:
    installed(form)
    path = tmp_path / f"network{EXPORTS[form].suffix}"
    done = EXPORTS[form].write(network, path)
    assert isinstance(done, Export) and done.path == path
    written = sorted(tmp_path.iterdir())
    assert path in written and done.bytes == sum(p.stat().st_size for p in written)
    before = path.read_bytes()
    with pytest.raises(OutputError, match=rf"network\{EXPORTS[form].suffix} is there already"):
        EXPORTS[form].write(network, path)
    assert path.read_bytes() == before and sorted(tmp_path.iterdir()) == written
    EXPORTS[form].write(network, path, force=True)
    with pytest.raises(OutputError, match=r"folder .* is not there"):
        EXPORTS[form].write(network, tmp_path / "absent" / path.name)


@pytest.mark.parametrize("form", EXPORTS)
def test_every_format_on_the_command_line(form: str, folder: Path, command: Command) -> None:
    installed(form)
    code, out, err = command("export", folder, "--format", form)
    assert (code, err) == (0, "")
    path = folder / f"quantized{EXPORTS[form].suffix}"
    assert path.is_file() and str(path) in out and "bytes" in out
    code, _, err = command("export", folder, "--format", form)
    assert code == 1 and "is there already" in err and err.count("\n") == 1


def test_a_file_is_compared_with_the_simulation(folder: Path, tmp_path: Path, command: Command) -> None:
    np.savez(tmp_path / "images.npz", x=images(40, seed=3).numpy())
    code, out, _ = command(
        "export", folder, "--format", "onnx", "--compat", "--check", tmp_path / "images.npz", "--images", 30
    )
    assert code == 0
    assert "30 images" in out and "opset 13" in out
    assert re.search(r"that differ elsewhere\s*│\s*0 ", out)


def test_images_that_do_not_fit_are_an_error_in_one_line(folder: Path, tmp_path: Path, command: Command) -> None:
    np.savez(tmp_path / "grey.npz", x=images(8, channels=1).numpy())
    code, _, err = command("export", folder, "--format", "onnx", "--check", tmp_path / "grey.npz")
    assert code == 1 and "can't be run on" in err and "grey.npz" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "onxx"], r"--format 'onxx' is unknown. Did you mean 'onnx'\?"),
        (["--format", "onnx", "--pt2e"], "--pt2e is not for --format onnx; it is for program"),
        (
            ["--format", "program", "--symmetric"],
            "is not for --format program; it is for onnx and openvino",
        ),
        (["--format", "onnx", "--batch", "3"], "--batch is not for --format onnx; it is for executorch"),
        (["--format", "program", "--check", "x.npz"], "it is for --format onnx"),
    ],
)
def test_wrong_options_are_refused_before_any_work(
    arguments: list[str], message: str, tmp_path: Path, command: Command
) -> None:
    code, _, err = command("export", tmp_path / "absent", *arguments)
    assert code == 1 and re.search(message, err)


@pytest.mark.parametrize("form", ["onnx", "openvino"])
def test_a_missing_package_is_named_with_its_extra(
    form: str, network: QuantizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = {"onnx": "onnxscript", "openvino": "openvino"}[form]
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(
        ModelError, match=rf"{package} is not installed; install it with: pip install quiesce\[{form}\]"
    ):
        EXPORTS[form].write(network, tmp_path / f"network{EXPORTS[form].suffix}")


@pytest.mark.parametrize("section", ["ONNX", "OpenVINO", "TensorRT"])
def test_the_examples_of_the_page_run(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_examples("docs/deploy.md", section)
    assert list(tmp_path.iterdir())
