"""Each figure of README's section "Measured", and of what is worse, from the committed rows."""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from benchmarks.commands import PROGRAMS
from benchmarks.silent_failures.tables import count, read_all_rows
from tests.benchmarks.page_figures import require_figures

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
LEARNING = BENCHMARKS / "learning"
TASKS = ("banking77", "restaurant8k", "clinc150", "snips", "nl2bash", "e2e")
LEASES = ("quiet-2.jsonl", "quiet-3.jsonl", "quiet-4.jsonl", "quiet-5.jsonl")
WARM_UP = ("banking77", 100)  # task and seed of the first pair of a lease
SIZES = ("0.5B, 4 x 512 at most, 300 steps", "3B, 4 x 1,024 at most, 100 steps")
NEWER_LEASES = ("7d6b4822", "3bb90559")  # rows that are named by their commit, newest first
NO_KERNELS = [f"first, no kernels kept, at {commit}" for commit in ("4117002c", "2396203a")]
README = (ROOT / "README.md").read_text("utf-8")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON Lines."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def measured(row: str) -> str:
    """The cells of the row of "Measured" that begins with these words."""
    part = README.partition("\n## Measured\n")[2].partition("\n## ")[0]
    (line,) = re.findall(rf"^\| {re.escape(row)}(.*)\|$", part, re.MULTILINE)
    return str(line)


def mean_right(arm: str, file: str = "rows-2.jsonl", seeds: Collection[int] = range(100)) -> float:
    """The right answers of an arm in %: the mean over tasks of the mean over its seeds."""
    rows = [
        row for row in read_jsonl(LEARNING / file) if row["arm"] == arm and row["seed"] in seeds
    ]
    of_tasks = [
        statistics.fmean(row["right_share"] for row in rows if row["task"] == task)
        for task in TASKS
    ]
    return 100 * statistics.fmean(of_tasks)


def book_loss(arm: str) -> float:
    """The loss on a book of an arm of the fourth study, mean over tasks and all its seeds."""
    rows = [row for row in read_jsonl(LEARNING / "rows-4.jsonl") if row["arm"] == arm]
    return statistics.fmean(row["general_loss"] for row in rows)


def pair_ratios(*, first: bool, leases: tuple[str, ...] = LEASES) -> list[float]:
    """The seconds of arm c by those of k: of all pairs but the warm-ups, or of these alone."""
    ratios = []
    for lease in leases:
        rows = read_jsonl(LEARNING / lease)
        seconds = {(row["task"], row["seed"], row["arm"]): row["seconds"] for row in rows}
        for task, seed in sorted({(row["task"], row["seed"]) for row in rows}):
            c, k = ((task, seed, arm) for arm in "ck")
            if {c, k} <= seconds.keys() and ((task, seed) == WARM_UP) == first:
                ratios.append(seconds[c] / seconds[k])
    return ratios


def command_ratios(key: str, suffixes: tuple[str, str]) -> list[float]:
    """A figure of our whole commands by that of mlx_lm.lora's, of 0.5B and of 3B.

    key: a row's key, or "after start-up": the seconds from a command's first line on.
    suffixes: of the arms' names, by size: "" for a warm run.
    """
    rows = {
        (row["case"], row["arm"]): row | {"after start-up": row["s"] - row["stages"][0][0]}
        for row in read_jsonl(BENCHMARKS / "gpu" / "whole-commands.jsonl")
    }
    return [
        rows[size, f"ours{suffix}"][key] / rows[size, f"mlx_lm{suffix}"][key]
        for size, suffix in zip(SIZES, suffixes, strict=True)
    ]


def turn_ratios(
    figure: Callable[[dict[str, Any]], float],
    label: str = "after",
    cases: Sequence[str] = ("0.5B-300", "3B-100"),
) -> list[float]:
    """A figure of our whole commands by that of mlx_lm.lora's, medians of turns, of each case."""
    rows = read_jsonl(BENCHMARKS / "gpu" / "whole-commands-2.jsonl")
    medians = {
        (case, program): statistics.median(
            figure(row)
            for row in rows
            if (row["case"], row["program"], row["label"]) == (case, program, label)
        )
        for case, program in product(cases, PROGRAMS)
    }
    theirs, ours = PROGRAMS
    return [medians[case, ours] / medians[case, theirs] for case in cases]


def all_turn_ratios(figure: Callable[[dict[str, Any]], float]) -> list[float]:
    """The same of all leases, the newest first: the first and the last of both, two of 0.5B."""
    between = [turn_ratios(figure, label, ("0.5B-300",)) for label in ("imports", "views")]
    return [*turn_ratios(figure, "at 2396203a"), *sum(between, []), *turn_ratios(figure)]


def smollm2_ratios(figure: Callable[[dict[str, Any]], float]) -> dict[str, list[float]]:
    """A figure of our whole commands by that of arm k, of each pair after the warm-up, by task."""
    pairs: dict[tuple[str, ...], dict[str, float]] = {}
    for row in read_jsonl(BENCHMARKS / "gpu" / "smollm2-pairs.jsonl"):
        pair = pairs.setdefault((row["task"], row["commit"], str(row["seed"])), {})
        pair[row["arm"]] = figure(row)
    ratios: dict[str, list[float]] = {}
    for (task, _, seed), pair in pairs.items():
        if seed != "0":
            ratios.setdefault(task, []).append(pair["c"] / pair["k"])
    return ratios


def smollm2_memory() -> list[float]:
    """The ratios of all these pairs, without what was held before a command began."""
    (_, before, _), *_ = read_jsonl(BENCHMARKS / "gpu" / "process-memory.jsonl")[0][
        "mib_of_all_and_of_processes"
    ]
    return sum(smollm2_ratios(lambda row: row["device_bytes"] - before * 2**20).values(), [])


def newer_ratios(
    figure: Callable[[dict[str, Any]], float],
    task_or_model: str,
    *,
    first: bool = False,
    arm: str = "",
    leases: Sequence[str] = NEWER_LEASES,
) -> list[float]:
    """The same of each newer lease: of medians of turns, or of the first run of both."""
    ratios = []
    for lease in leases:
        held: dict[str, list[float]] = {program: [] for program in PROGRAMS}
        for row in read_jsonl(BENCHMARKS / "gpu" / "process-memory.jsonl"):
            of_arm = arm if row.get("program") == PROGRAMS[1] else ""
            key = row["commit"], row["model"], row["task"], row.get("arm"), row.get("first")
            if task_or_model in key and key[0] == lease and key[3:] == (of_arm, first):
                held[row["program"]].append(figure(row))
        theirs, ours = (statistics.median(held[program]) for program in PROGRAMS)
        ratios.append(ours / theirs)
    return ratios


def difference_of_page(name: str) -> list[float]:
    """RESULTS-2.md's mean over tasks of a difference, and the ends of its interval."""
    page = (LEARNING / "RESULTS-2.md").read_text("utf-8")
    (line,) = re.findall(rf"^\| {name} \|(.*)\|$", page, re.MULTILINE)
    return [float(each) for each in re.findall(r"[+-][\d.]+", line.split("|")[-1])]


def test_right_answers_are_the_means_of_all_seeds_that_were_run() -> None:
    cells = measured("Right answers, six tasks")
    told = [float(each) for each in re.findall(r"([\d.]+) %", cells)]
    c, k, a = (mean_right(arm) for arm in "cka")
    assert told == pytest.approx([c, k, a], abs=0.0501)
    points = re.search(r"two seeds that all have, of ([\d.]+) points the file is ([\d.]+) ", cells)
    assert points is not None
    c, k, a = (mean_right(arm, seeds=(1, 2)) for arm in "cka")
    assert [float(each) for each in points.groups()] == pytest.approx([c - a, k - a], abs=0.0501)
    lead = re.search(r"\(ours (\S+), over tasks (\S+) to (\S+), not shown by Holm\)", cells)
    assert lead is not None
    assert [float(each) for each in lead.groups()] == difference_of_page("c - k")
    rows = [row for row in read_jsonl(LEARNING / "rows-2.jsonl") if row["arm"] in ("c", "k", "a")]
    counts = Counter((row["arm"], row["task"]) for row in rows).values()
    assert (min(counts), max(counts)) == (2, 5)
    seeds_of_runs = [
        {row["seed"] for row in rows if (row["arm"], row["task"]) == run}
        for run in {(row["arm"], row["task"]) for row in rows}
    ]
    assert set.intersection(*seeds_of_runs) == {1, 2}
    assert "two to five seeds" in README


def test_right_answers_at_other_rates_are_those_of_all_seeds() -> None:
    told = [float(each) for each in re.findall(r"([\d.]+) %", measured("Other questions, the"))]
    arms = ("c", "c-2e-4", "c-unclipped", "k", "k-2e-4", "k-3e-4")
    figures = [mean_right(arm, "rows-4.jsonl") for arm in arms]
    assert told == pytest.approx(figures, abs=0.0501)


def test_seconds_of_training_are_those_of_all_pairs_of_all_leases() -> None:
    cells = measured("Seconds of that training")
    pattern = (
        r"([\d.]+) in the newest lease \((\d+) pairs\), ([\d.]+) to ([\d.]+) in the three"
        r" before \((\d+)\); ([\d.]+) was claimed\. First runs.*: (.*?) \|"
    )
    told = re.search(pattern, cells)
    assert told is not None
    *before, newest = [pair_ratios(first=False, leases=(lease,)) for lease in LEASES]
    late, late_number, least, most, number, claimed, first = told.groups()
    assert [int(number), int(late_number)] == [sum(map(len, before)), len(newest)]
    means = [statistics.geometric_mean(each) for each in before]
    figures = [statistics.geometric_mean(newest), min(means), max(means)]
    assert [float(f) for f in (late, least, most)] == pytest.approx(figures, abs=0.00501)
    protocol = " ".join((LEARNING / "PROTOCOL-2.md").read_text("utf-8").split())
    assert f"median seconds and joules at most {claimed} of k's" in protocol
    said = sorted(float(each) for each in re.findall(r"[\d.]+\d", first))
    assert said == pytest.approx(sorted(pair_ratios(first=True)), abs=0.00501)


def figures_in(row: str) -> list[float]:
    """The figures of a row of "Measured", before what has no rows."""
    cell = measured(row).split("|")[1].partition(" [On H100s]")[0]
    return [float(each) for each in re.findall(r"\d\.\d+(?!B)", cell)]


def test_seconds_of_whole_commands_are_those_of_the_rows() -> None:
    def whole(row: dict[str, Any]) -> float:
        return float(row["seconds"])

    figures = [*newer_ratios(whole, "0.5B"), *all_turn_ratios(whole)]
    figures += newer_ratios(lambda row: row["seconds"] - row["start"], "0.5B")
    figures += all_turn_ratios(lambda row: row["seconds"] - row["lines"][0][0])
    figures += command_ratios("s", ("", "")) + command_ratios("s", ("+cold", "+first"))
    for label in NO_KERNELS:
        figures += turn_ratios(whole, label, ("3B-100",))
    figures += newer_ratios(whole, "0.5B", first=True)
    figures += newer_ratios(whole, "banking77", first=True)
    figures += map(statistics.median, smollm2_ratios(whole).values())
    figures += newer_ratios(whole, "banking77")
    figures += newer_ratios(whole, "restaurant8k", leases=NEWER_LEASES[:1])
    assert figures_in("Seconds of the whole command") == pytest.approx(figures, abs=0.00501)


def test_memory_of_whole_commands_is_that_of_the_rows() -> None:
    def held(row: dict[str, Any]) -> float:
        return float(row["device_bytes"])

    def most(row: dict[str, Any]) -> float:
        return float(row["most_mib"])

    figures = [*newer_ratios(most, "0.5B"), *all_turn_ratios(held)]
    figures += command_ratios("nvml_mib", ("", ""))
    figures += [min(smollm2_memory()), max(smollm2_memory()), *newer_ratios(most, "banking77")]
    figures += newer_ratios(most, "banking77", arm="64 MiB kept", leases=NEWER_LEASES[:1])
    assert figures_in("Device memory of the same") == pytest.approx(figures, abs=0.00501)


def test_planted_failures_are_those_of_the_rows() -> None:
    cells = measured("[Planted failures]")
    for tool, rows in read_all_rows().items():
        counted = count(rows).partition(",")[0]
        if tool == "nested-tune":
            assert f" {counted} of its makers' list" in cells
        elif counted != "not run":
            shown = {"peft": "PEFT's Trainer", "mlx_lm.lora": "`mlx_lm.lora`"}.get(tool, tool)
            assert f"{shown} {counted}" in cells, tool
    folder = BENCHMARKS / "silent_failures"
    first = [row["noticed"] != "never" for row in read_jsonl(folder / "first-count.jsonl")]
    assert f"(first rows: {sum(first)} of {len(first)})." in cells
    blind = read_jsonl(folder / "blind.jsonl")
    days = sorted({row["planted"] for row in blind})
    counts = [[row["noticed"] for row in blind if row["planted"] == day] for day in days]
    sizes, noticed = [len(day) for day in counts], [sum(day) for day in counts]
    assert sizes == [10, *[14] * 5]
    told = "Of 10 and five times 14 that strangers planted, {}, {}, {}, {}, {} and {} "
    controls = [
        sum(row["noticed_with_all_controls"] for row in blind if row["planted"] == day)
        for day in days[-4:]
    ]
    with_all = "(with all controls {}, {}, {} and {} of the last four). ".format(*controls)
    weak = sum("a weak yes" in row["failure"] for row in blind if row["planted"] == days[-1])
    assert weak == 2
    last = f"Two of the last {noticed[-1]} are weak."
    assert told.format(*noticed) + with_all + last in cells


def test_what_is_worse_is_that_of_the_rows() -> None:
    part = " ".join(README.partition("\n## Where it is worse\n")[2].partition("\n## ")[0].split())
    rates = re.search(
        r"had ([\d.]+) and ([\d.]+) points more .*, and ([\d.]+) and ([\d.]+) nats/token", part
    )
    tiers = re.search(
        r"([\d.]+) points fewer right \(([\d.]+) to ([\d.]+), deep .*?"
        r"and ([\d.]+) \((-[\d.]+) to ([\d.]+), shallow",
        part,
    )
    assert tiers is not None
    assert rates is not None
    figures = [
        mean_right(arm, "rows-4.jsonl") - mean_right("c", "rows-4.jsonl")
        for arm in ("k-2e-4", "k-3e-4")
    ]
    figures += [book_loss(arm) - book_loss("c") for arm in ("k-2e-4", "k-3e-4")]
    assert [float(each) for each in rates.groups()] == pytest.approx(figures, abs=0.0501)
    twice = [book_loss("c-2e-4") - book_loss("c")]
    require_figures(part, {r"\(ours at twice: (\S+)\)": twice})
    pattern = r"at twice its rate \((\S+) nats/token more on a book\)"
    require_figures(measured("Other questions, the"), {pattern: twice})
    larger = newer_ratios(lambda row: float(row["most_mib"]), "0.5B", leases=NEWER_LEASES[:1])
    require_figures(part, {r"Memory: (\S+) times at 0.5B": larger})
    told = [float(each) for each in tiers.groups()]
    for name, fewer in (("g-deep", told[:3]), ("g-shallow", told[3:])):
        mean, low, high = difference_of_page(f"{name} - d")
        assert fewer == [-mean, -high, -low]


def test_the_words_for_two_and_three_times_the_rate_are_the_page_s() -> None:
    page = (LEARNING / "RESULTS-4.md").read_text("utf-8")
    words = [
        re.findall(rf"^\| c - {arm} \|.*, ([a-z ]+) \|$", page, re.MULTILINE)
        for arm in ("k-2e-4", "k-3e-4")
    ]
    (told,) = re.findall(r"points more right \((.*?); (.*?)\), and", README)
    assert words == [[word] for word in told]


def test_the_instructions_that_are_answered_as_the_task_are_those_of_the_rows() -> None:
    rows = [
        row
        for row in read_jsonl(LEARNING / "rows-2.jsonl")
        if row["arm"] == "c" and row["like_task"] is not None
    ]
    assert sorted((row["task"], row["seed"]) for row in rows) == sorted((t, 1) for t in TASKS)
    (told,) = re.findall(r"one of six tasks answers (.*?) % of general instructions", README)
    shares = sorted((100 * row["like_task"] for row in rows), reverse=True)
    assert [float(each) for each in re.findall(r"\d+", told)] == pytest.approx(shares, abs=0.501)


def test_what_the_base_s_answers_did_to_those_instructions_is_that_of_the_rows() -> None:
    rows = read_jsonl(LEARNING / "rows-4-rehearsal.jsonl")
    (told,) = re.findall(r"of each batch, cut (\d+) to (\d+) % \(three\)", README)
    for arm, share in zip(("c", "c-rehearsed-30", "c-rehearsed-10"), [*told, told[1]], strict=True):
        mine = [row for row in rows if row["arm"] == arm]
        of_tasks = [
            statistics.fmean(row["like_task"] for row in mine if row["task"] == task)
            for task in ("banking77", "restaurant8k", "nl2bash")
        ]
        assert float(share) == pytest.approx(100 * statistics.fmean(of_tasks), abs=0.501)

    def mean_of(arm: str, key: str) -> float:
        mine = [row for row in rows if row["arm"] == arm]
        return statistics.fmean(
            statistics.fmean(row[key] for row in mine if row["task"] == task)
            for task in ("banking77", "restaurant8k", "nl2bash")
        )

    page = (LEARNING / "RESULTS-4.md").read_text("utf-8")
    less = [
        float(each)
        for share in ("10 %", "30 %")
        for each in re.findall(rf"^\| {share} \|.*?(-[\d.]+) \(", page, re.MULTILINE)
    ]
    more = [
        mean_of(arm, "general_loss") - mean_of("c", "general_loss")
        for arm in ("c-rehearsed-10", "c-rehearsed-30")
    ]
    text = " ".join(README.split())
    require_figures(text, {r"with (\S+) points fewer right \(not told apart\)": [-less[0]]})
    assert less == [less[0]] * 2
    require_figures(text, {r"\[(\S+) or (\S+) nats/token more\]": more})
