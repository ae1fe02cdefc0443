"""The rules for what a line may hold, and what the core is given of this room."""

from __future__ import annotations

import polars as pl

from nested_core.data.room_checks import RowChecks
from nested_core.data.rules.rule_table import FrameRules, Rule
from nested_core.records.dataset import Findings
from nested_core.rooms.secrets.sensitive_data import (
    SENSITIVE_PATTERNS,
    find_sensitive_pattern_bits,
)


def _make_sensitive_data_rule(pattern_index: int) -> Rule:
    """Make the rule for one kind of secret or personal data, once a file, without its value."""
    is_absent = pl.col("sensitive") // 2**pattern_index % 2 == 0
    name = SENSITIVE_PATTERNS[pattern_index].name
    if SENSITIVE_PATTERNS[pattern_index].group == "personal":
        message = f"what looks like personal data ({name}) in {{count}} lines: {{places}}"
        return Rule("personal-data", "warning", is_absent, message, once=True)
    message = (
        f"what looks like a secret ({name}) in {{count}} lines: {{places}}; "
        "take it out, and change it where it is in use"
    )
    return Rule("likely-secret", "warning", is_absent, message, once=True)


SENSITIVE_DATA_RULES = FrameRules(
    columns={"sensitive": pl.UInt32},
    rules=tuple(map(_make_sensitive_data_rule, range(len(SENSITIVE_PATTERNS)))),
)


def _find(texts: pl.Series) -> dict[str, pl.Series]:
    """Return the column `sensitive` for the texts of lines: bits of what each may hold."""
    return {"sensitive": find_sensitive_pattern_bits(texts)}


def _add_findings(frame: pl.DataFrame, findings: Findings) -> None:
    """Add the findings on the lines of a file."""
    SENSITIVE_DATA_RULES.add_findings(frame.filter(pl.col("sensitive") != 0), findings)


CHECKS = RowChecks(SENSITIVE_DATA_RULES.columns, _find, _add_findings)
