"""serve, asked what hypothesis draws; tests/reliability/test_hostile_serving.py asks it more."""

from __future__ import annotations

from pathlib import Path

from tests.reliability.hostile_requests import ask_over_two_swaps


def test_no_request_harms_the_server_or_another_answer_over_two_swaps(
    registry: Path, runs: dict[int, Path]
) -> None:
    statuses = ask_over_two_swaps(registry, runs, count=20)
    assert statuses[200] > 0
    assert statuses[400] > 0
