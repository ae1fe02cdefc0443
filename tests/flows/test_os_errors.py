"""A full disk and missing rights: one paragraph with the path, and nothing lost."""

from __future__ import annotations

import errno
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from flows.os_errors import explain
from tests.example import write_config
from tests.flows.conftest import PROGRAM, Ended, completed

LIMIT_KIB = 40  # of a file: more than any report of the example's run, less than its adapter


def refused(number: int) -> OSError:
    return OSError(number, os.strerror(number), "run/config.yaml")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_exit_1_and_says_how_to_go_on(number: int) -> None:
    text, code = explain(refused(number)) or ("", 0)
    assert code == 1
    assert text.startswith(f"run/config.yaml cannot be written ({os.strerror(number)})")
    assert "--resume" in text


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_missing_rights_are_exit_2_and_name_the_path(number: int) -> None:
    text, code = explain(refused(number)) or ("", 0)
    assert code == 2
    assert text.startswith(f"run/config.yaml cannot be read or written ({os.strerror(number)})")


def test_an_error_of_the_device_is_nothing_that_a_person_did() -> None:
    assert explain(refused(errno.EIO)) is None


def test_of_a_copy_the_file_that_could_not_be_written_is_named() -> None:
    error = OSError(errno.ENOSPC, "No space left on device", "from", None, "to")
    text, _ = explain(error) or ("", 0)
    assert text.startswith("to cannot be written")


def test_a_run_that_cannot_write_a_file_says_so_and_goes_on_once_it_can(tmp_path: Path) -> None:
    write_config(tmp_path / "config.yaml", iters=4, val_batches=1)
    command = ["train", "-c", "config.yaml", "--run-dir", "run"]
    limited = f"ulimit -f {LIMIT_KIB}; exec {shlex.join([str(PROGRAM), *command])}"
    failed = subprocess.run(["bash", "-c", limited], cwd=tmp_path, capture_output=True, text=True)
    message = Ended(failed.returncode, failed.stdout, failed.stderr).message()
    assert failed.returncode == 1
    assert "adapters.safetensors cannot be written (File too large)" in message
    resumed = completed(*command, "--resume", cwd=tmp_path)
    assert resumed.code == 0, resumed.stderr


def test_a_link_that_leads_nowhere_is_no_place_for_a_run(tmp_path: Path) -> None:
    write_config(tmp_path / "config.yaml")
    (tmp_path / "run").symlink_to("nowhere")
    done = completed("train", "-c", "config.yaml", "--run-dir", "run", cwd=tmp_path)
    assert done.code == 2
    assert "run is a link that leads nowhere" in done.message()
