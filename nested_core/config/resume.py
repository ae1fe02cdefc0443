"""Which keys of a configuration may differ between a run and its resumption."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nested_core.config.schema import FineTuneConfig
from nested_core.errors import ConfigError

# They do not change what is computed. The number of ranks does: dropout, and the order of sums.
FREE_ON_RESUME = frozenset(
    {"iters", "steps_per_report", "save_every", "test", "test_batches", "adapter_path", "gate"}
    | {"registry", "report_to", "project_name", "clear_cache_threshold", "train"}
)
MAX_SHOWN = 10


def refuse_differences(old: FineTuneConfig, new: FineTuneConfig, run_dir: Path) -> None:
    """Raise ConfigError, listing every key that matters and differs, with both values."""
    before, after = old.model_dump(mode="json"), new.model_dump(mode="json")
    differing = [key for key in before if key not in FREE_ON_RESUME and before[key] != after[key]]
    lines = [line for key in differing for line in _differences(key, before[key], after[key])]
    if lines:
        more = [f"  and {len(lines) - MAX_SHOWN} more"] if len(lines) > MAX_SHOWN else []
        raise ConfigError(
            f"{run_dir} cannot be resumed with a configuration that differs:\n"
            + "\n".join(lines[:MAX_SHOWN] + more)
            + "\nGive what the run began with, or another --run-dir for a new run."
        )


def _differences(name: str, before: Any, after: Any) -> Iterator[str]:
    """A line for a key, or, of a section, for each key in it that differs."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in [*before, *(key for key in after if key not in before)]:
            if before.get(key) != after.get(key):
                yield from _differences(f"{name}.{key}", before.get(key), after.get(key))
    else:
        yield f"  {name}: {before} in the run, {after} now"
