"""Progress of work in known amounts: on standard error, and only where the work takes long."""

from __future__ import annotations

import pytest

from flows.terminal import ProgressLine


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the terminal sees; a test moves it."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def test_short_work_shows_nothing(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    show = ProgressLine()
    for done in range(1, 11):
        clock[0] += 0.19
        show("tokenising", done, 10)
    assert capsys.readouterr() == ("", "")


def test_long_work_is_a_line_now_and_then(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    show = ProgressLine()
    for done in range(1, 101):
        clock[0] += 0.07
        show("tokenising", done, 100)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == [
        "tokenising: 29%, 5 s left",
        "tokenising: 58%, 3 s left",
        "tokenising: 87%, 1 s left",
        "tokenising: 100%",
    ]
