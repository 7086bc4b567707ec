"""Weight files are read as data, and take no more memory than they have bytes."""

from __future__ import annotations

import io
import pickletools
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from quiesce.errors import FileFormatError
from quiesce.weights import read_state


def state() -> dict[str, Tensor]:
    """Tied, transposed, offset, expanded, scalar, empty; several dtypes."""
    base = torch.randn(4, 6)
    tensors = {"base": base, "tied": base, "part": base.t()[1:, ::2], "row": base[2], "wide": base[:1].expand(3, 6)}
    tensors |= {"count": torch.tensor(7), "empty": torch.empty(0, 3), "flag": torch.tensor([True, False])}
    return tensors | {"half": torch.randn(3).half(), "brain": torch.randn(3).bfloat16(), "byte": torch.tensor([1, 255])}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrap", [dict, OrderedDict, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}])
def test_what_torch_saves_is_read(zipped: bool, wrap: Callable[[Any], Any], tmp_path: Path) -> None:
    torch.save(wrap(state()), tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    torch.manual_seed(0)
    expected, found = state(), read_state(tmp_path / "w.pt")
    torch.save(expected, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    found = read_state(tmp_path / "w.pt")
    assert list(found) == list(expected)
    assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in expected.items())


def test_parameters_are_read_as_tensors(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    torch.save(dict(network.named_parameters()), tmp_path / "w.pth")
    found = read_state(tmp_path / "w.pth")
    assert all(torch.equal(found[n], p) and not found[n].requires_grad for n, p in network.named_parameters())


def test_safetensors_are_read(tmp_path: Path) -> None:
    expected = {n: t.clone().contiguous() for n, t in state().items()}
    save_file(expected, tmp_path / "w.safetensors")
    found = read_state(tmp_path / "w.safetensors")
    assert all(torch.equal(found[n], t) for n, t in expected.items()) and found.keys() == expected.keys()


@pytest.mark.parametrize(
    "content",
    [
        [torch.ones(1)],
        {"a": 1},
        {3: torch.ones(1)},
        {"a": torch.ones(2).to_sparse()},
        {"a": torch.ones(2, dtype=torch.complex64)},
        {"a": torch.empty(2, device="meta")},
        {"a": torch.ones(2), "raw": bytearray(8)},
        {"state_dict": [1]},
        torch.ones(1),
        None,
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_what_is_no_state_dict_is_refused(content: object, zipped: bool, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(FileFormatError, match=r"save model\.state_dict"):
        read_state(tmp_path / "w.pt")


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize("data", [b"", b"PK", b"PK\3\4", b"\x80\2.", b"\0" * 64, b"\xff" * 64], ids=repr)
def test_foreign_bytes_are_refused(data: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(FileFormatError, match="can't be read"):
        read_state(tmp_path / name)


def rewritten(content: object, change: Callable[[bytes], bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """What torch saves of ``content``, with its pickle changed."""
    saved, made = io.BytesIO(), io.BytesIO()
    torch.save(content, saved)
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(made, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(old.read(name)) if name.endswith("data.pkl") else old.read(name))
    return made.getvalue()


def bomb(call: str, argument: bytes) -> bytes:
    """A pickle of ``{"a": call(argument)}``."""
    module, _, name = call.rpartition(".")
    return b"\x80\x02}X\x01\x00\x00\x00ac" + f"{module}\n{name}\n".encode() + argument + b"\x85Rs."


LONG = b"\x8a\x06" + (2**40).to_bytes(6, "little")
FLOATS = {"a": torch.ones(16)}
HOSTILE: dict[str, bytes] = {
    "bytes by the gigabyte": rewritten(FLOATS, lambda _: bomb("builtins.bytearray", LONG)),
    "text that doubles": rewritten(FLOATS, lambda _: bomb("_codecs.encode", b"X\x01\x00\x00\x00a")),
    "a tensor by its size": rewritten(FLOATS, lambda _: bomb("torch.FloatTensor", LONG)),
    "code": rewritten(FLOATS, lambda _: bomb("os.system", b"X\x04\x00\x00\x00true")),
    "more elements than stored": rewritten(FLOATS, lambda p: p.replace(b"K\x10", b"M\xff\x7f")),
    "compressed records": rewritten({"a": torch.zeros(100_000)}, lambda p: p, zipfile.ZIP_DEFLATED),
    "a stride behind the end": rewritten(FLOATS, lambda p: p.replace(b"K\x01\x85", b"M\xff\x7f\x85")),
    "a negative offset": rewritten({"a": torch.ones(16)[1:]}, lambda p: p.replace(b"QK\x01", b"QJ\xff\xff\xff\xff")),
}


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_of_megabytes_is_refused(zipped: bool, tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "log": list(range(2**20))}, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(FileFormatError, match="can't be read"):
        read_state(tmp_path / "w.pt")


@pytest.mark.parametrize("name", HOSTILE)
def test_sizes_that_the_file_does_not_have_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(HOSTILE[name])
    with pytest.raises(FileFormatError, match=r"can't be read"):
        read_state(tmp_path / "w.pt")


def test_a_small_tensor_expanded_to_an_enormous_one_takes_no_memory(tmp_path: Path) -> None:
    for zipped in (True, False):
        torch.save({"a": torch.ones(1).expand(2**40)}, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
        assert read_state(tmp_path / "w.pt")["a"].shape == (2**40,)


def test_pickles_of_state_dicts_name_nothing_else() -> None:
    """What :mod:`quiesce.weights` allows is what torch writes."""
    saved = io.BytesIO()
    torch.save(state(), saved, _use_new_zipfile_serialization=False)
    stream = io.BytesIO(saved.getvalue())
    names = {arg for _ in range(5) for op, arg, _ in pickletools.genops(stream) if op.name == "GLOBAL"}
    assert {"torch._utils _rebuild_tensor_v2", "torch FloatStorage", "torch BFloat16Storage"} <= names
    assert not any(re.search("builtins|_codecs|os", str(n)) for n in names)
