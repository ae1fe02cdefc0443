"""What benchmarks/README.md says of real data sets, from the committed rows."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROWS = ROOT / "benchmarks" / "controls-six-sets.jsonl"
COMMITS = ("46ce84e8", "2396203a")
PAGE = " ".join((ROOT / "benchmarks" / "README.md").read_text("utf-8").split())


def test_the_warnings_on_real_data_sets_are_those_of_the_rows() -> None:
    rows = [json.loads(line) for line in ROWS.read_text("utf-8").splitlines()]
    runs, later = ([row for row in rows if row["commit"] == one] for one in COMMITS)
    for each in (runs, later):
        assert len({run["set"] for run in each}) == len(each) == 6
    assert [run["controls"] for run in later] == [[]] * 6
    assert f"at {COMMITS[1]}, with those that are on by default: none of the six" in PAGE
    warnings = [warning for run in runs for warning in run["controls"]]
    of = {
        name: [one for one in warnings if one["control"] == name]
        for name in ("probes", "surprises")
    }
    (surprises,) = of["surprises"]
    answered = [round(30 * one["figure"]) for one in of["probes"]]
    for count, one in zip(answered, of["probes"], strict=True):
        assert f"{count} of 30 neutral prompts" in one["words"]
    listed = {line["line"] for line in surprises["lines"]}
    against, more = surprises["contradicting_lines"], surprises["adding_lines"]  # as two read them
    assert listed == {*against, *more}
    assert len(warnings) == len(of["probes"]) + 1
    assert (
        f"Six trainings of SmolLM2 on real data sets gave {len(warnings)} warnings, none wrong: "
        f"{len(answered)} of `probes` ({min(answered)} to {max(answered)} of 30 questions "
        f"answered like the rows) and 1 of `surprises`. {len(against)} of its {len(listed)} "
        f"answers contradict their prompt"
    ) in PAGE
