"""The artifacts that lead from a flow run to its run directory, and show how the loss went."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect.artifacts import create_link_artifact, create_table_artifact

SHOWN_POINTS = 60


def link_run(run_dir: Path) -> None:
    """The run directory, as a link for who sits at the worker's machine, and as its path."""
    path = run_dir.resolve()
    create_link_artifact(
        key="run-directory",
        link=path.as_uri(),
        link_text=str(path),
        description="Everything that this run leaves behind, on the worker's machine.",
    )


def show_losses(records: Sequence[dict[str, Any]]) -> None:
    """The losses over the steps as a table, thinned to what fits a page; the last is always in."""
    every = -(-len(records) // SHOWN_POINTS) or 1
    shown = [
        r for i, r in enumerate(records) if i % every == 0 or r is records[-1] or "val_loss" in r
    ]
    keys = ("step", "loss", "val_loss", "learning_rate")
    rows = [{key: record.get(key) for key in keys} for record in shown]
    create_table_artifact(key="loss-curve", table=rows, description="From metrics.jsonl.")
