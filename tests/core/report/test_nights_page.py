"""The lead's page: a row a night, from the run's folder and its outcome, and a line."""

from __future__ import annotations

import base64
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from nested_core.records.verdict_file import write_verdict
from nested_core.report.nights_page import Night, describe_nights
from nested_core.storage.run_directory import DEFAULT_RUNS_FOLDER, RunDirectory, run_key
from tests.core.report.verdicts import CHAMPION, LOSSES, make_verdict
from tests.core.report.verdicts import SUITE as COMPLETE_SUITE
from tests.runs import write_dataset

NONE = "\\-"  # as markdown shows a dash
SUITE = COMPLETE_SUITE | {"champion": 0.8}
NO_LINKS: list[tuple[str, str]] = []


def night(day: int, outcome: str, digest: str | None = None, **gate: Any) -> Night:
    """A fine-tune's run with the files of its folder: a data set, and a verdict where given."""
    due = datetime(2026, 11, day, 2, tzinfo=UTC)
    run = Night(uuid4(), due, outcome, 1.5)
    if digest is not None:
        folder = RunDirectory(DEFAULT_RUNS_FOLDER / f"20261122T020000Z-{run_key(run.flow_run)}")
        folder.path.mkdir(parents=True)
        write_dataset(folder, train=40, valid=10)
        folder.dataset.write_text(folder.dataset.read_text().replace("valid-digest", digest))
        if gate:
            write_verdict(folder.path, make_verdict(**gate), {})
    return run


def rows_of(page: object) -> list[list[str]]:
    lines = [line for line in str(page).splitlines() if line.startswith("| [")]
    return [line.strip("| ").split(" | ") for line in lines]


def picture_of(page: object) -> str:
    data = re.search(r"base64,([A-Za-z0-9+/=]+)\)", str(page))
    assert data is not None
    return base64.b64decode(data[1]).decode()


@pytest.fixture
def nights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Night]:
    """The latest night first, as the server gives them."""
    monkeypatch.chdir(tmp_path)
    judged = LOSSES | {"loss_after": 1.25, "examples": 10, "conclusion": "better"}
    return [
        night(22, "Crashed"),
        night(21, "Promoted", "v2", validation=judged, champion=CHAMPION),
        night(20, "Failed: data", "v1"),
        night(19, "Promoted", "v1", validation=judged, tasks=[SUITE]),
        night(18, "Promoted", "v1", validation=judged | {"loss_after": 1.5}),
    ]


def test_a_night_is_a_row_with_its_figures_and_a_link_to_its_run(nights: list[Night]) -> None:
    rows = rows_of(describe_nights("support-bot", nights, NO_LINKS))
    assert [row[1] for row in rows] == [
        "Crashed",
        "Promoted",
        "Failed: data",
        "Promoted",
        "Promoted",
    ]
    assert rows[3] == [
        f"[19 Nov](/runs/flow-run/{nights[3].flow_run})",
        *("Promoted", "better", "1.25 / -", "14 / 12 of 15", "1.5", "40+10"),
    ]
    assert rows[1][3] == "1.25 / 1.19"
    assert rows[0][2:] == [*[NONE] * 3, "1.5", NONE]


def test_a_validation_set_that_changed_has_a_star(nights: list[Night]) -> None:
    examples = [row[-1] for row in rows_of(describe_nights("support-bot", nights, NO_LINKS))]
    assert examples == [NONE, "40+10\\*", "40", "40+10", "40+10"]


def test_the_losses_of_the_nights_are_a_line_from_the_oldest_to_the_latest(
    nights: list[Night],
) -> None:
    drawn = picture_of(describe_nights("support-bot", nights, NO_LINKS))
    assert "night, 1 is 18 Nov, 5 is 22 Nov" in drawn
    dots = re.findall(r'<circle cx="([^"]*)" cy="([^"]*)" r="[^"]*" fill="([^"]*)"', drawn)
    colours = [colour for _, _, colour in dots]
    candidate = [(float(x), float(y)) for x, y, colour in dots if colour == colours[0]]
    assert len(candidate) == 3
    assert candidate == sorted(candidate), "the oldest is left"
    assert candidate[0][1] < candidate[1][1] == candidate[2][1], "and a lower loss is lower"
    assert len(set(colours)) == 2
    assert len(dots) == 4


def test_a_single_night_is_drawn_too(nights: list[Night]) -> None:
    assert "18 Nov" in picture_of(describe_nights("support-bot", nights[-1:], NO_LINKS))
