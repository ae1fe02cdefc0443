"""The artifacts that lead from a flow run to its run directory, and show how the loss went."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tasks.artifacts import publish_link, publish_table

SHOWN_POINTS = 60


def create_run_link(run_dir: Path) -> None:
    """The run directory, as a link for who sits at the worker's machine, and as its path."""
    path = run_dir.resolve()
    description = "Everything that this run leaves behind, on the worker's machine."
    publish_link("run-directory", path.as_uri(), str(path), description)


def create_loss_table(records: Sequence[dict[str, Any]]) -> None:
    """The losses over the steps as a table, thinned to what fits a page; the last is always in."""
    every = -(-len(records) // SHOWN_POINTS) or 1
    shown = [
        r for i, r in enumerate(records) if i % every == 0 or r is records[-1] or "val_loss" in r
    ]
    keys = ("step", "loss", "val_loss", "learning_rate")
    rows = [{key: record.get(key) for key in keys} for record in shown]
    publish_table("loss-curve", rows, "From metrics.jsonl.")
