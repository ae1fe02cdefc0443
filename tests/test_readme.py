"""The README's Python runs as it stands there, and the tests that documents name are there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.example import write_config

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "SECURITY.md", *(ROOT / "docs").glob("*.md")])


def test_the_six_lines_train_judge_and_read_the_verdict(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (program,) = [block for block in blocks if "finetune(" in block]
    assert len([line for line in program.splitlines() if line.strip()]) == 6
    registry = {"path": "registry", "name": "capitals", "promote": "always"}
    write_config(tmp_path / "lora.yaml", iters=4, registry=registry)
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    verdict, outcome = done.stdout.splitlines()
    assert verdict.startswith("passed: ")
    adapter, version, promotion = outcome.split()
    assert adapter == "runs/first/adapter"
    assert (tmp_path / "registry" / "capitals" / "champion").resolve().name == version
    assert promotion == "promoted"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.name))
def test_every_test_that_a_document_names_is_there(document: Path) -> None:
    """`test_file.py`, `test_file.py::test_name`, and `::test_name` of the file named before."""
    file = ""
    for named, function in re.findall(r"`(test_\w+\.py)?(?:::(\w+))?`", document.read_text()):
        file = named or file
        paths = list((ROOT / "tests").rglob(file)) if file else []
        assert paths or not file, f"{document.name} names {file}, which is not in tests/"
        if function:
            found = any(f"def {function}(" in path.read_text() for path in paths)
            assert found, f"{document.name}: {file} has no {function}"


def test_each_line_about_trust_names_its_test() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    table = text.partition("| who, or what |")[2].partition("\n\n")[0].splitlines()[2:]
    assert len(table) > 8
    assert [line for line in table if "`test_" not in line.rpartition("|")[0]] == []
