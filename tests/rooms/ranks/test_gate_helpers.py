"""The gate of several processes: they share its losses, which are those of one to the bit."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from nested_core.errors import NestedTuneError
from nested_core.pipeline import steps
from nested_core.process.child import Child
from nested_core.rooms.ranks import gate_helpers
from nested_core.storage.run_directory import RunDirectory
from tests.example import DATA, Finished, train_example

ROWS, BATCH_SIZE, BATCHES = 91, 6, 16  # of held-out text; the last batch has one row

FIGURES = ("gate.json", "gate-losses.jsonl")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run with many held-out rows."""
    folder = tmp_path_factory.mktemp("shared")
    lines = (DATA / "valid.jsonl").read_text().splitlines()
    rows = [lines[row % len(lines)].replace("?", f" ({row})?") for row in range(ROWS)]
    (folder / "many.jsonl").write_text("\n".join(rows))
    gate = {"held_out": str(folder / "many.jsonl"), "drift": True}
    return train_example(folder / "run", iters=4, val_batches=0, batch_size=BATCH_SIZE, gate=gate)


def judge(trained: Finished, path: Path, processes: int, **keys: Any) -> dict[str, bytes]:
    """Judge a copy of the run in so many processes; return the files with figures."""
    run = RunDirectory(Path(shutil.copytree(trained.run.path, path)))
    training = trained.config.training.model_copy(update={"processes": processes} | keys)
    with run.locked():
        steps.judge(trained.config.model_copy(update={"training": training}), run)
    contents = {name: (path / name).read_bytes() for name in FIGURES}
    return {name: text.replace(bytes(path), b"RUN") for name, text in contents.items()}


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many batches the judging process compares itself, at a time; it waits for the others."""
    counts: list[int] = []
    comparing = gate_helpers.comparing

    def note(*given: Any) -> Callable[[Sequence[Any]], list[Any]]:
        compare = comparing(*given)

        def count(batches: Sequence[Any]) -> list[Any]:
            counts.append(len(batches))
            return compare(batches)

        return count

    monkeypatch.setattr(gate_helpers, "comparing", note)
    monkeypatch.setattr(gate_helpers, "SECONDS_OF_A_LOOK", 300.0)
    monkeypatch.setattr(gate_helpers, "MIN_BATCHES", BATCHES)
    return counts


@pytest.mark.parametrize("processes", [2, 3])
def test_the_verdict_is_that_of_one_process_to_the_bit(trained, tmp_path, own, processes) -> None:
    alone = judge(trained, tmp_path / "alone", 1)
    assert own == []
    shared = judge(trained, tmp_path / "shared", processes)
    assert shared == alone
    assert json.loads(alone["gate.json"])["validation"]["examples"] == ROWS
    assert sum(own) == -(-BATCHES // processes)  # the others, by the helpers


def test_fewer_batches_start_no_process(trained, tmp_path, own, monkeypatch) -> None:
    monkeypatch.setattr(gate_helpers, "MIN_BATCHES", BATCHES + 1)
    monkeypatch.setattr(gate_helpers, "HELPER", "nested_core.no_such_module:answer")
    judge(trained, tmp_path / "alone", 2)
    assert own == []


ENDS = {
    "os.kill(os.getpid(), 9)": "SIGKILL",
    "raise ValueError('astray')": "astray",
    "os.kill(os.getpid(), 19)": "it took more than 3 seconds",  # stopped, as by a debugger
}


@pytest.mark.parametrize("end", ENDS)
def test_without_a_helper_there_is_no_verdict(trained, tmp_path, own, monkeypatch, end) -> None:
    program = tmp_path / "helper.py"
    program.write_text(
        f"import os\ndef answer(request):\n    if isinstance(request, list):\n        {end}\n"
    )
    monkeypatch.setattr(gate_helpers, "HELPER", program)
    with pytest.raises(
        NestedTuneError, match="computed losses of the gate beside this one"
    ) as lost:
        judge(trained, tmp_path / "run", 2, hang_timeout=3.0)
    assert ENDS[end] in str(lost.value)
    assert "--resume" in str(lost.value)
    assert not (tmp_path / "run" / "gate.json").exists()


class StoppedBeforeItReads(Child):
    """A helper that is stopped when it has loaded its base; a page fills the pipe to it."""

    def receive(self, seconds: float | None = None) -> Any:
        answer = super().receive(seconds)
        assert self.process.stdin is not None
        fcntl.fcntl(self.process.stdin, fcntl.F_SETPIPE_SZ, 4096)
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)
        return answer


@pytest.mark.skipif(sys.platform != "linux", reason="pipes have one size elsewhere")
def test_a_helper_that_reads_nothing_any_more_is_not_waited_for(
    trained: Finished, tmp_path: Path, own: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate_helpers, "Child", StoppedBeforeItReads)
    with pytest.raises(NestedTuneError, match="beside this one failed: it took more than 3 second"):
        judge(trained, tmp_path / "run", 2, hang_timeout=3.0)
    assert own == []  # it computed none itself
