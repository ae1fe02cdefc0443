"""The checks that read files alone, in order: of any two adapters, and of a run.

`promote` makes those of a run again, and loads no model for them.
"""

from __future__ import annotations

from nested_core.gate.checks.judged import Check, CheckedRun, Judged
from nested_core.gate.checks.tensors import (
    CHANGE,
    CONFIGURATION,
    EFFECT,
    FINITE_PRODUCTS,
    FINITE_TENSORS,
    LAYOUT,
    NAMED_BASE,
    TENSORS,
)
from nested_core.gate.checks.updates import SKIPPED_UPDATES, UPDATES

CHECKS_OF_ADAPTERS: tuple[Check[Judged], ...] = (
    TENSORS,
    CONFIGURATION,
    NAMED_BASE,
    LAYOUT,
    FINITE_TENSORS,
    *CHANGE,
    FINITE_PRODUCTS,
    EFFECT,
)
CHECKS_OF_FILES: tuple[Check[CheckedRun], ...] = (*CHECKS_OF_ADAPTERS, SKIPPED_UPDATES, UPDATES)
