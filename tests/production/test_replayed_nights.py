"""Twenty nights of two adapters: what is known not to help trains once, and is told once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.production.postgresql import Cluster
from tests.production.replayed_nights import ADAPTERS, KINDS, STORY, ReplayStack, replay
from tests.webhook_server import serving_webhook

pytestmark = [pytest.mark.production, pytest.mark.timeout(3600)]
FIRST = {
    "better": "Promoted",
    "rejected": "Rejected: worse",
    "declined": "Waits for approval",  # and then somebody says no
    "blocked": "Promoted",  # and then rolled back
}


@pytest.fixture
def stack(tmp_path: Path, binaries: Path) -> Iterator[ReplayStack]:
    made = ReplayStack(tmp_path / "replay", Cluster(binaries))
    made.folder.mkdir()
    try:
        yield made
    finally:
        made.stop()


def test_a_night_that_is_known_not_to_help_trains_nothing_and_tells_nobody(
    stack: ReplayStack,
) -> None:
    with serving_webhook() as webhook:
        stack.start("--notify", webhook.url)
        seen = replay(stack, webhook, len(STORY), every=len(STORY))
    again = [night for night in seen.nights if night.kind.endswith("again")]
    first = [night for night in seen.nights if not night.kind.endswith("again")]
    assert [night.kind for night in first] == [kind for kind in KINDS for _ in ADAPTERS]
    assert all(night.state == FIRST[night.kind] for night in first)
    assert all(night.trained_seconds > 0 for night in first)
    assert {night.trained_seconds for night in again} == {0.0}
    assert {night.state for night in again} == {"Skipped: unchanged", "Skipped: hopeless"}
    rejections = [text for text in seen.alerts if text.startswith("Rejected")]
    assert len(rejections) == len(ADAPTERS)
