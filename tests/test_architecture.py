"""What holds over the whole package."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import quiesce
from quiesce.graph.backends import BACKENDS
from quiesce.quant.rounding import ROUNDINGS
from quiesce.recipe import BACKENDS as BACKEND_NAMES
from quiesce.recipe import ROUNDING_NAMES

HEAVY = {"timm", "torchvision", "matplotlib", "jinja2", "onnx", "rich", "typer", "PIL", "scipy", "ray"}


def test_import_is_light() -> None:
    new = "set(sys.modules) - before"
    code = f"import sys, torch; before = set(sys.modules); import quiesce; print(sorted({HEAVY!r} & ({new})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_names_in_recipes_are_those_of_the_tables() -> None:
    assert set(BACKEND_NAMES) == set(BACKENDS)
    assert set(ROUNDING_NAMES) == set(ROUNDINGS)


# From below to above: a room may import from its own floor and from those below. "" is the package itself, whose public
# names are the pipeline's.
FLOORS = (
    {
        "errors",
        "files",
        "recipe",
        "progress",
        "outputs",
        "dotted",
        "preprocess",
        "data",
        "result",
        "evaluate",
        "memory",
        "processes",
        "transfer",
    },
    {"quant"},
    {"graph"},
    {"oscillation"},
    {"reconstruct"},
    {"precision"},
    {"export", "report"},
    {"quantized"},
    {"preparation"},
    {"pipeline", "analysis", ""},
    {"detection", "weights", "models", "sweep", "demo", "cli", "__main__"},
)
PACKAGE = Path(quiesce.__file__).parent


def room(module: str) -> str:
    """``quiesce.graph.fold`` → ``graph``; the package itself is ``""``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def imports() -> dict[str, set[str]]:
    """Modules of the package that each of its modules imports, inside functions too."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        froms = [n for n in nodes if isinstance(n, ast.ImportFrom)]
        assert not any(n.level for n in froms), f"{name} imports relatively"
        made = {str(n.module) for n in froms} | {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
        # A submodule may come by its package: from quiesce.demo import assets.
        made |= {f"{n.module}.{a.name}" for n in froms for a in n.names if _is_module(f"{n.module}.{a.name}")}
        found[name] = {m for m in made if m.split(".")[0] == "quiesce"}
    return found


def _is_module(name: str) -> bool:
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").exists()


def test_every_module_is_on_a_floor() -> None:
    assert {room(name) for name in imports()} == set().union(*FLOORS)


def test_imports_go_one_way() -> None:
    floor = {name: height for height, names in enumerate(FLOORS) for name in names}
    upward = [
        f"{name} imports {other}"
        for name, others in imports().items()
        for other in others
        if floor[room(other)] > floor[room(name)]
    ]
    assert upward == []


def test_no_module_imports_itself_by_a_detour() -> None:
    graph = {name: others - {name} for name, others in imports().items()}
    done: set[str] = set()
    while ready := {n for n, others in graph.items() if n not in done and others <= done}:
        done |= ready
    assert set(graph) - done == set()


def test_only_the_command_line_prints() -> None:
    """Results are returned and progress is reported by callback, so that a notebook or a service stays quiet."""
    printing = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
    }
    assert printing == set()
