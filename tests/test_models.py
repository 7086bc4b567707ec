import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from quiesce.detection import Core
from quiesce.errors import FileFormatError, ModelError
from quiesce.models import load_model, load_weights
from quiesce.preprocess import Preprocessing


def network(features: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, features, 3), nn.BatchNorm2d(features), nn.Flatten(), nn.Linear(features, 2))


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_model.py").write_text(
        "import torch\n"
        "def make():\n    return torch.nn.Linear(2, 2)\n"
        "def broken():\n    raise ValueError('no such size')\n"
        "def wrong():\n    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_model", raising=False)
    return tmp_path


class TestLibraries:
    def test_timm(self) -> None:
        loaded = load_model("timm:mobilenetv2_050", weights="random")
        assert loaded.name == "timm:mobilenetv2_050" and loaded.input_shape == (3, 224, 224)
        assert loaded.preprocessing is not None
        assert (loaded.preprocessing.resize, loaded.preprocessing.interpolation) == (256, "bicubic")

    def test_torchvision(self) -> None:
        loaded = load_model("torchvision:mobilenet_v2", weights="random")
        assert isinstance(loaded.model, nn.Module) and not loaded.model.training
        assert loaded.input_shape == (3, 224, 224)
        assert loaded.preprocessing is not None and loaded.preprocessing.resize == 232

    def test_segmentation(self) -> None:
        loaded = load_model("torchvision:lraspp_mobilenet_v3_large", weights="random")
        assert loaded.input_shape == (3, 520, 520)
        assert loaded.preprocessing is not None and loaded.preprocessing.resize == 520

    @pytest.mark.parametrize(
        ("name", "size"), [("fasterrcnn_mobilenet_v3_large_320_fpn", 320), ("ssdlite320_mobilenet_v3_large", 320)]
    )
    def test_of_a_detector_the_network_is_taken(self, name: str, size: int) -> None:
        loaded = load_model(f"torchvision:{name}", weights="random")
        assert isinstance(loaded.model, Core) and loaded.input_shape == (3, size, size)
        assert loaded.preprocessing is not None and len(loaded.preprocessing.std) == 3

    def test_a_tag_picks_other_weights_and_their_preprocessing(self) -> None:
        loaded = load_model("torchvision:mobilenet_v2.IMAGENET1K_V1", weights="random")
        assert loaded.preprocessing is not None and loaded.preprocessing.resize == 256

    @pytest.mark.parametrize("spec", ["timm:mobilenetv2_035", "torchvision:squeezenet1_1"])
    def test_random_weights_repeat_and_leave_the_callers_generator_alone(self, spec: str) -> None:
        torch.manual_seed(5)
        before = torch.get_rng_state()
        first, second = (load_model(spec, weights="random").model.state_dict() for _ in range(2))
        assert torch.equal(torch.get_rng_state(), before)
        assert all(torch.equal(first[k], second[k]) for k in first)

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("timm:mobilenetv2_O50", "timm has no model 'mobilenetv2_O50'. Did you mean 'mobilenetv2_050'"),
            ("timm:mobilenetv2_050.lamb_in1", "unknown tag. Did you mean 'lamb_in1k'"),
            ("torchvision:resnet81", "torchvision has no image model 'resnet81'. Did you mean 'resnet18'"),
            ("torchvision:fcn_resnet51", "torchvision has no image model 'fcn_resnet51'. Did you mean 'fcn_resnet50'"),
            ("torchvision:resnet18.IMAGENET1K_V2", "unknown tag. Did you mean 'IMAGENET1K_V1'"),
            ("torchvision:r3d_18", "no image model"),
            ("resnet18", "is none of timm:NAME, torchvision:NAME, module.path:callable, or FILE.pt2"),
            ("timm:", "is none of timm:NAME"),
        ],
    )
    def test_unknown_names(self, spec: str, message: str) -> None:
        with pytest.raises(ModelError, match=message):
            load_model(spec, weights="random")

    @pytest.mark.parametrize("spec", ["timm:mobilenetv2_050", "torchvision:mobilenet_v2"])
    def test_a_failed_download_is_an_error_that_says_what_to_do(self, spec: str, tmp_path: Path) -> None:
        program = f"from quiesce.models import load_model; load_model({spec!r})"
        offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "TORCH_HOME": str(tmp_path)}
        # An address that nothing answers at, so that the test fails fast with or without a network.
        offline |= dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
        run = subprocess.run(
            [sys.executable, "-c", program], env=os.environ | offline, capture_output=True, text=True, check=False
        )
        assert run.returncode != 0
        assert f"ModelError: the pretrained weights of {spec} can't be had" in run.stderr
        assert "--weights FILE" in run.stderr

    @pytest.mark.parametrize("library", ["timm", "torchvision"])
    def test_a_missing_library(self, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(ModelError, match=rf"{library} is not installed; .* pip install quiesce\[models\]"):
            load_model(f"{library}:resnet18")


def save_safetensors(state: dict[str, torch.Tensor], folder: Path) -> Path:
    save_file(state, folder / "w.safetensors")
    return folder / "w.safetensors"


def save_plain(state: dict[str, torch.Tensor], folder: Path) -> Path:
    torch.save(state, folder / "w.pth")
    return folder / "w.pth"


def save_under_key(state: dict[str, torch.Tensor], folder: Path) -> Path:
    torch.save({"state_dict": state, "epoch": 3}, folder / "w.pt")
    return folder / "w.pt"


class TestWeights:
    @pytest.mark.parametrize("save", [save_safetensors, save_plain, save_under_key])
    def test_a_file_that_fits(self, save: Callable[[dict[str, torch.Tensor], Path], Path], tmp_path: Path) -> None:
        source, target = network(), network()
        load_weights(target, save(source.state_dict(), tmp_path))
        assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))

    def test_batch_counts_may_be_missing(self, tmp_path: Path) -> None:
        state = {k: v for k, v in network().state_dict().items() if "num_batches" not in k}
        load_weights(network(), save_plain(state, tmp_path))

    def test_through_load_model(self, tmp_path: Path) -> None:
        state = load_model("timm:mobilenetv2_035", weights="random").model.state_dict()
        state["conv_stem.weight"] = state["conv_stem.weight"] + 1
        loaded = load_model("timm:mobilenetv2_035", weights=save_plain(state, tmp_path))
        assert torch.equal(loaded.model.state_dict()["conv_stem.weight"], state["conv_stem.weight"])

    def test_a_file_that_does_not_fit_names_the_keys(self, tmp_path: Path) -> None:
        state = network(5).state_dict()
        state["extra"] = state.pop("0.bias")
        model = network()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(ModelError) as caught:
            load_weights(model, save_plain(state, tmp_path))
        message = str(caught.value)
        assert "1 missing (0.bias)" in message and "1 unexpected (extra)" in message
        assert "6 of another shape (0.weight ([5, 3, 3, 3] in the file, [4, 3, 3, 3] in the network)" in message
        assert message.count("in the file") == 3
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())

    def test_by_order_only_when_asked_and_when_all_shapes_fit(self, tmp_path: Path) -> None:
        source, target = network(), network()
        path = save_plain({f"other{i}": v for i, v in enumerate(source.state_dict().values())}, tmp_path)
        with pytest.raises(ModelError, match="give --weights-by-order"):
            load_weights(target, path)
        load_weights(target, path, by_order=True)
        assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))
        state = {f"x.{k}": v for k, v in source.state_dict().items() if "num_batches" not in k}
        target = network()
        load_weights(target, save_plain(state, tmp_path), by_order=True)
        assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))
        with pytest.raises(ModelError, match="of another shape"):
            load_weights(network(5), save_plain(state, tmp_path), by_order=True)
        with pytest.raises(ModelError, match="1 tensors and the network 8"):
            load_weights(target, save_plain({"a": torch.ones(1)}, tmp_path), by_order=True)

    def test_by_order_needs_a_file(self) -> None:
        with pytest.raises(ModelError, match="by order only from a file"):
            load_model("timm:mobilenetv2_035", weights="random", by_order=True)

    def test_damaged_and_foreign_files(self, tmp_path: Path) -> None:
        class Local:
            pass

        for path in (save_plain(network().state_dict(), tmp_path), save_safetensors(network().state_dict(), tmp_path)):
            path.write_bytes(path.read_bytes()[:200])
            with pytest.raises(FileFormatError, match=f"{path.name} can't be read"):
                load_weights(network(), path)
        torch.save([1, 2], tmp_path / "list.pt")
        with pytest.raises(FileFormatError, match="holds no state dict"):
            load_weights(network(), tmp_path / "list.pt")
        torch.save(network(), tmp_path / "whole.pt")
        with pytest.raises(FileFormatError, match=r"can't be read \(.*save model.state_dict"):
            load_weights(network(), tmp_path / "whole.pt")
        with pytest.raises(ModelError, match=r"none\.pt is not there"):
            load_weights(network(), tmp_path / "none.pt")


class TestCallable:
    def test_the_working_folder_is_importable(self, own_module: Path) -> None:
        path_before = list(sys.path)
        loaded = load_model("own_model:make")
        assert isinstance(loaded.model, nn.Linear)
        assert loaded.name == "own_model:make" and loaded.preprocessing is None and loaded.input_shape is None
        assert sys.path == path_before

    def test_with_weights(self, own_module: Path) -> None:
        path = save_plain({"weight": torch.full((2, 2), 7.0), "bias": torch.zeros(2)}, own_module)
        assert torch.all(load_model("own_model:make", weights=path).model.state_dict()["weight"] == 7)

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("own_model:broken", "calling 'own_model:broken' without arguments raised ValueError: no such size"),
            ("own_model:wrong", "returned int, not a torch.nn.Module"),
            ("own_model:maek", "has no 'maek'. Did you mean 'make'"),
            ("own_modle:make", "module 'own_modle' of 'own_modle:make' can't be imported"),
        ],
    )
    def test_errors(self, own_module: Path, spec: str, message: str) -> None:
        with pytest.raises(ModelError, match=message):
            load_model(spec)

    def test_random_weights_are_refused(self, own_module: Path) -> None:
        with pytest.raises(ModelError, match="makes its own weights"):
            load_model("own_model:make", weights="random")


class TestProgram:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        program = torch.export.export(nn.Conv2d(3, 2, 3).eval(), (torch.ones(2, 3, 8, 8),))
        torch.export.save(program, tmp_path / "m.pt2")
        return tmp_path / "m.pt2"

    def test_needs_trust(self, path: Path) -> None:
        with pytest.raises(ModelError, match=r"can run code .* add --trust"):
            load_model(str(path))
        loaded = load_model(str(path), trust=True)
        assert isinstance(loaded.model, torch.export.ExportedProgram)
        assert loaded.input_shape == (3, 8, 8) and loaded.name == "m.pt2"

    def test_bad_files(self, path: Path, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="holds its own weights"):
            load_model(str(path), weights="w.pt", trust=True)
        path.write_bytes(path.read_bytes()[:500])
        with pytest.raises(FileFormatError, match=r"can't be read by torch.export.load"):
            load_model(str(path), trust=True)
        with pytest.raises(ModelError, match="is not there"):
            load_model(str(tmp_path / "none.pt2"), trust=True)


def test_preprocessing_type_is_shared() -> None:
    assert isinstance(load_model("torchvision:squeezenet1_1", weights="random").preprocessing, Preprocessing)
