"""Registries made of runs that were written by hand; Prefect's threads end after each test."""

from __future__ import annotations

from tests.core.registry.conftest import add, judged, make_run, no_time_to_decide, registry
from tests.flows.conftest import _prefect_is_quiet

__all__ = ["_prefect_is_quiet", "add", "judged", "make_run", "no_time_to_decide", "registry"]
