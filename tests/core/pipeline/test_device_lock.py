"""The lock on a device: held by one process at a time, and free as soon as that one is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nested_core import backend
from nested_core.errors import ConfigError
from nested_core.models.session import Session
from nested_core.pipeline.device_lock import (
    DEVICE_LOCK_VARIABLE,
    device_names,
    lock_path,
    locking_devices,
)
from tests.example import example_config

HOLD = (
    "import sys, time\n"
    "from nested_core.pipeline.device_lock import locking_devices\n"
    "with locking_devices():\n"
    "    print('held', flush=True)\n"
    "    time.sleep(60)\n"
)


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(DEVICE_LOCK_VARIABLE, "test-device")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def test_a_second_process_waits_names_the_holder_and_goes_on_when_that_one_is_killed() -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD], stdout=subprocess.PIPE, env=dict(os.environ), text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    lines = []

    def kill_the_holder(line: str) -> None:
        lines.append(line)
        holder.send_signal(signal.SIGKILL)

    session = Session()
    session.load_base(example_config())
    with locking_devices(kill_the_holder, session=session):
        assert lock_path("test-device").read_text() == str(os.getpid())
    assert session.base is None  # its memory was the other process's to use
    holder.communicate()
    assert lines == [
        f"device test-device is in use by process {holder.pid}: waiting until it is free"
    ]


def test_another_device_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with locking_devices():
        monkeypatch.setenv(DEVICE_LOCK_VARIABLE, "another")
        with locking_devices(pytest.fail):
            pass


def test_a_cpu_is_shared_and_off_locks_nothing(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv(DEVICE_LOCK_VARIABLE, "off")
    assert device_names(2) == ()
    with locking_devices(pytest.fail), locking_devices(pytest.fail):
        assert list(tmp_path.iterdir()) == []


def test_each_rank_on_cuda_has_a_device_of_its_own_and_one_process_takes_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(DEVICE_LOCK_VARIABLE)
    monkeypatch.setattr(backend, "device", lambda: "gpu")
    monkeypatch.setattr(backend, "computes_on_cuda", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert device_names(2) == ("gpu-0", "gpu-1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,4,5")
    assert device_names(2) == ("gpu-6", "gpu-4")
    assert device_names() == ("gpu-6",)
    with locking_devices(pytest.fail, 2):
        assert lock_path("gpu-6").read_text() == lock_path("gpu-4").read_text() == str(os.getpid())


def test_a_lock_is_not_kept_where_a_link_below_the_temporary_folder_leads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"nested-tune-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="Set XDG_RUNTIME_DIR"):
        lock_path("test-device")
