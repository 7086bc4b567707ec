"""What is typed, read: recipes, numbers, devices. What can't be is an error that names the option."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quiesce.errors import DataError, ModelError, RecipeError
from quiesce.recipe import DEFAULT_PRESET, Recipe

if TYPE_CHECKING:
    import torch


def read_recipe(file: Path | None, preset: str | None, settings: list[str], **options: Any) -> Recipe:
    """Return the recipe of ``file`` or of ``preset``, with ``KEY=VALUE`` settings and then options (not None) on top.

    Raises:
        RecipeError: an unknown or contradicting setting, or a value out of range.
    """
    if file is not None and preset is not None:
        raise RecipeError("--recipe and --preset both say where to start; give one (a file may name a preset itself).")
    base = Recipe.from_toml(file) if file is not None else Recipe.preset(preset or DEFAULT_PRESET)
    given = {key: value for key, value in options.items() if value is not None}
    if "activation_bits" in given:
        given["activation_bits"] = _bits(given["activation_bits"])
    return base.with_settings(**(dict(_setting(s) for s in settings) | given))


def _bits(text: str) -> int | str:
    if text == "float":
        return text
    try:
        return int(text)
    except ValueError as error:
        raise RecipeError(f"--activation-bits is {text!r}; give a whole number from 2 to 8, or 'float'.") from error


def _setting(text: str) -> tuple[str, Any]:
    """Split ``key=value``. A bare word is a string, as quotes rarely survive a shell."""
    key, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not key:
        raise RecipeError(f"--set {text!r} is not of the form key=value.")
    if re.fullmatch(r"[A-Za-z][\w-]*", value) and value not in ("true", "false", "nan", "inf"):
        return key, value
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"the value of --set {text!r} is not valid TOML ({error}).") from error


def read_budget(text: str | None, bits: str | None) -> dict[str, Any]:
    """Return the arguments of ``choose_bits`` that --mixed and --mixed-bits stand for; nothing without --mixed."""
    if text is None:
        if bits is not None:
            raise RecipeError("--mixed-bits says what --mixed chooses from; give --mixed too.")
        return {}
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:([kMGT]?)(B|BOP))?", text)
    if not found:
        raise RecipeError(f"--mixed is {text!r}; give mean bits such as 3, bytes such as 1.2MB, or such as 20GBOP.")
    number, prefix, unit = found.groups()
    amount = float(number) * 1000 ** " kMGT".index(prefix or " ")
    name = {"B": "size", "BOP": "bops", None: "average_bits"}[unit]
    choices = read_numbers("--mixed-bits", bits, int)
    return {name: amount} | ({} if choices is None else {"bits": choices})


def find_device(name: str | None) -> torch.device:
    """The device of that name; of several processes on a machine, each takes a GPU of its own."""
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device {name!r} can't be used ({str(error).splitlines()[0]}); give --device cpu.") from error
    return device


def read_preprocessing(
    resize: str | None, crop: str | None, mean: str | None, std: str | None, interpolation: str | None
) -> dict[str, Any]:
    """Return what ``preprocess.override`` takes; None is what was not given."""
    return {
        "resize": "none" if resize == "none" else _size("--resize", resize, square=False),
        "crop": _size("--crop", crop, square=True),
        "mean": read_numbers("--mean", mean, float),
        "std": read_numbers("--std", std, float),
        "interpolation": interpolation,
    }


def _size(option: str, text: str | None, *, square: bool) -> int | tuple[int, ...] | None:
    """Read ``N`` or ``H,W``; ``square`` makes N a pair."""
    sides = read_numbers(option, text, int)
    if sides is None:
        return None
    if len(sides) > 2:
        raise DataError(f"{option} is {text!r}; give one number of pixels, or height,width.")
    if len(sides) == 1:
        return sides * 2 if square else sides[0]
    return sides


def read_numbers(option: str, text: str | None, kind: type[int] | type[float]) -> tuple[Any, ...] | None:
    """Read ``N,N,…``; None stays None."""
    if text is None:
        return None
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        wanted = "whole numbers" if kind is int else "numbers"
        raise DataError(f"{option} is {text!r}; give {wanted} separated by commas.") from error
