"""Damages files of each kind, seeded, and reads them; run as a program by test_fuzz, as it limits its own memory.

``python fuzz.py ORIGINALS FIRST COUNT KIND…`` prints JSON: how each of COUNT damages of each kind ended. Whatever is
neither read nor refused by a QuiesceError is listed under ``failures``; a damage that ends the process, or takes longer
than :data:`SECONDS`, is the one named in the file ``last`` of the working folder.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
import resource
import shutil
import signal
import sys
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

import quiesce
from quiesce.cli.tables import results_table
from quiesce.errors import QuiesceError
from quiesce.export.checkpoint import GRAPH_FILE, RECIPE_FILE, RESULT_FILE, TENSOR_FILE
from quiesce.export.inspect import inspect
from quiesce.models import load_weights
from quiesce.recipe import Recipe
from quiesce.result import Result

SECONDS = 10
MEMORY = 2**30
"""Bytes that reading may take beyond what the program itself takes."""
ODD: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 7, 8, 255, 1.5, -0.0, 1e300, 2**31, 2**32, 2**62, 2**63 - 1, 2**64, 10**40),
    *(
        "",
        "x",
        "stem",
        "lambda",
        "__class__",
        "aten.relu.default",
        "F32",
        "U8",
        "uint8",
        "float32",
        "a" * 5000,
        "\x00é",
    ),
    *(
        [],
        [[]],
        [0],
        [-1],
        [2**40, 2**40],
        [0, 2**62],
        {},
        {"node": "x"},
        {"tensor": 0},
        {"dict": {}},
        {"float": "nan"},
    ),
]

Damage = Callable[[bytes, random.Random], bytes]


@dataclass(frozen=True)
class Kind:
    """A file to damage: how, beyond its bytes, and how it is read (and used, where reading it succeeds)."""

    file: str
    read: Callable[[Path], None]
    damage: Damage


def flip(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 8, 64])):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def cut(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def splice(data: bytes, draw: random.Random) -> bytes:
    """Repeat, move or remove a stretch."""
    a, b, place = (draw.randrange(len(data) + 1) for _ in range(3))
    stretch = data[min(a, b) : max(a, b)][:2000]
    return data[:place] + draw.choice([stretch, b""]) + data[place + draw.choice([0, len(stretch)]) :]


def overwrite(data: bytes, draw: random.Random) -> bytes:
    """A number of some width at some place: in front, where headers are, as often as anywhere else."""
    width = draw.choice([1, 2, 4, 8])
    number = draw.choice([0, 1, 255, 2**16, 2**31 - 1, 2**32 - 1, 2**63, 2**64 - 1, len(data)]) % 2 ** (8 * width)
    place = draw.choice([0, 8, draw.randrange(len(data))])
    return data[:place] + number.to_bytes(width, "little") + data[place + width :]


def in_json(data: bytes, draw: random.Random) -> bytes:
    """Replace, remove, or double something in a JSON document; or nest it deeply."""
    document = json.loads(data)
    for _ in range(draw.choice([1, 1, 1, 3])):
        outer, key = draw.choice(_places(document) or [([document], 0)])
        match draw.randrange(5):
            case 0:
                del outer[key]
            case 1 if isinstance(outer, dict):
                outer[draw.choice(["x", "", "name", "op", "__metadata__", "é", "graph"])] = outer.pop(key)
            case 2 if isinstance(outer, list):
                outer.insert(key, outer[draw.randrange(len(outer))])
            case 3:
                other, name = draw.choice(_places(document) or [([document], 0)])
                outer[key] = json.loads(json.dumps(other[name]))
            case _:
                outer[key] = draw.choice(ODD)
    text = json.dumps(document)
    if draw.random() < 0.05:
        text = text.replace("null", "[" * draw.choice([70, 900, 100_000]) + "1", 1).replace("1.", "1e99999", 1)
    if draw.random() < 0.05:
        text = re.sub(r"(\"\w+\": )(\d+)", r"\1\2, \g<0>", text, count=3)  # doubled keys
    return text.encode()


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in nested JSON."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [place for key in keys for place in _places(value[key])]


def in_header(data: bytes, draw: random.Random) -> bytes:
    """Damage the JSON header of safetensors, or the length in front of it."""
    length = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + length], data[8 + length :]
    changed = in_json(header, draw)
    stated = len(changed) if draw.random() < 0.9 else draw.choice([0, 1, len(data), 2**40, 2**63])
    return stated.to_bytes(8, "little") + changed + rest


def in_toml(data: bytes, draw: random.Random) -> bytes:
    lines = data.decode().splitlines()
    for _ in range(draw.choice([1, 1, 3])):
        i = draw.randrange(len(lines))
        name, equals, _ = lines[i].partition(" = ")
        odd = draw.choice(
            [json.dumps(v) for v in ODD] + ["inf", "nan", "1979-05-27", "[" * 2000, "{a = 1}", "9" * 5000]
        )
        lines[i] = draw.choice([name + equals + odd, name + equals + odd, "", lines[draw.randrange(len(lines))], odd])
    return "\n".join(lines).encode()


def in_pickle(data: bytes, draw: random.Random) -> bytes:
    """Damage numbers and bytes of a pickle, mostly where it states sizes."""
    changed = data
    for _ in range(draw.choice([1, 1, 2, 4])):
        numbers = list(re.finditer(rb"K.|M..|J....", changed, re.DOTALL))
        if numbers and draw.random() < 0.7:
            at = draw.choice(numbers)
            large = draw.choice([0, 1, 127, 2**16, 2**31 - 1, 2**40, 2**62, -1, -(2**40)])
            number = b"\x8a\x08" + large.to_bytes(8, "little", signed=True)
            changed = changed[: at.start()] + draw.choice([number, b"N", b"X\x01\0\0\0x"]) + changed[at.end() :]
        else:
            changed = draw.choice([flip, splice])(changed, draw)
    return changed


def in_archive(data: bytes, draw: random.Random) -> bytes:
    """Damage the pickle in a zip archive, or its other records, and write a whole archive again."""
    made = io.BytesIO()
    compression = zipfile.ZIP_DEFLATED if draw.random() < 0.05 else zipfile.ZIP_STORED
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(made, "w", compression) as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith(".pkl"):
                content = in_pickle(content, draw)
            elif draw.random() < 0.2:
                content = draw.choice([cut, flip, splice])(content, draw)
            if draw.random() < 0.97:
                new.writestr(name, content)
    return made.getvalue()


def read_network(path: Path) -> None:
    if path.name == TENSOR_FILE and path.stat().st_size % 2:
        # Half of the damages come with the sum that belongs to them, as whoever makes a file can make that too.
        document, data = json.loads((path.parent / GRAPH_FILE).read_text()), path.read_bytes()
        document["tensors"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (path.parent / GRAPH_FILE).write_text(json.dumps(document))
    network = quiesce.load(path.parent)
    inspect(path.parent).to_dict()
    # What the graph asks for when it runs may be anything; it ends in an error of torch then.
    with suppress(Exception):
        network(torch.zeros(2, 3, 4, 4))


def read_result(path: Path) -> None:
    result = Result.read(path)
    results_table(result)
    assert Result.from_dict(json.loads(result.to_json())) == result


def read_recipe(path: Path) -> None:
    recipe = Recipe.from_toml(path)
    path.write_text(recipe.to_toml())
    assert Recipe.from_toml(path) == recipe


def read_weights(path: Path) -> None:
    network = weighted()
    load_weights(network, path)
    network(torch.zeros(2, 3, 4, 4))


def weighted() -> nn.Module:
    """The network whose weights are damaged."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3)).eval()


def read_onnx(path: Path) -> None:
    inventory = inspect(path)
    json.dumps(inventory.to_dict(), allow_nan=False)


def in_protobuf(data: bytes, draw: random.Random) -> bytes:
    """Change a field of a tensor, of a node, or of the metadata."""
    model = onnx.load_from_string(data)
    tensor, node = draw.choice(model.graph.initializer), draw.choice(model.graph.node)
    match draw.randrange(8):
        case 0:
            tensor.dims.append(draw.choice([0, 2, 2**40, 2**62, -1]))
        case 1:
            tensor.dims[:] = [draw.choice([0, 1, 7, 2**31, 2**62, -(2**62)]) for _ in range(draw.randrange(40))]
        case 2:
            tensor.data_type = draw.choice([0, 1, 3, 16, 21, 22, 25, 99])
        case 3:
            tensor.raw_data = draw.choice([flip, cut, splice])(tensor.raw_data or b"x", draw)
        case 4:
            tensor.name = draw.choice(["", "x", model.graph.initializer[0].name])
        case 5:
            node.input[:] = [draw.choice(["", "x", tensor.name]) for _ in range(draw.randrange(4))]
        case 6:
            del model.graph.node[draw.randrange(2) :]
        case _:
            entry = next(e for e in model.metadata_props if e.key == "quiesce.bits")
            entry.value = json.dumps(draw.choice([*ODD, {"x": 3}, {tensor.name: 10**30}])) + draw.choice(["", "{", "]"])
    return bytes(model.SerializeToString())


KINDS = {
    "graph": Kind(GRAPH_FILE, read_network, in_json),
    "tensors": Kind(TENSOR_FILE, read_network, in_header),
    "result": Kind(RESULT_FILE, read_result, in_json),
    "recipe": Kind(RECIPE_FILE, read_recipe, in_toml),
    "safetensors": Kind("weights.safetensors", read_weights, in_header),
    "zip": Kind("weights.pt", read_weights, in_archive),
    "legacy": Kind("legacy.pt", read_weights, in_pickle),
    "onnx": Kind("network.onnx", read_onnx, in_protobuf),
}


def fuzz(kind: Kind, original: Path, folder: Path, draw: random.Random) -> str:
    """Damage one file of a copy of ``original``, read it, and return how it ended."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(original, folder)
    path = folder / kind.file
    # Bytes anywhere are mostly noticed at once, so most damages know the kind.
    damage = draw.choice([flip, cut, splice, overwrite]) if draw.random() < 0.3 else kind.damage
    path.write_bytes(damage(path.read_bytes(), draw))
    try:
        kind.read(path)
    except QuiesceError:
        return "refused"
    return "read"


def main(original: Path, first: int, count: int, kinds: list[str]) -> dict[str, Any]:
    before = memory("VmRSS")
    ends: dict[str, Counter[str]] = {name: Counter() for name in kinds}
    failures = []
    for seed in range(first, first + count):
        for name in kinds:
            Path("last").write_text(f"{name} {seed}")
            signal.alarm(SECONDS)
            try:
                ends[name][fuzz(KINDS[name], original, Path("damaged"), random.Random(f"{name} {seed}"))] += 1
            except Exception as error:
                failures.append(f"{name} {seed}: {type(error).__name__}: {error}"[:500])
            signal.alarm(0)
    return {"ends": ends, "failures": failures, "peak": memory("VmHWM") - before}


def memory(entry: str) -> int:
    """Bytes of physical memory, now (VmRSS) or at most so far (VmHWM). ru_maxrss would count the parent's as well."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"^{entry}:\s+(\d+) kB", status, re.MULTILINE)[1])  # type: ignore[index]


if __name__ == "__main__":
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])))
