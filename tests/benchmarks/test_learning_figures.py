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
