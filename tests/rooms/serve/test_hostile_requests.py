"""serve, asked what hypothesis draws; test_hostile_serving.py asks it more."""

from __future__ import annotations

import pytest

from tests.rooms.serve.hostile_requests import ask_over_two_swaps


@pytest.mark.slow("sixty requests over two swaps")
def test_no_request_harms_the_server_or_another_answer_over_two_swaps(registry, runs) -> None:
    asked = ask_over_two_swaps(registry, runs, count=60)
    assert asked.statuses[200] > 0
    assert asked.statuses[400] > 0
