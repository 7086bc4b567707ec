"""The embedded demo network and images are whole, small, and as accurate as recorded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quiesce.demo import DemoNet, assets, load_images, load_network, preprocessing
from quiesce.demo.network import STAGES, InvertedResidual
from quiesce.errors import FileFormatError

SHIPPED = Path(str(assets.DATA))


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the assets, read instead of the shipped ones, to be damaged."""
    folder = tmp_path / "data"
    shutil.copytree(SHIPPED, folder)
    monkeypatch.setattr(assets, "DATA", folder)
    return folder


def test_images_have_the_documented_shapes_and_values() -> None:
    calibration, test, labels = load_images()
    assert calibration.shape == (1024, 1, 28, 28)
    assert test.shape == (2000, 1, 28, 28)
    assert labels.shape == (2000,)
    assert (calibration.dtype, test.dtype, labels.dtype) == (torch.float32, torch.float32, torch.int64)
    assert labels.bincount().numel() == 10
    assert labels.bincount().min() > 100
    settings = preprocessing()
    (mean,), (std,) = settings["mean"], settings["std"]
    assert [*calibration.shape[1:]] == [settings["channels"], *settings["crop"]]
    assert calibration.min().item() == pytest.approx(-mean / std)
    assert calibration.max().item() == pytest.approx((1 - mean) / std)
    assert abs(calibration.mean().item()) < 0.05
    assert abs(calibration.std().item() - 1) < 0.05


def test_calibration_and_test_images_are_disjoint() -> None:
    calibration, test, _ = load_images()
    assert torch.cdist(calibration.flatten(1), test.flatten(1)).min() > 0


def test_network_is_the_recorded_one() -> None:
    network, record = load_network(), assets.training()
    assert not network.training
    assert sum(p.numel() for p in network.parameters()) == record["parameters"]
    assert 80_000 <= record["parameters"] <= 130_000
    blocks = [m for m in network.features if isinstance(m, InvertedResidual)]
    assert len(blocks) == sum(stage.blocks for stage in STAGES)
    assert {block.has_skip for block in blocks} == {False, True}


def test_top1_on_the_shipped_test_images_is_the_recorded_number() -> None:
    network, (_, test, labels) = load_network(), load_images()
    with torch.no_grad():
        top1 = 100 * (network(test).argmax(1) == labels).double().mean().item()
    record = assets.training()["top1"]
    assert top1 == pytest.approx(record["shipped_test"], abs=1e-9)
    assert record["test"] >= 92


def test_loading_twice_gives_equal_outputs() -> None:
    _, test, _ = load_images()
    with torch.no_grad():
        assert torch.equal(load_network()(test[:8]), load_network()(test[:8]))


def test_an_untrained_network_gives_finite_logits_for_any_batch() -> None:
    network = DemoNet(classes=7).eval()
    for batch in (1, 3):
        logits = network(torch.randn(batch, 1, 28, 28))
        assert logits.shape == (batch, 7)
        assert logits.isfinite().all()


def test_assets_are_small_and_carry_their_licence() -> None:
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= 6_000_000
    assert "Copyright (c) 2017 Zalando SE" in (SHIPPED / "FASHION-MNIST-LICENSE.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "load"), [("network.safetensors", load_network), ("images.npz", load_images)])
@pytest.mark.parametrize("damage", ["missing", "truncated", "changed"])
def test_a_damaged_asset_is_named(copied: Path, name: str, load: Callable[[], object], damage: str) -> None:
    path = copied / name
    raw = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(raw[:-1])
    else:
        path.write_bytes(raw[:-100] + bytes([raw[-100] ^ 1]) + raw[-99:])
    with pytest.raises(FileFormatError, match=rf"{name}.*install quiesce again"):
        load()


@pytest.mark.parametrize("text", [None, "", "{", '"text"', json.dumps({"sha256": {}})])
def test_a_damaged_training_record_is_an_error(copied: Path, text: str | None) -> None:
    path = copied / "training.json"
    path.unlink() if text is None else path.write_text(text, encoding="utf-8")
    with pytest.raises(FileFormatError, match="install quiesce again"):
        load_network()
