"""The report: one self-contained HTML page that shows a result (no scripts, no requests, figures as inline SVG)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quiesce.errors import FileFormatError, OutputError
from quiesce.report import plots
from quiesce.result import UNDECIDED, Result, Run

if TYPE_CHECKING:
    from jinja2 import Template
    from markupsafe import Markup


def write_report(result: Result, path: Path) -> Path:
    """Write the report of ``result`` to ``path`` (aside, then renamed) and return ``path``.

    Raises:
        OutputError: the file can't be written there; nothing is left behind.
    """
    path = Path(path)
    page = render(result)
    temporary = path.with_name(path.name + ".partial")
    try:
        temporary.write_text(page, encoding="utf-8", errors="replace")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(
            f"report {path} can't be written ({error.strerror}); give a folder with room to write in."
        ) from error
    return path


def render(result: Result) -> str:
    """Return the report as HTML text; equal results give equal text.

    Raises:
        FileFormatError: the result holds no run.
    """
    if not result.runs:
        raise FileFormatError(f"the result of {result.model} holds no run, so there is nothing to report; run again.")
    return template("report.html").render(
        result=result,
        float_top1=result.float.get("top1"),
        labelled=list(zip(plots.run_labels(result.runs), result.runs, strict=True)),
        recipe=recipe_sections(result.recipe),
        loss_figure=figure(plots.loss_over_modules),
        capacity_figure=figure(plots.capacities),
        unit_figure=figure(plots.unit_losses),
        most_undecided=UNDECIDED,
        module_order=plots.module_order,
        merge_outcomes=plots.merge_outcomes,
        drop=drop,
        change=change,
    )


def template(name: str) -> Template:
    """Return a page of this folder's templates, with the filters that all of them use."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("quiesce.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., str]] = {
        "number": plots.number,
        "fixed": fixed,
        "setting": setting,
        "bits": plots.bits,
    }
    environment.filters |= filters
    return environment.get_template(name)


def figure(draw: Callable[..., str]) -> Callable[..., Markup]:
    """Return ``draw`` with its SVG marked as such, so that a page takes it as it is."""
    from markupsafe import Markup

    return lambda *arguments: Markup(draw(*arguments))


def drop(run: Run, float_top1: float | None) -> float | None:
    """Return how many points of top-1 ``run`` loses against the float network, or None without labels."""
    return None if run.top1 is None or float_top1 is None else float_top1 - run.top1


def change(value: float, reference: float) -> float | None:
    """Return by how many per cent ``value`` differs from ``reference``, or None where that is zero."""
    return 100 * (value / reference - 1) if reference else None


def fixed(value: float | None, decimals: int = 2) -> str:
    """Write ``value`` with that many decimals, or a dash where there is none."""
    return "–" if value is None else f"{value:,.{decimals}f}".replace("-", "−")


def setting(value: Any) -> str:
    """Write a setting's value as a reader expects it: text bare, the rest as JSON."""
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def recipe_sections(recipe: dict[str, Any]) -> Sequence[tuple[str, dict[str, Any]]]:
    """Split a recipe into named sections of flat settings, those of the recipe itself first."""
    tables = {name: value for name, value in recipe.items() if isinstance(value, dict)}
    return [("recipe", {k: v for k, v in recipe.items() if k not in tables}), *tables.items()]
