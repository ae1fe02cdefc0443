"""The registry: for each name, adapters that passed the gate, one champion, and its history.

A version never changes once it is registered. Each change of a name is a line of its history, and
the history decides: the link `champion`, champion.json and policy.json are derived from it. Every
writer of these holds the folder's lock, and first finishes what a crash interrupted. A reader of
several files holds the lock shared; `read_champion`, `list_versions` and `read_version_verdicts`
take no lock.

ledger.py is the history; link_and_views.py the folder under its lock with the derived files;
versions.py a version; judgements.py its later verdicts; data_store.py its examples. registration.py
adds a version; promote_and_rollback.py changes the champion; garbage_collection.py removes
versions; queries.py and audit_report.py read; policy.py is the minimum that a name requires for
promotion. promotion_policy.py decides automatic
promotion, and trials.py finds runs whose repetition is useless; these two are imported where they
are used.
"""

from nested_core.registry.audit_report import AuditReport, audit
from nested_core.registry.folders import list_names
from nested_core.registry.garbage_collection import (
    GarbageReport,
    collect_garbage,
    forget,
    forget_rows,
)
from nested_core.registry.promote_and_rollback import (
    UNSET,
    Unset,
    promote,
    register_and_promote,
    rollback,
)
from nested_core.registry.promotion_outcome import Decision
from nested_core.registry.queries import (
    VerifiedVersion,
    check_champion,
    history,
    holding_champion,
    list_versions,
    read_champion,
    read_champion_changes,
    read_rollback_target,
    read_verified_version,
    read_version_verdicts,
    verify,
)
from nested_core.registry.registration import register
from nested_core.registry.versions import AuditFinding

__all__ = [
    "UNSET",
    "AuditReport",
    "GarbageReport",
    "AuditFinding",
    "Decision",
    "Unset",
    "VerifiedVersion",
    "audit",
    "check_champion",
    "collect_garbage",
    "forget",
    "forget_rows",
    "history",
    "holding_champion",
    "list_names",
    "list_versions",
    "promote",
    "read_champion_changes",
    "read_champion",
    "read_rollback_target",
    "read_verified_version",
    "read_version_verdicts",
    "register",
    "register_and_promote",
    "rollback",
    "verify",
]
