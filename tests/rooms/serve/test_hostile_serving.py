"""serve, asked 2,000 requests that hypothesis draws, while the champion changes twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.example import MODEL
from tests.rooms.serve.hostile_requests import ask_over_two_swaps
from tests.rooms.serve.versions import make_base, record_canary, write_version_run

pytestmark = pytest.mark.reliability

REQUESTS = 2_000


@pytest.mark.timeout(1800)
def test_2000_drawn_requests_harm_neither_the_server_nor_another_answer(tmp_path: Path) -> None:
    base = make_base(MODEL, tmp_path / "base")
    runs = {seed: write_version_run(tmp_path / f"run-{seed}", base, seed) for seed in (1, 2)}
    for run in runs.values():
        record_canary(run, base)
    asked = ask_over_two_swaps(tmp_path / "registry", runs, REQUESTS)
    print(dict(asked.statuses), dict(asked.compared))
    assert asked.statuses[200] > 100
    assert asked.statuses[400] > 100
