"""What must hold of a registry after a crash, and after the next change has mended it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from nested_core.registry import audit, history, read_champion
from nested_core.registry.ledger import read_ledger
from nested_core.registry.promotion_policy import promote_missed_versions
from nested_core.storage.adapter import read_adapter

NAME = "capitals"


def missed(registry: Path) -> dict[str, str]:
    """What `reconcile` decides, in its sentences."""
    decisions = promote_missed_versions(registry, NAME)
    return {version: decision.sentence for version, decision in decisions.items()}


def last_line(registry: Path) -> dict[str, Any]:
    """The last line of the history, whatever it is about."""
    return read_ledger(registry / NAME).entries[-1].fields()


def chained_line(registry: Path, entry: dict[str, Any]) -> bytes:
    """A line that follows the last one of the history, as a writer adds it."""
    last = (registry / NAME / "history.jsonl").read_bytes().splitlines(keepends=True)[-1]
    entry = entry | {"previous_line_sha256": hashlib.sha256(last).hexdigest()}
    return json.dumps(entry).encode() + b"\n"


def assert_old_or_new_and_whole(registry: Path, old: str | None, new: str) -> None:
    """What a reader sees right after the crash."""
    champion = read_champion(registry, NAME)
    assert champion in (old, new)
    assert audit(registry, NAME).findings == ()
    if champion is not None:
        assert read_adapter(registry / NAME / "champion").digest() == champion
    if champion == new:
        assert history(registry, NAME)[-1]["version"] == new


def assert_settled(registry: Path) -> None:
    """What is so after any later change: history, link and record agree; nothing is left over."""
    report = audit(registry, NAME)
    assert report.findings == ()
    assert report.unfinished is None
    assert not any("unfinished" in line for line in history(registry, NAME))
    last = last_line(registry)
    is_change = last["action"] in ("promote", "rollback", "moved")
    assert last["version" if is_change else "previous"] == report.champion
    lines = (registry / NAME / "history.jsonl").read_bytes().split(b"\n")
    assert lines.pop() == b""
    assert all(isinstance(json.loads(line), dict) for line in lines)
    assert not [path for path in registry.rglob(".*") if path.name != ".lock"]
