"""Prefect's messages within a server, tried until they are taken: the broker of the tests' server.

On SQLite two of the server's tasks that write at once get "database is locked" without a wait, and
after four tries within a few hundredths of a second Prefect gives the message up: no automation
hears of that event, nor for 15 minutes of those that follow it, and a task run stays as it was.
"""

from __future__ import annotations

from typing import Any

from prefect.server.utilities.messaging import memory
from prefect.server.utilities.messaging.memory import Publisher, break_topic, ephemeral_subscription

__all__ = ["Consumer", "Publisher", "break_topic", "ephemeral_subscription"]

TRIES = 10_000  # a lock is held for hundredths of a second


class Consumer(memory.Consumer):
    """Prefect's, whose subscription gives up only after so many tries."""

    def __init__(
        self, topic: str, subscription: memory.Subscription | None = None, **more: Any
    ) -> None:
        taken = subscription or memory.Topic.by_name(topic).subscribe(max_retries=TRIES)
        super().__init__(topic, taken, **more)
