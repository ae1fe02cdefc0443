"""Commands as a person gives them, in a folder with a run."""

from __future__ import annotations

from tests.flows.conftest import command_run, nested_tune

__all__ = ["command_run", "nested_tune"]
