"""The command line as a person calls it; Prefect's threads end after each test."""

from __future__ import annotations

from tests.flows.conftest import _prefect_is_quiet, nested_tune

__all__ = ["_prefect_is_quiet", "nested_tune"]
