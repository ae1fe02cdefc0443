"""`python -m benchmarks.learning run ROWS.jsonl`: every cell that is not in the file is appended.

`corpus` and `base` make the base models, `report` writes tables and plots of the rows there are.
PROTOCOL.md says what is run and what decides; a call ends within `--seconds`, the next goes on.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.pool import AsyncResult
from pathlib import Path
from typing import Any

from benchmarks.learning.study import FULL, OF_MLX_LM, SMALL, Cell, Study, cell_of, read_rows

POLL_SECONDS = 0.05
QUIET_PAIRS = 3
ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    """Do what the command line says."""
    options = parse()
    study = SMALL if options.small else FULL
    if options.command in ("run", "quiet") and options.data is None:
        study = replace(study, tasks=("geography",))
    if options.command == "corpus":
        from benchmarks.learning.bases import prepare_corpus

        prepare_corpus(options.books, options.out)
    elif options.command == "base":
        from benchmarks.learning.bases import make_base

        make_base(options.corpus, options.size, options.seconds, options.out)
    elif options.command == "report":
        from benchmarks.learning.report import write_report

        write_report(read_rows(options.rows), study, options.out)
    elif options.command == "quiet":
        run_quietly(study, options)
    else:
        run(study, options)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    corpus = commands.add_parser("corpus", help="tokenizer and tokens from a folder of books")
    corpus.add_argument("books", type=Path)
    corpus.add_argument("out", type=Path)
    base = commands.add_parser("base", help="pretrain one base")
    base.add_argument("corpus", type=Path)
    base.add_argument("size", help="10M or 20M")
    base.add_argument("out", type=Path)
    base.add_argument("--seconds", type=float, required=True)
    for name in ("run", "quiet", "report"):
        command = commands.add_parser(name)
        command.add_argument("rows", type=Path, metavar="ROWS.jsonl")
        if name == "report":
            command.add_argument("--out", type=Path, required=True)
            continue
        command.add_argument("--bases", type=Path, required=True, help="folder of the bases")
        command.add_argument("--data", type=Path, help="folder of the tasks' repositories")
        command.add_argument("--seconds", type=float, default=1e9)
        command.add_argument("--workers", type=int, default=1, help="trainings at the same time")
    parser.add_argument("--small", action="store_true", help="what make bench-learning runs")
    return parser.parse_args()


def run(study: Study, options: argparse.Namespace) -> None:
    """Run what is missing, `--workers` cells at the same time, and append each row as it ends."""
    end = time.monotonic() + options.seconds
    failed: set[Cell] = set()
    running: dict[Cell, AsyncResult[dict[str, Any]]] = {}
    with worker_pool(options.workers, prepares=True) as pool:
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
                if not append(options.rows, cell, running.pop(cell), options.workers):
                    failed.add(cell)
    done = len(read_rows(options.rows))
    print(f"{options.rows}: {done} rows, {len(failed)} failed", file=sys.stderr)


def run_quietly(study: Study, options: argparse.Namespace) -> None:
    """Time arms a and c in turns, one training at a time; the first of each only warms up.

    Each side has a process of its own, and nothing of ours prepares MLX in mlx_lm's.
    """
    end = time.monotonic() + options.seconds
    with worker_pool(1, prepares=False) as theirs, worker_pool(1, prepares=True) as ours:
        for cell in quiet_cells(study):
            if time.monotonic() > end:
                break
            pool = theirs if cell.arm in OF_MLX_LM else ours
            result = pool.apply_async(run_in_worker, (cell, study, options))
            result.wait(max(0.0, end - time.monotonic()))
            if result.ready():
                append(options.rows, cell, result, 1)


def quiet_cells(study: Study) -> Iterator[Cell]:
    """Pairs of arms a and c on the first task, at each size."""
    for size in study.sizes:
        for pair in range(QUIET_PAIRS):
            for arm in ("a", "c"):
                yield Cell(study.tasks[0], size, arm, 100 + pair)


def worker_pool(workers: int, *, prepares: bool) -> Any:
    """Processes that run cells; leaving the block ends them."""
    context = multiprocessing.get_context("spawn")
    return context.Pool(workers, prepare_worker, (prepares,))


def prepare_worker(prepares: bool) -> None:
    """Several trainings share one GPU here, and what they print is not wanted."""
    os.environ["NESTED_TUNE_DEVICE_LOCK"] = "off"
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if prepares:
        from nested_core.backend import hide_torch_from_transformers, prepare

        hide_torch_from_transformers()
        prepare()


def run_in_worker(cell: Cell, study: Study, options: argparse.Namespace) -> dict[str, Any]:
    """One cell, in a worker."""
    from benchmarks.learning.arms import run_cell

    return run_cell(cell, study, options.bases, options.data)


def append(rows: Path, cell: Cell, result: AsyncResult[dict[str, Any]], workers: int) -> bool:
    """Append the row of a cell; False where it failed, which is told and not recorded."""
    try:
        row = result.get()
    except Exception:  # any: the other cells go on
        print(f"{cell} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        return False
    rows.parent.mkdir(parents=True, exist_ok=True)
    with rows.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row | {"workers": workers}) + "\n")
    print(f"{row['seconds']:7.1f} s  {row['right_share']:.3f}  {cell}", file=sys.stderr, flush=True)
    return True


if __name__ == "__main__":
    main()
