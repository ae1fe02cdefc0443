"""Each file of a run is opened in records/ alone; whoever shows a run reads it through `Run`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from nested_core.storage.run_directory import RunDirectory

ROOT = Path(__file__).resolve().parents[3]
OPENERS = frozenset(
    {
        *("open", "open_regular", "read_regular", "read_json", "read_json_object", "read_text"),
        *("read_bytes", "parse_json", "read_yaml"),
    }
)
# Files that one room alone writes and reads, and that say nothing of a run to anybody else.
OWN_FILES = frozenset(
    {
        "tiers",  # training/training_setup.py: which tensor is in which tier
        "suites",  # measure/answers/suites.py: what the gate asks
        "report_to",  # rooms/services: names of the run at services
        "training_examples",  # measure/losses/left_out_examples.py: digests of what was trained on
        "validation_losses",  # training writes them, measure/losses/chosen_candidate.py reads them
        "checkpoints",  # storage: what a run goes on from
        "stop_request",
        "lock",
    }
)
RUN_FILES = frozenset(vars(RunDirectory(Path()))) - OWN_FILES - {"path", "initial", "adapter"}
EXCEPTIONS = {
    "nested_core/config/resume.py": ["config"],  # the configuration's own reader, before records
    "nested_core/training/reports/run_progress.py": [
        "metrics"
    ],  # goes on in a file that is being written
}
VIEWERS = (
    "nested_core/report",
    "flows/commands/inspection.py",
    *("flows/terminal/run_results.py", "flows/rooms", "nested_core/rooms/nights"),
    *(str(page.relative_to(ROOT)) for page in ROOT.glob("nested_core/rooms/*/page.py")),
)
# They show a run while it is written, and read again what has changed since the line before.
FOLLOWERS = {"flows/rooms/live/live_view.py"}


def calls(source: str) -> Iterator[tuple[str, list[str]]]:
    """Each call: the function's name, and the attributes that it is given or is a method of."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            of = [node.func.value] if isinstance(node.func, ast.Attribute) else []
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            given = [part.attr for part in (*of, *node.args) if isinstance(part, ast.Attribute)]
            yield name, given


def opened(source: str) -> list[str]:
    """The files of a run that some source opens itself."""
    return [
        file for name, given in calls(source) if name in OPENERS for file in RUN_FILES & {*given}
    ]


def sources(*rooms: str) -> Iterator[tuple[str, str]]:
    """The product's files in some rooms with their text."""
    for room in rooms:
        found = [ROOT / room] if room.endswith(".py") else sorted((ROOT / room).rglob("*.py"))
        for path in found:
            yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")


@pytest.mark.slow("reads the syntax of every source file")
def test_no_room_but_records_opens_a_file_of_a_run() -> None:
    rooms = {
        name: opened(text)
        for name, text in sources("nested_core", "tasks", "flows")
        if not name.startswith("nested_core/records/")
    }
    assert {name: files for name, files in rooms.items() if files} == EXCEPTIONS


def test_whoever_shows_a_run_calls_no_reader_of_one_of_its_files() -> None:
    read = {
        name: [
            call for call, given in calls(text) if call.startswith("read_") and {*given} & RUN_FILES
        ]
        for name, text in sources(*VIEWERS)
        if name not in FOLLOWERS
    }
    assert len(read) >= 8  # of the core alone
    assert {name: found for name, found in read.items() if found} == {}


@pytest.mark.parametrize(
    ("source", "files"),
    [
        ("read_json_object(run.dataset)", ["dataset"]),
        ("json.loads(self._run.gate.read_bytes())", ["gate"]),
        ("with open(run.metrics) as file: pass", ["metrics"]),
        ("read_verdict(run.gate)", []),
        ("run.gate.exists()", []),
    ],
)
def test_what_opens_a_file_is_seen(source: str, files: list[str]) -> None:
    assert opened(source) == files
