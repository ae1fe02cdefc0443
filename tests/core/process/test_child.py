"""A process that answers: errors as they were, limits of time and length, and its end."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nested_core.errors import ChildFailed, DamagedError, TrainingDiverged, go_on_with
from nested_core.process import child
from nested_core.process.child import Child
from tests.waiting import wait_until

FUNCTION = """
import errno, os, signal, subprocess, sys, time

def answer(request):
    from nested_core.errors import DamagedError, TrainingDiverged, go_on_with
    word, *rest = request
    if word == "twice":
        print("what a library prints")
        return [*rest, *rest]
    if word == "raise":
        raise {
            "advice": TrainingDiverged("it left", advice=go_on_with()),
            "known": DamagedError("a \\\\ in a name"),
            "file": FileNotFoundError(errno.ENOENT, "No such file", "/none"),
            "number": OSError("no number"),
            "memory": MemoryError("too much"),
            "other": KeyError("x" * 999),
            "exit": SystemExit(3),
        }[rest[0]]
    if word == "wait":
        started = subprocess.Popen(["sleep", "100"])
        with open(rest[0], "w") as file:
            file.write(f"{os.getpid()} {started.pid}")
        time.sleep(100)
    if word == "close":
        os.close(3)
        time.sleep(100)
    if word == "atexit":
        import atexit
        atexit.register(open, rest[0], "w")
    return None
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    path = tmp_path / "program.py"
    path.write_text(FUNCTION)
    return path


def has_ended(process: int) -> bool:
    """Whether it is gone, or dead and not waited for by whoever adopted it."""
    status = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True, check=False
    )
    return not status.stdout.strip() or status.stdout.startswith("Z")


def test_the_program_imports_nothing_of_ours() -> None:
    imported = [
        node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.walk(ast.parse(child.PROGRAM.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert {str(name).partition(".")[0] for name in imported} <= sys.stdlib_module_names


def test_an_answer_that_json_does_not_have_is_an_error_and_the_next_one_comes(
    tmp_path: Path,
) -> None:
    path = tmp_path / "sets.py"
    path.write_text("def answer(request):\n    return {1, 2} if request else 'none'\n")
    with Child(path) as asked:
        with pytest.raises(ChildFailed, match="set is not JSON serializable"):
            asked.ask(True, 30)
        assert asked.ask(False, 30) == "none"


def test_each_request_has_its_answer_whatever_is_printed(program: Path) -> None:
    with Child(program) as asked:
        assert asked.ask(["twice", 1, None]) == [1, None, 1, None]
        long = "é" * 10**6
        assert asked.ask(["twice", long], 60) == [long, long]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("advice", TrainingDiverged("it left", advice=go_on_with())),
        ("known", DamagedError("a \\ in a name")),
        ("file", FileNotFoundError(2, "No such file", "/none")),
        ("memory", MemoryError("too much")),
    ],
)
def test_an_error_is_raised_again_as_it_was(program: Path, name: str, expected: Exception) -> None:
    with Child(program) as asked, pytest.raises(type(expected)) as caught:
        asked.ask(["raise", name])
    assert type(caught.value) is type(expected)
    assert str(caught.value) == str(expected)
    assert vars(caught.value) == vars(expected)


@pytest.mark.parametrize(
    ("name", "problem"),
    [("number", "OSError: no number"), ("other", "KeyError: 'xxx"), ("exit", "SystemExit: 3")],
)
def test_any_other_error_is_named_with_what_was_printed(program, name, problem) -> None:
    with Child(program) as asked:
        with pytest.raises(ChildFailed) as caught:
            asked.ask(["raise", name])
        assert asked.ask(["twice"]) == []  # it goes on answering
    first, *printed = str(caught.value).splitlines()
    assert first.startswith(problem)
    assert len(first) <= child.MAX_ERROR_CHARACTERS
    assert any("program.py" in line for line in printed)


def test_a_function_that_is_not_there_is_the_answer_to_the_first_request(tmp_path: Path) -> None:
    with Child("nested_core.errors:nothing") as asked, pytest.raises(ChildFailed, match="nothing"):
        asked.ask(1)
    with Child(tmp_path / "none.py") as asked, pytest.raises(FileNotFoundError, match="none.py"):
        asked.ask(1)


def test_what_takes_too_long_or_says_too_much_is_an_error(program: Path, tmp_path: Path) -> None:
    with Child(program) as asked, pytest.raises(ChildFailed, match="it took more than 0.2 sec"):
        asked.ask(["wait", str(tmp_path / "pids")], 0.2)
    with (
        Child(program, max_answer_bytes=100) as asked,
        pytest.raises(ChildFailed, match="something else than an answer"),
    ):
        asked.ask(["twice", "x" * 10**5])
    with Child(program) as asked:
        os.kill(asked.process.pid, signal.SIGSTOP)
        with pytest.raises(ChildFailed, match="it took more than 0.2 seconds"):
            asked.send(["twice", "x" * 10**6], 0.2)


def test_a_process_that_closes_its_output_is_not_waited_for(program, monkeypatch) -> None:
    monkeypatch.setattr(child, "SECONDS_TO_EXIT", 0.1)
    with Child(program) as asked, pytest.raises(ChildFailed, match="it closed its output"):
        asked.ask(["close"])


def test_all_that_it_started_ends_with_the_block(program: Path, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    with Child(program) as asked:
        asked.send(["wait", str(pids)])
        wait_until(lambda: pids.exists() and pids.read_text() != "")
        assert asked.has_answer(0) is False
    wait_until(lambda: all(has_ended(int(each)) for each in pids.read_text().split()))


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_what_is_at_work_ends_with_its_parent(program, tmp_path, sent) -> None:
    pids = tmp_path / "pids"
    code = (
        "import signal, sys; from pathlib import Path\n"
        "from nested_core.process.child import Child\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell may have it ignored
        "Child(Path(sys.argv[1])).ask(['wait', sys.argv[2]])"
    )
    command = [sys.executable, "-c", code, str(program), str(pids)]
    parent = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    wait_until(lambda: pids.exists() and pids.read_text() != "")
    parent.send_signal(sent)
    parent.wait()
    wait_until(lambda: all(has_ended(int(each)) for each in pids.read_text().split()))


def test_one_that_has_answered_ends_as_any_program_does(program: Path, tmp_path: Path) -> None:
    with Child(program) as asked:
        asked.ask(["atexit", str(tmp_path / "at its end")])
        asked.finish()
        assert asked.process.returncode == 0
    assert (tmp_path / "at its end").exists()


def test_ctrl_c_is_the_parents_to_handle(program: Path) -> None:
    with Child(program) as asked:
        assert asked.ask(["twice"]) == []
        os.kill(asked.process.pid, signal.SIGINT)
        assert asked.ask(["twice"]) == []


def test_what_is_said_of_an_error_is_not_believed(program: Path) -> None:
    for said in (7, {}, {"type": "DamagedError", "module": "nested_core.errors", "advice": 1}):
        assert child.rebuild_error(said) is None
    described: dict[str, Any] = {"type": "shorten", "module": "nested_core.errors"}
    assert child.rebuild_error(described | {"message": "", "os": [None] * 3}) is None
