"""policy.json: the policy of a name as people read it; the history's last line `policy` counts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nested_core.errors import DamagedError
from nested_core.registry.ledger import Ledger
from nested_core.registry.versions import AuditFinding
from nested_core.storage.atomic import Confirm, write_json
from nested_core.storage.strict_files import file_type, read_json

POLICY_NAME = "policy.json"
MAX_POLICY_BYTES = 4 * 1024 * 1024


def write_policy(folder: Path, fields: dict[str, Any], *, confirm: Confirm) -> None:
    """Replace policy.json; `confirm` is called just before, and raises to leave the old."""
    write_json(folder / POLICY_NAME, fields, confirm=confirm)


def finish_policy_change(folder: Path, ledger: Ledger, *, confirm: Confirm) -> None:
    """Write the policy of a change that a crash cut short between the history and the file."""
    recorded = ledger.policy()
    if recorded is not None and _is_cut_short(ledger, _read_policy_file(folder)):
        write_policy(folder, recorded, confirm=confirm)


def policy_findings(folder: Path, ledger: Ledger) -> Iterator[AuditFinding]:
    """Whether policy.json is what the history's last line `policy` says."""
    recorded, written = ledger.policy(), _read_policy_file(folder)
    if written == recorded or _is_cut_short(ledger, written):
        return
    advice = (
        f"`nested-tune policy {folder.name} --registry {folder.parent} --promote P`, or another of "
        f"its keys, writes the file anew from the history and what is given."
    )
    yield AuditFinding(folder / POLICY_NAME, "is not the policy that the history recorded", advice)


def _is_cut_short(ledger: Ledger, written: Any) -> bool:
    """Whether the file is still that of before the history's last line."""
    last = ledger.entries[-1] if ledger.entries else None
    return last is not None and last.action == "policy" and written == last.before


def _read_policy_file(folder: Path) -> Any:
    """What the file holds, whatever that is; None without one."""
    path = folder / POLICY_NAME
    if file_type(path) == "missing":
        return None
    try:
        return read_json(path, MAX_POLICY_BYTES)
    except DamagedError as error:
        return str(error)
