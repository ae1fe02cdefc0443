"""Proof by volume: `python -m tests.reliability.soak --kills 1000 --queue 500`.

Each volume says its seed and its figures; those of the full runs are in benchmarks/faults.md.
Anything that does not hold ends the program with a traceback and the folder that shows it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name

# Before anything is imported: one core, and no hub.
os.environ |= {"OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}

from nested_core import backend  # noqa: E402
from nested_core.storage.user_tmpdir import environment_with_user_tmpdir  # noqa: E402

backend.prepare()

from tests.fork_server import forking_python  # noqa: E402

# What the commands import; loaded once, so that a forked process begins with its work.
IMPORTED = (
    "mlx_lm.utils",
    "mlx_lm.tuner.lora",
    "rich.table",
    "nested_core.pipeline.finetune",
    "nested_core.registry",
    "flows.cli",
    "flows.commands.demo",
    "flows.commands.training",
)


def main() -> None:
    """Run the volumes that are asked for, one after the other."""
    parser = argparse.ArgumentParser(description="proof by volume")
    parser.add_argument("--kills", type=int, default=0, metavar="N", help="processes to kill")
    parser.add_argument(
        "--replay-kills", type=int, default=0, metavar="N", help="nights with replay to kill"
    )
    parser.add_argument("--queue", type=int, default=0, metavar="N", help="runs to queue")
    parser.add_argument("--seed", type=int, default=0, help="of random moments")
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="nested-tune-soak-"))
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    print(f"seed {arguments.seed}, in {folder}", flush=True)
    if arguments.kills:
        soak = "tests.reliability.kills:KillSoak"
        _timed(lambda: run_kills(soak, folder / "kills", arguments.kills, arguments.seed))
    if arguments.replay_kills:
        replay, kills = "tests.reliability.kills:ReplayKillSoak", arguments.replay_kills
        _timed(lambda: run_kills(replay, folder / "replay", kills, arguments.seed))
    if arguments.queue:
        _timed(lambda: run_queue(arguments.queue))


def run_kills(soak_name: str, folder: Path, kills: int, seed: int) -> str:
    """Kill the commands of a KillSoak, named as `module:Class`, so often; return the figures."""
    for name in IMPORTED:
        import_module(name)
    sys.executable = forking_python()  # the gate of each forked command starts its process by it

    folder.mkdir()
    soak = resolve_name(soak_name)(folder, seed)
    soak.prepare()
    soak.run(kills)
    return str(soak.describe())


def run_queue(runs: int) -> str:
    """Queue runs for two workers on PostgreSQL, as `make soak` does; return the figures."""
    test = Path(__file__).parents[1] / "production" / "test_soak.py"
    subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "soak", "-s", "-q", str(test)],
        env=environment_with_user_tmpdir() | {"SOAK_RUNS": str(runs)},
        cwd=Path(__file__).parents[2],
        check=True,
    )
    return f"{runs} queued runs, none stuck, none promoted twice"


def _timed(volume: Callable[[], str]) -> None:
    began = time.monotonic()
    print(f"{volume()}; {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
