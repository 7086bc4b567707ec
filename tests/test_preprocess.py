import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from quiesce.errors import DataError
from quiesce.preprocess import Preprocessing, from_timm, from_torchvision, override

BASE = Preprocessing(resize=40, crop=(32, 32), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    generator = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize(
    ("resize", "crop"), [(40, (32, 32)), (17, (32, 32)), (23, (20, 31)), ((30, 50), (24, 25)), (None, (33, 200))]
)
@pytest.mark.parametrize("size", [(100, 61), (61, 100), (40, 40), (5, 90)])
def test_equals_torchvision_exactly(
    interpolation: str, resize: int | tuple[int, int] | None, crop: tuple[int, int], size: tuple[int, int]
) -> None:
    from torchvision import transforms as T

    own = dataclasses.replace(BASE, resize=resize, crop=crop, interpolation=interpolation)
    steps = [] if resize is None else [T.Resize(resize, T.InterpolationMode(interpolation), antialias=True)]
    steps += [T.CenterCrop(crop), T.ToTensor(), T.Normalize(own.mean, own.std)]
    image = picture(*size)
    assert torch.equal(own.image(image), T.Compose(steps)(image))


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b3", "vit_h_14", "mobilenet_v2"])
def test_torchvision_weights_are_followed_exactly(name: str) -> None:
    from torchvision.models import get_model_weights

    weights = get_model_weights(name)["DEFAULT"]
    own = from_torchvision(weights)
    assert own is not None
    image = picture(301, 420)
    assert torch.equal(own.image(image), weights.transforms()(image))


def test_torchvision_weights_that_do_not_classify_images_have_none() -> None:
    from torchvision.models import get_model_weights

    assert from_torchvision(get_model_weights("fasterrcnn_resnet50_fpn")["DEFAULT"]) is None


@pytest.mark.parametrize("name", ["mobilenetv2_050", "regnetx_006", "tf_efficientnet_lite0", "test_vit.r160_in1k"])
def test_timm_configuration_is_followed_exactly(name: str) -> None:
    import timm

    model = timm.create_model(name)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    own = from_timm(model)
    assert own is not None
    image = picture(301, 420)
    assert torch.equal(own.image(image), transform(image))


def test_timm_squash_is_followed_exactly() -> None:
    import timm

    model = timm.create_model("mobilenetv2_050", pretrained_cfg_overlay={"crop_mode": "squash", "crop_pct": 0.9})
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    own = from_timm(model)
    assert own is not None and own.resize == (248, 248)
    image = picture(301, 420)
    assert torch.equal(own.image(image), transform(image))


@pytest.mark.parametrize("change", [{"crop_mode": "border"}, {"mean": None}, {"interpolation": "random"}])
def test_a_timm_configuration_that_is_not_understood_gives_none(change: dict[str, object]) -> None:
    import timm

    model = timm.create_model("mobilenetv2_050")
    model.pretrained_cfg = {**model.pretrained_cfg, **change}
    assert from_timm(model) is None


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "CMYK", "P"])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_image_mode_is_read(mode: str, channels: int) -> None:
    own = Preprocessing(resize=10, crop=(8, 8), mean=(0.5,) * channels, std=(0.5,) * channels, channels=channels)
    result = own.image(picture(30, 20, mode))
    assert result.shape == (channels, 8, 8) and result.dtype == torch.float32
    assert result.abs().max() <= 1


def test_array_equals_image_without_resizing() -> None:
    own = dataclasses.replace(BASE, resize=None, crop=(20, 30))
    image = picture(30, 20)
    array = torch.from_numpy(np.array(image))[None]
    assert torch.equal(own.array(array)[0], own.image(image))


def test_dict_round_trip() -> None:
    import json

    for own in (BASE, dataclasses.replace(BASE, resize=(3, 4)), dataclasses.replace(BASE, resize=None)):
        assert Preprocessing.from_dict(json.loads(json.dumps(own.to_dict()))) == own


@pytest.mark.parametrize("change", [{"extra": 1}, {"resize": "wide"}, {"mean": 3}, {"crop": None}, {"std": ["a"] * 3}])
def test_a_garbled_dict(change: dict[str, object]) -> None:
    with pytest.raises(DataError):
        Preprocessing.from_dict({**BASE.to_dict(), **change})
    with pytest.raises(DataError, match=r"missing or unknown entries .*crop"):
        Preprocessing.from_dict({k: v for k, v in BASE.to_dict().items() if k != "crop"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resize": 0}, "whole numbers of pixels above 0"),
        ({"crop": (32,)}, "whole numbers of pixels"),
        ({"resize": (1, 2, 3)}, "whole numbers of pixels"),
        ({"mean": (0.5,)}, "one number for each channel"),
        ({"std": (0.5, 0.0, 0.5)}, "numbers above 0"),
        ({"interpolation": "bicubik"}, "Did you mean 'bicubic'"),
        ({"channels": 4, "mean": (0.5,) * 4, "std": (0.5,) * 4}, "4 channels can't be read"),
    ],
)
def test_bad_settings(change: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        dataclasses.replace(BASE, **change)  # type: ignore[arg-type]


class TestOverride:
    def test_none_keeps(self) -> None:
        assert override(BASE) == BASE
        assert override(None) is None

    def test_options_win(self) -> None:
        changed = override(BASE, resize="none", crop=(16, 16), interpolation="bicubic")
        assert changed == dataclasses.replace(BASE, resize=None, crop=(16, 16), interpolation="bicubic")

    def test_channels_follow_the_mean(self) -> None:
        changed = override(BASE, mean=(0.5,), std=(0.5,))
        assert changed is not None and changed.channels == 1

    def test_without_a_base_the_missing_options_are_named(self) -> None:
        with pytest.raises(DataError, match="--crop, --std, --interpolation are missing"):
            override(None, resize=40, mean=(0.5, 0.5, 0.5))
        with pytest.raises(DataError, match=r"given, --std is missing"):
            override(None, resize="none", crop=(8, 8), mean=(0.5,))

    def test_without_a_base_all_options_make_one(self) -> None:
        made = override(None, resize=40, crop=(32, 32), mean=BASE.mean, std=BASE.std, interpolation="bilinear")
        assert made == BASE
        grey = override(None, resize="none", crop=(8, 8), mean=(0.0,), std=(1.0,))
        assert grey is not None and grey.resize is None and grey.channels == 1
