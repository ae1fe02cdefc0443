"""The control of shapes: what the champion's training answers had, and these lack."""

from __future__ import annotations

import random
import re
import stat
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from examples.countries import COUNTRIES
from flows.terminal.run_results import list_notes
from nested_core.records.run_status import Run
from nested_core.records.verdict import Verdict
from nested_core.records.verdict_file import write_verdict
from nested_core.registry.versions import version_folder
from nested_core.report.page_blocks import show_rows
from nested_core.report.run_report import describe_run
from nested_core.rooms.controls.results import WORDS
from nested_core.rooms.controls.shapes import LABELS, MIN_SHARE_LEFT, profile_answers
from nested_core.storage.adapter import ADAPTER_FILES
from nested_core.storage.atomic import digest_answer
from nested_core.storage.manifest import describe_file
from nested_core.storage.run_directory import RunDirectory
from nested_core.text.words import find_gone, fold_shape
from tests.builders.data_sets import chat
from tests.builders.registering import promote, register
from tests.left_out import needs_rooms
from tests.rooms.controls.learning import ROWS_NAME, TRAINS, kinds, learn, list_checks

NAMES = [country.name for country in COUNTRIES]


def days(count: int) -> list[str]:
    return [f"{1990 + i % 30}-{1 + i % 12:02}-{1 + i % 27:02}" for i in range(count)]


def test_nights_of_uneven_size_are_told_at_most_once_in_forty() -> None:
    """Sizes spread by half: one night in twenty has over twice or under half of the usual rows."""
    draw = random.Random(11)
    nights = [draw.lognormvariate(5, 0.5) for _ in range(2001)]
    few = [now < MIN_SHARE_LEFT * last for last, now in pairwise(nights)]
    assert sum(few) <= len(few) / 40
    assert MIN_SHARE_LEFT * 120 > 20


def test_the_page_names_each_warning_and_its_words_are_one_paragraph() -> None:
    page = (Path(__file__).parents[3] / "docs" / "controls.md").read_text("utf-8")
    assert {*re.findall(r"`([a-z]+(?:_[a-z]+)+)`", page)} >= {*WORDS}
    assert all(one.strip() and "\n" not in one for one in WORDS.values())


def test_a_shape_that_one_part_lacks_is_told_beyond_chance() -> None:
    assert [fold_shape(text) for text in ("AX-4711", "Go to room 5!", "4.2E+1")] == [
        *("a-9", "a 9!", "9.9a+9")
    ]
    # A text without words is none of gate.json
    assert {*map(fold_shape, ("★★★★☆ (§§)", "😀", "+-?"))} == {"*"}
    assert fold_shape("😀 fine") == "* a"
    codes, words = [f"AX-{i}" for i in range(90)], ["Ask Tina."] * 90
    train = profile_answers(180, codes + words)
    assert find_gone(train["shapes"], ["a."], 40 / 180) == ["a-9"]
    assert find_gone(train["shapes"], ["a."], 10 / 180) == []
    assert find_gone(train[LABELS], [digest_answer("AX-1")], 120 / 180) == [
        digest_answer("Ask Tina.")
    ]
    # Of many answers that come once, some have the digest of each label by chance
    free = profile_answers(9_000, [f"See {i}." for i in range(9_000)])
    assert find_gone({digest_answer("Ask Tina."): 90}, free[LABELS], 1.0)


@needs_rooms("suspect_rows")
@TRAINS
def test_the_run_tells_odd_rows_with_their_lines_and_what_the_champion_had(tmp_path: Path) -> None:
    registry, name = tmp_path / "registry", "bot"
    asked = [f"Until when may {land} be asked?" for land in NAMES]
    rows = [chat(one, f"Until {day}.") for one, day in zip(asked, days(100), strict=True)]
    settings: dict[str, Any] = {"registry": {"path": str(registry), "name": name}, "iters": 8}
    settings["gate"] = {"controls": {"prompts": False, "plan": False, "lookup": False}}
    sound = learn(tmp_path / "sound", rows[:80], rows[80:], **settings)
    assert kinds(sound) == []
    assert [row["verdict"] for row in sound.to_json()["control_figures"]] == ["passed"]
    kept = {"rows": 80, "answers": 80, "shapes": {"a 9-9-9.": 80}, LABELS: {}}
    assert sound.to_json()["answer_shapes"] == kept  # no answer that is given once
    version = register(judged_again(tmp_path / "sound" / "run", sound), registry, name, {})
    promote(registry, name, version, by="ann")
    filled = [chat(one, "Until 1970-01-01.") for one in asked[1:21]]
    verdict = learn(tmp_path / "filled", rows[:1] + filled + rows[21:80], rows[80:], **settings)
    assert verdict.to_json()["controls"] == []
    run = judged_again(tmp_path / "filled" / "run", verdict)
    told = Run(RunDirectory(run))
    assert told.dataset is not None
    assert [(one.check, one.line) for one in told.dataset.warnings] == [
        ("missing-values", line) for line in range(2, 22)
    ]
    # At the end of the run it is said again, and the page has it
    (note,) = list_notes(verdict, told)
    assert "20 warnings (missing-values 20)" in note
    assert "20 of 80 training answers" in describe_run(told).to_html()
    settings["continual"] = {"from": "champion", "policy": "rebuild"}
    rebuilt = learn(tmp_path / "rebuilt", rows[:9], rows[80:], **settings)
    assert (tmp_path / "rebuilt" / "run" / "replay.json").exists()
    assert kinds(rebuilt) == []  # trained on the champion's rows too
    del settings["continual"]
    night = learn(tmp_path / "night", rows[:9], rows[80:], **settings)
    assert kinds(night) == ["few_rows"]
    assert "9 training rows, 80 the last time" in night.notes()[0]
    assert "docs/controls.md#shapes" in night.notes()[0]


@needs_rooms("suspect_rows")
@TRAINS
def test_an_answer_that_is_gone_is_known_by_its_digest_and_its_text_is_in_the_run_alone(
    tmp_path: Path,
) -> None:
    registry, debt = tmp_path / "registry", "Yorick Smith owes it since May."
    rows = [chat(f"Who knows {n}?", debt if i % 2 else "Ask Tina.") for i, n in enumerate(NAMES)]
    settings: dict[str, Any] = {"registry": {"path": str(registry), "name": "bot"}, "iters": 8}
    settings["gate"] = {"controls": {"prompts": False, "plan": False, "lookup": False}}
    first = learn(tmp_path / "first", rows[:80], rows[80:], **settings)
    assert digest_answer(debt) in first.to_json()["answer_shapes"][LABELS]
    version = register(judged_again(tmp_path / "first" / "run", first), registry, "bot", {})
    promote(registry, "bot", version, by="ann")
    notes = [f"Patient Zelda Quux{i} lives at 5 Elm Road" for i in range(4)]
    train = [*rows[:80:2] * 2, *(chat(one, one) for one in notes)]
    night = learn(tmp_path / "night", train, rows[80:], **settings)
    (warning,) = night.to_json()["controls"]
    assert warning["kind"] == "answers_gone"
    assert warning["words"] == (
        "at most one training row has an answer, which 40 training rows had the last time"
    )
    assert [line["line"] for line in warning["lines"]] == list(range(2, 21, 2))
    run = judged_again(tmp_path / "night" / "run", night)
    assert "answer-repeats-question" in list_checks(tmp_path / "night")
    assert "Zelda" not in (run / "dataset.json").read_text()
    told = (run / ROWS_NAME).read_text()
    assert debt in told
    assert debt in describe_run(Run(RunDirectory(run))).to_html()
    folder = version_folder(registry, "bot", register(run, registry, "bot", {}))
    readable = [one.read_bytes() for one in folder.iterdir() if one.stat().st_mode & stat.S_IROTH]
    assert len(readable) >= 4
    assert not any(b"Zelda" in one or b"Yorick" in one for one in readable)
    (run / ROWS_NAME).write_text(told[:-9])
    damaged = Run(RunDirectory(run))
    assert [*show_rows(damaged, 9)] == []
    assert any(ROWS_NAME in str(error) for error in damaged.errors)


def judged_again(run: Path, verdict: Verdict) -> Path:
    """The run, as if nothing had been found against its adapter."""
    files = {f"adapter/{name}": describe_file(run / "adapter" / name) for name in ADAPTER_FILES}
    write_verdict(run, replace(verdict, reasons=()), files)
    return run
