"""Prefect's threads end after each test."""

from __future__ import annotations

from tests.flows.conftest import _prefect_is_quiet, command_run, new_name

__all__ = ["_prefect_is_quiet", "command_run", "new_name"]
