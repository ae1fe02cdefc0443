"""The notebook and the beginning of docs/python.md run as printed, each in a new process."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nested_core.registry import read_champion
from tests.example import DATA, EXAMPLES, write_config

ROOT = EXAMPLES.parent
NOTEBOOK = EXAMPLES / "notebook.ipynb"
# Runs the cells of a notebook in one namespace, as a kernel does, and prints what each one printed.
RUN_CELLS = """
import contextlib, io, json, sys
cells = json.load(open(sys.argv[1], encoding="utf-8"))["cells"]
names, printed = {"__name__": "__main__"}, []
for cell in cells:
    if cell["cell_type"] == "code":
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec("".join(cell["source"]), names)
        printed.append(out.getvalue())
json.dump(printed, sys.stdout)
"""


def run_python(program: str, *arguments: object, cwd: Path) -> str:
    """What a program prints in a new process, in which a warning of the project is an error."""
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", program, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_notebook(notebook: Path, cwd: Path) -> list[str]:
    """What each code cell of a notebook prints, run in their order."""
    printed: list[str] = json.loads(run_python(RUN_CELLS, notebook, cwd=cwd))
    return printed


def code_cells(notebook: Path) -> list[dict[str, Any]]:
    """The code cells of a notebook."""
    cells = json.loads(notebook.read_bytes())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def kept_output(cell: dict[str, Any]) -> str:
    """What a cell printed when the notebook was saved."""
    return "".join(text for output in cell["outputs"] for text in output["text"])


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    """A folder like examples/, in which the notebook leaves what it writes."""
    for folder in ("geography", "geography-base"):
        (tmp_path / folder).symlink_to(EXAMPLES / folder)
    return tmp_path


@pytest.mark.slow("trains the example, and exports it")
def test_the_notebook_prints_what_is_kept_in_it(examples: Path) -> None:
    kept = [kept_output(cell) for cell in code_cells(NOTEBOOK)]
    assert run_notebook(NOTEBOOK, examples) == kept
    assert sum(map(bool, kept)) >= 5
    assert [f"{number}" for number, _ in enumerate(kept, start=1)] == [
        str(cell["execution_count"]) for cell in code_cells(NOTEBOOK)
    ]


def test_a_cell_that_prints_something_else_is_seen(tmp_path: Path) -> None:
    cells = [{"cell_type": "code", "source": [f"print({n})"], "outputs": []} for n in (1, 2)]
    notebook = tmp_path / "notebook.ipynb"
    notebook.write_text(json.dumps({"cells": [*cells, {"cell_type": "markdown", "source": ["a"]}]}))
    assert run_notebook(notebook, tmp_path) == ["1\n", "2\n"]
    assert [kept_output(cell) for cell in code_cells(notebook)] == ["", ""]
    notebook.write_text(notebook.read_text().replace("print(2)", "raise ValueError(2)"))
    with pytest.raises(AssertionError, match="ValueError: 2"):
        run_notebook(notebook, tmp_path)


@pytest.mark.slow("trains and judges in a process")
def test_the_program_that_begins_python_md_trains_promotes_asks_and_evaluates(tmp_path) -> None:
    page = (ROOT / "docs" / "python.md").read_text()
    program = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[0]
    write_config(tmp_path / "lora.yaml", iters=4)
    shutil.copy(DATA / "held_out.jsonl", tmp_path / "questions.jsonl")
    answer, *rows = run_python(program, cwd=tmp_path).splitlines()
    version = read_champion(tmp_path / "registry", "support-bot")
    assert (tmp_path / "registry/support-bot/champion").resolve().name == version
    assert answer
    assert [row.split()[:2] for row in rows] == [
        ["base", "questions"],
        ["registry/support-bot", "questions"],
    ]
