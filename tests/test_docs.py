"""The documents' own checks, each seen to fail; and pages that must say what the code does."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import nested_core
from flows.process.stop_signals import INTERRUPTED_EXIT_CODE
from nested_core.errors import NestedTuneError
from tests.left_out import needs_rooms

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
SITE = """\
[project]
site_name = "a site"
docs_dir = "pages"
site_dir = "site"
use_directory_urls = false
nav = [{ "Start" = ["README.md", "docs/gone.md"] }]
[project.theme]
font = false
custom_dir = "theme"
"""


def run_tool(name: str) -> dict[str, Any]:
    """What one of the programs in docs/ defines."""
    return runpy.run_path(str(DOCS / name))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout of two pages, one of which the navigation lacks."""
    shutil.copytree(DOCS / "theme", tmp_path / "docs" / "theme")
    (tmp_path / "docs" / "zensical.toml").write_text(SITE)
    (tmp_path / "README.md").write_text("# A\n\n[b](docs/b.md#here) [b](https://example.com)\n")
    (tmp_path / "docs" / "b.md").write_text("# B\n\n## Here\n\n[a](../README.md)\n")
    return tmp_path


def test_a_broken_link_and_a_broken_anchor_are_found(root: Path) -> None:
    (root / "README.md").write_text("# A\n\n[b](docs/c.md)\n\n[b](docs/b.md#there)\n")
    (problem,) = run_tool("build_site.py")["build_site"](root)
    assert "page does not exist" in problem
    assert "anchor does not exist" in problem
    assert "2 issues found" in problem
    assert "Traceback" not in problem


@pytest.mark.slow("builds two sites")
def test_pages_outside_of_the_navigation_and_loads_of_other_hosts_are_found(root: Path) -> None:
    with (root / "docs" / "b.md").open("a") as page:
        page.write('\n<img src="https://example.com/a.png">\n')
    assert run_tool("build_site.py")["build_site"](root) == [
        "docs/b.md is not in the navigation of docs/zensical.toml",
        "docs/zensical.toml names docs/gone.md, which is not there",
        "docs/b.html loads https://example.com/a.png from another host",
    ]
    written = (root / "build" / "docs" / "site" / "docs" / "b.html").read_text()
    assert "Content-Security-Policy\" content=\"default-src 'self'" in written


def test_a_misspelt_word_is_found(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("Training is seperate.\n")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    command = [sys.executable, "-m", "codespell_lib"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "page.md:1: seperate ==> separate" in done.stdout


def test_an_undocumented_public_name_is_found() -> None:
    def function(documented: int, undocumented: int) -> None:
        """Do something with `documented`."""

    class Silent:
        pass

    module = ModuleType("module")
    placed = [name for names in run_tool("make_python.py")["SECTIONS"].values() for name in names]
    for name in placed:
        setattr(module, name, getattr(nested_core, name))
    module.finetune, module.Steps = function, Silent  # type: ignore[attr-defined]
    module.__all__ = [*placed, "added"]  # type: ignore[attr-defined]
    assert list(run_tool("make_python.py")["find_undocumented"](module)) == [
        "Steps: has no docstring",
        "added: is in only one of nested_core.__all__ and make_python.py's SECTIONS",
        "finetune: the docstring does not say what undocumented is",
    ]


@needs_rooms("doctor")
def test_the_page_of_the_command_line_has_a_shared_flag_once() -> None:
    page = run_tool("make_command_line.py")["render_page"]()
    assert page.count("whose champions are checked") == 1
    assert page.count("- `--registry DIR`: where NAME is looked for") == 1, "shared flags, once"


def test_a_variable_that_is_not_listed_is_found(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "deployments", tmp_path / "deployments")
    (tmp_path / "flows").mkdir()
    (tmp_path / "flows" / "new.py").write_text(
        'A = "NESTED_TUNE_ADDED"\nos.environ.get("ALSO")\nb = os.environ["THIRD"]\n'
    )
    tool = run_tool("make_environment.py")
    problems = list(tool["find_problems"](tool["find_variables"](tmp_path)))
    assert [line for line in problems if "has no line" in line] == [
        f"{name}, of flows/new.py, has no line in docs/make_environment.py"
        for name in ("ALSO", "NESTED_TUNE_ADDED", "THIRD")
    ]
    assert "NESTED_TUNE_CACHE has a line" not in "".join(problems), "the units name it"
    assert any(line.startswith("NESTED_TUNE_DEVICE_LOCK has a line") for line in problems)


@needs_rooms("cuda", "delta_nets")
def test_the_table_of_families_is_what_is_found_in_their_models() -> None:
    page = run_tool("make_support.py")["render_page"]()
    assert page == (DOCS / "support.md").read_text(), "run `make docs`"


def test_every_exit_code_has_its_place() -> None:
    def codes_below(error: type[NestedTuneError]) -> set[int]:
        return {error.exit_code}.union(*map(codes_below, error.__subclasses__()))

    anchors = re.findall(r'<a id="exit-(\d+)">', (DOCS / "exit-codes.md").read_text())
    codes = {0, *codes_below(NestedTuneError), INTERRUPTED_EXIT_CODE}
    assert sorted(map(int, anchors)) == sorted(codes)
