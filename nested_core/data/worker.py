"""A worker process: jobs as JSON lines on standard input, an answer as a JSON line for each.

Run by nested_core.data.workers as `python -m nested_core.data.worker`; knows no job by itself.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from importlib import import_module
from typing import Any

from nested_core.errors import NestedTuneError


def run_job(request: dict[str, Any]) -> dict[str, Any]:
    """Call the function that request["job"] names as "package.module:function" with the request.

    Requests and answers are JSON objects; what is large goes into files that the request names.
    """
    module, _, function = request["job"].partition(":")
    answer: dict[str, Any] = getattr(import_module(module), function)(request)
    return answer


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    """The answer, or the error in a form that the parent can raise again."""
    try:
        return {"answer": run_job(request)}
    except NestedTuneError as error:
        return {"known": type(error).__name__, "message": str(error)}
    except OSError as error:
        return {"errno": error.errno, "message": error.strerror, "file": error.filename}
    except Exception:
        traceback.print_exc(limit=-2)
        return {"unknown": traceback.format_exc().strip().splitlines()[-1]}


def main() -> None:
    """Answer requests until standard input ends, as it does when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent's
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)  # what a library prints must not get between the answers
        for line in sys.stdin:
            answers.write(json.dumps(_answer(json.loads(line))) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
