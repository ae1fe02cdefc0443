"""Verified adapters as immutable versions, one champion each name, an append-only history.

Refuses what did not pass the gate and what has changed since; readers trust the `champion` link.
"""

from nested_core.registry.audit_report import AuditReport, audit
from nested_core.registry.garbage_collection import Collection, collect
from nested_core.registry.name_folders import list_names
from nested_core.registry.promotion import UNSET, Promotion, Unset, promote, rollback
from nested_core.registry.queries import (
    history,
    holding_champion,
    list_versions,
    read_champion,
    read_changes,
    verify,
)
from nested_core.registry.registration import register
from nested_core.registry.versions import AuditFinding

__all__ = [
    "UNSET",
    "AuditReport",
    "Collection",
    "AuditFinding",
    "Promotion",
    "Unset",
    "audit",
    "collect",
    "history",
    "holding_champion",
    "list_names",
    "list_versions",
    "promote",
    "read_changes",
    "read_champion",
    "register",
    "rollback",
    "verify",
]
