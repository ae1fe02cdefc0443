"""The run that the gate's tests judge, for the check of the ancestors.

`continual.policy: auto` forecasts minutes: its tests need that room.
"""

from nested_core.seams import is_there
from tests.core.gate.conftest import candidate

__all__ = ["candidate"]

collect_ignore = [] if is_there("minutes") else ["test_policy.py"]
