"""Runs cells in processes of their own, several at a time, and appends a row as each ends."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
import traceback
from collections import Counter
from functools import cache, partial
from multiprocessing.pool import AsyncResult, Pool
from pathlib import Path
from typing import Any

from benchmarks.learning.study import OF_MLX_LM, Cell, Study, cell_of, read_rows

POLL_SECONDS = 0.05
KEPT_BYTES = 2**30  # of freed buffers, in each of several workers
MOST_FAILURES = 8  # in a row: then the device is lost, and every further cell would fail
MOST_TRIES = 2  # of a cell: CUDA's "unspecified launch failure" came once in 25 trainings


def run(study: Study, options: argparse.Namespace) -> None:
    """Run what is missing, `--workers` cells at the same time, and append each row as it ends.

    A worker in which a cell failed is replaced: once CUDA has failed in a process, it fails always.
    The cell is tried again when all others have begun.
    """
    end = time.monotonic() + options.seconds
    failures = Counter[Cell]()
    in_a_row = 0
    running: dict[Cell, tuple[Pool, AsyncResult[dict[str, Any]]]] = {}
    start = partial(start_worker, prepares=True, shares=options.workers > 1)
    idle = [start() for _ in range(options.workers)]
    while time.monotonic() < end and in_a_row < MOST_FAILURES:
        rows = read_rows(options.rows)
        known = {cell_of(row) for row in rows} | running.keys()
        known |= {cell for cell, count in failures.items() if count == MOST_TRIES}
        waiting = [cell for cell in study.cells(rows) if cell not in known]
        waiting.sort(key=lambda cell: failures[cell])
        for cell in waiting[: len(idle)]:
            worker = idle.pop()
            running[cell] = worker, worker.apply_async(run_in_worker, (cell, study, options))
        if not running:
            break
        time.sleep(POLL_SECONDS)
        for cell in [cell for cell, (_, result) in running.items() if result.ready()]:
            worker, result = running.pop(cell)
            if append(options.rows, cell, result, options.workers):
                in_a_row = 0
            else:
                failures[cell] += 1
                in_a_row += 1
                worker.terminate()
                worker = start()
            idle.append(worker)
    for worker in [*idle, *(worker for worker, _ in running.values())]:
        end_worker(worker, waits=not running)
    rows = read_rows(options.rows)
    lost = failures.keys() - {cell_of(row) for row in rows}
    print(f"{options.rows}: {len(rows)} rows, {len(lost)} failed", file=sys.stderr)


def run_quietly(study: Study, options: argparse.Namespace) -> None:
    """Time the study's quiet cells in turns, one training at a time.

    Each side has a process of its own, and nothing of ours prepares MLX in mlx_lm's.
    """
    end = time.monotonic() + options.seconds
    known = {cell_of(row) for row in read_rows(options.rows)}
    theirs, ours = (start_worker(prepares=mine, shares=False) for mine in (False, True))
    for cell in (cell for cell in study.quiet if cell not in known):
        if time.monotonic() > end:
            break
        worker = theirs if cell.arm in OF_MLX_LM else ours
        result = worker.apply_async(run_in_worker, (cell, study, options))
        result.wait(max(0.0, end - time.monotonic()))
        if result.ready():
            append(options.rows, cell, result, 1)
    for worker in (theirs, ours):
        end_worker(worker, waits=time.monotonic() < end)


def start_worker(*, prepares: bool, shares: bool) -> Pool:
    """A process that runs cells, one after the other."""
    return multiprocessing.get_context("spawn").Pool(1, prepare_worker, (prepares, shares))


def end_worker(worker: Pool, *, waits: bool) -> None:
    """End a worker: by itself, so that what it compiled is kept for the next call, or at once."""
    if waits:
        worker.close()
        worker.join()
    else:
        worker.terminate()


def prepare_worker(prepares: bool, shares: bool) -> None:
    """Several trainings may share one GPU, and what they print is not wanted.

    MLX keeps freed buffers up to the whole device's memory, so those that share it keep few.
    mlx_lm.lora gives all of them back after each step, which costs seconds that are not told there.
    """
    os.environ["NESTED_TUNE_DEVICE_LOCK"] = "off"
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if prepares:
        from nested_core.backend import hide_torch_from_transformers, prepare

        hide_torch_from_transformers()
        prepare()
    if shares:
        import mlx.core as mx
        from mlx_lm.tuner import trainer

        mx.set_cache_limit(KEPT_BYTES)
        trainer._clear_cache = lambda _threshold: None


def run_in_worker(cell: Cell, study: Study, options: argparse.Namespace) -> dict[str, Any]:
    """One cell, in a worker."""
    if cell.task in study.streams:
        from benchmarks.learning.stream_cells import run_stream

        return run_stream(cell, options.bases, options.data)
    from benchmarks.learning.arms import run_cell

    return run_cell(cell, study, options.bases, options.data)


@cache
def code_commit() -> str:
    """The commit of this checkout when it was first asked, with `-dirty` where files differ.

    CODE_COMMIT names it where the code came without its repository.
    """
    if given := os.environ.get("CODE_COMMIT"):
        return given
    command = ("git", "describe", "--always", "--dirty", "--abbrev=8", "--exclude=*")
    done = subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def append(rows: Path, cell: Cell, result: AsyncResult[dict[str, Any]], workers: int) -> bool:
    """Append the row of a cell; False where it failed, which is told and not recorded."""
    try:
        row = result.get()
    except Exception:  # any: the other cells go on
        print(f"{cell} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        return False
    rows.parent.mkdir(parents=True, exist_ok=True)
    with rows.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row | {"workers": workers, "commit": code_commit()}) + "\n")
    print(f"{row['seconds']:7.1f} s  {row['right_share']:.3f}  {cell}", file=sys.stderr, flush=True)
    return True
