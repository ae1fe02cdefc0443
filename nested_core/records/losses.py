"""gate-losses.jsonl: the loss of every held-out example, one line an example.

A line has file, line, supervised tokens, and mean losses with the initial adapter,
the trained adapter, the champion when the gate ran and the policy's reference; the KL divergence in
nats/token of the predictions from those of the initial adapter, and of the base if that was
measured. An example that the candidate or a parent was trained on is marked `left_out` and is in no
mean. Examples with the same `cluster` are resampled together. `content` is a digest of the example.
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
Vector = np.typing.NDArray[np.float64]
Contents = np.typing.NDArray[np.uint64]


class _LossLine(BaseModel):
    """One line of gate-losses.jsonl; a loss that is not finite is null."""

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
    content: int | None = Field(default=None, ge=0)


_LINES_VALIDATOR = TypeAdapter(Annotated[list[_LossLine], FailFast()])


@dataclass(frozen=True, eq=False)
class ExampleLosses:
    """Losses of the same held-out examples with several adapters, one array element an example.

    file: the name of the data set's file that holds the examples.
    lines: the line of each example in it, int64 (n,).
    tokens: supervised tokens of each example, all above 0, float64 (n,).
    before, after: mean losses in `unit` with the initial and the trained adapter, float64 (n,);
        NaN if not finite.
    champion: the champion's losses, float64 (n,), NaN for an example left out; None if no champion
        was judged.
    reference: losses of the version that the policy names as the reference; None without one, and
        if the champion is that version.
    drift, base_drift: mean KL(initial || trained) and KL(base || trained) in nats/token, float64
        (n,); None if not measured.
    left_out: whether the candidate or a parent was trained on the example, bool (n,); None if no
        example is left out.
    clusters: the number of each example's cluster, int64 (n,), such as one for each prompt; None if
        each example is a cluster by itself.
    counts_rows: whether each row counts as independent although rows share clusters, decided on all
        rows of the file; None if these are all rows.
    contents: the digest of each example's content, by which losses of other files are found,
        uint64 (n,); None if it was not recorded.
    unit: of the losses; with one that counts examples, each has 1 in `tokens`.
    """

    file: str
    lines: np.typing.NDArray[np.int64]
    tokens: Vector
    before: Vector
    after: Vector
    champion: Vector | None = None
    reference: Vector | None = None
    drift: Vector | None = None
    base_drift: Vector | None = None
    left_out: np.typing.NDArray[np.bool_] | None = None
    clusters: Indices | None = None
    counts_rows: bool | None = None
    contents: Contents | None = None
    unit: str = NATS_PER_TOKEN

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.tokens)

    def mean(self, losses: Vector) -> float:
        """Return the mean loss per token of all examples.

        NaN if one is not finite or there are none.

        losses: one of the columns of this object, float64 (n,).
        """
        return float(self.tokens @ losses / self.tokens.sum()) if len(self) else float("nan")

    def compare_trained_with(self, other: Vector) -> PairedDifference | None:
        """Compare the trained adapter's losses with other losses of the same examples in pairs.

        The difference is trained minus other; below 0 is better. None without examples, or if a
        loss is not finite.
        """
        if not len(self) or not np.isfinite([other, self.after]).all():
            return None
        return compare_pairs(other, self.after, self.tokens, self.drawn_clusters)

    @property
    def are_rows_drawn(self) -> bool:
        """Whether single rows are resampled, because all rows of the file have too few clusters."""
        if self.counts_rows is None:
            return has_too_few_clusters(self.clusters)
        return self.counts_rows

    @property
    def drawn_clusters(self) -> Indices | None:
        """Clusters that the bootstrap resamples, int64 (n,); None if it resamples single rows."""
        return None if self.are_rows_drawn else self.clusters

    @property
    def independent_examples(self) -> int:
        """The number of independent examples: each resampled cluster counts once."""
        clusters = self.drawn_clusters
        return len(self) if clusters is None else len(np.unique(clusters))

    def few_prompts(self) -> int | None:
        """Return the number of prompts if it is too small to resample by prompt; else None."""
        if self.clusters is None or not self.are_rows_drawn:
            return None
        return len(np.unique(self.clusters))

    def leaving_out(self, is_seen: np.typing.NDArray[np.bool_]) -> ExampleLosses:
        """Return a copy that marks the examples with `is_seen`, bool (n,), as left out."""
        return replace(self, left_out=is_seen) if is_seen.any() else self

    def counted(self) -> ExampleLosses:
        """Return the examples that neither the candidate nor a parent was trained on."""
        return self if self.left_out is None else self.select(~self.left_out)

    def examples_with_champion_loss(self) -> ExampleLosses:
        """Return the examples that have a finite loss with the champion."""
        if self.champion is None:
            return self.select(np.zeros(len(self), np.bool_))
        return self.select(np.isfinite(self.champion))

    def select(self, is_kept: np.typing.NDArray[np.bool_]) -> ExampleLosses:
        """Return the examples with True in `is_kept`, bool (n,)."""
        names = (*REQUIRED_COLUMNS, "champion", *OPTIONAL_COLUMNS, "clusters", "contents")
        columns = {
            name: column[is_kept] for name in names if (column := getattr(self, name)) is not None
        }
        return replace(self, **columns, left_out=None, counts_rows=self.are_rows_drawn)

    def render(self) -> bytes:
        """Return the bytes of gate-losses.jsonl."""
        return "".join(f"{json.dumps(line)}\n" for line in self._lines()).encode()

    def sha256(self) -> str:
        """Return the SHA-256 of the bytes of gate-losses.jsonl."""
        return hashlib.sha256(self.render()).hexdigest()

    def _lines(self) -> Iterator[dict[str, object]]:
        """Yield the JSON object of each example, in order, as gate-losses.jsonl holds it.

        A loss that is not finite, or that was not measured, is null.
        """
        champion = self.champion if self.champion is not None else np.full(len(self), np.nan)
        columns = {"before": self.before, "after": self.after, "champion": champion}
        for name in OPTIONAL_COLUMNS:
            if (column := getattr(self, name)) is not None:
                columns[name] = column
        # `lines`, `tokens` and the columns are vectors with a value for each example
        for row in range(len(self)):
            line: dict[str, object] = {
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
            if self.contents is not None:
                line["content"] = int(self.contents[row])
            yield line


def read_example_losses(path: Path) -> ExampleLosses:
    """Read gate-losses.jsonl, a held-out example a line, to a vector for each field.

    Fields that no line has are None. Raises DamagedError if the file is missing or a line has
    another form.
    """
    content = read_regular(path)
    with naming_damaged_file(path):
        lines = _LINES_VALIDATOR.validate_json(b"[" + b",".join(content.splitlines()) + b"]")
    left_out = [line.left_out is True for line in lines]
    clusters = [line.cluster for line in lines]
    contents = [line.content for line in lines]
    has_champion = any(line.champion is not None for line in lines)
    # Every line has the same fields; which of the optional ones, the first line tells
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
        contents=np.array(contents, np.uint64) if None not in contents and contents else None,
        **optional,
    )


def _to_vector(losses: list[float | None]) -> Vector:
    """Convert losses to a float64 array, with NaN for None."""
    return np.array([np.nan if loss is None else loss for loss in losses], np.float64)
