"""Prefect's threads end after each test; the deployment is tried where the room deploy is there."""

from __future__ import annotations

from nested_core.seams import is_there
from tests.flows.conftest import _prefect_is_quiet

__all__ = ["_prefect_is_quiet"]

collect_ignore = [] if is_there("deploy") else ["test_deployment.py"]
