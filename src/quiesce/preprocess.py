"""How an image becomes a network's input: resize, center crop, scale, normalize."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from quiesce.errors import DataError, nearest_name

if TYPE_CHECKING:
    from PIL import Image

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
OPTIONS = ("resize", "crop", "mean", "std", "interpolation")


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Preparation of images, equal to torchvision's ``Resize``, ``CenterCrop`` and ``Normalize`` on PIL images."""

    resize: int | tuple[int, int] | None
    """Length of the shorter side in pixels, or (height, width); None leaves the size."""
    crop: tuple[int, int]
    """(height, width) of the central part that is kept; where the image is smaller it is padded with black."""
    mean: tuple[float, ...]
    """Per channel, subtracted after scaling pixels to [0, 1]."""
    std: tuple[float, ...]
    """Per channel, divided by at the end."""
    interpolation: str = "bilinear"
    channels: int = 3
    """3: red, green, blue; 1: grey."""

    def __post_init__(self) -> None:
        sides = (self.resize,) if isinstance(self.resize, int) else self.resize or ()
        if not all(_is_size(s) for s in (*sides, *self.crop)) or len(self.crop) != 2 or len(sides) > 2:
            raise DataError(f"resize {self.resize} and crop {self.crop} should be whole numbers of pixels above 0.")
        if self.channels not in (1, 3):
            raise DataError(f"images of {self.channels} channels can't be read; give mean and std for 1 or 3 channels.")
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise DataError(f"mean {self.mean} and std {self.std} should have one number for each channel (1 or 3).")
        if not all(s > 0 for s in self.std):
            raise DataError(f"std is {self.std}; give numbers above 0, in units of the pixel range [0, 1].")
        if self.interpolation not in INTERPOLATIONS:
            known = nearest_name(self.interpolation, INTERPOLATIONS)
            raise DataError(f"interpolation {self.interpolation!r} is unknown.{known}")

    def to_dict(self) -> dict[str, Any]:
        """Return plain data (JSON types only)."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Preprocessing:
        """Read what :meth:`to_dict` gives.

        Raises:
            DataError: an entry is missing, unknown, or of the wrong kind.
        """
        names = {f.name for f in fields(cls)}
        if set(data) != names:
            wrong = ", ".join(sorted(names ^ set(data)))
            raise DataError(
                f"the stored preprocessing has missing or unknown entries ({wrong}); save the network again."
            )
        try:
            values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
            return cls(**values)
        except TypeError as error:
            raise DataError(f"the stored preprocessing is garbled ({error}); save the network again.") from error

    def image(self, image: Image.Image) -> Tensor:
        """Prepare a PIL image of any mode and size: [C, crop height, crop width], float32."""
        image = image.convert("RGB" if self.channels == 3 else "L")
        image = _center_crop(self._resized(image), *self.crop)
        pixels = np.asarray(image).reshape(*self.crop, self.channels)
        return self.array(torch.from_numpy(pixels.copy())[None])[0]

    def array(self, images: Tensor) -> Tensor:
        """Scale and normalize uint8 images [N, H, W, C], or grey ones [N, H, W], to float32 [N, C, H, W].

        Raises:
            DataError: they have another number of dimensions or of channels.
        """
        grey = images[..., None] if images.ndim == 3 and self.channels == 1 else images
        if grey.ndim != 4 or grey.shape[-1] != self.channels:
            raise DataError(
                f"the uint8 images have shape {list(images.shape)}; give [N, height, width, {self.channels}], "
                f"as the mean {self.mean} has {self.channels} number(s)."
            )
        scaled = grey.permute(0, 3, 1, 2).contiguous().to(torch.float32) / 255
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return scaled.sub_(mean).div_(std)

    def _resized(self, image: Image.Image) -> Image.Image:
        if self.resize is None:
            return image
        width, height = image.size
        if isinstance(self.resize, int):
            # The long side is rounded down, as torchvision does.
            short = min(width, height)
            size = (int(self.resize * width / short), int(self.resize * height / short))
        else:
            size = (self.resize[1], self.resize[0])
        return image if size == image.size else image.resize(size, _resampling(self.interpolation))


def from_timm(model: Any) -> Preprocessing | None:
    """Return the evaluation preprocessing of a timm model's ``pretrained_cfg``, or None if it can't be followed."""
    config = dict(model.pretrained_cfg or {})
    keys = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    channels, height, width = config.get("input_size") or (0, 0, 0)
    if any(config.get(key) is None for key in keys) or channels not in (1, 3):
        return None
    if config["interpolation"] not in INTERPOLATIONS:
        return None
    mode, share = config["crop_mode"], config["crop_pct"]
    scaled = (int(height / share), int(width / share))
    if mode not in ("center", "squash") or (mode == "center" and height != width):
        return None
    return Preprocessing(
        resize=scaled[0] if mode == "center" else scaled,
        crop=(height, width),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config["interpolation"],
        channels=channels,
    )


def from_torchvision(weights: Any) -> Preprocessing | None:
    """Return the preprocessing of a torchvision weights entry, or None if it is not one for images.

    That for segmentation keeps whole images; as batches are of one size, their central square is taken here.
    """
    transform = weights.transforms()
    if type(transform).__name__ not in ("ImageClassification", "SemanticSegmentation"):
        return None
    resize = transform.resize_size
    crop = transform.crop_size if hasattr(transform, "crop_size") else resize
    return Preprocessing(
        resize=resize[0] if len(resize) == 1 else tuple(resize),
        crop=(crop[0], crop[-1]),
        mean=tuple(transform.mean),
        std=tuple(transform.std),
        interpolation=transform.interpolation.value,
        channels=len(transform.mean),
    )


def from_detector(detector: Any) -> Preprocessing:
    """Return the preprocessing of a torchvision detector, of whose images the central square is taken."""
    transform = detector.transform
    fixed = transform.fixed_size
    return Preprocessing(
        resize=transform.min_size[-1] if fixed is None else (fixed[1], fixed[0]),
        crop=(transform.min_size[-1],) * 2 if fixed is None else (fixed[1], fixed[0]),
        mean=tuple(transform.image_mean),
        std=tuple(transform.image_std),
    )


def override(
    base: Preprocessing | None,
    *,
    resize: int | tuple[int, int] | Literal["none"] | None = None,
    crop: tuple[int, int] | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    interpolation: str | None = None,
) -> Preprocessing | None:
    """Return ``base`` with the given options changed; None keeps one, ``resize="none"`` means no resizing.

    Without a ``base`` the result is None when no option is given, and built from the options when all are.

    Raises:
        DataError: there is no base, and only some options are given; the missing ones are named.
    """
    options = dict(zip(OPTIONS, (resize, crop, mean, std, interpolation), strict=True))
    given = {k: v for k, v in options.items() if v is not None}
    if not given:
        return base
    if base is None:
        # What is never resized needs no interpolation.
        needed = [k for k in OPTIONS if k != "interpolation" or resize != "none"]
        missing = [f"--{k}" for k in needed if k not in given]
        if missing:
            raise DataError(f"this model has no preprocessing of its own; with the options given, {_listed(missing)}.")
    settings = ({} if base is None else asdict(base)) | given
    settings["resize"] = None if settings["resize"] == "none" else settings["resize"]
    return Preprocessing(**(settings | {"channels": len(settings["mean"])}))


def _listed(names: list[str]) -> str:
    return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} missing"


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _resampling(interpolation: str) -> Image.Resampling:
    from PIL import Image

    return Image.Resampling[interpolation.upper()]


def _center_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """Crop as torchvision's ``center_crop`` does, which pads the smaller half first and rounds half to even."""
    from PIL import ImageOps

    short_x, short_y = max(width - image.width, 0), max(height - image.height, 0)
    if short_x or short_y:
        image = ImageOps.expand(image, (short_x // 2, short_y // 2, (short_x + 1) // 2, (short_y + 1) // 2))
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))
