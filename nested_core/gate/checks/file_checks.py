"""The checks that read files alone, in order: those for any two adapters, and those for a run.

`promote` repeats the checks for a run, because they load no model.
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
