"""Flows of this room: what Prefect leaves behind ends with the test."""

from tests.flows.conftest import _prefect_is_quiet

__all__ = ["_prefect_is_quiet"]
