"""A program that forks a process for each step that it is told: author or reader of a mirror.

It imports all but the client of object storage, whose threads no fork may inherit. A line of JSON
says the step; it answers with the process' number, and with its exit status once it has ended.

    {"step": "promote", "runs": [...], "registry": ...}   register, promote, mirror
    {"step": "read", "address": ...}                      read the champion, verified
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from nested_core.errors import NestedTuneError
from nested_core.registry import read_champion, read_verified_version
from nested_core.registry.mirroring import open_copy, update_copy
from nested_core.rooms.mirror import author, reader  # noqa: F401 (imported before the fork)
from tests.builders.registering import promote, register

NAME = "capitals"


class Forker:
    """The program, started by a test."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.rooms.mirror.forked_steps"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def run(self, kill_after: float | None = None, **step: Any) -> int:
        """Run a step; its exit status, -9 where it was killed before its end."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(step | {"environment": dict(os.environ)}) + "\n")
        process = int(self._process.stdout.readline())
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(process, signal.SIGKILL)  # not waited for yet, so it is still this process
        self._process.stdin.write("wait\n")
        return int(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None
        with self._process:  # closes its pipes, and waits
            self._process.stdin.close()


def take_step(step: dict[str, Any]) -> int:
    """Exit code 0, or that of the error, which is printed."""
    os.environ.update(step["environment"])
    try:
        if step["step"] == "promote":
            for run in map(Path, step["runs"]):
                version = register(run, Path(step["registry"]), NAME, {"parent": "p" * 64})
                promote(Path(step["registry"]), NAME, version, by="ann")
        else:
            copy = open_copy(step["address"])
            update_copy(copy, NAME)
            champion = read_champion(copy, NAME)
            assert champion is not None
            assert read_verified_version(copy, NAME, champion).version == champion
    except NestedTuneError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except BaseException:
        traceback.print_exc()
        return 70
    return 0


def main() -> None:
    """Fork for each line, until there is no more."""
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            os._exit(take_step(json.loads(line)))
        print(process, flush=True)
        sys.stdin.readline()  # the test has killed it, or does not mean to
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
