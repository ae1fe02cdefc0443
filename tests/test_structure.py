"""Imports point to the right only, files and functions are short, and a planted fault is seen."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.structure import LAYERS, figures, main, reversed_arrows, too_long

ROOT = Path(__file__).resolve().parent.parent


def copied(root: Path) -> Path:
    """A copy of the three packages and deployments in `root`, free to be spoiled."""
    for name in (*LAYERS, "deployments"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    return root


def plant(root: Path, place: str, source: str) -> None:
    path = root / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source, encoding="utf-8")


def test_imports_of_the_packages_point_to_the_right_only() -> None:
    assert reversed_arrows(ROOT) == []


def test_no_file_or_function_is_over_its_limit() -> None:
    assert too_long(ROOT) == []


WRONG = [
    ("nested_core/", "import tasks.train", "nested_core imports tasks.train"),
    ("nested_core/", "import json, flows.cli as c", "nested_core imports flows.cli"),
    ("nested_core/", "from flows import cli", "nested_core imports flows"),
    ("nested_core/data/", "from tasks.gate import gate", "nested_core imports tasks.gate"),
    ("tasks/", "from flows.finetune import finetune", "tasks imports flows.finetune"),
    ("tasks/", "def f():\n    import flows", "tasks imports flows"),
    ("tasks/", "async def f():\n    from flows import cli", "tasks imports flows"),
    ("tasks/", "if TYPE_CHECKING:\n    import flows", "tasks imports flows"),
    ("tasks/", "try:\n    import flows\nexcept ImportError: ...", "tasks imports flows"),
    ("nested_core/", "from ..tasks import gate", "nested_core imports tasks"),
    ("nested_core/", "from .. import flows", "nested_core imports flows"),
    ("nested_core/data/", "from ...tasks.gate import g", "nested_core imports tasks.gate"),
    ("nested_core/", "import prefect", "nested_core imports prefect"),
    (
        "nested_core/",
        "def f():\n    from prefect.runtime import flow_run",
        "prefect.runtime",
    ),
    (
        "nested_core/",
        "import importlib\nimportlib.import_module('prefect.flows')",
        "prefect",
    ),
    ("tasks/", "__import__('flows')", "tasks imports flows"),
    ("tasks/", "from flows import cli", "tasks imports flows"),
    ("flows/", "from deployments import settings", "flows imports deployments"),
    ("flows/", "import tests.conftest", "flows imports tests.conftest"),
    ("flows/", "import pickle", "flows imports pickle: what it reads can run code"),
    ("deployments/", "x = 1", "deployments holds data"),
]
ALLOWED = [
    ("flows/", "from tasks.gate import gate\nimport nested_core, prefect"),
    ("tasks/", "import prefect\nfrom nested_core.gate import judge"),
    ("nested_core/data/", "from .reading import read\nfrom ..errors import ConfigError"),
    (
        "nested_core/",
        "from . import errors, config\nimport prefect_like\nimport_module(name)",
    ),
    ("nested_core/", "text = 'import prefect'  # import flows"),
]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The arrows found, by file, in a copy of the project with every case in a file of its own."""
    root = copied(tmp_path_factory.mktemp("planted"))
    for index, (folder, source, _) in enumerate(WRONG):
        plant(root, f"{folder}wrong_{index}.py", source)
    for index, (folder, source) in enumerate(ALLOWED):
        plant(root, f"{folder}allowed_{index}.py", source)
    found: dict[str, list[str]] = {}
    for arrow in reversed_arrows(root):
        found.setdefault(arrow.split(":")[0], []).append(arrow)
    return found


@pytest.mark.parametrize("index", range(len(WRONG)), ids=[f"{c[0]} {c[1]}" for c in WRONG])
def test_a_reversed_arrow_is_caught(planted: dict[str, list[str]], index: int) -> None:
    folder, _, expected = WRONG[index]
    (arrow,) = planted[f"{folder}wrong_{index}.py"]
    assert expected in arrow


def test_a_reversed_arrow_in_the_file_of_a_package_is_caught(tmp_path: Path) -> None:
    plant(tmp_path, "tasks/__init__.py", "import json\n\nfrom flows import cli\n")
    (arrow,) = reversed_arrows(tmp_path)
    assert arrow == "tasks/__init__.py:3: tasks imports flows: the arrow is flows -> tasks"


def test_an_allowed_import_is_let_through(planted: dict[str, list[str]]) -> None:
    assert [file for file in planted if "allowed_" in file] == []


def test_a_file_and_a_function_that_are_too_long_are_named_with_both_numbers(
    tmp_path: Path,
) -> None:
    plant(tmp_path, "tasks/long.py", "def long():\n" + "    x = 1\n" * 60 + "y = 2\n" * 190)
    assert "tasks/long.py: 251 lines, at most 250" in too_long(tmp_path)
    assert "tasks/long.py:1 long: 61 lines, at most 60" in too_long(tmp_path)


def test_a_high_median_is_named(tmp_path: Path) -> None:
    for layer in LAYERS:
        plant(tmp_path, f"{layer}/a.py", "def f():\n" + "    x = 1\n" * 10)
    assert too_long(tmp_path) == ["median function: 11 lines, at most 10"]


def test_the_script_prints_three_figures_and_fails_over_a_limit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(tmp_path, "nested_core/a.py", "def f():\n    return 1\n\n\ndef g():\n    return 2\n")
    assert main(tmp_path) == 0
    assert figures(tmp_path) == [
        "largest file         6 lines, at most 250: nested_core/a.py",
        "longest function     2 lines, at most 60: nested_core/a.py:1 f",
        "median function      2 lines, at most 10: 2 functions in 1 files",
    ]
    plant(tmp_path, "nested_core/b.py", "import flows\n")
    assert main(tmp_path) == 1
    assert "nested_core/b.py:1: nested_core imports flows" in capsys.readouterr().err
