"""serve, asked what hypothesis draws, while the champion changes twice."""

from __future__ import annotations

import pytest

FULL = [pytest.mark.reliability, pytest.mark.timeout(1800)]


@pytest.mark.parametrize(
    ("count", "least"),
    [
        pytest.param(60, 0, marks=pytest.mark.slow("sixty requests over two swaps")),
        pytest.param(2_000, 100, marks=FULL),
    ],
)
def test_drawn_requests_harm_neither_the_server_nor_another_answer(
    registry, runs, count, least
) -> None:
    from tests.rooms.serve.hostile_requests import ask_over_two_swaps  # openai takes half a second

    asked = ask_over_two_swaps(registry, runs, count=count)
    print(dict(asked.statuses), dict(asked.compared))
    assert asked.statuses[200] > least
    assert asked.statuses[400] > least
