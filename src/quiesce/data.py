"""What a network is fed: one container for calibration and evaluation data, and the ways to fill it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from quiesce.dotted import DOTTED, call_dotted, working_folder_importable
from quiesce.errors import DataError, QuiesceError
from quiesce.memory import mapped
from quiesce.preprocess import Preprocessing

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
LABEL_KEYS = ("label", "labels")


@dataclass(frozen=True)
class Samples:
    """Inputs of a network, batch dimension first everywhere.

    ``args`` are the positional inputs, ``kwargs`` those passed by name: tensors [N, ...], or dicts, tuples and lists of
    such (and dataclasses that ``torch.export.register_dataclass`` knows). ``labels`` is an integer tensor [N] or None.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        sizes = {tuple(t.shape[:1]) for t in self._tensors()}
        if len(sizes) != 1 or () in sizes:
            shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in self._named().items())
            raise DataError(f"the tensors of one batch need one common first dimension; got {shapes or 'no tensor'}.")

    def __len__(self) -> int:
        return self._tensors()[0].shape[0]

    def select(self, index: slice | Tensor) -> Samples:
        """Return the samples at ``index``, a slice or an integer or boolean tensor [n]."""
        return self._map(lambda tensor: tensor[index])

    def to(self, device: torch.device) -> Samples:
        return self._map(lambda tensor: tensor.to(device))

    def batches(self, size: int, device: torch.device | None = None) -> Iterator[Samples]:
        """Yield consecutive batches of ``size`` samples on ``device`` (None: where they are).

        The last one is smaller when ``size`` does not divide N.
        """
        for start in range(0, len(self), size):
            batch = self.select(slice(start, start + size))
            yield batch if device is None else batch.to(device)

    @property
    def inputs(self) -> dict[str, Tensor]:
        """All input tensors by names for messages: ``input 0``, ``input 'mask'``, ``input 0['image']``."""
        roots = {f"input {i}": t for i, t in enumerate(self.args)} | {f"input {k!r}": t for k, t in self.kwargs.items()}
        return {
            f"{name}{pytree.keystr(path)}": tensor
            for name, root in roots.items()
            for path, tensor in pytree.tree_leaves_with_path(root)
        }

    def _map(self, change: Callable[[Tensor], Tensor]) -> Samples:
        args, kwargs = pytree.tree_map(change, (self.args, self.kwargs))
        return Samples(args, kwargs, None if self.labels is None else change(self.labels))

    def _named(self) -> dict[str, Tensor]:
        return self.inputs | ({} if self.labels is None else {"labels": self.labels})

    def _tensors(self) -> list[Tensor]:
        return list(self._named().values())


def gather(data: object, what: str = "calibration", limit: int | None = None, *, in_file: bool = False) -> Samples:
    """Collect ``data`` into one :class:`Samples`, at most ``limit`` of them (the first ones).

    What has to be put together is put into a temporary file if ``in_file``, else into memory.

    ``data`` is a :class:`Samples`, a tensor [N, ...], or an iterable of batches, such as a DataLoader. A batch is

    - a tensor [B, ...];
    - a tuple or list, whose first element is the input and whose second, if it is an integer tensor [B], the labels
      (other elements are ignored);
    - a dict, whose entries are passed by name; the keys ``label`` and ``labels`` hold labels, not inputs.

    An input may itself be a dict, tuple or list of tensors, for networks that take such.

    Raises:
        DataError: there is nothing, a batch holds NaN or inf, batches differ in kind, shape, or dtype, or the iterable
            raises, as when a worker process of a DataLoader dies. ``what`` names the data in the message.
    """
    if limit is not None and limit < 1:
        raise DataError(f"the limit of {what} samples is {limit}; give 1 or more.")
    batches: list[Samples] = []
    found = 0
    for number, raw in enumerate(_iterate(data, what)):
        batch = _batch(raw, f"{what} batch {number}")
        if batches:
            _check_same_kind(batch, batches[0], f"{what} batch {number}")
        batches.append(batch if limit is None else batch.select(slice(limit - found)))
        found += len(batches[-1])
        if limit is not None and found >= limit:
            break
    if found == 0:
        raise DataError(f"the {what} data is empty; give at least one batch of inputs.")
    return _concatenate(batches, in_file)


def check_like(samples: Samples, example: Samples, what: str) -> None:
    """Check that ``samples`` fit a network captured with ``example``: same inputs, dtypes, and shapes but for N.

    Raises:
        DataError: they do not fit; the message names the input and both shapes.
    """
    given, expected = samples.inputs, example.inputs
    if given.keys() != expected.keys():
        raise DataError(
            f"the {what} data has {', '.join(given)}, but the network was captured with {', '.join(expected)}; "
            "give the same inputs."
        )
    for name, tensor in given.items():
        if _form(tensor) != _form(expected[name]):
            raise DataError(
                f"{name} of the {what} data is {_describe(tensor)}, but the network was captured with "
                f"{_describe(expected[name])}; give data of that form."
            )


def load_data(
    spec: str,
    preprocessing: Preprocessing | None,
    *,
    limit: int | None = None,
    seed: int = 0,
    what: str = "calibration",
    in_file: bool = False,
) -> Samples:
    """Read the data that ``spec`` names, at most ``limit`` samples; images go to a temporary file if ``in_file``.

    - A folder: all images in it, at any depth. If every image is in a sub-folder, the folders directly below are the
      classes, numbered in sorted order as torchvision's ``ImageFolder`` does; otherwise there are no labels.
    - A ``.npz`` file with ``x`` or ``images`` and, if there are labels, ``y`` or ``labels``. Arrays of uint8 are
      images, [N, H, W, C] or grey [N, H, W], which are scaled and normalized but not resized; others are taken as is.
    - ``module.path:callable`` returns anything that :func:`gather` takes, in its own order. It is given ``limit`` and
      ``seed`` if it has parameters of these names. This runs code.

    Images and arrays come in an order drawn from ``seed`` that takes one of each class in turn, so that any first part
    of them (``limit``, a held-out share) is spread evenly over the classes.

    Raises:
        DataError: nothing there, a file that can't be read, or images without preprocessing.
    """
    path = Path(spec)
    if limit is not None and limit < 1:
        raise DataError(f"the limit of {what} samples is {limit}; give 1 or more.")
    if path.is_dir():
        return gather(_read_folder(path, preprocessing, limit, seed, in_file), what)
    if path.suffix == ".npz":
        return gather(_read_npz(path, preprocessing, limit, seed), what)
    if DOTTED.fullmatch(spec):
        return _from_callable(spec, what, limit, seed, in_file)
    raise DataError(f"{what} data {spec!r} is not there; give an image folder, a .npz file, or module.path:callable.")


def _iterate(data: object, what: str) -> Iterator[object]:
    if isinstance(data, Samples | Tensor | Mapping):
        yield data
        return
    if isinstance(data, str | bytes) or not isinstance(data, Iterable):
        raise DataError(
            f"the {what} data is {_kind(data)}; give a tensor [N, ...] or an iterable of batches such as a DataLoader."
        )
    try:
        yield from data
    except QuiesceError:
        raise
    except Exception as error:
        # Of an error in a worker, the text is a traceback; its last line says what it was.
        reason = str(error).strip().rpartition("\n")[2]
        raise DataError(f"iterating over the {what} data raised {type(error).__name__}: {reason}") from error


def _batch(raw: object, where: str) -> Samples:
    if isinstance(raw, Samples):
        batch = raw
    elif isinstance(raw, Mapping):
        batch = _from_mapping(raw, where)
    elif isinstance(raw, tuple | list):
        batch = _from_sequence(raw, where)
    else:
        batch = _checked((_input(raw, where),), {}, None, where)
    for name, tensor in batch.inputs.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise DataError(f"{where}, {name}, holds NaN or infinite values; remove or repair those samples.")
    return batch


def _from_sequence(raw: tuple[object, ...] | list[object], where: str) -> Samples:
    if not raw:
        raise DataError(f"{where} is an empty {type(raw).__name__}; give (input,) or (input, labels).")
    second = raw[1] if len(raw) > 1 else None
    labels = second.detach() if isinstance(second, Tensor) and second.ndim == 1 and _is_integer(second) else None
    return _checked((_input(raw[0], where),), {}, labels, where)


def _from_mapping(raw: Mapping[object, object], where: str) -> Samples:
    entries = {str(k): _input(v, f"{where}, entry {k!r},") for k, v in raw.items()}
    found = [entries.pop(key) for key in LABEL_KEYS if key in entries]
    if len(found) > 1 or any(not isinstance(t, Tensor) or t.ndim != 1 or not _is_integer(t) for t in found):
        raise DataError(f"{where} should hold its labels once, as an integer tensor [batch] under 'label' or 'labels'.")
    if not entries:
        raise DataError(f"{where} has no inputs; give a dict of the network's keyword arguments.")
    return _checked((), entries, found[0] if found else None, where)


def _checked(args: tuple[Tensor, ...], kwargs: dict[str, Tensor], labels: Tensor | None, where: str) -> Samples:
    try:
        return Samples(args, kwargs, labels)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def _input(value: object, where: str) -> Any:
    """A tensor, or containers of tensors, without gradients."""
    leaves, nest = pytree.tree_flatten(value)
    for leaf in leaves or [value]:
        if not isinstance(leaf, Tensor):
            inside = "" if leaf is value else f"holds {_kind(leaf)} and "
            raise DataError(f"{where} {inside}is {_kind(value)}, not a tensor; give tensors [batch, ...].")
    return pytree.tree_unflatten([tensor.detach() for tensor in leaves], nest)


def _check_same_kind(batch: Samples, first: Samples, where: str) -> None:
    given, expected = batch._named(), first._named()
    if given.keys() != expected.keys():
        raise DataError(
            f"{where} holds {', '.join(given)}, but the first batch holds {', '.join(expected)}; "
            "give batches of one kind (to pass one batch with labels, put it in a list)."
        )
    for name, tensor in given.items():
        if _form(tensor) != _form(expected[name]) or tensor.device != expected[name].device:
            raise DataError(
                f"{where}, {name}, is {_describe(tensor)} on {tensor.device}, but the first batch has "
                f"{_describe(expected[name])} on {expected[name].device}; all batches need one form."
            )


def _concatenate(batches: list[Samples], in_file: bool) -> Samples:
    if len(batches) == 1:
        return batches[0]

    def joined(*parts: Tensor) -> Tensor:
        if not in_file or parts[0].device.type != "cpu":
            return torch.cat(parts)
        images = sum(len(part) for part in parts)
        return torch.cat(parts, out=mapped((images, *parts[0].shape[1:]), parts[0].dtype))

    args, kwargs = pytree.tree_map(joined, *((b.args, b.kwargs) for b in batches))
    labels = [b.labels for b in batches if b.labels is not None]
    return Samples(args, kwargs, torch.cat(labels) if labels else None)


def _form(tensor: Tensor) -> tuple[torch.dtype, torch.Size]:
    return tensor.dtype, tensor.shape[1:]


def _describe(tensor: Tensor) -> str:
    sizes = ", ".join(["N", *map(str, tensor.shape[1:])])
    return f"{str(tensor.dtype).removeprefix('torch.')} [{sizes}]"


def _kind(value: object) -> str:
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _from_callable(spec: str, what: str, limit: int | None, seed: int, in_file: bool) -> Samples:
    # Iterating is still the user's code, and may import more of it.
    with working_folder_importable():
        return gather(call_dotted(spec, DataError, limit=limit, seed=seed), what, limit, in_file=in_file)


def _read_folder(
    folder: Path, preprocessing: Preprocessing | None, limit: int | None, seed: int, in_file: bool
) -> Samples:
    if preprocessing is None:
        raise DataError(
            f"how to prepare the images of {folder} is not known for this model; "
            "give --resize, --crop, --mean, --std and --interpolation."
        )
    files = _image_files(folder)
    if not files:
        raise DataError(f"folder {folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}); give another folder.")
    labels = _folder_labels(folder, files)
    order = _spread(labels or [0] * len(files), seed)[:limit]
    images = _read_images([files[i] for i in order], preprocessing, in_file)
    return Samples((images,), {}, torch.tensor([labels[i] for i in order]) if labels else None)


def _image_files(folder: Path) -> list[Path]:
    found = []
    # Linked folders are followed, as class folders are often links.
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place, n) for n in names if Path(n).suffix.lower() in IMAGE_SUFFIXES and not n.startswith(".")]
    return sorted(found)


def _folder_labels(folder: Path, files: list[Path]) -> list[int] | None:
    """Return the class of each file, or None if some file is directly in ``folder``."""
    names = [file.relative_to(folder).parts for file in files]
    if any(len(parts) == 1 for parts in names):
        return None
    classes = sorted(f.name for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))
    empty = set(classes) - {parts[0] for parts in names}
    if empty:
        raise DataError(
            f"sub-folder {min(empty)!r} of {folder} holds no images, so the numbers of the classes are in doubt; "
            "fill or remove it."
        )
    return [classes.index(parts[0]) for parts in names]


def _spread(labels: list[int], seed: int) -> list[int]:
    """Return a permutation of ``range(len(labels))`` that takes one of each class in turn, drawn from ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    groups: dict[int, list[int]] = {}
    for index in torch.randperm(len(labels), generator=generator).tolist():
        groups.setdefault(labels[index], []).append(index)
    return [index for index in chain.from_iterable(zip_longest(*groups.values())) if index is not None]


def _read_images(files: list[Path], preprocessing: Preprocessing, in_file: bool) -> Tensor:
    shape = (len(files), preprocessing.channels, *preprocessing.crop)
    images = mapped(shape, torch.float32) if in_file else torch.empty(shape)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for i, image in enumerate(pool.map(lambda file: _read_image(file, preprocessing), files)):
            images[i] = image
    return images


def _read_image(file: Path, preprocessing: Preprocessing) -> Tensor:
    from PIL import Image

    try:
        with Image.open(file) as image:
            return preprocessing.image(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"image {file} can't be read ({error}); repair or remove it.") from error


def _read_npz(path: Path, preprocessing: Preprocessing | None, limit: int | None, seed: int) -> Samples:
    arrays = _npz_arrays(path)
    values = arrays.get("x", arrays.get("images"))
    given = arrays.get("y", arrays.get("labels"))
    if values is None:
        raise DataError(f"{path} holds {', '.join(arrays) or 'nothing'}; name the array of inputs x or images.")
    if values.ndim == 0 or len(values) == 0:
        raise DataError(f"the inputs of {path} are empty; give at least one sample.")
    labels = None if given is None else _npz_labels(given, len(values), path)
    order = torch.tensor(_spread([0] * len(values) if labels is None else labels.tolist(), seed)[:limit])
    inputs = _npz_inputs(values[order.numpy()], preprocessing, path)
    return Samples((inputs,), {}, None if labels is None else labels[order])


def _npz_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        # Opened here, as numpy leaves a damaged file open.
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            return {name: file[name] for name in file.files if name in ("x", "images", "y", "labels")}
    except FileNotFoundError as error:
        raise DataError(f"{path} is not there; give a .npz file that exists.") from error
    except Exception as error:  # zipfile, zlib and numpy raise many kinds for a damaged file
        raise DataError(f"{path} can't be read as .npz ({error}); save it again with numpy.savez.") from error


def _npz_labels(given: np.ndarray, count: int, path: Path) -> Tensor:
    if given.shape != (count,) or given.dtype.kind not in "iu":
        raise DataError(f"the labels of {path} are {given.dtype} {list(given.shape)}; give integers [{count}].")
    return torch.from_numpy(given.astype(np.int64))


def _npz_inputs(values: np.ndarray, preprocessing: Preprocessing | None, path: Path) -> Tensor:
    if values.dtype == np.uint8:
        if preprocessing is None:
            raise DataError(
                f"how to scale the uint8 images of {path} is not known for this model; "
                "give --resize, --crop, --mean, --std and --interpolation, or save float32 inputs."
            )
        return preprocessing.array(torch.from_numpy(values))
    if values.dtype.kind not in "fi":
        raise DataError(f"the inputs of {path} are {values.dtype}; save float32, or uint8 images [N, H, W, C].")
    return torch.from_numpy(values)
