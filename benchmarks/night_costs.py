"""What a night costs by policy, over thirty nights: rebuilt, gone on with, and auto with a window.

    python -m benchmarks.night_costs --folder FOLDER --rows benchmarks/night-costs.jsonl
    python -m benchmarks.night_costs --rows benchmarks/night-costs.jsonl --plot docs/images

Whole nights of the example's model, from the check of the data to the promotion, with their gate,
in one process. Each night has as many new rows. Seconds are the processor's, of this process and
those that it starts: others use the machine. A row of JSON is written after each night, and the
same command goes on behind the last.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from nested_core import backend

backend.prepare()
backend.hide_torch_from_transformers()

from benchmarks.learning.streams import OWNERS, list_words  # noqa: E402
from nested_core.config.loading import parse_config  # noqa: E402
from nested_core.pipeline.finetune import finetune  # noqa: E402
from nested_core.records.start import START_FILE  # noqa: E402
from nested_core.records.verdict_file import read_verdict  # noqa: E402
from nested_core.storage.atomic import write_bytes  # noqa: E402
from nested_core.storage.run_directory import open_run  # noqa: E402
from nested_core.text.svg_chart import STANDALONE, Chart, Curve, Point, draw_chart  # noqa: E402

NIGHTS, TRAIN, HELD_OUT = 30, 24, 6
POLICIES = ("rebuild", "continue", "auto")
WINDOW = "5m"
MODEL = Path(__file__).resolve().parents[1] / "examples" / "geography-base"
SETTINGS: dict[str, Any] = {
    "model": str(MODEL),
    "num_layers": -1,
    "lora_parameters": {"rank": 8, "alpha": 160},
    "learning_rate": 2.5e-4,
    "mask_prompt": True,
    "batch_size": 8,
    "training": {"epochs": 6, "warmup_steps": 0.05, "decay": "cosine", "max_grad_norm": 1.0},
    "val_batches": -1,
    "steps_per_report": 0.25,
    "steps_per_eval": 0.25,
    "save_every": 0.25,
}


@dataclass(frozen=True)
class NightCost:
    """A night: what the policy began from, and its seconds.

    policy: as configured; began: `rebuild` or `continue`; ancestors, ancestor_rows: how many
    earlier nights the gate asked, with how many rows.
    """

    policy: str
    night: int
    began: str
    reason: str
    processor_seconds: float
    seconds: float
    ancestors: int
    ancestor_rows: int


def write_night(folder: Path, night: int) -> None:
    """Rows that no other night has: who has two things."""
    chance = Random(night)
    words = list_words()
    pairs = {(chance.choice(words), chance.choice(words)) for _ in range(2 * (TRAIN + HELD_OUT))}
    rows = [
        {"prompt": f"Who has {a} and {b}?", "completion": f"Ask {OWNERS[hash_of(a, b)]}."}
        for a, b in sorted(pairs)
    ]
    for split, some in {"train": rows[:TRAIN], "valid": rows[TRAIN : TRAIN + HELD_OUT]}.items():
        text = "".join(f"{json.dumps(row)}\n" for row in some)
        write_bytes(folder / f"{split}.jsonl", text.encode())


def hash_of(one: str, other: str) -> int:
    """A number of an owner."""
    return sum(map(ord, one + other)) % len(OWNERS)


def processor_seconds() -> float:
    """Of this process, and of those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def play(folder: Path, known: list[NightCost], nights: int) -> Iterator[NightCost]:
    """The nights that are left, policy by policy in each night."""
    done = {(cost.policy, cost.night) for cost in known}
    for night in range(1, nights + 1):
        for policy in POLICIES:
            if (policy, night) not in done:
                yield _play(folder / policy, policy, night)


def _play(folder: Path, policy: str, night: int) -> NightCost:
    data = folder / f"data-{night}"
    data.mkdir(parents=True, exist_ok=True)
    write_night(data, night)
    continual = {"from": "champion", "policy": policy, "window": WINDOW}
    settings = SETTINGS | {
        "data": str(data),
        "registry": {"path": str(folder / "registry"), "name": "facts", "promote": "always"},
        "continual": continual | {"replay": {"fraction": 0.5}},
        "gate": {"max_val_loss_increase": 10.0, "max_harmed_share": 1.0},  # each is a champion
    }
    began, used = time.monotonic(), processor_seconds()
    run = open_run(folder / f"run-{night}", resume=False)
    finetune(parse_config(settings, source="night"), run, progress=False)
    start = START_FILE.read(run.start)
    asked = [each for each in read_verdict(run.gate).ancestors if each.examples]
    return NightCost(
        policy,
        night,
        "rebuild" if start.champion is None else start.choice.policy,
        start.choice.reason,
        round(processor_seconds() - used, 2),
        round(time.monotonic() - began, 2),
        len(asked),
        sum(each.examples for each in asked),
    )


def draw(costs: list[NightCost]) -> str:
    """A curve for each policy."""
    curves = [
        Curve(
            f"auto, window {WINDOW}" if policy == "auto" else policy,
            [Point(c.night, c.processor_seconds) for c in costs if c.policy == policy],
        )
        for policy in POLICIES
    ]
    title = "What a night costs, by policy"
    chart = Chart(title, "night", "processor seconds", curves, from_zero=True)
    return f"{draw_chart(chart, STANDALONE)}\n"


def main() -> None:
    """Play the nights that are left, or draw those that there are."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nights", type=int, default=NIGHTS)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--folder", type=Path, help="where runs and registries lie")
    parser.add_argument("--plot", type=Path, help="draw night-costs.svg into this folder")
    arguments = parser.parse_args()
    lines = arguments.rows.read_text().splitlines() if arguments.rows.exists() else []
    costs = [NightCost(**json.loads(line)) for line in lines]
    if arguments.folder is not None:
        for cost in play(arguments.folder, costs, arguments.nights):
            print(cost, flush=True)
            with arguments.rows.open("a") as rows:
                rows.write(json.dumps(asdict(cost)) + "\n")
            costs.append(cost)
    if arguments.plot is not None:
        (arguments.plot / "night-costs.svg").write_text(draw(costs))


if __name__ == "__main__":
    main()
