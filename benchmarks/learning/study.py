"""Which trainings the study has, in which order, and which rates its own rows have chosen."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.learning.tasks import Counts

Row = Mapping[str, Any]
CHOOSING_SEED = 0
RATES = (3e-5, 1e-4, 3e-4, 1e-3)
ARMS = {
    "a": "mlx_lm.lora as shipped",
    "b": "mlx_lm.lora, all layers, best of four rates",
    "c": "`init` as written",
    "d": "ours, best of four rates",
    "e": "`sweep` with the examples of four trainings",
    "g-deep": "d in tiers [1, 2, 4], deep layers fast",
    "g-shallow": "d in tiers [1, 2, 4], shallow layers fast",
    "h": "b with the prompt masked",
}
OF_MLX_LM = ("a", "b", "h")
RATES_FROM = {"b": "b", "d": "d", "g-deep": "d", "g-shallow": "d", "h": "b"}
STREAM_ARMS = {
    "alone": "each night alone, from a fresh adapter",
    "joint": "all nights at once, with the newest answer of each prompt",
    "replay-0": "night after night, without replay",
    "replay-1": "with 1 % replay",
    "replay-5": "with 5 % replay",
    "replay-10": "with 10 % replay",
    "replay-30": "with 30 % replay",
}


@dataclass(frozen=True)
class Cell:
    """One training and its judgement; `rate` is None where the arm brings its own."""

    task: str
    size: str
    arm: str
    seed: int
    rate: float | None = None


@dataclass(frozen=True)
class Study:
    """What is trained. `iterations` are mlx_lm's, of batches of 4; seeds are of arms a to d.

    Of `streams` (stream_cells.py) `stream_arms` are trained, each under `stream_seeds`.
    """

    tasks: tuple[str, ...]
    sizes: tuple[str, ...]
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    later_seeds: tuple[int, ...]
    counts: Counts = field(default_factory=Counts)
    iterations: Mapping[str, int] = field(default_factory=dict)
    streams: tuple[str, ...] = ()
    stream_arms: tuple[str, ...] = tuple(STREAM_ARMS)
    stream_seeds: tuple[int, ...] = ()

    def cells(self, rows: Sequence[Row]) -> Iterator[Cell]:
        """Every cell that can run by now, in order: what comes last is dropped first."""
        main = [arm for arm in "abcd" if arm in self.arms]
        for size in self.sizes:
            for arm in (arm for arm in main if RATES_FROM.get(arm) == arm):
                for task in self.tasks:
                    for rate in RATES:
                        yield Cell(task, size, arm, CHOOSING_SEED, rate)
            for seed in self.seeds:
                yield from self._judged(rows, size, main, seed)
        for arm in (arm for arm in self.arms if arm not in main):
            for size in self.sizes:
                for seed in self.later_seeds:
                    yield from self._judged(rows, size, [arm], seed)
        yield from self._stream_cells()

    def _stream_cells(self) -> Iterator[Cell]:
        for kind in dict.fromkeys(map(kind_of, self.streams)):
            names = [name for name in self.streams if kind_of(name) == kind]
            for seed, size, stream, arm in product(
                self.stream_seeds, self.sizes, names, self.stream_arms
            ):
                yield Cell(stream, size, arm, seed)

    def _judged(
        self, rows: Sequence[Row], size: str, arms: Sequence[str], seed: int
    ) -> Iterator[Cell]:
        for arm in arms:
            for task in self.tasks:
                rate = None
                if arm in RATES_FROM:
                    rate = chosen_rate(rows, task, size, RATES_FROM[arm])
                    if rate is None:
                        continue
                yield Cell(task, size, arm, seed, rate)


FULL = Study(
    tasks=("clinc150", "banking77", "restaurant8k"),
    sizes=("10M", "20M"),
    arms=("a", "b", "c", "d", "e", "g-deep", "g-shallow", "h"),
    seeds=(1, 2, 3, 4, 5),
    later_seeds=(1, 2, 3),
    iterations=dict.fromkeys(("clinc150", "banking77", "restaurant8k"), 1000),
)
# On the example's base, for two cores: its context is 64 tokens, so that longer rows are left out.
SMALL = Study(
    tasks=("geography", "clinc150"),
    sizes=("geography-base",),
    arms=("a", "b", "c", "d", "e", "g-deep"),
    seeds=(1, 2),
    later_seeds=(1,),
    counts=Counts(train=104, choose=50, judge=100, longest=80, answers=10),
    iterations={"geography": 200, "clinc150": 78},
    streams=("facts",),
    stream_arms=("joint", "replay-0", "replay-10"),
    stream_seeds=(1,),
)
STREAMS = Study(
    tasks=(),
    sizes=("geography-base",),
    arms=(),
    seeds=(),
    later_seeds=(),
    streams=("facts", "facts-reversed", "tasks", "tasks-reversed"),
    stream_seeds=(1, 2, 3, 4, 5),
)
# The second size, on a GPU
STREAMS_20M = replace(
    STREAMS,
    sizes=("20M",),
    streams=("facts", "facts-reversed"),
    stream_arms=tuple(arm for arm in STREAM_ARMS if arm != "replay-1"),
    stream_seeds=(1, 2, 3),
)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, without a last line that was cut off; none where there is no file."""
    if not path.exists():
        return []
    whole = [line for line in path.read_bytes().split(b"\n")[:-1] if line]
    return [json.loads(line) for line in whole]


def cell_of(row: Row) -> Cell:
    """The cell that a row is the result of."""
    return Cell(*(row[name] for name in asdict(Cell("", "", "", 0))))


def chosen_rate(rows: Sequence[Row], task: str, size: str, arm: str) -> float | None:
    """The rate with most right answers on the rows that choose, then the lowest loss.

    None until every rate has been tried.
    """
    tried = {
        row["rate"]: (-row["right_share"], row["loss"])
        for row in rows
        if (row["task"], row["size"], row["arm"]) == (task, size, arm)
        and row["seed"] == CHOOSING_SEED
    }
    return min(tried, key=lambda rate: tried[rate]) if len(tried) == len(RATES) else None


def kind_of(stream: str) -> str:
    """`facts` or `tasks`, whatever the order of the nights."""
    return stream.partition("-")[0]


def replay_fraction(arm: str) -> float | None:
    """The share of earlier rows in an arm of a stream; None where nothing goes on."""
    name, _, percent = arm.partition("-")
    return int(percent) / 100 if name == "replay" else None
