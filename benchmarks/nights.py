"""Known trainings, and what the gate says of them and `promote: better` does with them.

    python -m benchmarks.nights [--json]
    python -m benchmarks.nights --replay 60
    python -m benchmarks.nights --unattended 30 --folder FOLDER --rows unattended.jsonl

Runs the example, the first hour's two trainings, the runs of the shipped deployments and five
nights of continuing, and plants a few sets of losses. benchmarks/nights.md has what it said at
commit 95bc16c beside what it says now. With --replay so many nights of two adapters are played in
fast motion on a Prefect server with PostgreSQL: what trains, what is told, and what is left on disk
and in the database. With --unattended an adapter learns new facts every night, while processes are
killed, the server is away and files are cut short (tests/production/unattended_nights.py). FOLDER
keeps the stack: the same command goes on after the last row.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nested_core.config.sections import GateSection
from nested_core.measure.losses.loss_figures import harm_reasons, loss_reasons, summarise_losses
from nested_core.records.losses import ExampleLosses
from tests.reliability.test_nightly_series import NIGHTS, run_nights

EXAMPLE = "examples/geography.yaml"
DEPLOYED = "deployments/geography.yaml"
SECOND = (
    *("--training.epochs", "18", "--learning-rate", "1e-3", "--lora-parameters.scale", "2"),
    *("--steps-per-eval", "10", "--steps-per-report", "10", "--save-every", "10"),
)
SWEEP = [(rate, fast) for rate in ("1e-3", "3e-4") for fast in ("shallow", "deep")]
FROM_CHAMPION = ("--continual.from", "champion")
PLANTED = {
    "4 examples, all by +0.01": [0.01] * 4,
    "5 examples, all by about +1.5": [1.3, 1.4, 1.5, 1.6, 1.7],
    "5 examples, one by +7.5": [0.0, 0.0, 0.0, 0.0, 7.5],
    "10 examples, 3 by +5 nats": [5.0] * 3 + [0.0] * 7,
    "30 examples, 3 by +7 nats": [7.0] * 3 + [0.0] * 27,
    "30 examples, 3 by +3 nats": [3.0] * 3 + [0.0] * 27,
    "30 examples, 4 by +3 nats": [3.0] * 4 + [0.0] * 26,
    "84 examples, all by about -0.1": list(np.linspace(-0.4, 0.2, 84)),
}


@dataclass(frozen=True)
class Judged:
    """What the gate said of one training, and what came of it.

    `against` is what `difference` is from: the adapter that it began from, or the champion.
    """

    night: str
    against: str
    difference: float | None
    interval: Sequence[float] | None
    corrected: Sequence[float] | None
    word: str | None
    outcome: str


def describe_outcome(gate: dict[str, Any], promotion: str | None) -> str:
    """`refused: loss_regressed`, or `passed, ` and what became of it; None: nothing was asked."""
    if gate["verdict"] == "failed":
        return "refused: " + ", ".join(sorted({reason["code"] for reason in gate["reasons"]}))
    if promotion is None:
        return "passed"
    if promotion in ("promoted", "already_champion"):
        return f"passed, {promotion.replace('_', ' ')}"
    return "passed, champion kept" if gate["champion"] else "passed, not promoted"


def read_judged(night: str, gate: dict[str, Any], promotion: str | None) -> Judged:
    """From the content of gate.json."""
    compared = gate["champion"] or gate["validation"] or {}
    return Judged(
        night,
        "the champion" if gate["champion"] else "its start",
        compared.get("difference"),
        compared.get("interval"),
        compared.get("corrected_interval"),
        compared.get("conclusion"),
        describe_outcome(gate, promotion),
    )


def train(night: str, folder: Path, name: str, *arguments: str) -> Judged:
    """Train by the command line into a registry, under `promote: better`; it may be rejected."""
    run = folder / night.replace(" ", "-").replace("/", "-").replace(",", "")
    registry = ("--registry.path", str(folder / "registry"), "--registry.name", name)
    command = ("train", *arguments, "--run-dir", str(run), *registry)
    said = json.loads(call(*command, "--registry.promote", "better", "--json") or "{}")
    if said.get("skipped"):
        return Judged(night, "the champion", None, None, None, None, "skipped: unchanged data")
    gate = json.loads((run / "gate.json").read_text())
    return read_judged(night, gate, said.get("promotion") or "")


def call(*arguments: str) -> str:
    """The standard output of a command; 0 and 4 are what a gate may end with."""
    command = [sys.executable, "-m", "flows.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 4):
        raise SystemExit(f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stderr}")
    return done.stdout


def list_trainings(folder: Path) -> Iterator[Judged]:
    """The example, the first hour, and what the shipped deployments run."""
    yield train("the example (make demo)", folder, "example", "-c", EXAMPLE)
    config = str(folder / "lora.yaml")
    model = ("--data", "examples/geography", "--model", "examples/geography-base")
    call("init", *model, "-o", config)
    yield train("first hour, step 4", folder, "hour", "-c", config)
    yield train("first hour, step 5", folder, "hour", "-c", config, *SECOND)
    deployed = ("-c", DEPLOYED)
    yield train("nightly, the first night", folder, "nights", *deployed, *FROM_CHAMPION)
    yield train("nightly, the same data once more", folder, "nights", *deployed, *FROM_CHAMPION)
    yield train("manual, another seed", folder, "nights", *deployed, "--seed", "1")
    for rate, fast in SWEEP:
        point = ("--learning-rate", rate, "--nested.fast", fast)
        yield train(f"sweep, {rate} {fast}", folder, "nights", *deployed, *point)


def list_nights(folder: Path) -> Iterator[Judged]:
    """Five nights of continuing, each with new training and held-out data."""
    for number, night in enumerate(run_nights(folder, NIGHTS), 1):
        gate = json.loads(night.result.run.gate.read_bytes())
        yield read_judged(
            f"continuing, night {number} of {NIGHTS}", gate, str(night.result.promotion)
        )


def list_planted() -> Iterator[Judged]:
    """Sets of losses with a mean of 1 nat a token before."""
    bounds = GateSection()
    for night, differences in PLANTED.items():
        count = len(differences)
        before = np.ones(count)
        after = before + np.array(differences)
        tokens = np.full(count, 20.0)
        losses = ExampleLosses("test.jsonl", np.arange(1, count + 1), tokens, before, after)
        validation = summarise_losses(losses, selected_on_same_data=False, bounds=bounds)
        reasons = loss_reasons(validation, bounds) + harm_reasons(losses, validation, bounds)
        gate = {
            "verdict": "failed" if reasons else "passed",
            "reasons": [asdict(reason) for reason in reasons],
            "champion": None,
            "validation": asdict(validation),
        }
        yield read_judged(night, gate, None)


def main() -> None:
    """Print a line, or with --json an object, for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--replay", type=int, metavar="NIGHTS")
    parser.add_argument("--unattended", type=int, metavar="NIGHTS")
    parser.add_argument("--folder", type=Path, help="of --unattended: where its stack lies")
    parser.add_argument("--rows", type=Path, help="of --unattended: a row of JSON for each night")
    arguments = parser.parse_args()
    if arguments.unattended is not None:
        if arguments.folder is None or arguments.rows is None:
            parser.error("--unattended needs --folder and --rows")
        play_unattended(arguments.unattended, arguments.folder.resolve(), arguments.rows.resolve())
        return
    if arguments.replay is not None:
        print_replay(arguments.replay)
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for part in (list_planted(), list_trainings(Path(folder)), list_nights(Path(folder))):
            for judged in part:
                rows.append(judged)
                print(judged, file=sys.stderr, flush=True)
    if arguments.json:
        print(json.dumps({"rows": [asdict(row) for row in rows]}))
    else:
        print_table(rows)


def print_table(rows: Sequence[Judged]) -> None:
    """As Markdown."""
    print("| night | difference, 95 % interval | word, outcome |\n|---|---|---|")
    for row in rows:
        ends = row.interval
        figures = "none" if row.difference is None else f"{row.difference:+.3f}"
        figures += "" if ends is None else f", {ends[0]:+.3f} to {ends[1]:+.3f}"
        if row.corrected is not None:
            figures += f" (corrected: {row.corrected[0]:+.3f} to {row.corrected[1]:+.3f})"
        word = "" if row.word is None else f"`{row.word}`, "
        print(f"| {row.night} | {figures} | {word}{row.outcome} |")


MEASURED_EVERY = 20


def print_replay(nights: int) -> None:
    """Play the nights, and print what was seen as Markdown."""
    from tests.production.postgresql import Cluster, find_binaries
    from tests.production.replayed_nights import ReplayStack, replay
    from tests.webhook_server import serving_webhook

    binaries = find_binaries()
    if binaries is None:
        raise SystemExit("PostgreSQL is not installed: apt-get install postgresql")
    with tempfile.TemporaryDirectory() as folder, serving_webhook() as webhook:
        stack = ReplayStack(Path(folder), Cluster(binaries))
        try:
            stack.start("--notify", webhook.url)
            seen = replay(stack, webhook, nights, MEASURED_EVERY)
        finally:
            stack.stop()
    print(
        "| night | flow runs | state | s trained in all | message of one |\n|---|---|---|---|---|"
    )
    kinds: dict[tuple[str, str], list[Any]] = {}
    for night in seen.nights:
        kinds.setdefault((night.kind, night.state), []).append(night)
    for (kind, state), played in kinds.items():
        trained = sum(night.trained_seconds for night in played)
        message = played[0].message.replace("|", "\\|")
        print(f"| {kind} | {len(played)} | {state} | {trained:.1f} | {message} |")
    print("\n| flow | state | rows |\n|---|---|---|")
    for (flow, state), count in sorted(seen.rows.items()):
        print(f"| {flow} | {state} | {count} |")
    print(f"\nalerts: {dict(Counter(text.partition(':')[0] for text in seen.alerts))}\n")
    print("| nights | runs, kB | registry, kB | cache, kB | rows in the database | its kB |")
    print("|---|---|---|---|---|---|")
    for sizes in seen.sizes:
        disk = (sizes.runs, sizes.registry, sizes.cache)
        cells = [*(f"{size / 1000:,.0f}" for size in disk), f"{sum(sizes.rows.values()):,}"]
        print(f"| {sizes.nights} | {' | '.join(cells)} | {sizes.database / 1000:,.0f} |")
    print("\n" + "\n".join(seen.housekeeping))


def play_unattended(nights: int, folder: Path, rows: Path) -> None:
    """Play the nights that are left, and compare the last champion with joint training."""
    from tests.production.postgresql import Cluster, find_binaries
    from tests.production.unattended_nights import (
        UnattendedStack,
        judge,
        plan_nights,
        play,
        questions_after,
        train_jointly,
    )
    from tests.webhook_server import serving_webhook

    binaries = find_binaries()
    if binaries is None:
        raise SystemExit("PostgreSQL is not installed: apt-get install postgresql")
    folder.mkdir(parents=True, exist_ok=True)
    planned = plan_nights(nights)
    with serving_webhook() as webhook:
        stack = UnattendedStack.open(folder, lambda: Cluster(binaries), rows)
        try:
            stack.begin(webhook.url)
            for night in play(stack, webhook, nights):
                print(f"night {night.number}: {night.state}: {night.message}", flush=True)
        finally:
            stack.stop(keeps_database=True)
    questions = questions_after(planned)
    right, count = judge(stack.champion_folder(), questions)
    joint, _ = judge(train_jointly(stack, planned), questions)
    print(f"champion {right:.1%}, joint training {joint:.1%}, of {count} questions")


if __name__ == "__main__":
    main()
