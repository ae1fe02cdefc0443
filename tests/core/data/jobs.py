"""Jobs that go well or wrong, for the tests of the worker processes."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from nested_core.errors import DatasetError


def echo(request: dict[str, Any]) -> dict[str, Any]:
    time.sleep(request.get("seconds", 0))
    print("what a library prints")
    return {"value": request["value"], "process": os.getpid(), "mlx": "mlx.core" in sys.modules}


def large(request: dict[str, Any]) -> dict[str, Any]:
    return {"value": "x" * request["length"], "got": len(request.get("filler", ""))}


def unknown_error(request: dict[str, Any]) -> dict[str, Any]:
    print("something strange", file=sys.stderr)
    raise ValueError(f"bad value {request['value']}")


def known_error(request: dict[str, Any]) -> dict[str, Any]:
    raise DatasetError("the file changed")


def missing_file(request: dict[str, Any]) -> dict[str, Any]:
    return {"size": len(Path(request["path"]).read_bytes())}


def die(request: dict[str, Any]) -> dict[str, Any]:
    print("last words", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def leave(request: dict[str, Any]) -> dict[str, Any]:
    os._exit(3)


def announce_and_wait(request: dict[str, Any]) -> dict[str, Any]:
    Path(request["out"], str(os.getpid())).touch()
    time.sleep(60)
    return {}
