"""Prefect's logs: errors in a paragraph, and a flow process whose worker no longer reads them."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.exceptions import CancelledRun

from flows.finetune import FinetuneParameters, finetune
from flows.flow_runs.prefect_logs import _ErrorAsParagraphFilter
from flows.rollback import RollbackParameters, rollback
from tasks.log_text import LOGGERS_OF_RUNS
from tests.example import example_settings
from tests.left_out import slow_except

PROGRAM = """
import logging, sys
from pathlib import Path
from types import SimpleNamespace
from prefect.logging.configuration import setup_logging
from flows.flow_runs import prefect_logs

held, deployment = sys.argv[1:]
setup_logging()
prefect_logs.runtime = SimpleNamespace(deployment=SimpleNamespace(id=deployment or None))
prefect_logs.tolerate_closed_output()
logging.warning("begun")
sys.stdin.readline()
for _ in range(3):
    logging.warning("nobody reads this")
print("nor this", flush=True)
print("nor this", file=sys.stderr, flush=True)
Path(held).write_text("went on")
"""


@pytest.mark.slow("processes that import Prefect")
@pytest.mark.parametrize(
    "deployment",
    slow_except(["a deployment's run", ""], "a deployment's run", reason="another flow's process"),
)
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


class Lines(logging.Handler):
    """Keeps what a log would show of each record."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.shown: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.shown.append(self.format(record))


@pytest.fixture
def lines() -> Iterator[Lines]:
    handler = Lines()
    loggers = [logging.getLogger(name) for name in LOGGERS_OF_RUNS]
    for logger in loggers:
        logger.addHandler(handler)
    yield handler
    for logger in loggers:
        logger.removeHandler(handler)


@pytest.mark.usefixtures("prefect_server")
def test_an_error_of_a_flow_or_of_its_task_is_logged_once_in_a_paragraph(tmp_path, lines) -> None:
    missing = str(tmp_path / "none")
    state = rollback(RollbackParameters(registry=missing, name="a", by="me"), return_state=True)
    assert state.is_failed()
    settings = example_settings(data=missing) | {"run_dir": str(tmp_path / "run")}
    state = finetune(FinetuneParameters.model_validate(settings), return_state=True)
    assert state.is_failed()
    ours = [text for text in lines.shown if "ConfigError: " in text]
    assert len(ours) == 2
    assert all(missing in text and "\n" not in text for text in ours)
    assert "Traceback" not in "".join(lines.shown)


JSON_PROGRAM = """
import logging, os, warnings
from prefect.logging.configuration import setup_logging
from flows.flow_runs.prefect_logs import prepare_logs

setup_logging()
prepare_logs()
logging.getLogger("prefect.flow_runs").warning("%s :smile: [bold]\\n", "x" * 300)
warnings.warn("old", stacklevel=1)
"""


@pytest.mark.slow("a process that imports all of Prefect")
def test_with_the_environments_word_each_record_and_warning_is_a_line_of_json() -> None:
    done = subprocess.run(
        [sys.executable, "-c", JSON_PROGRAM],
        env=os.environ | {"NESTED_TUNE_LOG_FORMAT": "json", "PREFECT_LOGGING_TO_API_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    first, second = [json.loads(line) for line in done.stderr.splitlines()]
    assert first["message"].startswith("x" * 300)
    assert first["message"].endswith("[bold]\n")
    assert (first["logger"], first["level"]) == ("prefect.flow_runs", "WARNING")
    assert (second["logger"], "old" in second["message"]) == ("py.warnings", True)


def test_a_cancelled_run_is_told_by_its_state_and_has_no_traceback() -> None:
    """Prefect's engine raises and logs an error for a flow that returns Cancelled."""
    record = logging.LogRecord("prefect.flow_runs", logging.ERROR, "", 0, "exited", (), None)
    assert _ErrorAsParagraphFilter().filter(record)
    error = CancelledRun("stopped at step 4")
    record.exc_info = (CancelledRun, error, None)
    assert not _ErrorAsParagraphFilter().filter(record)
