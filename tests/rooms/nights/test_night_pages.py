"""Prefect's pages of nights: one night, and the last ones of an adapter."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from nested_core.records.answers import write_answers
from nested_core.records.dataset import Finding
from nested_core.records.metrics import append_metrics
from nested_core.records.outcome_names import Outcome
from nested_core.records.run_status import Run
from nested_core.records.skip import Skip, write_skip
from nested_core.records.verdict_file import write_verdict
from nested_core.rooms.nights.pages import Night, describe_night, describe_nights
from nested_core.storage.atomic import write_json
from nested_core.storage.run_directory import (
    DEFAULT_RUNS_FOLDER,
    RunDirectory,
    find_run_of,
    run_key,
)
from tests.core.report.test_prefect_pages import facts_of, picture_of, plain
from tests.core.report.verdicts import CHAMPION, LOSSES, SUITE, make_verdict
from tests.example import example_config
from tests.flows.test_one_wording import rolled_back
from tests.runs import make_answer, write_dataset

NAME = "support-bot"
FINDINGS = [
    Finding("train.jsonl", 1, "warning", "duplicate", "line 1 again"),
    Finding("train.jsonl", 2, "warning", "near_duplicate", "line 2, nearly"),
    Finding("train.jsonl", None, "info", "rows", "1200"),
]


def night_of(folder: Path, outcome: str, message: str = "said", **changes: Any) -> str:
    registry = {"path": "registry", "name": NAME}
    config = example_config(**{"registry": registry} | changes)
    return str(describe_night(config, Run(RunDirectory(folder)), outcome, message))


@pytest.fixture
def judged(tmp_path: Path) -> Path:
    """The folder of a run with a verdict, a data set and two questions."""
    verdict = make_verdict(validation=LOSSES, champion=CHAMPION, tasks=[SUITE | {"champion": 1.0}])
    write_verdict(tmp_path, verdict, {})
    write_dataset(RunDirectory(tmp_path), FINDINGS, train=1200, valid=84)
    rows = [make_answer("base", 1, "same"), make_answer("candidate", 1, "same")]
    rows += [make_answer("base", 2, "<b>Rome"), make_answer("candidate", 2, "Paris")]
    write_answers(tmp_path / "answers.jsonl", rows)
    return tmp_path


def test_a_few_lines_and_a_table_tell_the_night(judged: Path) -> None:
    page = night_of(judged, Outcome.PROMOTED, "verified ada9ad: promoted")
    assert page.startswith("# support-bot: Promoted")
    facts = facts_of(page)
    assert list(facts) == ["Outcome", "Loss", "Data", "Made of", "Run folder"]
    assert facts["Outcome"] == "verified ada9ad: promoted"
    assert facts["Loss"] == (
        "validation loss 3.142 -> 0.02135 (valid.jsonl, 84 examples, step 80); 14 of 15 right; "
        "champion "
        "c4a3c4a3c4a3 1.191, difference -1.17 (-1.2 to -1.1), better"
    )
    assert "| answers, capitals (champion 15) | 0 of 15 | 14 of 15 | +0.9333 (" in plain(page)
    assert facts["Data"].endswith(
        "1,200 train, 84 valid examples; 2 warning (duplicate, near_duplicate)"
    )
    assert "from a fresh adapter, 8 iterations, learning rate 0.002" in facts["Made of"]
    assert "seed 0, registry.promote: " in facts["Made of"]
    for digest in ("da7ada7ada7a", "141714171417", "ada9ada9ada9"):
        assert digest in facts["Made of"]
    command = "    nested-tune train --run-dir again \\\n"
    assert f"{command}      -c {judged / 'config.yaml'}\n" in page


def test_a_night_of_epochs_or_without_a_registry_has_its_page(tmp_path: Path) -> None:
    page = night_of(tmp_path, Outcome.PROMOTED, training={"epochs": 3})
    assert ", 3 epochs, learning rate" in facts_of(page)["Made of"]
    assert night_of(tmp_path, Outcome.VERIFIED, registry={}).startswith("# Fine-tune: Verified")


def test_answers_and_samples_are_those_of_the_report_and_no_markup(judged: Path) -> None:
    for step in range(0, 10_001, 10):
        samples = [{"prompt": f"Where to {number}?", "answer": "There."} for number in range(50)]
        append_metrics(judged / "metrics.jsonl", {"step": step, "samples": samples})
    answers = night_of(judged, Outcome.PROMOTED).partition("## Answers")[2]
    assert "| Question 2? | ✓ right Paris | \\- | ✗ wrong \\<b\\>Rome |" in answers
    assert "8 of 1001 evaluations to 4 of 50 prompts" in answers
    assert "| 80 (selected) | There. | There. | There. | There. |" in answers.replace("\\", "")
    assert answers.count("| There. |") == 8 * 2


def test_a_night_without_a_verdict_says_so(tmp_path: Path) -> None:
    facts = facts_of(night_of(tmp_path, Outcome.RUNNING))
    assert facts["Loss"] == "not measured yet"
    assert facts["Data"].endswith("not read yet")
    assert facts_of(night_of(tmp_path, Outcome.SKIPPED_UNCHANGED))["Loss"] == "not measured"


def test_an_error_of_several_lines_is_told_on_one(tmp_path: Path) -> None:
    message = "DatasetError: rejected: 1 error.\n  train.jsonl:4: bad-json: no value\nCorrect it."
    told = "DatasetError: rejected: 1 error. train.jsonl:4: bad-json: no value; Correct it."
    assert facts_of(night_of(tmp_path, "Failed", message))["Outcome"] == told


def make_night(day: int, outcome: str, digest: str | None = None, **gate: Any) -> Night:
    """A fine-tune's run with the files of its folder: a data set, and a verdict where given."""
    night = Night(uuid4(), datetime(2026, 11, day, 2, tzinfo=UTC), outcome, 1.5)
    if digest is not None:
        folder = RunDirectory(DEFAULT_RUNS_FOLDER / f"20261122T020000Z-{run_key(night.flow_run)}")
        folder.path.mkdir(parents=True)
        write_dataset(folder, train=40, valid=10)
        folder.dataset.write_text(folder.dataset.read_text().replace("valid-digest", digest))
        if gate:
            write_verdict(folder.path, make_verdict(**gate), {})
    return night


@pytest.fixture
def nights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Night]:
    """The latest night first, as the server gives them."""
    monkeypatch.chdir(tmp_path)
    validation = LOSSES | {"loss_after": 1.25, "examples": 10, "conclusion": "better"}
    return [
        make_night(22, "Crashed"),
        make_night(21, "Promoted", "v2", validation=validation, champion=CHAMPION),
        make_night(20, "Failed: data", "v1"),
        make_night(19, "Promoted", "v1", validation=validation, tasks=[SUITE | {"champion": 0.8}]),
        make_night(18, "Promoted", "v1", validation=validation | {"loss_after": 1.5}),
    ]


def test_a_night_is_a_row_with_its_figures_and_a_link_and_a_star_for_other_examples(nights) -> None:
    page = plain(describe_nights(NAME, nights, [("champion", "/artifacts/artifact/c")]))
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| [")]
    assert [row[1] for row in rows] == [
        *("Crashed", "Promoted: better loss", "Failed: data", "Promoted: better"),
        "Promoted: better loss",
    ]
    assert rows[3] == [
        f"[19 Nov 02:00](/runs/flow-run/{nights[3].flow_run})",
        *("Promoted: better", "1.25 / -", "14 / 12 of 15", "1.5", "40+10"),
    ]
    assert rows[1][2] == "1.25 / 1.19"
    assert rows[0][2:] == [*["-"] * 2, "1.5", "-"]
    assert [row[-1] for row in rows] == ["-", "40+10*", "40", "40+10", "40+10"]
    assert "**Newest champion page**: [open](/artifacts/artifact/c)" in page


def test_a_night_that_trained_nothing_says_why_in_its_row(nights: list[Night]) -> None:
    skipped = make_night(23, Outcome.SKIPPED_HOPELESS, "v2")
    folder = find_run_of(skipped.flow_run)
    assert folder is not None
    skip = Skip(Outcome.SKIPPED_HOPELESS, "rejected as worse on 22 Nov 2026", "because")
    write_skip(folder.skipped, skip)
    page = plain(describe_nights(NAME, [skipped, *nights], []))
    assert (
        "| Skipped: hopeless: rejected | - | - | 1.5 | 40 |\n| … | as worse on 22 Nov 2026 |"
        in page
    )


def test_a_night_says_that_its_gain_was_too_small(nights: list[Night]) -> None:
    losses = LOSSES | {"loss_after": 1.25, "examples": 10, "conclusion": "better"}
    small = CHAMPION | {"difference": -0.0026}
    kept = make_night(23, Outcome.KEPT_CHAMPION, "v2", validation=losses, champion=small)
    folder = find_run_of(kept.flow_run)
    assert folder is not None
    folder.config.write_text("model: base\ndata: data\nregistry: {min_improvement: 0.005}\n")
    page = plain(describe_nights(NAME, [kept, *nights], []))
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| [")]
    assert rows[0][1] == "Kept the champion: better"
    assert "| … | loss, by less than 0.005 |" in page


@pytest.mark.usefixtures("nights")
def test_a_night_whose_answers_show_no_learning_is_not_called_better() -> None:
    doubtful = SUITE | {"candidate": 0.2, "constant": 0.2}
    losses = LOSSES | {"examples": 10, "conclusion": "better"}
    night = make_night(23, Outcome.PROMOTED, "v2", validation=losses, tasks=[doubtful])
    page = plain(describe_nights(NAME, [night], []))
    assert "Promoted: better loss, not" in page
    assert "| … | its answers |" in page


def test_the_losses_of_the_nights_are_a_line_from_the_oldest_to_the_latest(nights) -> None:
    drawn = picture_of(describe_nights(NAME, nights, []))
    assert "run, 1 is 18 Nov 02:00, 5 is 22 Nov 02:00" in drawn
    dots = re.findall(r'<circle cx="([^"]*)" cy="([^"]*)" r="[^"]*" fill="([^"]*)"', drawn)
    colours = [colour for _, _, colour in dots]
    candidate = [(float(x), float(y)) for x, y, colour in dots if colour == colours[0]]
    assert candidate == sorted(candidate), "the oldest is left"
    assert candidate[0][1] < candidate[1][1] == candidate[2][1], "and a lower loss is lower"
    assert (len(candidate), len(set(colours)), len(dots)) == (3, 2, 4)
    alone = picture_of(describe_nights(NAME, nights[-1:], []))
    assert "run, 1 is 18 Nov 02:00<" in alone


def test_losses_that_are_made_otherwise_are_another_curve_and_have_a_star(nights) -> None:
    for night, length in zip(nights, (None, 512, None, 64, 64), strict=True):
        if length is not None:
            folder = find_run_of(night.flow_run)
            assert folder is not None
            folder.config.write_text(f"model: base\ndata: data\nmax_seq_length: {length}\n")
            folder.initial.mkdir()
            write_json(folder.initial / "adapter_config.json", {"base_fingerprint": "f" * 64})
    page = describe_nights(NAME, nights, [])
    assert "| 40+10* |" in plain(page)
    drawn = picture_of(page)
    assert "candidate, another loss until 19 Nov 02:00" in drawn
    dots = re.findall(r'<circle [^>]*fill="([^"]*)"', drawn)
    assert len(set(dots)) == 3, "the earlier candidates, the latest one, and its champion"


def test_the_page_of_nights_says_that_a_champion_was_rolled_back_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    night = Night(uuid4(), datetime(2026, 11, 18, 2, tzinfo=UTC), Outcome.PROMOTED, 1.5)
    place = DEFAULT_RUNS_FOLDER / f"20261118T020000Z-{run_key(night.flow_run)}"
    run = rolled_back(tmp_path)
    place.parent.mkdir()
    run.path.rename(place)
    assert "Promoted, then Rolled back" in str(describe_nights(NAME, [night], []))
