"""The loss of every held-out example, as RUN_DIR/gate-losses.jsonl keeps it.

A line an example: file, line, supervised tokens, and mean losses in nats a token with the initial
adapter, the trained adapter, and the champion at the time of the gate; and how far the predictions
moved, as KL divergence in nats a token from the initial adapter, and from the base if that is
measured.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from nested_core.errors import DamagedError, describe_first_problem
from nested_core.gate.paired_difference import PairedDifference, compare_pairs
from nested_core.storage.strict_files import read_regular

OPTIONAL_COLUMNS = ("drift", "base_drift")
REQUIRED_COLUMNS = ("lines", "tokens", "before", "after")
Vector = np.ndarray[Any, np.dtype[np.float64]]


class _LossLine(BaseModel):
    """A line of gate-losses.jsonl; a loss that is not finite is null."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")
    file: str
    line: int
    tokens: int = Field(gt=0)
    before: float | None
    after: float | None
    champion: float | None
    drift: float | None = None
    base_drift: float | None = None


_LINES_VALIDATOR = TypeAdapter(list[_LossLine])


@dataclass(frozen=True, eq=False)
class ExampleLosses:
    """Losses of the same held-out examples with two adapters, or three.

    file: the name of the data set's file that holds the examples.
    lines: the line of each example in it, int64 (n,).
    tokens: supervised tokens of each example, all above 0, float64 (n,).
    before, after, champion: mean losses in nats a token, float64 (n,); NaN where not finite.
        `champion` is None where no champion was judged, and NaN for an example left out.
    drift, base_drift: mean KL(initial || trained) and KL(base || trained) in nats a token,
        float64 (n,); None where not measured.
    """

    file: str
    lines: np.ndarray[Any, np.dtype[np.int64]]
    tokens: Vector
    before: Vector
    after: Vector
    champion: Vector | None = None
    drift: Vector | None = None
    base_drift: Vector | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def mean(self, losses: Vector) -> float:
        """The mean loss a token over all examples; NaN if one of them is not finite."""
        return float(self.tokens @ losses / self.tokens.sum())

    def compare_trained_with(self, other: Vector) -> PairedDifference | None:
        """The trained adapter's losses minus others of the same examples; below 0 is better.

        None where a loss is not finite, or there is no example.
        """
        if not len(self) or not np.isfinite([other, self.after]).all():
            return None
        return compare_pairs(other, self.after, self.tokens)

    def examples_with_champion_loss(self) -> ExampleLosses:
        """The examples for which there is a loss of the champion."""
        if self.champion is None:
            known = np.zeros(len(self), np.bool_)
        else:
            known = np.isfinite(self.champion)
        columns = {
            name: column[known]
            for name in (*REQUIRED_COLUMNS, "champion", *OPTIONAL_COLUMNS)
            if (column := getattr(self, name)) is not None
        }
        return replace(self, **columns)

    def render(self) -> bytes:
        """The content of gate-losses.jsonl."""
        return "".join(f"{json.dumps(line)}\n" for line in self._lines()).encode()

    def sha256(self) -> str:
        """Of the content of gate-losses.jsonl."""
        return hashlib.sha256(self.render()).hexdigest()

    def _lines(self) -> Iterator[dict[str, Any]]:
        champion = self.champion if self.champion is not None else np.full(len(self), np.nan)
        columns = {"before": self.before, "after": self.after, "champion": champion}
        for name in OPTIONAL_COLUMNS:
            if (column := getattr(self, name)) is not None:
                columns[name] = column
        for row in range(len(self)):
            line = {
                "file": self.file,
                "line": int(self.lines[row]),
                "tokens": int(self.tokens[row]),
            }
            values = {name: float(column[row]) for name, column in columns.items()}
            yield line | {name: v if np.isfinite(v) else None for name, v in values.items()}


def read_example_losses(path: Path) -> ExampleLosses:
    """Read gate-losses.jsonl; DamagedError if it is missing or holds anything else."""
    content = read_regular(path)
    try:
        lines = _LINES_VALIDATOR.validate_json(b"[" + b",".join(content.splitlines()) + b"]")
    except ValidationError as error:
        raise DamagedError(f"{path}: {describe_first_problem(error)}.") from error
    has_champion = any(line.champion is not None for line in lines)
    written = lines[0].model_fields_set if lines else set()
    optional = {
        name: _to_vector([getattr(line, name) for line in lines])
        for name in OPTIONAL_COLUMNS
        if name in written
    }
    return ExampleLosses(
        file=lines[0].file if lines else "",
        lines=np.array([line.line for line in lines], np.int64),
        tokens=np.array([line.tokens for line in lines], np.float64),
        before=_to_vector([line.before for line in lines]),
        after=_to_vector([line.after for line in lines]),
        champion=_to_vector([line.champion for line in lines]) if has_champion else None,
        **optional,
    )


def _to_vector(losses: list[float | None]) -> Vector:
    return np.array([np.nan if loss is None else loss for loss in losses], np.float64)
