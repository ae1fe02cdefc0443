"""Lock files: what is locked is the file at the path, and nothing else is opened or written."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from nested_core.errors import DamagedError
from nested_core.pipeline import steps
from nested_core.pipeline.device_lock import DEVICE_LOCK_VARIABLE, lock_path, locking_devices
from nested_core.registry import history, rollback
from nested_core.storage.checkpoint_verification import list_checkpoints
from nested_core.storage.lock_file import (
    exclusive_lock,
    exclusive_lock_with_holder_id,
    read_holder,
    shared_lock,
)
from nested_core.storage.run_directory import RunDirectory
from tests.builders.file_damage import delete, link_to_a_device, make_directory, make_pipe
from tests.builders.registering import promote, register
from tests.core.registry.conftest import write_run
from tests.example import example_config
from tests.registry_care import audit, collect_garbage

REMOVED = r"lock was removed or replaced while this process had it locked"
SECONDS = 5.0


def make_link(path: Path) -> None:
    path.symlink_to(path.with_name("victim"))


def make_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket has at most 107 bytes
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)
    os.chdir(here)


NO_LOCK_FILES = [make_link, make_pipe, make_directory, make_socket, link_to_a_device]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "victim").write_text("precious")
    return tmp_path / "a.lock"


def replace(path: Path) -> None:
    path.unlink()
    path.touch()


@pytest.mark.parametrize("make", NO_LOCK_FILES)
def test_what_is_no_regular_file_is_damage_for_every_lock_and_is_left_as_it_is(
    path: Path, make: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    make(path)
    monkeypatch.setenv(DEVICE_LOCK_VARIABLE, "test-device")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(path.parent))
    os.rename(path, lock_path("test-device"))
    device = lock_path("test-device")
    run = RunDirectory(path.parent / "run")
    registry = path.parent / "registry"
    version = register(write_run(path.parent / "judged", 1), registry, "capitals", {})
    run.path.mkdir()
    make(run.lock)
    (registry / "capitals" / ".lock").unlink()
    make(registry / "capitals" / ".lock")
    for place, call in (
        (device, lambda: locking_devices().__enter__()),
        (run.lock, lambda: run.locked().__enter__()),
        (run.lock, lambda: run.locked_for_reading().__enter__()),
        (run.lock, run.holder),
        (registry, lambda: promote(registry, "capitals", version, by="ann")),
        (registry, lambda: rollback(registry, "capitals", by="ann")),
        (registry, lambda: collect_garbage(registry, "capitals", by="ann")),
        (registry, lambda: register(path.parent / "judged", registry, "capitals", {})),
        (registry, lambda: history(registry, "capitals")),
        (registry, lambda: audit(registry, "capitals")),
    ):
        before = stat.S_IFMT(run.lock.lstat().st_mode)
        with pytest.raises(DamagedError, match=str(place)) as caught:
            call()
        assert "Expected the file of a lock. Remove it" in str(caught.value)
        assert stat.S_IFMT(run.lock.lstat().st_mode) == before
    assert (path.parent / "victim").read_text() == "precious"


def test_a_second_name_of_a_lock_keeps_its_content(path: Path) -> None:
    os.link(path.with_name("victim"), path)
    with exclusive_lock_with_holder_id(path):
        assert path.read_text() == str(os.getpid())
        assert read_holder(path) == os.getpid()
    assert path.with_name("victim").read_text() == "precious"


def test_a_program_that_is_started_does_not_keep_the_lock(path: Path) -> None:
    with exclusive_lock(path) as lock:
        assert not os.get_inheritable(lock.descriptor)


@pytest.mark.parametrize("lose", [delete, replace])
@pytest.mark.parametrize("lock", [exclusive_lock, exclusive_lock_with_holder_id])
def test_a_lock_whose_file_is_gone_is_seen_by_who_has_it(path, lock, lose) -> None:
    with lock(path) as held:
        held.require_still_at_path()
        lose(path)
        with pytest.raises(DamagedError, match=REMOVED):
            held.require_still_at_path()


@pytest.mark.parametrize("lose", [delete, replace])
@pytest.mark.parametrize("lock", [exclusive_lock, exclusive_lock_with_holder_id, shared_lock])
def test_who_waited_for_a_file_that_is_gone_locks_the_one_at_the_path(path, lock, lose) -> None:
    """The waiting one gets the removed file first: it must not go in with that."""
    asked, inside = threading.Event(), threading.Event()

    def wait() -> None:
        with lock(path) as held:
            held.require_still_at_path()
            inside.set()

    flock, waiting = fcntl.flock, threading.Thread(target=wait)

    def noted(descriptor: int, operation: int) -> None:
        asked.set()
        flock(descriptor, operation)

    first, newcomer = ExitStack(), ExitStack()
    with newcomer:
        with first, pytest.MonkeyPatch.context() as patch:
            first.enter_context(exclusive_lock(path))
            patch.setattr(fcntl, "flock", noted)
            waiting.start()
            assert asked.wait(SECONDS)
            lose(path)
            newcomer.enter_context(exclusive_lock(path))
        assert not inside.wait(0.2)
    assert inside.wait(SECONDS)
    waiting.join()


def test_an_id_that_is_none_is_no_holder_and_not_read_without_end(path: Path) -> None:
    with exclusive_lock_with_holder_id(path) as lock:
        for content in (b"", b"12a", b"\x1b[2J", b"9" * 100_000_000, "٣".encode()):
            os.ftruncate(lock.descriptor, 0)
            os.pwrite(lock.descriptor, content, 0)
            assert read_holder(path) in (0, int("9" * 32))
    assert read_holder(path) is None
    assert read_holder(path.with_name("missing")) is None


class TestRun:
    def test_a_checkpoint_a_result_and_a_verdict_ask_for_the_lock_of_the_run(
        self, tmp_path: Path
    ) -> None:
        run = RunDirectory(tmp_path / "run")
        run.require_lock()  # a notebook that locks nothing is not held up
        with run.locked():
            RunDirectory(run.path).require_lock()
            run.lock.unlink()
            with pytest.raises(DamagedError, match=REMOVED):
                RunDirectory(run.path).require_lock()
            with RunDirectory(run.path).locked():
                pass
        run.require_lock()

    @pytest.mark.parametrize("lose", [delete, replace])
    def test_training_that_lost_its_lock_writes_no_checkpoint_more(self, tmp_path, lose) -> None:
        config, run = example_config(iters=8, save_every=2), RunDirectory(tmp_path / "run")

        def lose_it(trainer: Any) -> None:
            lose(run.lock)

        with run.locked():
            steps.write_run_config(config, run, resume=False)
            steps.validate(config, run)
            steps.write_initial_adapter_and_tiers(config, run)
            with pytest.raises(DamagedError, match=REMOVED):
                steps.train(config, run, on_start=lose_it)
        assert list_checkpoints(run.checkpoints) == []
        assert not run.result.exists()

    def test_a_rank_watches_the_lock_of_the_process_that_started_it(self, tmp_path: Path) -> None:
        run, rank = RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "run")
        with run.locked():
            rank.watch_parents_lock()
            rank.require_lock()
            replace(run.lock)
            with pytest.raises(DamagedError, match=REMOVED):
                rank.require_lock()

    def test_readers_share_a_run_that_nobody_works_on_and_write_nothing(self, tmp_path) -> None:
        run = RunDirectory(tmp_path / "run")
        run.path.mkdir()
        with run.locked_for_reading():
            assert list(run.path.iterdir()) == []
        run.stop_request.touch()
        run.lock.write_text("7")
        with run.locked_for_reading(), run.locked_for_reading():
            assert run.holder() is None
        assert (run.lock.read_text(), run.stop_request.exists()) == ("7", True)
