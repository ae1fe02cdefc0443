"""Prefect's order of events, which waits for a lost one a minute in place of fifteen.

A server that was killed has forgotten which events it saw, and holds back those that follow them:
benchmarks/faults.md. Nights in fast motion are not to wait for that.
"""

from __future__ import annotations

from datetime import timedelta

from prefect.server.events.ordering import memory

memory.PRECEDING_EVENT_LOOKBACK = timedelta(minutes=1)
CausalOrdering = memory.CausalOrdering
