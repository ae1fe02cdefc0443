"""Work in several processes: in order, with one clear error, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nested_core.data.parallel_jobs import (
    count_processes_for,
    count_usable_cores,
    cut_file_into_line_ranges,
    run_jobs,
)
from nested_core.errors import DatasetError, DataWorkerFailed
from tests.waiting import wait_until

JOBS = "tests.core.data.jobs"


def ask(job: str, **fields: Any) -> dict[str, Any]:
    return {"job": f"{JOBS}:{job}", **fields}


def run_two(*requests: dict[str, Any]) -> list[dict[str, Any]]:
    return list(run_jobs(requests, processes=2))


def children() -> set[int]:
    """Processes whose parent is this one, zombies included."""
    listed = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid=,comm="], capture_output=True, text=True, check=True
    )
    rows = [line.split(None, 2) for line in listed.stdout.splitlines()]
    return {int(pid) for pid, parent, name in rows if int(parent) == os.getpid() and name != "ps"}


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    private = tmp_path / "tmp"
    private.mkdir()
    monkeypatch.setenv("TMPDIR", str(private))
    monkeypatch.setattr("tempfile.tempdir", None)
    before = children()
    yield
    assert children() == before
    assert list(private.iterdir()) == []


def test_answers_come_in_the_order_of_the_requests() -> None:
    seconds = [0.3, 0.0, 0.1, 0.0, 0.0]
    requests = [ask("echo", value=n, seconds=wait) for n, wait in enumerate(seconds)]
    answers = run_two(*requests)
    assert [answer["value"] for answer in answers] == [0, 1, 2, 3, 4]
    assert len({answer["process"] for answer in answers}) == 2


def test_a_worker_loads_no_mlx() -> None:
    assert [answer["mlx"] for answer in run_two(ask("echo", value=0), ask("echo", value=1))] == [
        False,
        False,
    ]


def test_an_idle_worker_takes_the_next_request() -> None:
    slow, *quick = run_two(
        ask("echo", value=0, seconds=1), *(ask("echo", value=n) for n in range(1, 6))
    )
    assert {answer["process"] for answer in quick}.isdisjoint({slow["process"]})


def test_progress_counts_what_is_done() -> None:
    done: list[int] = []
    requests = [ask("echo", value=n) for n in range(4)]
    list(run_jobs(requests, processes=2, on_done=done.append))
    list(run_jobs(requests, processes=1, on_done=done.append))
    assert done == [1, 2, 3, 4] * 2


def test_one_process_is_this_process() -> None:
    answers = run_jobs([ask("echo", value=n) for n in range(3)], processes=1)
    assert {answer["process"] for answer in answers} == {os.getpid()}


def test_large_requests_and_answers_pass_through() -> None:
    filler = "é" * 300_000
    answers = run_two(*(ask("large", length=1_000_000 + n, filler=filler) for n in range(3)))
    assert [len(answer["value"]) for answer in answers] == [1_000_000, 1_000_001, 1_000_002]
    assert {answer["got"] for answer in answers} == {300_000}


def test_an_unexpected_error_in_a_job_is_one_error_with_what_the_worker_said() -> None:
    with pytest.raises(DataWorkerFailed, match="ValueError: bad value 7") as caught:
        run_two(ask("echo", value=1), ask("unknown_error", value=7), ask("echo", value=2))
    assert "something strange" in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 14


def test_known_errors_keep_their_class() -> None:
    with pytest.raises(DatasetError, match="the file changed"):
        run_two(ask("known_error"), ask("echo", value=2))


def test_an_os_error_keeps_its_number_and_file(tmp_path: Path) -> None:
    path = str(tmp_path / "none")
    with pytest.raises(FileNotFoundError) as caught:
        run_two(ask("missing_file", path=path), ask("echo", value=2))
    assert caught.value.filename == path


def test_a_killed_worker_is_named_with_its_signal_and_last_words() -> None:
    with pytest.raises(
        DataWorkerFailed, match="ended by SIGKILL, as when memory runs out"
    ) as caught:
        run_two(ask("echo", value=1, seconds=1), ask("die"))
    assert "last words" in str(caught.value)


def test_a_worker_that_leaves_is_named_with_its_exit_status() -> None:
    with pytest.raises(DataWorkerFailed, match="with exit status 3"):
        run_two(ask("leave"), ask("leave"))


def test_an_early_end_leaves_no_process() -> None:
    with closing(run_jobs([ask("echo", value=n) for n in range(9)], processes=2)) as answers:  # type: ignore[type-var]
        assert next(answers)["value"] == 0
        assert len(children()) >= 2


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_their_parent(sent: signal.Signals, tmp_path: Path) -> None:
    request = ask("announce_and_wait", out=str(tmp_path))
    program = (
        "import json, signal, sys; from nested_core.data.parallel_jobs import run_jobs\n"
        "class Stop(BaseException): pass\n"
        "def stop(*_): raise Stop\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell may have it ignored
        "list(run_jobs(json.loads(sys.argv[1]), processes=2))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    parent = subprocess.Popen(
        [sys.executable, "-c", program, json.dumps([request, request])],
        env=environment,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    pids = lambda: [int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()]  # noqa: E731
    wait_until(lambda: len(pids()) == 2)
    workers = pids()
    parent.send_signal(sent)
    assert parent.wait(timeout=30) != 0
    wait_until(lambda: not any(is_alive(pid) for pid in workers))


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_workers_start_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('shadowed')")
    monkeypatch.chdir(tmp_path)
    assert len(run_two(ask("echo", value=0), ask("echo", value=1))) == 2


@given(st.binary(max_size=200), st.integers(min_value=1, max_value=50))
def test_spans_cover_a_file_in_whole_lines(content: bytes, size: int) -> None:
    path = Path(os.environ["PYTEST_SPANS"])
    path.write_bytes(content)
    spans = cut_file_into_line_ranges(path, size)
    pieces = [content[span.start : span.end] for span in spans]
    assert all(pieces)
    assert b"".join(pieces) == content
    assert all(piece.endswith(b"\n") for piece in pieces[:-1])


@pytest.fixture(autouse=True)
def _spans_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_SPANS", str(tmp_path / "spans"))


def test_spans_end_at_lines(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"aa\nbb\ncccccc\nd")
    assert cut_file_into_line_ranges(path, 3) == [(0, 3), (3, 6), (6, 13), (13, 14)]
    assert cut_file_into_line_ranges(path, 4) == [(0, 6), (6, 13), (13, 14)]


def test_small_work_is_worth_one_process() -> None:
    assert count_processes_for(1000) == count_processes_for(20 * 2**20) == 1
    assert count_processes_for(10**9) == count_usable_cores()
