"""The figures of RESULTS-2.md and README, computed from the rows without the report's code."""

from __future__ import annotations

import json
import math
import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEARNING = ROOT / "benchmarks" / "learning"
TASKS = ("banking77", "restaurant8k", "clinc150", "snips", "nl2bash", "e2e")
SEEDS = (1, 2)
T_OF_FIVE = 2.570582  # Student's t, 97.5 %, of six tasks
HALF_A_DIGIT = 0.0501  # points, where one digit is written


def right_percent(arm: str) -> dict[str, float]:
    """The right answers of an arm by task, in % of its questions, mean of the two seeds."""
    shares: dict[str, list[float]] = {task: [] for task in TASKS}
    for line in (LEARNING / "rows-2.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["arm"] == arm and row["seed"] in SEEDS:
            bits = int(row["right"], 16) >> (4 * len(row["right"]) - row["rows"])
            shares[row["task"]].append(100 * bits.bit_count() / row["rows"])
    assert all(len(values) in (1, len(SEEDS)) for values in shares.values())
    return {task: statistics.fmean(values) for task, values in shares.items()}


@pytest.mark.parametrize("arm", ["base", "a", "k", "c"])
def test_the_table_of_answers_is_that_of_the_rows(arm: str) -> None:
    page = (LEARNING / "RESULTS-2.md").read_text()
    (line,) = re.findall(rf"^\| {arm}(?: |:[^|]*)\|(.*)\|$", page, re.MULTILINE)
    written = [float(cell.strip(" *")) for cell in line.split("|")]
    of_tasks = list(right_percent(arm).values())
    assert written == pytest.approx([*of_tasks, statistics.fmean(of_tasks)], abs=HALF_A_DIGIT)


def test_the_difference_over_tasks_is_that_of_the_rows() -> None:
    page = (LEARNING / "RESULTS-2.md").read_text()
    told = re.search(r"c - k is (\+\S+) points\*\* .*?tasks (\S+) to (\+\S+)\)", page)
    assert told is not None
    c, k = right_percent("c"), right_percent("k")
    differences = [c[task] - k[task] for task in TASKS]
    mean = statistics.fmean(differences)
    half = T_OF_FIVE * statistics.stdev(differences) / math.sqrt(len(TASKS))
    written = [float(figure) for figure in told.groups()]
    assert written == pytest.approx([mean, mean - half, mean + half], abs=HALF_A_DIGIT)
    assert min(differences) > 0


def test_readme_names_the_arms_means_of_the_rows() -> None:
    readme = " ".join((ROOT / "README.md").read_text().split())
    told = re.search(
        r"`init` writes got ([\d.]+) % of six tasks' test questions right, `mlx_lm.lora` with the "
        r"same rate, mask, batch and schedule ([\d.]+) %, and as shipped ([\d.]+) %",
        readme,
    )
    assert told is not None
    means = [statistics.fmean(right_percent(arm).values()) for arm in "cka"]
    assert [float(figure) for figure in told.groups()] == pytest.approx(means, abs=HALF_A_DIGIT)


@pytest.mark.parametrize(("task", "goal"), [("banking77", 75), ("restaurant8k", 80)])
def test_the_time_to_an_accuracy_is_that_of_the_rows(task: str, goal: int) -> None:
    page = (LEARNING / "RESULTS-2.md").read_text()
    (line,) = re.findall(rf"^\| {goal} % of {task} \|(.*)\|$", page, re.MULTILINE)
    cells = [cell.strip(" *") for cell in line.split("|")]
    rows = map(json.loads, (LEARNING / "quiet-3.jsonl").read_text().splitlines())
    followed = {
        row["arm"]: row["on_the_way"] for row in rows if row["task"] == task and row["seed"] == 101
    }
    for arm, cell in zip(("c", "k", "a", "peft"), cells, strict=True):
        reached = [entry for entry in followed[arm] if 100 * entry[2] >= goal]
        if reached:
            seconds, joules, _ = reached[0]
            assert cell == f"{seconds:.1f} ({joules:,.0f})"
        else:
            seconds, _, share = followed[arm][-1]
            assert cell == f"never: {100 * share:.1f} % after {seconds:.1f} s"


def test_the_seconds_of_the_fourth_lease_are_those_of_the_rows() -> None:
    page = " ".join((LEARNING / "RESULTS-2.md").read_text().split())
    told = re.search(
        r"b6b88583\), banking77: c (\S+), (\S+); k (\S+), (\S+) \((\S+); joules (\S+)\)", page
    )
    assert told is not None
    rows = [json.loads(line) for line in (LEARNING / "quiet-3.jsonl").read_text().splitlines()]
    turns = {
        arm: [r for r in rows if (r["task"], r["arm"]) == ("banking77", arm) and r["seed"] > 100]
        for arm in "ck"
    }
    seconds = [row["seconds"] for arm in "ck" for row in turns[arm]]
    assert [float(figure.strip(";")) for figure in told.groups()[:4]] == pytest.approx(
        seconds, abs=HALF_A_DIGIT
    )
    for key, figure in (("seconds", told.group(5)), ("joules", told.group(6))):
        c, k = (statistics.median(row[key] for row in turns[arm]) for arm in "ck")
        assert float(figure) == pytest.approx(c / k, abs=0.0051)


def test_readme_names_the_time_to_an_accuracy_of_the_results() -> None:
    readme = " ".join((ROOT / "README.md").read_text().split())
    told = re.search(r"banking77 right after (\S+) s, under .*? after (\S+) s \(one run", readme)
    assert told is not None
    page = (LEARNING / "RESULTS-2.md").read_text()
    assert re.search(rf"banking77 \| \*\*{told.group(1)} \(.*?\| {told.group(2)} \(", page)


def test_the_final_averages_of_the_task_nights_are_those_of_the_rows() -> None:
    page = (LEARNING / "RESULTS-3.md").read_text()
    lines = (LEARNING / "stream-rates.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["seed"] == 1]
    table = re.findall(r"^\| `([a-z0-9-]+)`[^|]*\|(.*)\|$", page, re.MULTILINE)
    assert len(table) == 8
    for arm, line in table:
        written = [float(cell) for cell in line.split("|")[2:4]]
        for stream, figure in zip(("tasks", "tasks-reversed"), written, strict=True):
            (row,) = (r for r in rows if (r["arm"], r["task"]) == (arm, stream))
            assert figure == pytest.approx(100 * row["right_share"], abs=HALF_A_DIGIT)
