"""Lines of stages on standard error, for commands that are silent for long otherwise."""

from __future__ import annotations

from flows.terminal import run_follower
from flows.terminal.run_follower import showing_stages
from nested_core.text.stages import receiving_stages, stages
from tests.waiting import wait_until


def test_a_stage_is_shown_while_it_lasts_and_again_with_the_time(capsys, monkeypatch) -> None:
    monkeypatch.setattr(run_follower, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(run_follower, "SECONDS_BEFORE_FIRST_LINE", 0.0)
    monkeypatch.setattr(run_follower, "SECONDS_BETWEEN_REPEATS", 0.02)
    shown = ""

    def has_shown(text: str) -> bool:
        nonlocal shown
        shown += capsys.readouterr().err
        return text in shown

    with showing_stages("loading"):
        wait_until(lambda: has_shown("loading\n"))
        stages.info("%d of %d answered", 1, 2)
        wait_until(lambda: has_shown("1 of 2 answered ("))
    assert shown.index("loading") < shown.index("1 of 2 answered\n")
    stages.info("not of this command")
    assert "not of this" not in capsys.readouterr().err


def test_the_innermost_block_alone_is_told_of_a_stage() -> None:
    outer: list[str] = []
    inner: list[str] = []
    with receiving_stages(outer.append):
        stages.info("before")
        with receiving_stages(inner.append):
            stages.info("within")
        stages.info("after")
    assert (outer, inner) == (["before", "after"], ["within"])
