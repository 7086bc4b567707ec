"""The published merge lists, shipped as data."""

from __future__ import annotations

import tomllib
from importlib import resources

from quiesce.errors import RecipeError, nearest_name

Scheme = tuple[tuple[str, ...], ...]


def published_schemes() -> dict[str, Scheme]:
    """Return the authors' merged units by network name (arXiv 2303.11906, code)."""
    text = resources.files("quiesce.oscillation").joinpath("schemes.toml").read_text(encoding="utf-8")
    return {name: tuple(tuple(u) for u in row["units"]) for name, row in tomllib.loads(text).items()}


def resolve_scheme(scheme: Scheme | str) -> Scheme:
    """Return a scheme given by hand as it is, or the published one of that name."""
    if not isinstance(scheme, str):
        return scheme
    known = published_schemes()
    if scheme not in known:
        raise RecipeError(f"granularity.scheme {scheme!r} is no published scheme.{nearest_name(scheme, known)}")
    return known[scheme]
