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
QUIET_SEED = 100  # and above: trainings that are timed
RATES = (3e-5, 1e-4, 3e-4, 1e-3)
ARMS = {
    "a": "mlx_lm.lora as shipped",
    "b": "mlx_lm.lora, all layers, best of four rates",
    "c": "`init` as written",
    "d": "ours, best of four rates",
    "e": "`sweep`, with the steps that the study allows it",
    "g-deep": "d in tiers [1, 2, 4], deep layers fast",
    "g-shallow": "d in tiers [1, 2, 4], shallow layers fast",
    "h": "b with the prompt masked",
    "k": "mlx_lm.lora with what `init` writes: rate, mask, batch, steps, warm-up and cosine",
    "c-256MB": "c, which keeps 256 MiB of freed buffers at most; timed alone",
    "c-512MB": "c, which keeps 512 MiB; timed alone",
    "c-long": "c with 5 epochs in place of 3",
    "c-long-answers": "c-long, the step chosen by answers",
    "c-long-32": "c-long with rank 32",
    "c-unclipped": "c without clipping",
    "c-2e-4": "c at the rate 2e-4",
    "c-3e-4-corrected": "c at the rate 3e-4, where Adam corrects its bias",
    "c-rehearsed-10": "c, 10 % of each batch what the base answered to prompts of no task",
    "c-rehearsed-30": "c, 30 % of each batch such answers",
    "k-2e-4": "k at the rate 2e-4",
    "k-3e-4": "k at the rate 3e-4",
    "k-3e-4-corrected": "k at the rate 3e-4, where Adam corrects its bias",
    "k-sorted": "k, its rows sorted by their tokens",
    "peft-uncorrected": "PEFT with the settings of k, where Adam does not correct its bias",
}
# Changes to arm k, in mlx_lm.lora's own keys
CORRECTED: Mapping[str, Any] = {"optimizer_config": {"adam": {"bias_correction": True}}}
LIKE_K: Mapping[str, Mapping[str, Any]] = {
    "k": {},
    "k-2e-4": {"learning_rate": 2e-4},
    "k-3e-4": {"learning_rate": 3e-4},
    "k-3e-4-corrected": {"learning_rate": 3e-4, **CORRECTED},
    "k-sorted": {},
}
OF_MLX_LM = ("a", "b", "h", *LIKE_K)
PEFT = "peft"  # the settings of arm k, timed alone on the GPU
UNCORRECTED = "peft-uncorrected"
WITH_LAST_STEP = ("c", "c-unclipped")  # where a study judges that of the same run too
REHEARSED: Mapping[str, float] = {"c-rehearsed-10": 0.1, "c-rehearsed-30": 0.3}
RATES_FROM = {"b": "b", "d": "d", "g-deep": "d", "g-shallow": "d", "h": "b"}
REAL_BASE = "SmolLM2-135M-Instruct"
LARGER_BASE = "Qwen2.5-Coder-0.5B-Instruct"
NO_ADAPTER = "base"  # the base itself, judged once a task
STREAM_ARMS = {
    "alone": "each night alone, from a fresh adapter",
    "joint": "all nights at once, with the newest answer of each prompt",
    "replay-0": "night after night, without replay",
    "replay-1": "with 1 % replay",
    "replay-5": "with 5 % replay",
    "replay-10": "with 10 % replay",
    "replay-30": "with 30 % replay",
}
SHARES = (10, 30, 100)  # % of the first night's rate, at which later nights go on
FRACTIONS = (0, 10, 30, 50, 80)  # % of a batch that is replayed
GOING_ON = "go-30-50"  # what `auto` does in a night that it does not rebuild
AUTO_NIGHTS = 3  # that fit into the window of `auto` and of `auto-go`
POLICY_ARMS = {
    "rebuild": "each night from the base on all nights so far, with as many steps as all of them",
    "auto": "rebuilt while that fits into the window, then also on a sample of earlier rows",
    "auto-go": "rebuilt while that fits into the window, then going on for good",
}
# PROTOCOL-4.md, block 5: what later nights are trained with, at a share of the rate in %
TIER_SHARES = (10, 30, 100, 200)
ENDS = ("deep", "shallow")  # that are fast, or the only ones trained
TIERED: Mapping[str, Mapping[str, Any]] = {
    "one": {},
    **{
        f"{fast}-{slow}": {"frequencies": [1, 4, 16], "fast": fast, "slow_gradients": slow}
        for fast, slow in product(ENDS, ("skip", "accumulate"))
    },
    **{
        f"{name}-{fast}": {"frequencies": [1, 1, 1], "fast": fast, "learning_rate_scale": scales}
        for (name, scales), fast in product(
            {"slower": [1, 1 / 4, 1 / 16], "frozen": [1, 0, 0]}.items(), ENDS
        )
    },
}
TIER_ARMS: Mapping[str, str] = {
    f"{name}-{share}": name
    for name, share in product(TIERED, TIER_SHARES)
    if not name.startswith("frozen") or share in (30, 100)
}
ENDED_ARMS = ("auto",)  # the room replay has the sample no more: in the rows, and not run again
RATE_ARMS = {
    "joint": STREAM_ARMS["joint"],
    "alone": STREAM_ARMS["alone"],
    **POLICY_ARMS,
    "rebuild-short": "rebuilt with the steps of one night",
    "all-30": "going on at 30 % of the rate on all nights so far, with the steps of one night",
    **{
        f"go-{share}-{fraction}": f"going on at {share} % of the rate with {fraction} % replay"
        for share, fraction in product(SHARES, FRACTIONS)
    },
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
class Stage:
    """Arms that are trained under some seeds, after the rates that they need have been chosen."""

    arms: tuple[str, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Study:
    """What is trained, stage by stage. `iterations` are mlx_lm's, of batches of 4.

    `sweep_runs` are the optimizer steps of arm e, in runs of `init`, and `sweeps_by_answers` says
    whether answers choose among three rates there, else the loss among what a sweep tries by
    itself. Of `streams` (stream_cells.py) `stream_arms` are trained, each under `stream_seeds`;
    `least_transfer` is the backward transfer that is asked of them. `judges_last_step` says whether
    the last step of some arms is judged beside the one that they offer, and `asks_each_seed` says
    whether the general instructions are answered under each seed, not one alone.
    """

    tasks: tuple[str, ...]
    sizes: tuple[str, ...]
    stages: tuple[Stage, ...]
    counts: Counts = field(default_factory=Counts)
    iterations: Mapping[str, int] = field(default_factory=dict)
    sweep_runs: float = float(len(RATES))
    sweeps_by_answers: bool = False
    quiet: tuple[Cell, ...] = ()
    streams: tuple[str, ...] = ()
    stream_arms: tuple[str, ...] = tuple(STREAM_ARMS)
    stream_seeds: tuple[int, ...] = ()
    least_transfer: float = -0.01
    judges_last_step: bool = False
    asks_each_seed: bool = False

    def cells(self, rows: Sequence[Row]) -> Iterator[Cell]:
        """Every cell that can run by now, in order: what comes last is dropped first."""
        for size in self.sizes:
            chosen = set[str]()
            for stage in self.stages:
                choosing = dict.fromkeys(RATES_FROM[arm] for arm in stage.arms if arm in RATES_FROM)
                for arm, task, rate in product(choosing.keys() - chosen, self.tasks, RATES):
                    yield Cell(task, size, arm, CHOOSING_SEED, rate)
                chosen |= choosing.keys()
                for seed in stage.seeds:
                    yield from self._judged(rows, size, stage.arms, seed)
        yield from self._stream_cells()

    def _stream_cells(self) -> Iterator[Cell]:
        for seed, size, stream, arm in product(
            self.stream_seeds, self.sizes, self.streams, self.stream_arms
        ):
            if arm not in ENDED_ARMS:
                yield Cell(stream, size, arm, seed)

    def _judged(
        self, rows: Sequence[Row], size: str, arms: Sequence[str], seed: int
    ) -> Iterator[Cell]:
        for arm, task in product(arms, self.tasks):
            rate = None
            if arm in RATES_FROM:
                rate = chosen_rate(rows, task, size, RATES_FROM[arm])
                if rate is None:
                    continue
            yield Cell(task, size, arm, seed, rate)


def quiet_pairs(
    tasks: Sequence[str], sizes: Sequence[str], arms: Sequence[str], rounds: int
) -> tuple[Cell, ...]:
    """Trainings to be timed one at a time, the arms in turns; the first round warms up."""
    cells = product(sizes, tasks, range(rounds), arms)
    return tuple(Cell(task, size, arm, QUIET_SEED + turn) for size, task, turn, arm in cells)


def quiet_cells(
    tasks: Sequence[str], arms: Sequence[str], turns: Sequence[int]
) -> tuple[Cell, ...]:
    """Trainings of the real base to be timed one at a time; turn 0 warms up."""
    cells = product(turns, tasks, arms)
    return tuple(Cell(task, REAL_BASE, arm, QUIET_SEED + turn) for turn, task, arm in cells)


FULL = Study(
    tasks=("clinc150", "banking77", "restaurant8k"),
    sizes=("10M", "20M"),
    stages=(
        Stage(tuple("abcd"), (1, 2, 3, 4, 5)),
        Stage(("e", "g-deep", "g-shallow", "h"), (1, 2, 3)),
    ),
    iterations=dict.fromkeys(("clinc150", "banking77", "restaurant8k"), 1000),
    quiet=quiet_pairs(("clinc150",), ("10M", "20M"), ("a", "c"), 3),
)
REAL_TASKS = ("banking77", "restaurant8k", "clinc150", "snips", "nl2bash", "e2e")
# PROTOCOL-2.md, on a model that people use
REAL = Study(
    tasks=REAL_TASKS,
    sizes=(REAL_BASE,),
    stages=(
        Stage((NO_ADAPTER,), (1,)),
        Stage(("a", "c", "k"), (1, 2)),
        Stage(("e",), (1, 2)),
        Stage(("c-long", "c-long-answers", "c-long-32"), (1, 2)),
        Stage(("b", "d", "h"), (1,)),
        Stage(("g-deep", "g-shallow"), (1, 2)),
        Stage(("c", "k"), (3, 4, 5)),
        Stage(("e", "c-long", "c-long-answers", "c-long-32"), (3, 4, 5)),
        Stage(("a", "b", "d", "h"), (2, 3, 4, 5)),
        Stage(("g-deep", "g-shallow"), (3, 4, 5)),
    ),
    counts=Counts(train=1336, choose=200, judge=1000),
    iterations=dict.fromkeys(REAL_TASKS, 1000),
    sweep_runs=1.75,  # fill the seconds of arm k, by quiet-3.jsonl
    sweeps_by_answers=True,
    quiet=(
        *quiet_cells(REAL_TASKS[:1], ("c", "k"), (0,)),
        *quiet_cells(REAL_TASKS[:2], ("c", "k", "a", PEFT), (1,)),
        *quiet_cells(REAL_TASKS[1:2], ("c-256MB", "c-512MB"), (1,)),
        *quiet_cells(REAL_TASKS[:2], ("c", "k"), (2, 3, 4, 5)),
    ),
)
# PROTOCOL-4.md: c taken apart, on questions that no study above has asked
APART_ARMS = (
    *("c", "c-unclipped", "k", "k-3e-4-corrected", "k-3e-4", "k-2e-4", "k-sorted"),
    UNCORRECTED,
)
APART = Study(
    tasks=REAL_TASKS,
    sizes=(REAL_BASE,),
    stages=(
        *(Stage(APART_ARMS, (seed,)) for seed in (1, 2, 3)),
        Stage(("c-2e-4", "c-3e-4-corrected"), (1, 2, 3)),
    ),
    counts=replace(REAL.counts, is_fresh=True),
    judges_last_step=True,
)
# PROTOCOL-4.md, block 2
REHEARSAL = Study(
    tasks=("banking77", "restaurant8k", "nl2bash"),
    sizes=(REAL_BASE,),
    stages=(*(Stage(("c", *REHEARSED), (seed,)) for seed in (1, 2, 3)), Stage((NO_ADAPTER,), (1,))),
    counts=APART.counts,
    asks_each_seed=True,
)
# PROTOCOL-4.md, block 4
LARGER = Study(
    tasks=("banking77", "clinc150", "snips", "nl2bash"),
    sizes=(LARGER_BASE,),
    stages=(
        Stage(("c", "k"), (1,)),
        Stage(("c", "k", "c-2e-4", "k-2e-4"), (CHOOSING_SEED,)),
        Stage(("c", "k"), (2, 3)),
        Stage(("c-2e-4", "k-2e-4"), (1, 2, 3)),
    ),
    counts=APART.counts,
)
# On the example's base, for two cores: its context is 64 tokens, so that longer rows are left out.
SMALL = Study(
    tasks=("geography", "clinc150"),
    sizes=("geography-base",),
    stages=(Stage(tuple("abcd"), (1, 2)), Stage(("e", "g-deep"), (1,))),
    counts=Counts(train=104, choose=50, judge=100, longest=80, answers=10),
    iterations={"geography": 200, "clinc150": 78},
    streams=("facts",),
    stream_arms=("joint", "replay-0", "replay-10"),
    stream_seeds=(1,),
)
STREAMS = Study(
    tasks=(),
    sizes=("geography-base",),
    stages=(),
    streams=("facts", "facts-reversed", "tasks", "tasks-reversed"),
    stream_seeds=(1, 2, 3, 4, 5),
)
# PROTOCOL-3.md, and its two streams on a model that people use
STREAM_RATES = replace(STREAMS, stream_arms=tuple(RATE_ARMS), least_transfer=-0.03)
STREAM_INTENTS = replace(
    STREAM_RATES,
    sizes=(REAL_BASE,),
    streams=("intents",),
    stream_arms=("joint", *POLICY_ARMS, GOING_ON, "go-100-50"),
    stream_seeds=(1, 2, 3),
)
STREAM_FOUR = replace(
    STREAM_INTENTS,
    streams=("four",),
    stream_arms=("joint", "rebuild", "auto", GOING_ON, "go-100-50"),
)
# PROTOCOL-4.md, block 3
STREAM_NIGHTS = replace(
    STREAM_INTENTS, streams=("intents", "four", "facts"), stream_arms=(GOING_ON, "go-100-50")
)
# PROTOCOL-4.md, block 5
STREAM_TIERS = replace(STREAMS, stream_arms=tuple(TIER_ARMS), stream_seeds=(1, 2, 3))
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
    """The share of earlier rows in an arm of a stream; None where none is replayed."""
    name, *percents = arm.split("-")
    return int(percents[-1]) / 100 if name in ("replay", "go") else None


def rate_share(arm: str) -> float:
    """The rate at which an arm of a stream goes on, as a share of the first night's."""
    name, *percents = arm.split("-")
    if arm in TIER_ARMS:
        return int(percents[-1]) / 100
    return int(percents[0]) / 100 if name in ("go", "all") else 1.0
