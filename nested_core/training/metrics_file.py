"""metrics.jsonl: one JSON object a line, flushed at every report, truncated on resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nested_core.storage.atomic import finite_or_none, write_bytes


def append_metrics(path: Path, record: dict[str, Any]) -> None:
    """Append one record; a number that is not finite becomes null, as JSON has no word for it."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(finite_or_none(record), allow_nan=False) + "\n")
        file.flush()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete records, without a last line that a killed process left half-written."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def truncate_metrics(path: Path, step: int, count: int) -> int:
    """Keep the first `count` records, but none of a later step; return how many there are."""
    kept = [record for record in read_metrics(path)[:count] if record["step"] <= step]
    write_bytes(path, "".join(json.dumps(record) + "\n" for record in kept).encode())
    return len(kept)
