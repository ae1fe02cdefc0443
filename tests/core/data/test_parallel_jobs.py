"""Work in several processes: in order, with one clear error, and nothing left behind."""

from __future__ import annotations

import os
import subprocess
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

pytestmark = pytest.mark.slow("starts worker processes")

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


def test_an_unexpected_error_in_a_job_is_one_error_with_what_the_worker_said() -> None:
    with pytest.raises(DataWorkerFailed, match="ValueError: bad value 7") as caught:
        run_two(ask("echo", value=1), ask("unknown_error", value=7), ask("echo", value=2))
    assert "something strange" in str(caught.value)


def test_known_errors_keep_their_class() -> None:
    with pytest.raises(DatasetError, match="the file changed"):
        run_two(ask("known_error"), ask("echo", value=2))


def test_a_killed_worker_is_named_with_its_signal_and_last_words() -> None:
    with pytest.raises(
        DataWorkerFailed, match="ended by SIGKILL, as when memory runs out"
    ) as caught:
        run_two(ask("echo", value=1, seconds=1), ask("die"))
    assert "last words" in str(caught.value)


def test_an_early_end_leaves_no_process() -> None:
    with closing(run_jobs([ask("echo", value=n) for n in range(9)], processes=2)) as answers:  # type: ignore[type-var]
        assert next(answers)["value"] == 0
        assert len(children()) >= 2


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
