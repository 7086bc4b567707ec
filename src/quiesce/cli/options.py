"""The arguments and options of commands, with what ``--help`` says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from quiesce.export.export import EXPORT_OPTIONS
from quiesce.recipe import BACKENDS, DEFAULT_PRESET, GRANULARITIES, PRESETS

_MODEL = "timm:NAME, torchvision:NAME, module.path:callable (runs your code), or FILE.pt2 (with --trust)."
_DATA = "an image folder, an .npz (x or images, y or labels), or module.path:callable (runs your code)"
_RECIPE, _IMAGES, _NETWORK = "Recipe", "Preparation of images (default: the model's own)", "Parameters of MODEL"


def _option(help_text: str, metavar: str | None, *names: str, panel: str = "Options", **more: Any) -> Any:
    return typer.Option(*names, help=help_text, metavar=metavar, rich_help_panel=panel, **more)


Model = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL)]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A folder that quantize or demo has written.")]
Stored = Annotated[
    Path,
    typer.Argument(
        metavar="PATH", help="A folder that quantize or demo has written, one of its files, or an ONNX file."
    ),
]
Out = Annotated[Path, _option("Folder for the results; made by this command.", "DIR")]
Force = Annotated[bool, _option("Replace earlier results in the output folder.", None, "--force")]
Restart = Annotated[bool, _option("Throw an interrupted run's progress away instead of going on.", None, "--restart")]
Compile = Annotated[
    bool | None,
    _option("Compile the elementwise maths of steps.", None, "--compile/--no-compile", show_default="when it pays"),
]
Seed = Annotated[int, _option("Seed of everything random.", "N", min=0)]
Device = Annotated[str | None, _option("Such as cuda:1.", "NAME", show_default="cuda if there is one, else cpu")]
Calibration = Annotated[str, _option(f"Images to fit on, labels unused: {_DATA}.", "DATA")]
Evaluation = Annotated[str | None, _option("Images to measure on, in the same forms.", "DATA")]
Data = Annotated[str, _option(f"Images to measure on: {_DATA}.", "DATA")]
CalibrationImages = Annotated[int, _option("Most calibration images to use.", "N", min=1)]
EvaluationImages = Annotated[int | None, _option("Most evaluation images to use.", "N", min=1, show_default="all")]
ImageSeed = Annotated[int, _option("Picks the images when --images is given.", "N", min=0)]
BatchSize = Annotated[int, _option("Images per forward pass; does not change the result.", "N", min=1)]
InputShape = Annotated[str | None, _option("Shape of one input, where MODEL does not say it.", "C,H,W")]
Json = Annotated[Path | None, _option("Write the numbers there.", "FILE", "--json")]

RecipeFile = Annotated[Path | None, _option("Settings from TOML; options beside it win.", "FILE", panel=_RECIPE)]
Preset = Annotated[
    str | None, _option(f"Start from {', '.join(PRESETS)}.", "NAME", panel=_RECIPE, show_default=DEFAULT_PRESET)
]
WeightBits = Annotated[int | None, _option("Bits of weights, 2-8.", "N", panel=_RECIPE, show_default="4")]
ActivationBits = Annotated[str | None, _option("Bits of activations, 2-8.", "N|float", panel=_RECIPE, show_default="4")]
LeaveFloat = Annotated[
    list[str] | None,
    _option(
        "Layers not to quantize, by a pattern of names or of types (type:Linear). Repeatable.",
        "PATTERN",
        "--leave-float",
        panel=_RECIPE,
    ),
]
BackendName = Annotated[
    str | None,
    _option(f"What is quantized where: {', '.join(BACKENDS)}.", "NAME", panel=_RECIPE, show_default="academic"),
]
Granularity = Annotated[
    str | None,
    _option(
        f"What is optimized jointly: {', '.join(GRANULARITIES)}.", "NAME", panel=_RECIPE, show_default="the preset's"
    ),
]
CapacityGranularity = Annotated[
    str | None,
    _option("How merges are chosen: modcap or scheme.", "NAME", panel=_RECIPE, show_default="modcap"),
]
Steps = Annotated[
    int | None, _option("Optimization steps for each module.", "N", panel=_RECIPE, show_default="the preset's")
]
MemoryBudget = Annotated[
    str | None,
    _option(
        "What reconstruction may take on the device, such as 4GB; what has no room goes to files.",
        "SIZE",
        "--memory",
        show_default="most of what is free",
    ),
]
RecipeSeed = Annotated[
    int | None, _option("Seed of everything random.", "N", "--seed", panel=_RECIPE, show_default="0")
]
Settings = Annotated[
    list[str] | None,
    _option("Any key of a recipe file, such as granularity.k=3. Repeatable.", "KEY=VALUE", "--set", panel=_RECIPE),
]

Sensitivities = Annotated[
    bool, _option("Rank layers by the output error that quantizing each alone causes.", None, "--sensitivity")
]
SensitivityImages = Annotated[
    str | None, _option(f"For --sensitivity: images, labels unused: {_DATA}.", "DATA", "--calibration")
]
SensitivityCount = Annotated[
    int, _option("Most images to use; errors are measured on a quarter of them.", "N", "--images", min=2)
]
TriedBits = Annotated[str, _option("For --sensitivity: bits to try each weight at alone.", "N,N,…", "--bits")]
Figure = Annotated[Path | None, _option("Draw the sensitivities there, as SVG.", "FILE", "--figure")]
Mixed = Annotated[
    str | None,
    _option(
        "Choose the weight bits of each layer for a budget: mean bits (3), bytes of the weights (1.2MB), or bit "
        "operations for an image (20GBOP).",
        "BUDGET",
        "--mixed",
        panel=_RECIPE,
    ),
]
MixedBits = Annotated[
    str | None,
    _option("Bits that --mixed chooses from.", "N,N,…", "--mixed-bits", panel=_RECIPE, show_default="2,3,4,5,6,7,8"),
]

ExportForm = Annotated[str, _option(f"{', '.join(EXPORT_OPTIONS)}.", "NAME", "--format")]
ExportOut = Annotated[Path | None, _option("The file.", "FILE", "--out", show_default="DIR/quantized with a suffix")]
Compat = Annotated[bool, _option("Integers of 8 bits only, and opset 13: onnx, openvino.", None, "--compat")]
Symmetric = Annotated[bool, _option("Weights with zero points of 0: onnx, openvino.", None, "--symmetric")]
Pt2e = Annotated[bool, _option("Operators of quantized_decomposed: program.", None, "--pt2e")]
RunBatch = Annotated[int | None, _option("Images a run: executorch.", "N", "--batch", min=1, show_default="1")]
Check = Annotated[str | None, _option(f"Compare with the simulation on images: onnx. {_DATA}.", "DATA")]
CheckImages = Annotated[int, _option("Most images to compare on.", "N", min=1)]
ForceFile = Annotated[bool, _option("Replace the file if it is there.", None, "--force")]

SweepFile = Annotated[
    Path, typer.Argument(metavar="FILE", help="Networks, data and grids of settings (docs/sweep.md).")
]
SweepOut = Annotated[Path, _option("Folder for the results; finished cells in it are kept.", "DIR", "--out")]
Address = Annotated[
    str | None, _option("Of a Ray cluster, such as HOST:6379.", "ADDRESS", show_default="the file's, else this machine")
]
SaveNetworks = Annotated[bool, _option("Keep the quantized networks, too.", None, "--save-networks")]
DryRun = Annotated[bool, _option("Show the cells and which are finished; run none.", None, "--dry-run")]

Weights = Annotated[
    str | None,
    _option(
        "A .safetensors, .pt or .pth state dict, or 'random'.",
        "FILE|random",
        panel=_NETWORK,
        show_default="the library's pretrained ones",
    ),
]
WeightsByOrder = Annotated[
    bool, _option("Take the file's tensors in order, whatever their names.", None, "--weights-by-order", panel=_NETWORK)
]
Trust = Annotated[bool, _option("Read a .pt2 file, which can run code stored in it.", None, "--trust", panel=_NETWORK)]

Resize = Annotated[str | None, _option("Pixels of the shorter side, or height,width.", "N|H,W|none", panel=_IMAGES)]
Crop = Annotated[str | None, _option("Pixels of the central crop.", "N|H,W", panel=_IMAGES)]
Mean = Annotated[str | None, _option("Subtracted per channel, of pixels in 0-1.", "R,G,B", panel=_IMAGES)]
Std = Annotated[str | None, _option("Divided by per channel.", "R,G,B", panel=_IMAGES)]
Interpolation = Annotated[
    str | None, _option("Of resizing: nearest, bilinear, bicubic or lanczos.", "NAME", panel=_IMAGES)
]
