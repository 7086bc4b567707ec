"""The documents say what the code does: examples run, and tables name what there is."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import runpy
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from quiesce import Recipe, Result
from quiesce.cli.commands import app
from quiesce.graph.backends import BACKENDS
from quiesce.oscillation.schemes import published_schemes
from quiesce.recipe import BACKENDS as BACKEND_DEMANDS
from quiesce.recipe import (
    PRESETS,
    ActivationRecipe,
    GranularityRecipe,
    LayerOverride,
    ReconstructionRecipe,
    WeightRecipe,
)
from quiesce.result import ExportRecord, Run, UnitRecord
from quiesce.sweep.plan import DATA_KEYS, Cluster, Network, read_sweep
from quiesce.sweep.table import Row

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
SECTIONS: dict[str, type] = {
    "Top level": Recipe,
    "`[weights]`": WeightRecipe,
    "`[activations]`": ActivationRecipe,
    "`[granularity]`": GranularityRecipe,
    "`[reconstruction]`": ReconstructionRecipe,
    "`[[layers]]`": LayerOverride,
}
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def section(page: str, title: str) -> str:
    """Return what stands below the heading ``title``, up to the next one of its level or above."""
    found = re.search(rf"^(#+) {re.escape(title)}$(.*?)(?=^#{{1,}} |\Z)", page, re.MULTILINE | re.DOTALL)
    assert found, title
    return found[2]


def rows(text: str) -> Iterator[list[str]]:
    """Yield the cells of each table row of ``text`` but the heads and rulers."""
    for head, line in zip(["", *text.splitlines()], [*text.splitlines(), ""], strict=True):
        if head.startswith("|") and not re.match(r"\|[-:|]+$", head) and not re.match(r"\|[-:|]+$", line):
            yield [cell.strip() for cell in head.strip("|").split("|")]


def code(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def value(cell: str) -> Any:
    """Read a default as it is written in a table: TOML in backticks, or a dash for None."""
    return None if cell == "–" else tomllib.loads(f"x = {names(cell)[0]}")["x"]


def test_python_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = code(read("README.md"), "python")
    scope: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), scope)
    assert capsys.readouterr().out.startswith("top-1 92.9 % float, ")
    assert (tmp_path / "out" / "quantized.safetensors").is_file()
    assert scope["logits"].shape == (2000, 10)
    assert (scope["logits"].argmax(1) == scope["labels"]).float().mean() > 0.4


def test_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchvision")
    example = runpy.run_path(str(ROOT / "examples/quantize_torchvision.py"))
    example["main"](["--random", "--steps", "1", "--size", "32", "--count", "32"])
    shown = capsys.readouterr().out
    assert "torchvision:resnet18" in shown
    assert "layer1.1 + layer2.0: " in shown


def test_toml_of_the_recipe_page_is_a_recipe(tmp_path: Path) -> None:
    (block,) = code(read("docs/recipe.md"), "toml")
    (tmp_path / "recipe.toml").write_text(block)
    recipe = Recipe.from_toml(tmp_path / "recipe.toml")
    assert recipe.reconstruction is not None and recipe.reconstruction.drop_prob == 0.5
    assert recipe.layers[0].pattern == "features.1*"


def test_backends_and_their_demands_are_those_of_the_page() -> None:
    first, second = read("docs/backends.md").split("| Backend |")[1:]
    biases = {names(name)[0]: bias for name, _, bias in list(rows(f"| Backend |{first}"))}
    assert biases == {n: "integer" if b.integer_bias else "float" for n, b in BACKENDS.items()}
    demands = dict(rows(f"| Backend |{second.partition('## ')[0]}"))
    assert [names(n)[0] for n in demands] == list(BACKEND_DEMANDS)
    for name, written in demands.items():
        wanted = BACKEND_DEMANDS[names(name)[0]]
        bits = {key for key in wanted if key.endswith("bits")}
        assert bool(bits) == ("8 bits everywhere" in written) and {wanted[key] for key in bits} <= {8}
        grids = {key for key in wanted if wanted[key] == "uniform"}
        assert bool(grids) == ("uniform grids" in written)
        given = dict(setting.split(" = ") for setting in names(written))
        assert {k: v == "true" for k, v in given.items()} == {k: v for k, v in wanted.items() if k not in bits | grids}


def test_python_of_the_recipe_page_runs() -> None:
    (block,) = code(read("docs/recipe.md"), "python")
    scope: dict[str, Any] = {}
    exec(compile(block, "docs/recipe.md", "exec"), scope)
    assert scope["recipe"].granularity.k == 4


@pytest.mark.parametrize("title", SECTIONS)
def test_recipe_tables_hold_every_setting_and_its_default(title: str) -> None:
    table = {names(key)[0]: default for key, default, _ in rows(section(read("docs/recipe.md"), title))}
    parts = {"weights", "activations", "granularity", "reconstruction"} if SECTIONS[title] is Recipe else set()
    fields = {f.name: f for f in dataclasses.fields(SECTIONS[title]) if f.name not in parts}
    assert list(table) == list(fields)
    for name, field in fields.items():
        if table[name] == "required":
            assert field.default is dataclasses.MISSING
        else:
            written = value(table[name])
            assert (tuple(written) if isinstance(written, list) else written) == field.default, name


def test_preset_tables() -> None:
    slow, fast = (t for t in re.split(r"^(?=\| Setting)", section(read("docs/recipe.md"), "Presets"), flags=re.M)[1:])
    presets = names(slow.splitlines()[0])
    assert [*presets, *(f"{preset}-fast" for preset in presets if preset != "nearest")] == list(PRESETS)
    faster = {names(key)[0]: value(cell) for key, _, cell in rows(fast)}
    for number, preset in enumerate(presets):
        changed = {names(key)[0]: value(cells[number]) for key, *cells in rows(slow)}
        changed = {key: found for key, found in changed.items() if found is not None}
        if preset == "nearest":
            assert not changed and PRESETS[preset].reconstruction is None
        else:
            made = Recipe(name="custom").with_settings(**changed)
            assert made == PRESETS[preset]
            assert made.with_settings(**faster) == PRESETS[f"{preset}-fast"]


@pytest.mark.parametrize(
    ("title", "kind"),
    [
        ("Top level", Result),
        ("`runs[]`", Run),
        ("`runs[].unit_records[]`", UnitRecord),
        ("`exports[]`", ExportRecord),
    ],
)
def test_result_page_holds_every_entry(title: str, kind: type) -> None:
    documented = [names(cells[0])[0] for cells in rows(section(read("docs/result.md"), title))]
    assert sorted(documented) == sorted(f.name for f in dataclasses.fields(kind))


@pytest.mark.parametrize(("title", "kind"), [("`[[network]]`", Network), ("`[ray]`", Cluster)])
def test_sweep_tables_hold_every_key_and_its_default(title: str, kind: type) -> None:
    table = {names(key)[0]: default for key, default, _ in rows(section(read("docs/sweep.md"), title))}
    fields = {f.name: f.default for f in dataclasses.fields(kind)}
    assert sorted(table) == sorted(fields)
    for name, default in fields.items():
        assert (table[name] == "required") if default is dataclasses.MISSING else value(table[name]) == default, name


def test_sweep_page_names_every_column_and_what_data_may_hold() -> None:
    page = section(read("docs/sweep.md"), "What is written")
    columns = {name for cells in rows(page.split("| Column |")[1]) for name in names(cells[0])}
    assert columns == {f.name for f in dataclasses.fields(Row)} - {"axes"}
    first = [names(cells[0])[0] for cells in rows(section(read("docs/sweep.md"), "`[[network]]`"))][: len(DATA_KEYS)]
    assert tuple(first) == DATA_KEYS


def test_sweep_files_of_the_page_and_the_example_are_sweeps(tmp_path: Path) -> None:
    blocks = code(read("docs/sweep.md"), "toml")
    counts = []
    for block in [*blocks, read("examples/sweep.toml")]:
        (tmp_path / "sweep.toml").write_text(block)
        counts.append(len(read_sweep(tmp_path / "sweep.toml").cells))
    assert counts == [3 * 2 * 2 * 3 * 2, 2 + 2 * 2 * 3, 3 * (3 + 3 * 2 * 2 * 3)]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_on_the_command_line_page_and_no_other(command: str) -> None:
    documented: set[str] = set()
    for cells in rows(section(read("docs/cli.md"), f"quiesce {command}")):
        documented.update(name.split()[0] for name in names(cells[0]))
    options = {name for parameter in COMMANDS[command].params for name in parameter.opts if name.startswith("--")}
    assert documented == options - {"--help"}


@pytest.mark.parametrize("page", ["README.md", "docs/cli.md", "docs/sweep.md"])
def test_commands_of_examples_exist(page: str) -> None:
    lines = [line for block in code(read(page), "sh") for line in block.replace("\\\n", " ").splitlines()]
    commands = [line.split() for line in lines if line.startswith("quiesce ")]
    assert commands
    for _, command, *arguments in commands:
        options = {name for parameter in COMMANDS[command].params for name in parameter.opts}
        assert {a for a in arguments if a.startswith("--")} <= options


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    for page in ("README.md", "CONTRIBUTING.md"):
        assert set(re.findall(r"make (demo|test[a-z-]*|lint|format|clean)\b", read(page))) <= targets


def test_schemes_are_those_of_the_method_page() -> None:
    text = section(read("docs/method.md"), "Granularity")
    listed = text[text.index("| Name | Merged units |") :]
    assert [names(cells[0])[0] for cells in rows(listed)] == list(published_schemes())


def test_stages_of_the_architecture_page_have_those_parameters() -> None:
    calls = [names(cells[1])[0] for cells in rows(section(read("docs/architecture.md"), "Stages"))]
    assert len(calls) > 15
    for call in calls:
        path, given = re.fullmatch(r"([\w.]+)\((.*)\)", call).groups()  # type: ignore[union-attr]
        module, name = path.rsplit(".", 1)
        parameters = list(inspect.signature(getattr(importlib.import_module(f"quiesce.{module}"), name)).parameters)
        written = given.split(", ")
        assert (written[:-1] == parameters[: len(written) - 1]) if written[-1] == "…" else written == parameters, call


def test_imports_go_one_way() -> None:
    """A module imports from its own group or from groups in front of it, in the order of docs/architecture.md."""
    (block,) = code(section(read("docs/architecture.md"), "Rooms"), "")
    order = {name: i for i, line in enumerate(block.splitlines()) for name in line.split()}
    source = ROOT / "src/quiesce"
    statement = re.compile(r"^\s*(?:from|import) quiesce\b\.?(\w*)\S*(?: import (\w+))?", re.MULTILINE)
    seen = 0
    for file in sorted(source.rglob("*.py")):
        room = file.relative_to(source).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        for module, imported in statement.findall(file.read_text(encoding="utf-8")):
            target = module or (imported if imported in order else "pipeline")
            seen += 1
            assert order[target] <= order[room], f"{file.name} imports from {target}"
    assert seen > 100
    assert set(order) == {p.name.removesuffix(".py") for p in source.iterdir() if _is_module(p)}


def _is_module(path: Path) -> bool:
    return (path.suffix == ".py" and path.stem != "__init__") or (path / "__init__.py").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_resolve(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in headings}, link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_are_at_most_120_characters(page: Path) -> None:
    long = [line for line in page.read_text(encoding="utf-8").splitlines() if len(line) > 120]
    assert not long


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_of_code_are_closed(page: Path) -> None:
    fences = re.findall(r"^ *```(\w*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(fences) % 2 == 0
    assert not any(fences[1::2]), "a block of code begins inside another one"
