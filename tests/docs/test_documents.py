"""README and documentation: the code runs and prints what it says, names exist, links lead somewhere."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.util
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

import esper
import esper.artifacts
import esper_passes
from tests.docs.pages import BLOCK_END, PAGES, ROOT, Page

_NAMED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)

pages = pytest.mark.parametrize("page", [pytest.param(Page(path), id=Page(path).name) for path in PAGES])
pages_with_code = pytest.mark.parametrize(
    "page",
    [
        pytest.param(Page(path), id=Page(path).name, marks=[pytest.mark.slow, pytest.mark.xdist_group("docs")])
        for path in PAGES
        if any(block.language == "python" for block in Page(path).blocks())
    ],
)


@pytest.fixture(scope="module")
def platform_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all pages, which run in one process, so that a kernel that two of them use is compiled once."""
    return tmp_path_factory.mktemp("platform")


@pages_with_code
def test_code_runs_and_prints_what_the_page_says(page: Page, platform_folder: Path, tmp_path: Path) -> None:
    program = tmp_path / "page.py"
    program.write_text(page.program(), encoding="utf-8")
    environment = {
        **os.environ,
        "ESPER_PLATFORM__ROOT": str(platform_folder),
        "ESPER_TEZZERET__PIPELINE": "fast",
        "OMP_NUM_THREADS": "1",
        "PYTHONIOENCODING": "utf-8",
    }
    # a page that trains until its kernel is compiled leaves the compiler, at its low priority, little of a busy machine
    command = ["nice", "-n", "15", sys.executable, str(program)]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, f"{page.name}, line numbers as in the page:\n{run.stderr}"
    outputs, expected = run.stdout.split(BLOCK_END), page.expected_outputs()
    assert outputs.pop() == "", "something was printed after the last block"
    assert len(outputs) == len(expected)
    checker = doctest.OutputChecker()
    for output, wanted in zip(outputs, expected, strict=True):
        if wanted is not None:
            assert checker.check_output(wanted, output, doctest.ELLIPSIS), f"{page.name} says {wanted}, not {output}"


@pages
def test_code_that_is_not_run_has_a_reason(page: Page) -> None:
    for block in page.blocks():
        assert block.language in ("python", "output", "sh", "text", "yaml"), f"{page.name}:{block.line}"
        if block.language == "python":
            assert block.is_run, f"{page.name}:{block.line} is not run; nothing here needs that"


@pages
def test_links_lead_somewhere(page: Page) -> None:
    for file, fragment in page.links():
        target = page.path if not file else (page.path.parent / file).resolve()
        assert target.exists(), f"{page.name} links to {file}, which does not exist"
        if fragment:
            assert fragment in Page(target).fragments(), f"{page.name}: {file} has no heading {fragment!r}"


@pages
def test_names_exist(page: Page) -> None:
    for name in page.references():
        _find(name)
    for code in page.inline_code():
        for dotted in re.findall(r"(?<![\w./-])(?:esper|esper_passes)(?:\.\w+)+", code):
            if not (ROOT / dotted).exists():
                _find(dotted)
        owner, _, member = re.sub(r"\(.*", "", code).partition(".")
        if re.fullmatch(r"\w+", member) and owner in _PUBLIC_CLASSES:
            _find(member, _PUBLIC_CLASSES[owner])


@pages
def test_files_and_modules_in_the_text_exist(page: Page) -> None:
    tops = {path.name for path in ROOT.iterdir() if path.is_dir()}
    made = ("site/", "demo/report.png", ".venv")  # by commands that the text speaks of
    for code in page.inline_code():
        if "/" in code and code.split("/")[0] in tops and not code.startswith(made) and "<" not in code:
            assert (ROOT / code.split()[-1].partition("::")[0]).exists(), f"{page.name}: there is no {code}"
        for module in re.findall(r"python -m ([\w.]+)", code):
            assert importlib.util.find_spec(module) is not None, f"{page.name}: there is no module {module}"


@pages
def test_commands_exist(page: Page) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    commands = [*page.inline_code(), *(block.text for block in page.blocks() if block.language == "sh")]
    for command in commands:
        for target in re.findall(r"^make (\w+)", command, re.MULTILINE):
            assert target in targets, f"{page.name}: the Makefile has no target {target}"
        for name in re.findall(r"^esper (\w+)", command, re.MULTILINE):
            from esper.cli import app

            assert CliRunner().invoke(app, [name, "--help"]).exit_code == 0, f"{page.name}: esper has no command {name}"


def test_readme_shows_the_two_commands() -> None:
    shown = [block.text for block in Page(ROOT / "README.md").blocks() if block.language == "sh"]
    assert re.findall(r"^make (\w+)", "\n".join(shown), re.MULTILINE) == ["demo", "test"]


def test_tables_are_up_to_date() -> None:
    tables = _load(ROOT / "docs" / "hooks" / "tables.py")
    for page in map(Page, PAGES):
        assert tables.filled(page.text) == page.text, f"run python docs/hooks/tables.py: {page.name} is out of date"


def test_every_benchmark_has_its_place() -> None:
    text = "".join(Page(ROOT / "docs" / name).text for name in ("benchmarks.md", "growth.md"))
    for module in pkgutil.iter_modules([str(ROOT / "benchmarks")]):
        source = (ROOT / "benchmarks" / f"{module.name}.py").read_text(encoding="utf-8")
        if re.search(r"^def main\(", source, re.MULTILINE) and module.name != "__main__":
            assert f"<!-- table: results {module.name} -->" in text, f"no page has {module.name}"


@pytest.mark.parametrize("module", [esper, esper.artifacts, esper_passes], ids=lambda module: module.__name__)
def test_every_public_name_is_in_the_reference(module: ModuleType) -> None:
    documented = {id(_find(name)) for path in PAGES if path.parent.name == "api" for name in Page(path).references()}
    whole = [path for path in PAGES if path.parent.name == "api"]
    modules = {name for path in whole for name in Page(path).references() if inspect.ismodule(_find(name))}
    for name in module.__all__:
        value = getattr(module, name)
        home = getattr(value, "__module__", "") or ""
        if not home.startswith("torch."):
            assert id(value) in documented or home in modules, f"{module.__name__}.{name} is in no page of docs/api"


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr
    assert not re.search(r"^WARNING", run.stderr, re.MULTILINE)
    html = [path.read_text(encoding="utf-8") for path in (tmp_path / "site").rglob("*.html")]
    fetched = {url for text in html for url in re.findall(r'(?:src|rel="stylesheet" href)="(https?://[^"]+)"', text)}
    assert not fetched, "the pages fetch something from elsewhere"


_PUBLIC_CLASSES: dict[str, Any] = {
    name: value
    for name, value in ((each, getattr(esper, each)) for each in esper.__all__)
    if inspect.isclass(value) and value.__module__.startswith("esper")
}


def _find(name: str, owner: Any = None) -> Any:
    """What a dotted name means; fails if it means nothing."""
    parts = name.split(".")
    if owner is None:
        owner = importlib.import_module(parts.pop(0))
    for part in parts:
        if not hasattr(owner, part) and inspect.ismodule(owner):
            importlib.import_module(f"{owner.__name__}.{part}")
        found = hasattr(owner, part) or part in getattr(owner, "__annotations__", {})
        assert found, f"{name}: {getattr(owner, '__name__', owner)} has no {part}"
        owner = getattr(owner, part, None)
    return owner


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pages
def test_tests_that_a_page_names_exist(page: Page) -> None:
    for path, names in re.findall(r"`(tests/[\w/]+\.py)::([\w:]+)`", page.path.read_text(encoding="utf-8")):
        scope: ast.AST = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        for name in names.split("::"):
            inside = {each.name: each for each in scope.body if isinstance(each, _NAMED)}  # type: ignore[attr-defined]  # a module or a class
            assert name in inside, f"{path} has no {names}"
            scope = inside[name]
