"""The command line as a person calls it; Prefect's threads end after each test.

What the alerts are about is the room nights'.
"""

from __future__ import annotations

from nested_core.seams import is_there
from tests.flows.conftest import _prefect_is_quiet, nested_tune

__all__ = ["_prefect_is_quiet", "nested_tune"]

OF_NIGHTS = ["test_alerts.py", "test_automation_triggers.py"]
collect_ignore = [] if is_there("nights") else OF_NIGHTS
