"""Files that are ours but for one thing: each is refused as damaged, and never with another kind of error."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save

import quiesce
from quiesce.errors import FileFormatError, OutputError
from quiesce.export.checkpoint import GRAPH_FILE, RESULT_FILE, TENSOR_FILE, read_checkpoint
from tiny import Chain, images, recipe


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = quiesce.quantize(Chain(1), images(8), recipe("nearest", weight_bits=2))
    return network.save(tmp_path_factory.mktemp("original") / "net")


@pytest.fixture
def saved(original: Path, tmp_path: Path) -> Path:
    (tmp_path / "net").mkdir()
    for file in original.iterdir():
        (tmp_path / "net" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "net"


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / TENSOR_FILE)


def put_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write other tensors, and the graph file as one that was written with them."""
    data = save(tensors)
    (folder / TENSOR_FILE).write_bytes(data)
    document = json.loads((folder / GRAPH_FILE).read_text())
    document["tensors"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / GRAPH_FILE).write_text(json.dumps(document))


def test_the_file_holds_no_parameter_of_a_quantized_weight(saved: Path) -> None:
    float_shapes = {tuple(p.shape) for n, p in Chain(1).named_parameters() if p.ndim > 1}
    stored = tensors_of(saved)
    assert not [n for n, t in stored.items() if t.is_floating_point() and tuple(t.shape) in float_shapes]
    rows = json.loads((saved / GRAPH_FILE).read_text())["quantizers"]
    weights = {n: row for n, row in rows.items() if row["kind"] == "weight"}
    assert {tuple(row["shape"]) for row in weights.values()} == float_shapes
    for name, row in weights.items():
        packed, bits = stored[f"{name}.quantized"], 8 if "stem" in name or "head" in name else 2
        assert row["bits"] == bits
        assert packed.dtype == torch.uint8 and packed.shape == (-(-math.prod(row["shape"]) * bits // 8),)
        assert stored[f"{name}.zero_point"].dtype == torch.uint8


def test_each_missing_tensor_is_refused(original: Path, saved: Path) -> None:
    whole = tensors_of(original)
    for name in whole:
        put_tensors(saved, {n: t for n, t in whole.items() if n != name})
        with pytest.raises(FileFormatError, match=rf"damaged .*{name}"):
            quiesce.load(saved)


def test_each_quantizers_tensor_of_another_shape_or_type_is_refused(original: Path, saved: Path) -> None:
    whole = tensors_of(original)
    quantizers = {n: t for n, t in whole.items() if "quantizer" in n}
    assert {n.rpartition(".")[2] for n in quantizers} == {"quantized", "scale", "zero_point"}
    for name, tensor in quantizers.items():
        for changed in (torch.cat([tensor.flatten(), tensor.flatten()]), tensor.to(torch.int32)):
            put_tensors(saved, {**whole, name: changed})
            with pytest.raises(FileFormatError, match=r"integers of \d bits are|(scale|zero point) of "):
                quiesce.load(saved)


def test_tensors_of_another_network_or_with_a_flipped_bit_are_refused(original: Path, saved: Path) -> None:
    data = bytearray((original / TENSOR_FILE).read_bytes())
    data[-1] ^= 1
    (saved / TENSOR_FILE).write_bytes(data)
    with pytest.raises(FileFormatError, match=rf"{TENSOR_FILE} is not the one that {GRAPH_FILE} was written with"):
        quiesce.load(saved)


def test_an_additional_tensor_is_refused(original: Path, saved: Path) -> None:
    put_tensors(saved, {**tensors_of(original), "payload": torch.zeros(3)})
    with pytest.raises(FileFormatError, match="reads tensor payload"):
        quiesce.load(saved)


def test_zero_points_that_the_bits_do_not_hold_are_refused(original: Path, saved: Path) -> None:
    whole = tensors_of(original)
    name = next(n for n in whole if n.startswith("blocks") and n.endswith("weight_quantizer.zero_point"))
    put_tensors(saved, {**whole, name: torch.full_like(whole[name], 4)})
    with pytest.raises(FileFormatError, match=r"zero point of .* is larger than 2 bits hold"):
        quiesce.load(saved)


def test_a_shape_of_enormous_size_allocates_nothing(saved: Path) -> None:
    document = json.loads((saved / GRAPH_FILE).read_text())
    row = next(q for q in document["quantizers"].values() if q["kind"] == "weight")
    for shape in ([2**40, 2**20], [0, 2**50], [2**50, 0]):
        row["shape"] = shape
        (saved / GRAPH_FILE).write_text(json.dumps(document))
        with pytest.raises(FileFormatError, match="damaged"):
            quiesce.load(saved)


def test_a_graph_of_more_values_than_any_network_has_is_refused(saved: Path) -> None:
    document = json.loads((saved / GRAPH_FILE).read_text())
    next(row for row in document["nodes"] if row["op"] == "call")["args"].append([1] * 500_000)
    (saved / GRAPH_FILE).write_text(json.dumps(document))
    with pytest.raises(FileFormatError, match="more than 500,000"):
        quiesce.load(saved)


def test_files_of_two_networks_do_not_mix(saved: Path, tmp_path: Path) -> None:
    other = quiesce.quantize(Chain(1, channels=6), images(8), recipe("nearest")).save(tmp_path / "other")
    (saved / TENSOR_FILE).write_bytes((other / TENSOR_FILE).read_bytes())
    with pytest.raises(FileFormatError, match="not the one that"):
        quiesce.load(saved)


@pytest.mark.parametrize("file", [GRAPH_FILE, RESULT_FILE])
@pytest.mark.parametrize(
    "text", ["[]", "null", "{}", "3", '"x"', "[" * 100_000, "[" * 70 + "]" * 70, "{" * 3, "\x00", '{"schema": 2}']
)
def test_foreign_json_is_refused(file: str, text: str, saved: Path) -> None:
    (saved / file).write_text(text)
    with pytest.raises(FileFormatError):
        quiesce.load(saved)


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="can't be read"):
        quiesce.load(tmp_path / "nowhere")


def test_saving_keeps_an_earlier_result(saved: Path) -> None:
    network = quiesce.load(saved)
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    with pytest.raises(OutputError, match="holds other results"):
        network.save(saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert [p.name for p in saved.parent.iterdir()] == ["net"]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in nested JSON."""
    found = [path] if path else []
    rows = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return found + [p for key, inner in rows for p in places(inner, (*path, key))]


junk = st.sampled_from(
    [None, True, -1, 0, 7, 2**70, 1.5, "", "x", "stem", "lambda", [], [[]], {}, {"node": "x"}, {"tensor": 0}]
)


@given(st.data())
def test_any_single_change_is_refused_or_harmless(original: Path, data: st.DataObject) -> None:
    """Whatever one place of the graph is replaced by, loading works or says that the file is damaged."""
    document = json.loads((original / GRAPH_FILE).read_text())
    path = data.draw(st.sampled_from(places(document)))
    inner: Any = document
    for key in path[:-1]:
        inner = inner[key]
    if data.draw(st.booleans()):
        inner[path[-1]] = data.draw(junk)
    else:
        del inner[path[-1]]
    folder = original.parent / "changed"
    folder.mkdir(exist_ok=True)
    for file in original.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / GRAPH_FILE).write_text(json.dumps(document))
    try:
        read_checkpoint(folder)
    except FileFormatError as error:
        assert GRAPH_FILE in str(error)
