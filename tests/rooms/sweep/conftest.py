"""Prefect's threads end after each test."""

from __future__ import annotations

from tests.flows.conftest import _prefect_is_quiet

__all__ = ["_prefect_is_quiet"]
