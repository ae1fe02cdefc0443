"""`python -m benchmarks.learning run ROWS.jsonl`: every cell that is not in the file is appended.

`corpus` and `base` make the base models, `report` writes tables and plots of the rows there are.
PROTOCOL.md says what is run and what decides; a call ends within `--seconds`, the next goes on.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from benchmarks.learning.study import (
    APART,
    FULL,
    LARGER,
    REAL,
    REHEARSAL,
    SMALL,
    STREAM_FOUR,
    STREAM_INTENTS,
    STREAM_NIGHTS,
    STREAM_RATES,
    STREAM_TIERS,
    STREAMS,
    STREAMS_20M,
    Study,
    read_rows,
)

STUDIES: dict[str, Study] = {
    "apart": APART,
    "full": FULL,
    "larger": LARGER,
    "real": REAL,
    "rehearsal": REHEARSAL,
    "small": SMALL,
    "streams": STREAMS,
    "streams-20M": STREAMS_20M,
    "stream-rates": STREAM_RATES,
    "stream-intents": STREAM_INTENTS,
    "stream-four": STREAM_FOUR,
    "stream-nights": STREAM_NIGHTS,
    "stream-tiers": STREAM_TIERS,
}


def main() -> None:
    """Do what the command line says."""
    options = parse()
    study = STUDIES[options.study]
    if study.tasks and options.command in ("run", "quiet") and options.data is None:
        study = replace(study, tasks=("geography",))
    if getattr(options, "seeds", None):
        study = replace(study, stream_seeds=tuple(options.seeds))
    if getattr(options, "tasks", None):
        study = replace(study, tasks=tuple(options.tasks))
    if options.command == "corpus":
        from benchmarks.learning.bases import prepare_corpus

        prepare_corpus(options.books, options.out)
    elif options.command == "base":
        from benchmarks.learning.bases import make_base

        make_base(options.corpus, options.size, options.seconds, options.out)
    elif options.command == "general":
        from benchmarks.learning.general import write_general
        from benchmarks.learning.rehearsal import write_rehearsal

        write_general(options.books, options.data, options.base)
        write_rehearsal(options.base)
    elif options.command == "report":
        from benchmarks.learning.report import write_report
        from benchmarks.learning.stream_report import write_stream_report

        quiet = read_rows(options.quiet) if options.quiet else []
        if study.tasks:
            write_report(read_rows(options.rows), quiet, study, options.out)
        if study.streams:
            write_stream_report(read_rows(options.rows), study, options.out, options.data)
    else:
        from benchmarks.learning import driver

        {"run": driver.run, "quiet": driver.run_quietly}[options.command](study, options)


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
    general = commands.add_parser("general", help="general text, instructions and rows to rehearse")
    general.add_argument("books", type=Path)
    general.add_argument("data", type=Path, help="folder of the tasks' repositories")
    general.add_argument("base", type=Path, help="the base's folder, which they are written into")
    for name in ("run", "quiet", "report"):
        command = commands.add_parser(name)
        command.add_argument("rows", type=Path, metavar="ROWS.jsonl")
        command.add_argument("--data", type=Path, help="folder of the tasks' repositories")
        if name == "report":
            command.add_argument("--quiet", type=Path, help="rows of the command quiet")
            command.add_argument("--out", type=Path, required=True)
            continue
        command.add_argument("--bases", type=Path, required=True, help="folder of the bases")
        command.add_argument("--seconds", type=float, default=1e9)
        command.add_argument("--workers", type=int, default=1, help="trainings at the same time")
        command.add_argument("--seeds", type=int, nargs="+", help="of streams, alone: one a GPU")
        command.add_argument("--tasks", nargs="+", help="of a study, alone: some a GPU")
    parser.add_argument("--study", choices=STUDIES, default="full")
    return parser.parse_args()


if __name__ == "__main__":
    main()
