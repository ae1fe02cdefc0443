"""A full disk and missing rights: one paragraph with the path, and nothing lost."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from flows.process.os_errors import ADVICE_BY_PATH_ERRNO, explain
from tests.core.limits import largest_file
from tests.example import write_config
from tests.flows.conftest import PROGRAM, Ended, called, completed

PR_CAPBSET_DROP, CAP_SYS_RESOURCE = 24, 24  # linux/prctl.h, linux/capability.h
LIMIT_KIB = 40  # of a file: more than any report of the example's run, less than its adapter


def refused(number: int) -> OSError:
    return OSError(number, os.strerror(number), "run/config.yaml")


@pytest.mark.parametrize(
    ("numbers", "code", "said"),
    [
        ((errno.ENOSPC, errno.EDQUOT), 1, "cannot be written ({})*--resume"),
        ((errno.EACCES, errno.EPERM, errno.EROFS), 2, "cannot be read or written ({})"),
        (tuple(ADVICE_BY_PATH_ERRNO), 2, "cannot be used ({}). "),
    ],
)
def test_what_the_system_refuses_is_named_in_one_line_with_what_to_do(numbers, code, said) -> None:
    for number in numbers:
        error = explain(refused(number))
        start, _, then = said.format(os.strerror(number)).partition("*")
        assert (error.exit_code, then in str(error)) == (code, True)
        assert str(error).startswith(f"run/config.yaml {start}")
        assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize("number", sorted(errno.errorcode))
def test_no_error_of_the_system_is_unexpected(number: int) -> None:
    error = explain(refused(number))
    text = str(error)
    assert "run/config.yaml" in text
    assert os.strerror(number) in text
    assert error.exit_code in (1, 2)


def test_an_error_of_the_device_is_exit_1_and_says_how_to_go_on() -> None:
    error = explain(refused(errno.EIO))
    assert error.exit_code == 1
    assert "--resume" in str(error)
    assert "Retry" in error.describe_for("page")


def test_an_error_without_number_or_path_is_a_paragraph_too() -> None:
    assert str(explain(OSError("no free ports"))).startswith(
        "a file or a connection cannot be read or written (no free ports)"
    )


@pytest.mark.slow("a process that imports mlx_lm")
def test_a_hard_limit_of_open_files_below_mlx_lms_is_told_in_one_sentence(tmp_path: Path) -> None:
    write_config(tmp_path / "config.yaml")
    done = subprocess.run(
        [PROGRAM, "train", "-c", "config.yaml"],
        cwd=tmp_path,
        preexec_fn=limit_open_files,  # noqa: PLW1509
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    message = Ended(done.returncode, done.stdout, done.stderr).message()
    assert "This process may open 1,024 files at a time" in message
    assert "ulimit -Hn 4096" in message


def limit_open_files() -> None:
    """The limits of a careful system, and no right to raise them, which root has."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_SYS_RESOURCE, 0, 0, 0)


def test_of_a_copy_the_file_that_could_not_be_written_is_named() -> None:
    error = OSError(errno.ENOSPC, "No space left on device", "from", None, "to")
    assert str(explain(error)).startswith("to cannot be written")


def test_a_run_that_cannot_write_a_file_says_so_and_goes_on_once_it_can(tmp_path: Path) -> None:
    write_config(tmp_path / "config.yaml", iters=4, val_batches=1)
    command = ["train", "-c", "config.yaml", "--run-dir", "run"]
    with largest_file(LIMIT_KIB * 1024):
        failed = called(*command, cwd=tmp_path)
    assert failed.code == 1
    assert "adapters.safetensors cannot be written (File too large)" in failed.message()
    resumed = called(*command, "--resume", cwd=tmp_path)
    assert resumed.code == 0, resumed.stderr


def test_a_link_that_leads_nowhere_is_no_place_for_a_run(tmp_path: Path) -> None:
    write_config(tmp_path / "config.yaml")
    (tmp_path / "run").symlink_to("nowhere")
    done = completed("train", "-c", "config.yaml", "--run-dir", "run", cwd=tmp_path)
    assert done.code == 2
    assert "run is a link that leads nowhere" in done.message()
