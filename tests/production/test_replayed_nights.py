"""Twenty nights of two adapters: what is known not to help trains once, and is told once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flows.conftest import drain_prefect
from tests.production.postgresql import Cluster
from tests.production.replayed_nights import (
    ADAPTERS,
    EVENTS_KEPT_FOR,
    STORY,
    ReplayStack,
    make_a_day_older,
    measure,
    replay,
)
from tests.webhook_server import serving_webhook

pytestmark = [pytest.mark.production, pytest.mark.timeout(3600)]
FIRST = {
    "better": "Promoted",
    "rejected": "Rejected: worse",
    "declined": "Waits for approval",  # and then somebody says no
    "blocked": "Promoted",  # and then rolled back
}


@pytest.fixture
def stack(tmp_path: Path, binaries: Path, own_random_state: None) -> Iterator[ReplayStack]:
    """Its flows run in this process: what Prefect started and drew here ends with it."""
    made = ReplayStack(tmp_path / "replay", Cluster(binaries))
    made.folder.mkdir()
    try:
        yield made
    finally:
        drain_prefect()
        made.stop()


def test_a_night_that_is_known_not_to_help_trains_nothing_and_tells_nobody(stack) -> None:
    with serving_webhook() as webhook:
        stack.start("--notify", webhook.url)
        seen = replay(stack, webhook, len(STORY), every=len(STORY))
        for _ in range(EVENTS_KEPT_FOR.days + 1):
            make_a_day_older(stack)
        measure(stack, len(STORY))  # once the server has removed what is too old
        kept = stack.query("SELECT event FROM events WHERE event = 'adapter.rolled_back'")
    again = [night for night in seen.nights if night.kind.endswith("again")]
    first = [night for night in seen.nights if not night.kind.endswith("again")]
    assert len(first) == len(ADAPTERS) * sum(not kind.endswith("again") for kind in STORY)
    assert all(night.state == FIRST[night.kind] for night in first)
    assert all(night.trained_seconds > 0 for night in first)
    assert {night.trained_seconds for night in again} == {0.0}
    assert {night.state for night in again} == {"Skipped: unchanged", "Skipped: hopeless"}
    # Else whoever looks next tells of them a second time: the history's times are those of today.
    assert len(kept) == len(ADAPTERS)
    for alert in ("Rejected", "Waits for approval", "Rolled back"):
        assert len([text for text in seen.alerts if text.startswith(alert)]) == len(ADAPTERS)
