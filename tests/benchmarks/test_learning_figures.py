"""The figures of three pages of results, from the rows and without the report's code."""

from __future__ import annotations

import itertools
import json
import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.learning.streams import read_stream

ROOT = Path(__file__).resolve().parents[2]
LEARNING = ROOT / "benchmarks" / "learning"
TASKS = ("banking77", "restaurant8k", "clinc150", "snips", "nl2bash", "e2e")
SEEDS = (1, 2)
WARM_UP = ("banking77", 100)  # task and seed of the first turn of a lease
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


def test_the_bold_arm_has_the_most_right_answers_of_each_task() -> None:
    c, k = right_percent("c"), right_percent("k")
    assert min(c[task] - k[task] for task in TASKS) > 0


@pytest.mark.parametrize(("task", "goal"), [("banking77", 75), ("restaurant8k", 80)])
def test_the_time_to_an_accuracy_is_that_of_the_rows(task: str, goal: int) -> None:
    page = (LEARNING / "RESULTS-2.md").read_text()
    (line,) = re.findall(rf"^\| {goal} % of {task} \|(.*)\|$", page, re.MULTILINE)
    cells = [cell.strip(" *") for cell in line.split("|")]
    rows = map(json.loads, (LEARNING / "quiet-3.jsonl").read_text().splitlines())
    followed = {
        row["arm"]: row["on_the_way"] for row in rows if row["task"] == task and row["seed"] == 101
    }
    for arm, cell in zip(("c", "k", "a"), cells, strict=True):
        reached = [entry for entry in followed[arm] if 100 * entry[2] >= goal]
        if reached:
            seconds, joules, _ = reached[0]
            assert cell == f"{seconds:.1f} ({joules:,.0f})"
        else:
            seconds, _, share = followed[arm][-1]
            assert cell == f"never: {100 * share:.1f} % after {seconds:.1f} s"


@pytest.mark.parametrize(
    ("file", "cell"),
    [
        ("quiet-2.jsonl", r"third lease, one GPU \| (\S+) \((\S+)\), 3 and 2 \|"),
        ("quiet-3.jsonl", r"b6b88583 \| (\S+) \((\S+)\), 2 \| (\S+) \((\S+)\), 1;"),
        ("quiet-4.jsonl", r"9c210666 \| (\S+) \((\S+)\), 4 \| (\S+) \((\S+)\), 4 \|"),
        ("quiet-5.jsonl", r"955b4587 \| (\S+) \((\S+)\), 4 and 3 \| (\S+) \((\S+)\), 5, "),
    ],
)
def test_the_share_of_seconds_and_joules_is_that_of_the_turns(file: str, cell: str) -> None:
    told = re.search(cell, (LEARNING / "RESULTS-2.md").read_text())
    assert told is not None
    rows = [json.loads(line) for line in (LEARNING / file).read_text().splitlines()]
    shares = []
    for task, key in itertools.product(("banking77", "restaurant8k"), ("seconds", "joules")):
        turns = [row for row in rows if row["task"] == task and (task, row["seed"]) != WARM_UP]
        c, k = ([row[key] for row in turns if row["arm"] == arm] for arm in "ck")
        if c:
            shares.append(statistics.median(c) / statistics.median(k))
    assert [float(figure) for figure in told.groups()] == pytest.approx(shares, abs=0.0051)


def test_the_mean_ratio_of_each_lease_is_that_of_its_pairs() -> None:
    by_lease = []
    for number in (2, 3, 4, 5):
        rows = map(json.loads, (LEARNING / f"quiet-{number}.jsonl").read_text().splitlines())
        seconds = {(row["task"], row["seed"], row["arm"]): row["seconds"] for row in rows}
        turns = {turn[:2] for turn in seconds} - {WARM_UP}
        pairs = [[seconds.get((*turn, arm)) for arm in "ck"] for turn in sorted(turns)]
        by_lease.append([c / k for c, k in pairs if c and k])
    ratios = list(itertools.chain(*by_lease))
    pattern = (
        r"Over all (\d+) other pairs the geometric mean is (\S+) \(range (\S+) to (\S+)\),"
        r" by lease (\S+), (\S+), (\S+) and \*\*(\S+) at the newest"
    )
    told = re.search(pattern, " ".join((LEARNING / "RESULTS-2.md").read_text().split()))
    assert told is not None
    number_of_pairs, *figures = map(float, told.groups())
    means = [statistics.geometric_mean(each) for each in (ratios, *by_lease)]
    expected = [means[0], min(ratios), max(ratios), *means[1:]]
    assert number_of_pairs == len(ratios)
    assert figures == pytest.approx(expected, abs=0.00501)


def test_the_seconds_of_a_sweep_are_beside_those_of_other_seeds() -> None:
    def span(arm: str, seeds: set[int]) -> list[float]:
        rows = map(json.loads, (LEARNING / "rows-2.jsonl").read_text().splitlines())
        seconds = [
            row["seconds"]
            for row in rows
            if (row["arm"], row["seed"] in seeds, row["task"] in TASKS[:3]) == (arm, True, True)
        ]
        return [min(seconds), max(seconds)]

    page = " ".join((LEARNING / "RESULTS-2.md").read_text().split())
    pattern = r"a cell took (\S+) to (\S+) s, where c of other seeds took (\d+) to (\d+) and k"
    told = re.search(rf"{pattern} (\d+) to (\d+);", page)
    assert told is not None
    figures = [float(each.replace(",", "")) for each in told.groups()]
    later = {3, 4, 5}
    expected = [*span("e", {1, 2}), *span("c", later), *span("k", later)]
    assert figures == pytest.approx(expected, abs=0.501)


DIFFERENCES = re.findall(
    r"^\| (\S+ - \S+) \|", (LEARNING / "RESULTS-2.md").read_text(), re.MULTILINE
)
T_BY_COUNT = {3: 4.302653, 5: 2.776445, 6: 2.570582}  # Student's t, 97.5 %, of so many tasks


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_difference_of_two_arms_is_that_of_their_common_seeds(name: str) -> None:
    page = (LEARNING / "RESULTS-2.md").read_text()
    (line,) = re.findall(rf"^\| {name} \|(.*)\|$", page, re.MULTILINE)
    *cells, over_tasks = [cell.strip() for cell in line.split("|")]
    shares = {
        (row["task"], row["arm"], row["seed"]): row["right_share"]
        for row in map(json.loads, (LEARNING / "rows-2.jsonl").read_text().splitlines())
        if row["seed"]
    }
    one, other = name.split(" - ")
    means = []
    for task, cell in zip(TASKS, cells, strict=True):
        seeds = [s for s in range(1, 6) if {(task, one, s), (task, other, s)} <= shares.keys()]
        if not seeds:
            assert cell == ""
            continue
        means.append(statistics.fmean(shares[task, one, s] - shares[task, other, s] for s in seeds))
        difference, count = cell.strip(")").split(" (")
        assert float(difference) == pytest.approx(100 * means[-1], abs=HALF_A_DIGIT)
        assert int(count) == len(seeds)
    half = T_BY_COUNT[len(means)] * statistics.stdev(means) / math.sqrt(len(means))
    written = [float(figure) for figure in re.findall(r"[+-][\d.]+", over_tasks)]
    mean = statistics.fmean(means)
    expected = [100 * value for value in (mean, mean - half, mean + half)]
    assert written == pytest.approx(expected, abs=HALF_A_DIGIT)


def test_the_page_has_each_difference_that_decides_and_concludes_by_its_figures() -> None:
    decide = {"c - k", "e - k", "c-long - c", "c-long-answers - c", "c-long-32 - c"}
    assert decide | {"g-deep - d", "g-shallow - d"} <= set(DIFFERENCES)
    page = (LEARNING / "RESULTS-2.md").read_text()
    for name, conclusion in {
        "c - k": r"The estimate is c - k = (\S+) points",
        "d - c": r"d, gains (\S+) points over c",
        "g-deep - d": r"Deep layers fast: (\S+) points",
    }.items():
        (told,) = re.findall(conclusion, page)
        assert re.search(rf"^\| {name} \|.*\| {re.escape(told)} \([^|]*\|$", page, re.MULTILINE)


AGAIN = "stream-rates-again.jsonl"
ORDERS = ("facts", "facts-reversed", "tasks", "tasks-reversed")


def night_rows(arm: str, stream: str) -> dict[int, dict[str, Any]]:
    """The rows of an arm in a stream of nights, by seed."""
    file = LEARNING / ("stream-rates.jsonl" if stream in ORDERS else "stream-real.jsonl")
    rows = map(json.loads, file.read_text().splitlines())
    return {row["seed"]: row for row in rows if (row["arm"], row["task"]) == (arm, stream)}


def final_average(arm: str, stream: str) -> float:
    """In % of answers, mean over seeds."""
    return 100 * statistics.fmean(row["right_share"] for row in night_rows(arm, stream).values())


def both(figure: Callable[[str, str], float], arm: str, kind: str) -> float:
    """Over both orders, each as often as it has current questions."""
    weights = {}
    for stream in (kind, f"{kind}-reversed"):
        asked = [fact.row for fact in read_stream(stream).questions]
        newest = {row.prompt: row.answer for row in asked}
        weights[stream] = sum(newest[row.prompt] == row.answer for row in asked)
    total = sum(weight * figure(arm, stream) for stream, weight in weights.items())
    return total / sum(weights.values())


def behind_joint(arm: str, stream: str) -> float:
    """The final average less that of joint training in points, mean over the seeds of both."""
    rows, joint = night_rows(arm, stream), night_rows("joint", stream)
    return 100 * statistics.fmean(
        rows[seed]["right_share"] - joint[seed]["right_share"] for seed in rows.keys() & joint
    )


def backward_transfer(arm: str, stream: str) -> float:
    """In points: right answers to earlier nights' questions, at the end less after their night."""
    nights = [[each.row for each in night.questions] for night in read_stream(stream).nights]
    newest = {row.prompt: row.answer for night in nights for row in night}
    changes = []
    for row in night_rows(arm, stream).values():
        final, learnt = (f"{int('1' + row[key], 16):b}"[1:] for key in ("right", "learnt"))
        numbers = itertools.count()
        numbered = [[(next(numbers), question) for question in night] for night in nights]
        for number, question in itertools.chain(*numbered[:-1]):
            if newest[question.prompt] == question.answer:
                changes.append(int(final[number]) - int(learnt[number]))
    return 100 * statistics.fmean(changes)


def table_of_nights(columns: int) -> list[tuple[str, list[str]]]:
    """The arms of the tables of RESULTS-3.md that have so many columns, with their cells."""
    page = (LEARNING / "RESULTS-3.md").read_text()
    lines = re.findall(r"^\| `([a-z0-9-]+)`[^|]*\|(.*)\|$", page, re.MULTILINE)
    cells = [(arm, [cell.strip() for cell in line.split("|")]) for arm, line in lines]
    return [(arm, row) for arm, row in cells if len(row) == columns]


def test_the_final_averages_of_the_nights_are_those_of_the_rows() -> None:
    table = table_of_nights(5)
    assert len(table) == 12
    for arm, cells in table:
        for stream, cell in zip(ORDERS, cells[:4], strict=True):
            figure, seeds = cell.removesuffix(")").split(" (")
            assert int(seeds) == len(night_rows(arm, stream))
            assert float(figure) == pytest.approx(final_average(arm, stream), abs=HALF_A_DIGIT)
        steps = [
            {sum(row["steps"]) for row in night_rows(arm, stream).values()}
            for stream in ("facts", "tasks")
        ]
        assert [{int(told.replace(",", ""))} for told in cells[4].split(", ")] == steps


def test_what_nights_lost_is_that_of_the_rows() -> None:
    table = table_of_nights(4)
    assert len(table) == 4
    for arm, cells in table:
        for stream, cell in zip(ORDERS, cells, strict=True):
            lost = [behind_joint(arm, stream), backward_transfer(arm, stream)]
            assert [float(each) for each in cell.split(", ")] == pytest.approx(
                lost, abs=HALF_A_DIGIT
            )


def real_transfer(arm: str, stream: str) -> float:
    """As `backward_transfer`, of real text: its nights are equal, and no answer changes."""
    changes = []
    for row in night_rows(arm, stream).values():
        final, learnt = (f"{int('1' + row[key], 16):b}"[1:] for key in ("right", "learnt"))
        before = row["rows"] - row["rows"] // len(row["steps"])
        changes += [int(final[number]) - int(learnt[number]) for number in range(before)]
    return 100 * statistics.fmean(changes)


def test_the_nights_of_the_real_model_are_those_of_the_rows_and_of_the_report() -> None:
    report = (LEARNING / "rates-real.md").read_text()
    table = table_of_nights(7)
    assert len(table) == 6
    for arm, cells in table:
        streams = ("intents",) if arm == "auto-go" else ("intents", "four")
        steps = [{sum(r["steps"]) for r in night_rows(arm, name).values()} for name in streams]
        assert [{int(told.replace(",", ""))} for told in cells[6].split(" and ")] == steps
        for place, stream in enumerate(streams):
            assert night_rows(arm, stream).keys() == {1, 2, 3}
            told = [cell for cell in cells[3 * place : 3 * place + 3] if cell]
            figures = [figure(arm, stream) for figure in (final_average, behind_joint)]
            figures = figures[:1] if arm == "joint" else [*figures, real_transfer(arm, stream)]
            assert [float(cell.split()[0]) for cell in told] == pytest.approx(
                figures, abs=HALF_A_DIGIT
            )
            (line,) = re.findall(rf"^\| \S+ \| {stream} \| {arm} \|.*$", report, re.MULTILINE)
            assert all(f"| {cell} |" in line for cell in told)


def test_what_the_page_of_nights_concludes_is_that_of_the_rows() -> None:
    def twice(arm: str) -> list[float]:
        """What seed 1 gave on both machines, in both orders of the facts."""
        again = [json.loads(line) for line in (LEARNING / AGAIN).read_text().splitlines()]
        second = {row["task"]: row["right_share"] for row in again if row["arm"] == arm}
        shares = [(night_rows(arm, name)[1]["right_share"], second[name]) for name in ORDERS[:2]]
        return [100 * share for share in itertools.chain(*shares)]

    def over_kinds(arm: str) -> float:
        """Mean of facts and tasks over both orders."""
        return statistics.fmean(both(final_average, arm, kind) for kind in ("facts", "tasks"))

    def over_facts_and_intents(arm: str) -> float:
        """What decides on the rebuilt night on a sample."""
        return (both(final_average, arm, "facts") + final_average(arm, "intents")) / 2

    first, again = twice("auto-go")[2:]
    expected = {
        r"moved one by (\S+) points and one by (\S+)\. ": [
            abs(twice("auto-go")[0] - twice("auto-go")[1]),
            abs(first - again),
        ],
        r"`auto-go` got (\S+) and (\S+) % of the facts and (\S+) and (\S+) % in": twice("auto-go"),
        r"`joint` (\S+) and (\S+), and (\S+) and (\S+) %": twice("joint"),
        r"with half replayed, against (\S+) % at a share of 10 and (\S+) % at 100": [
            over_kinds(f"go-{share}-50") for share in (10, 100)
        ],
        r"50 %\*\*: (\S+) % against (\S+) % with 30": [
            over_kinds(f"go-30-{fraction}") for fraction in (50, 30)
        ],
        r"Over facts and intents `auto-go` has (\S+) % and `auto` (\S+) %": [
            over_facts_and_intents(arm) for arm in ("auto-go", "auto")
        ],
        r"and `auto` \S+ %, (\S+) points apart where 2": [
            over_facts_and_intents("auto-go") - over_facts_and_intents("auto")
        ],
        r"sample was better, by (\S+) points": [
            final_average("auto", "intents") - final_average("auto-go", "intents")
        ],
        r"apart on the intents \((\S+) and (\S+) %\) and better on `four` \((\S+) and (\S+) %\)": [
            final_average(f"go-{share}-50", stream)
            for stream in ("intents", "four")
            for share in (100, 30)
        ],
        r"is at most (\S+) points behind joint training, in one order (\S+)\. ": [
            -both(behind_joint, "rebuild", "tasks"),
            -behind_joint("rebuild", "tasks-reversed"),
        ],
        r"(\S+) times the steps of `go-30-50` on the facts, (\S+) times on the tasks,"
        r" (\S+) on the intents and (\S+) on `four`": [
            sum(night_rows("rebuild", name)[1]["steps"])
            / sum(night_rows("go-30-50", name)[1]["steps"])
            for name in ("facts", "tasks", "intents", "four")
        ],
        r"it ends (\S+) points behind joint training on the facts, (\S+) on": [
            -both(behind_joint, "auto-go", kind) for kind in ("facts", "tasks")
        ],
        r"\*\*`rebuild` is shown\*\* on the facts \((\S+) points": [
            both(behind_joint, "rebuild", "facts")
        ],
        r"`auto-go` does not hold\*\*: over both orders (\S+) points on the facts": [
            both(behind_joint, "auto-go", "facts")
        ],
        r"and (\S+) on the tasks \(-15": [both(behind_joint, "auto-go", "tasks")],
        r"nine at a time, (\S+) against (\S+) on the facts and (\S+) against (\S+) on": [
            night_rows(arm, stream)[1]["seconds"]
            for stream in ("facts", "tasks")
            for arm in ("rebuild", "go-30-50")
        ],
    }
    require_told("benchmarks/learning/RESULTS-3.md", expected)


def require_told(page: str, expected: dict[str, list[float]]) -> None:
    """Fail unless each pattern is on the page, and the figures that it finds are those."""
    text = " ".join((ROOT / page).read_text().split())
    for pattern, figures in expected.items():
        told = re.search(pattern, text)
        assert told is not None, pattern
        assert [float(each) for each in told.groups()] == pytest.approx(figures, abs=HALF_A_DIGIT)


@pytest.mark.parametrize("page", ["replay", "nested-learning"])
def test_what_documents_say_of_rebuilt_nights_is_that_of_the_rows(page: str) -> None:
    streams = (*ORDERS, "intents", "four")
    ratios = [
        sum(night_rows("rebuild", stream)[1]["steps"])
        / sum(night_rows("go-100-50", stream)[1]["steps"])
        for stream in streams
    ]
    expected = {
        r"at (\S+) to (\S+) times the steps": [min(ratios), max(ratios)],
        r"at most (\S+) points": [max(-behind_joint("rebuild", stream) for stream in streams)],
    }
    if page == "replay":
        pattern = r"on was (\S+) to (\S+) behind with a real model, (\S+) to (\S+) with a tiny one"
        behind = [-behind_joint("go-100-50", stream) for stream in streams]
        tiny, real = sorted(behind[: len(ORDERS)]), sorted(behind[len(ORDERS) :])
        expected[pattern] = [real[0], real[-1], tiny[0], tiny[-1]]
        assert "In six streams" in (ROOT / "docs" / "replay.md").read_text()
    require_told(f"docs/{page}.md", expected)
