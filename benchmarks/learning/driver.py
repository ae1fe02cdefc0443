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
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from multiprocessing.pool import AsyncResult
from pathlib import Path
from typing import Any

from benchmarks.learning.study import OF_MLX_LM, Cell, Study, cell_of, read_rows

POLL_SECONDS = 0.05
KEPT_BYTES = 2**30  # of freed buffers, in each of several workers
MOST_FAILURES = 8  # in a row: then the device is lost, and every further cell would fail


def run(study: Study, options: argparse.Namespace) -> None:
    """Run what is missing, `--workers` cells at the same time, and append each row as it ends."""
    end = time.monotonic() + options.seconds
    failed: set[Cell] = set()
    in_a_row = 0
    running: dict[Cell, AsyncResult[dict[str, Any]]] = {}
    with worker_pool(options.workers, end, prepares=True) as pool:
        while time.monotonic() < end:
            rows = read_rows(options.rows)
            known = {cell_of(row) for row in rows} | failed | running.keys()
            waiting = [cell for cell in study.cells(rows) if cell not in known]
            for cell in waiting[: options.workers - len(running)]:
                running[cell] = pool.apply_async(run_in_worker, (cell, study, options))
            if not running:
                break
            time.sleep(POLL_SECONDS)
            for cell in [cell for cell, result in running.items() if result.ready()]:
                if append(options.rows, cell, running.pop(cell), options.workers):
                    in_a_row = 0
                    continue
                failed.add(cell)
                in_a_row += 1
            if in_a_row >= MOST_FAILURES:
                pool.terminate()
                break
    done = len(read_rows(options.rows))
    print(f"{options.rows}: {done} rows, {len(failed)} failed", file=sys.stderr)


def run_quietly(study: Study, options: argparse.Namespace) -> None:
    """Time the study's quiet cells in turns, one training at a time.

    Each side has a process of its own, and nothing of ours prepares MLX in mlx_lm's.
    """
    end = time.monotonic() + options.seconds
    known = {cell_of(row) for row in read_rows(options.rows)}
    with worker_pool(1, end, prepares=False) as theirs, worker_pool(1, end, prepares=True) as ours:
        for cell in (cell for cell in study.quiet if cell not in known):
            if time.monotonic() > end:
                break
            pool = theirs if cell.arm in OF_MLX_LM else ours
            result = pool.apply_async(run_in_worker, (cell, study, options))
            result.wait(max(0.0, end - time.monotonic()))
            if result.ready():
                append(options.rows, cell, result, 1)


@contextmanager
def worker_pool(workers: int, end: float, *, prepares: bool) -> Iterator[Any]:
    """Processes that run cells; they end by themselves, or at `end` whatever they do then."""
    start = (prepares, workers > 1)
    with multiprocessing.get_context("spawn").Pool(workers, prepare_worker, start) as pool:
        yield pool
        if time.monotonic() < end:
            pool.close()  # what they compiled is kept for the next call
            pool.join()


def prepare_worker(prepares: bool, shares: bool) -> None:
    """Several trainings may share one GPU, and what they print is not wanted.

    MLX keeps freed buffers up to the whole device's memory, so those that share it keep few.
    """
    os.environ["NESTED_TUNE_DEVICE_LOCK"] = "off"
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if prepares:
        from nested_core.backend import hide_torch_from_transformers, prepare

        hide_torch_from_transformers()
        prepare()
    if shares:
        import mlx.core as mx

        mx.set_cache_limit(KEPT_BYTES)


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
