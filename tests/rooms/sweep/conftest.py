"""Prefect's threads end after each test.

How long a whole run is, is what the room planning finds out.
"""

from __future__ import annotations

from nested_core.seams import is_there
from tests.flows.conftest import _prefect_is_quiet

__all__ = ["_prefect_is_quiet"]

OF_PLANNING = ["test_command.py", "test_search.py"]
collect_ignore = [] if is_there("planning") else OF_PLANNING
