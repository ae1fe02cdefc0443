"""Jobs that go well or wrong, for the tests of the worker processes."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from nested_core.errors import DatasetError


def echo(request: dict[str, Any]) -> dict[str, Any]:
    time.sleep(request.get("seconds", 0))
    print("what a library prints")
    return {"value": request["value"], "process": os.getpid(), "mlx": "mlx.core" in sys.modules}


def unknown_error(request: dict[str, Any]) -> dict[str, Any]:
    print("something strange", file=sys.stderr)
    raise ValueError(f"bad value {request['value']}")


def known_error(request: dict[str, Any]) -> dict[str, Any]:
    raise DatasetError("the file changed")


def die(request: dict[str, Any]) -> dict[str, Any]:
    print("last words", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
    return {}
