"""A signal while MLX compiles kernels: the run ends as any stopped run does."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from nested_core.storage.checkpoint_verification import list_checkpoints
from tests.example import write_config
from tests.flows.conftest import completed, ended, start
from tests.rooms.kernel_folder.test_compiled_kernels import needs_compiler
from tests.waiting import wait_until

TRAIN = ("train", "-c", "config.yaml", "--run-dir", "run")

# g++ that says so, and waits, where the second step's kernels are compiled.
SLOW_COMPILER = """#!/bin/sh
if [ -d run/checkpoints/step-0000001 ]; then touch compiling; sleep 2; fi
exec {compiler} "$@"
"""


@pytest.mark.slow("compiles the kernels of two steps")
@pytest.mark.parametrize("reaches_compiler", [False, True])
@needs_compiler
def test_a_signal_while_kernels_are_compiled_is_a_stop(
    tmp_path: Path, reaches_compiler: bool
) -> None:
    """`kill` and `timeout` signal the program; systemd, its compiler with it."""
    write_config(
        tmp_path / "config.yaml", save_every=1, val_batches=0, nested={"frequencies": [1, 2]}
    )
    compiler = tmp_path / "bin" / "g++"
    compiler.parent.mkdir()
    compiler.write_text(SLOW_COMPILER.format(compiler=shutil.which("g++")))
    compiler.chmod(0o755)
    environment = {
        "PATH": f"{compiler.parent}:{os.environ['PATH']}",
        "NESTED_TUNE_KERNELS": str(tmp_path / "kernels"),
    }
    process = start(*TRAIN, cwd=tmp_path, **environment)
    wait_until((tmp_path / "compiling").exists, process=process)
    if reaches_compiler:
        (trains,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.killpg(int(trains), signal.SIGTERM)
    else:
        process.send_signal(signal.SIGTERM)
    stopped = ended(process)
    assert stopped.code == 5, stopped.stderr
    step = 1 if reaches_compiler else 2
    assert f"stopped at step {step} of 8" in stopped.message()
    assert ("could not be finished" in stopped.message()) is reaches_compiler
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == f"step-{step:07}"
    if reaches_compiler:
        resumed = completed(*TRAIN, "--resume", cwd=tmp_path)
        assert resumed.code in (0, 4), resumed.stderr
