"""A flow process whose worker is gone: nobody reads what it prints, and it goes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import logging, sys
from pathlib import Path
from types import SimpleNamespace
from prefect.logging.configuration import setup_logging
from flows import prefect_logs

held, deployment = sys.argv[1:]
setup_logging()
prefect_logs.runtime = SimpleNamespace(deployment=SimpleNamespace(id=deployment or None))
prefect_logs.outlive_the_worker()
logging.warning("begun")
sys.stdin.readline()
for _ in range(3):
    logging.warning("nobody reads this")
print("nor this", flush=True)
print("nor this", file=sys.stderr, flush=True)
Path(held).write_text("went on")
"""


@pytest.mark.parametrize("deployment", ["a deployment's run", ""])
def test_a_deployments_run_goes_on_when_its_worker_no_longer_reads_what_it_prints(
    tmp_path: Path, deployment: str
) -> None:
    held = tmp_path / "held"
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(held), deployment],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert "begun" in process.stdout.readline()
        process.stdout.close()
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.close()
        code = process.wait(60)
    assert (code == 0) == bool(deployment)  # a person's run ends with its reader, as rich has it
    assert held.exists() == bool(deployment)
