"""Run mlx_lm.lora's own command line on many files, one after the other in a process of its own.

`python tests/mlx_lm_runs.py REQUEST RESULTS`: REQUEST is JSON, as `Request` has it. RESULTS gets
for each job what the program made of its words and file (`values`), and the error that it ended
with, if any. What a job writes is in its folder.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any, TypedDict

from nested_core import backend


class Job(TypedDict):
    """A command line, the folder that it is run in, and whether it trains or is only read."""

    folder: str
    words: list[str]
    trains: bool


class Request(TypedDict):
    """The jobs, a folder of modules to import from, and whether MLX compiles the steps.

    Without compiling, the results differ from mlx_lm.lora's in the last bits, and no job waits for
    the C++ compiler.
    """

    jobs: list[Job]
    modules: str
    compiles: bool


def run_job(job: Job) -> dict[str, Any]:
    """What mlx_lm.lora reads, and trains unless it is only to read."""
    lora: Any = importlib.import_module("mlx_lm.lora")
    layer: Any = importlib.import_module("mlx_lm.models.llama").TransformerBlock
    result: dict[str, Any] = {"values": None, "error": None}
    train, call = lora.run, layer.__call__

    def run(arguments: Any, *rest: Any) -> None:
        result["values"] = json.loads(json.dumps(vars(arguments)))
        if job["trains"]:
            train(arguments, *rest)

    os.chdir(job["folder"])
    sys.argv[1:] = job["words"]
    lora.run = run
    try:
        lora.main()
    except (Exception, SystemExit) as error:
        result["error"] = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    finally:
        lora.run = train
        layer.__call__ = call  # grad_checkpoint changes the class for good
    return result


def main(request_file: str, results: str) -> None:
    """Run all jobs."""
    request: Request = json.loads(Path(request_file).read_bytes())
    backend.prepare()  # before mlx: the BLAS that the tests have
    import mlx.core as mx
    from mlx_lm.tuner import callbacks

    if not request["compiles"]:
        mx.disable_compile()
    sys.path.insert(0, request["modules"])
    importlib.reload(callbacks)  # it looks for wandb when it is imported
    done = [run_job(job) for job in request["jobs"]]
    Path(results).write_text(json.dumps(done), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
