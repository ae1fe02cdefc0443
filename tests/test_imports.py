"""The import rules of pyproject.toml catch each arrow that they forbid."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# A forbidden line in a file, and how the report names the arrow.
FORBIDDEN = [
    ("nested_core/errors.py", "import tasks.finetune", "nested_core.errors -> tasks.finetune"),
    ("tasks/promote.py", "def late():\n    from flows import cli", "tasks.promote -> flows.cli"),
    (
        "nested_core/records/run_status.py",
        "import prefect",
        "nested_core.records.run_status -> prefect",
    ),
    ("flows/promote.py", "from flows import rooms", "flows.promote -> flows.rooms"),
    (
        "nested_core/storage/atomic.py",
        "import nested_core.gate.checks.judged",
        "nested_core.storage.atomic -> nested_core.gate.checks.judged",
    ),
    (
        "nested_core/gate/checks/judged.py",
        "import nested_core.gate.judge",
        ".checks -> .judge (1 import)",
    ),
]


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("lint-imports")
    command = [str(program), "--no-cache"]
    environment = {"PYTHONPATH": str(folder), "PATH": "/usr/bin:/bin", "COLUMNS": "200"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_each_forbidden_import_breaks_a_contract(tmp_path: Path) -> None:
    for package in ("nested_core", "tasks", "flows"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, tmp_path / package, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    sound = lint(tmp_path)
    assert (sound.returncode, "5 kept, 0 broken" in sound.stdout) == (0, True), sound.stdout
    for file, line, _ in FORBIDDEN:
        with (tmp_path / file).open("a") as source:
            source.write(f"\n{line}\n")
    done = lint(tmp_path)
    assert (done.returncode, "0 kept, 5 broken" in done.stdout) == (1, True), done.stdout
    assert [arrow for _, _, arrow in FORBIDDEN if arrow not in done.stdout] == []


def test_deployments_hold_data_and_no_code() -> None:
    assert list((ROOT / "deployments").rglob("*.py")) == []
