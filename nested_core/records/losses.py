"""The loss of every held-out example, as RUN_DIR/gate-losses.jsonl keeps it.

A line an example: file, line, supervised tokens, and mean losses with the initial
adapter, the trained adapter, the champion at the time of the gate and the policy's reference; how
far the predictions moved, as KL divergence in nats/token from the initial adapter, and from the
base if that is measured. An example that the candidate or a parent was trained on is marked
`left_out`, and is in no mean; examples with the same `cluster` are drawn together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, FailFast, Field, TypeAdapter

from nested_core.errors import naming_damaged_file
from nested_core.records.paired_difference import (
    Indices,
    PairedDifference,
    compare_pairs,
    has_too_few_clusters,
)
from nested_core.storage.untrusted_files import read_regular
from nested_core.text.loss_format import NATS_PER_TOKEN

OPTIONAL_COLUMNS = ("reference", "drift", "base_drift")
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
    reference: float | None = None
    drift: float | None = None
    base_drift: float | None = None
    left_out: Literal[True] | None = None
    cluster: int | None = Field(default=None, ge=0)


_LINES_VALIDATOR = TypeAdapter(Annotated[list[_LossLine], FailFast()])


@dataclass(frozen=True, eq=False)
class ExampleLosses:
    """Losses of the same held-out examples with two adapters, or three.

    file: the name of the data set's file that holds the examples.
    lines: the line of each example in it, int64 (n,).
    tokens: supervised tokens of each example, all above 0, float64 (n,).
    before, after, champion: mean losses in `unit`, float64 (n,); NaN where not finite.
        `champion` is None if no champion was judged, and NaN for an example left out.
    reference: the same of the version that the policy names as the reference; None without one, and
        where the champion is it.
    drift, base_drift: mean KL(initial || trained) and KL(base || trained) in nats/token,
        float64 (n,); None if not measured.
    left_out: whether each example is one that the candidate or a parent was trained on, bool (n,);
        None if no example is.
    clusters: the number of each example's cluster, int64 (n,); None if each is its own.
    counts_rows: whether each row counts as independent although rows share clusters, decided on all
        rows of the file; None if these are all.
    unit: of the losses. One that counts examples has 1 in `tokens`.
    """

    file: str
    lines: np.ndarray[Any, np.dtype[np.int64]]
    tokens: Vector
    before: Vector
    after: Vector
    champion: Vector | None = None
    reference: Vector | None = None
    drift: Vector | None = None
    base_drift: Vector | None = None
    left_out: np.ndarray[Any, np.dtype[np.bool_]] | None = None
    clusters: Indices | None = None
    counts_rows: bool | None = None
    unit: str = NATS_PER_TOKEN

    def __len__(self) -> int:
        return len(self.tokens)

    def mean(self, losses: Vector) -> float:
        """The mean loss a token over all examples; NaN if one of them is not finite."""
        return float(self.tokens @ losses / self.tokens.sum()) if len(self) else float("nan")

    def compare_trained_with(self, other: Vector) -> PairedDifference | None:
        """The trained adapter's losses minus others of the same examples; below 0 is better.

        None if a loss is not finite, or there is no example.
        """
        if not len(self) or not np.isfinite([other, self.after]).all():
            return None
        return compare_pairs(other, self.after, self.tokens, self.drawn_clusters)

    @property
    def are_rows_drawn(self) -> bool:
        """Whether rows are the draw because all rows of the file have too few clusters."""
        if self.counts_rows is None:
            return has_too_few_clusters(self.clusters)
        return self.counts_rows

    @property
    def drawn_clusters(self) -> Indices | None:
        """The clusters that are drawn, int64 (n,); None if each row is drawn by itself."""
        return None if self.are_rows_drawn else self.clusters

    @property
    def independent_examples(self) -> int:
        """How many examples are independent: those of one cluster are one."""
        clusters = self.drawn_clusters
        return len(self) if clusters is None else len(np.unique(clusters))

    def few_prompts(self) -> int | None:
        """How many prompts these rows have, where rows are drawn for lack of prompts; else None."""
        if self.clusters is None or not self.are_rows_drawn:
            return None
        return len(np.unique(self.clusters))

    def leaving_out(self, is_seen: np.ndarray[Any, np.dtype[np.bool_]]) -> ExampleLosses:
        """The same, with these examples marked as left out, bool (n,)."""
        return replace(self, left_out=is_seen) if is_seen.any() else self

    def counted(self) -> ExampleLosses:
        """The examples that neither the candidate nor a parent was trained on."""
        return self if self.left_out is None else self.select(~self.left_out)

    def examples_with_champion_loss(self) -> ExampleLosses:
        """The examples for which there is a loss of the champion."""
        if self.champion is None:
            return self.select(np.zeros(len(self), np.bool_))
        return self.select(np.isfinite(self.champion))

    def select(self, is_kept: np.ndarray[Any, np.dtype[np.bool_]]) -> ExampleLosses:
        """These examples alone, bool (n,)."""
        names = (*REQUIRED_COLUMNS, "champion", *OPTIONAL_COLUMNS, "clusters")
        columns = {
            name: column[is_kept] for name in names if (column := getattr(self, name)) is not None
        }
        return replace(self, **columns, left_out=None, counts_rows=self.are_rows_drawn)

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
            line: dict[str, Any] = {
                "file": self.file,
                "line": int(self.lines[row]),
                "tokens": int(self.tokens[row]),
            }
            values = {name: float(column[row]) for name, column in columns.items()}
            line |= {name: v if np.isfinite(v) else None for name, v in values.items()}
            if self.left_out is not None and self.left_out[row]:
                line["left_out"] = True
            if self.clusters is not None:
                line["cluster"] = int(self.clusters[row])
            yield line


def read_example_losses(path: Path) -> ExampleLosses:
    """Read gate-losses.jsonl; DamagedError if it is missing or holds anything else."""
    content = read_regular(path)
    with naming_damaged_file(path):
        lines = _LINES_VALIDATOR.validate_json(b"[" + b",".join(content.splitlines()) + b"]")
    left_out = [line.left_out is True for line in lines]
    clusters = [line.cluster for line in lines]
    has_champion = any(line.champion is not None for line in lines)
    written = lines[0].model_fields_set if lines else set()
    optional: dict[str, Any] = {
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
        left_out=np.array(left_out, np.bool_) if any(left_out) else None,
        clusters=np.array(clusters, np.int64) if None not in clusters and clusters else None,
        **optional,
    )


def _to_vector(losses: list[float | None]) -> Vector:
    return np.array([np.nan if loss is None else loss for loss in losses], np.float64)
