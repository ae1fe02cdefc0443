"""What must hold of a registry after a crash, and after the next change has mended it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

from nested_core.config.sections import RegistrySection
from nested_core.registry import Decision, read_champion
from nested_core.registry.ledger import NO_ORIGIN, read_ledger
from nested_core.registry.link_and_views import make_views, read_view, writing
from nested_core.registry.policy import set_policy
from nested_core.registry.promotion_policy import decide, promote_missed_versions
from tests.registry_care import audit, collect_garbage

NAME = "capitals"


def promote_by_policy(section: RegistrySection, version: str, champion: str | None) -> Decision:
    """What this section and the registry's policy make of a version that is registered."""
    with writing(Path(str(section.path)), str(section.name)) as folder:
        return decide(folder, section, version, champion, origin=NO_ORIGIN)


def missed(registry: Path) -> dict[str, str]:
    """What `reconcile` decides, in its sentences."""
    decisions = promote_missed_versions(registry, NAME)
    return {version: decision.sentence for version, decision in decisions.items()}


def set_keys(registry: Path, **changes: Any) -> None:
    set_policy(registry, NAME, by="ann", changes=changes)


def section(registry: Path, mode: str) -> RegistrySection:
    return RegistrySection.model_validate({"path": str(registry), "name": NAME, "promote": mode})


def clock_at(time: datetime) -> type[datetime]:
    """A clock that stands still."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return time

    return Clock


def collected(registry: Path, keep: int) -> set[str]:
    return set(collect_garbage(registry, NAME, by="ann", keep=keep).collected)


def last_line(registry: Path) -> dict[str, Any]:
    """The last line of the history, whatever it is about."""
    return read_ledger(registry / NAME).entries[-1].fields()


def restore_from(saved: Path, path: Path) -> None:
    """Put a file, link or folder of a registry back as it is in a backup, or take it away."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if saved.is_dir() and not saved.is_symlink():
        shutil.copytree(saved, path, symlinks=True)
    elif os.path.lexists(saved):
        shutil.copy2(saved, path, follow_symlinks=False)


def chained_line(registry: Path, entry: dict[str, Any]) -> bytes:
    """A line that follows the last one of the history, as a writer adds it."""
    last = (registry / NAME / "history.jsonl").read_bytes().splitlines(keepends=True)[-1]
    entry = entry | {"previous_line_sha256": hashlib.sha256(last).hexdigest()}
    return json.dumps(entry).encode() + b"\n"


def assert_settled(registry: Path, *, is_sound: bool = True) -> None:
    """What is so after any later change: history and views agree; nothing is left over."""
    report = audit(registry, NAME)
    assert report.unfinished is None
    assert not is_sound or report.findings == ()
    ledger = read_ledger(registry / NAME)
    assert read_champion(registry, NAME) == ledger.champion
    for name, content in make_views(ledger).items():
        assert read_view(registry / NAME / name) == content
    assert ledger.torn == b""
    assert not [path for path in registry.rglob(".*") if path.name != ".lock"]
