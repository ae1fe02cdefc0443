"""A run directory: names, who works in it, and when it may be begun or resumed."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest

from nested_core import ConfigError
from nested_core.storage.run_directory import RunDirectory, new_run_name, open_run

HOLD = """
import sys, time
from pathlib import Path
from nested_core.storage.run_directory import RunDirectory
with RunDirectory(Path(sys.argv[1])).locked():
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "run")


@pytest.fixture
def other_process(run: RunDirectory) -> Iterator[subprocess.Popen[str]]:
    """A second process that works in the run directory."""
    command = [sys.executable, "-c", HOLD, str(run.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def begin(run: RunDirectory) -> None:
    run.path.mkdir(parents=True)
    run.config.write_text("iters: 3\n")
    run.lock.touch()


class TestLock:
    def test_a_second_process_is_refused_and_told_the_first_ones_id_until_that_is_killed(
        self, run: RunDirectory, other_process: subprocess.Popen[str]
    ) -> None:
        assert run.holder() == other_process.pid
        with pytest.raises(ConfigError) as error, run.locked():
            pass
        assert str(error.value) == (
            f"{run.path} is in use by process {other_process.pid}: two processes may not work on "
            "one run directory. Wait for it, stop it with `nested-tune stop`, or give another "
            "--run-dir."
        )
        assert error.value.exit_code == 2
        other_process.send_signal(signal.SIGKILL)
        other_process.wait()
        assert run.holder() is None
        with run.locked():
            assert run.holder() == os.getpid()

    def test_a_refused_second_lock_leaves_the_first(self, run: RunDirectory) -> None:
        with run.locked():
            with pytest.raises(ConfigError, match=f"process {os.getpid()}:"), run.locked():
                pass
            assert run.holder() == os.getpid()

    def test_it_is_free_after_an_exception(self, run: RunDirectory) -> None:
        with pytest.raises(ZeroDivisionError), run.locked():
            raise ZeroDivisionError
        with run.locked():
            pass
        assert run.holder() is None

    def test_it_makes_the_directory_and_nobody_holds_one_that_is_not_there(self, run) -> None:
        assert run.holder() is None
        with run.locked():
            assert run.lock.read_text() == str(os.getpid())

    def test_two_that_look_at_once_do_not_take_each_other_for_a_holder(
        self, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with run.locked():
            pass
        flock, found = fcntl.flock, []

        def meanwhile(descriptor: int, operation: int) -> None:
            flock(descriptor, operation)
            monkeypatch.undo()
            found.append(run.holder())

        monkeypatch.setattr(fcntl, "flock", meanwhile)
        assert (run.holder(), found) == (None, [None])


class TestOpening:
    def test_a_new_path_and_an_empty_directory_are_begun(self, run: RunDirectory) -> None:
        assert open_run(run.path, resume=False) == run
        run.path.mkdir()
        assert open_run(run.path, resume=False) == run
        assert not run.is_nonempty()

    def test_what_is_not_empty_needs_resume(self, run: RunDirectory) -> None:
        begin(run)
        with pytest.raises(ConfigError, match="ended before it could train: add --resume to begin"):
            open_run(run.path, resume=False)
        with (
            run.locked(),
            pytest.raises(ConfigError, match=r"is in use by process \d+, which trains there now"),
        ):
            open_run(run.path, resume=False)  # it has not ended: it is still at work
        run.tiers.write_bytes(b"{}")
        with pytest.raises(ConfigError, match=r"is not empty\. A run is never written over: add"):
            open_run(run.path, resume=False)
        assert open_run(run.path, resume=True) == run

    def test_resume_works_before_the_configuration_is_written(self, run: RunDirectory) -> None:
        run.path.mkdir()
        run.lock.touch()
        assert open_run(run.path, resume=True) == run

    def test_a_folder_with_a_configuration_of_its_own_is_no_run(self, run: RunDirectory) -> None:
        run.path.mkdir()
        run.config.write_text("model: mine")
        (run.path / "checkpoints").mkdir()
        with pytest.raises(ConfigError) as error:
            open_run(run.path, resume=True)
        assert str(error.value) == (
            f"{run.path} is not a run directory: it is not empty, and has no run.lock, "
            "dataset.json or tiers.json as a run leaves them. Nothing there is touched. Give the "
            "--run-dir of the run to resume."
        )
        with pytest.raises(ConfigError, match=r"it has no run\.lock, dataset\.json or tiers\.json"):
            run.require_begun()

    @pytest.mark.parametrize("mark", ["run.lock", "dataset.json", "tiers.json"])
    def test_a_run_is_known_by_each_of_its_marks(self, run: RunDirectory, mark: str) -> None:
        run.path.mkdir()
        (run.path / mark).touch()
        run.config.touch()
        assert open_run(run.path, resume=True) == run
        run.require_begun()

    def test_nothing_cannot_be_resumed(self, run: RunDirectory) -> None:
        for make in (lambda: None, run.path.mkdir):
            make()
            with pytest.raises(ConfigError, match="holds nothing to resume"):
                open_run(run.path, resume=True)

    def test_a_program_is_told_what_to_call(self, run: RunDirectory) -> None:
        begin(run)
        with pytest.raises(ConfigError, match=r"add --resume to begin it again") as refused:
            open_run(run.path)
        told = traceback.format_exception(refused.value)[-1]
        assert told.startswith("In Python: call finetune(config, open_run(PATH, resume=True)")

    def test_a_file_is_no_directory(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(ConfigError, match="is a file; a run needs a directory"):
            open_run(tmp_path / "file", resume=False)

    def test_another_command_wants_a_run_that_has_a_configuration(self, run: RunDirectory) -> None:
        with pytest.raises(ConfigError, match=r"is not a run directory: it has no config\.yaml"):
            run.require_begun()
        begin(run)
        run.require_begun()


class TestName:
    def test_it_is_utc_time_and_8_hex_digits(self) -> None:
        assert re.fullmatch(r"\d{8}T\d{6}Z-[0-9a-f]{8}", new_run_name())
        assert new_run_name() != new_run_name()

    def test_a_run_with_an_id_of_its_own_keeps_its_digits(self) -> None:
        started = datetime(2025, 1, 31, 23, 59, 58, tzinfo=UTC)
        name = new_run_name(started, "0a1b-2c3d-4e5f")
        assert name == "20250131T235958Z-0a1b2c3d"

    def test_times_elsewhere_are_turned_into_utc(self) -> None:
        started = datetime(2025, 2, 1, 0, 30, tzinfo=timezone(timedelta(hours=2)))
        assert new_run_name(started, "0" * 8).startswith("20250131T223000Z-")
