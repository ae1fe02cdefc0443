"""Verdicts for the tests of pages: complete, with the fields that a test names changed."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from nested_core.records.verdict import Verdict

SUITE: dict[str, Any] = {
    "name": "capitals",
    "questions": 15,
    "base": 0.0,
    "parent": None,
    "champion": None,
    "candidate": 14 / 15,
    "difference": 14 / 15,
    "interval": [0.8, 1.0],
    "smallest_visible": 0.2,
    "verdict": "passed",
    "seconds": {},
    "odd": {},
}
LOSSES: dict[str, Any] = {
    "loss_before": 3.14159265,
    "loss_after": 0.0213456789,
    "selected_on_same_data": False,
    "file": "valid.jsonl",
    "examples": 84,
}
CHAMPION: dict[str, Any] = {
    "version": "c4a3" * 16,
    "loss": 1.191,
    "difference": -1.17,
    "interval": [-1.2, -1.1],
    "conclusion": "better",
}
GATE: dict[str, Any] = {
    "verdict": "passed",
    "reasons": [],
    "adapter_step": 80,
    "initial": {"path": "initial", "digest": "1417" * 16},
    "trained": {"path": "adapter", "digest": "ada9" * 16},
    "tensors": [],
}


def make_verdict(**fields: Any) -> Verdict:
    """A verdict that passed, with these fields of gate.json."""
    return TypeAdapter(Verdict).validate_python(GATE | fields)
