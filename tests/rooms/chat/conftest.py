"""A run that commands look at."""

from __future__ import annotations

from tests.flows.conftest import command_run

__all__ = ["command_run"]
