"""The import rules of pyproject.toml catch each arrow that they forbid."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FORBIDDEN = {
    "a task in the library": ("nested_core/errors.py", "import tasks.finetune"),
    "a flow in a task": ("tasks/promote.py", "def late():\n    from flows import cli"),
    "Prefect in the library": ("nested_core/records/verdict.py", "import prefect"),
    "a room in a flow": ("flows/promote.py", "from flows import rooms"),
    "an upper package": ("nested_core/storage/atomic.py", "import nested_core.gate.checks.judged"),
    "a circle of files": ("nested_core/gate/checks/judged.py", "import nested_core.gate.judge"),
}


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("lint-imports")
    command = [str(program), "--no-cache"]
    environment = {"PYTHONPATH": str(folder), "PATH": "/usr/bin:/bin", "COLUMNS": "200"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for package in ("nested_core", "tasks", "flows"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, tmp_path / package, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.parametrize("case", FORBIDDEN)
def test_a_forbidden_import_breaks_a_contract(tree: Path, case: str) -> None:
    file, line = FORBIDDEN[case]
    with (tree / file).open("a") as source:
        source.write(f"\n{line}\n")
    done = lint(tree)
    assert done.returncode == 1, done.stdout
    assert "BROKEN" in done.stdout


def test_the_tree_as_it_is_breaks_none(tree: Path) -> None:
    done = lint(tree)
    assert done.returncode == 0, done.stdout
    assert "5 kept, 0 broken" in done.stdout


def test_deployments_hold_data_and_no_code() -> None:
    assert list((ROOT / "deployments").rglob("*.py")) == []
