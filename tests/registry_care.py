"""What the room housekeeping does with a registry; a test that asks for it is skipped without."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

from nested_core.seams import is_there

if TYPE_CHECKING:
    from nested_core.rooms.housekeeping.garbage_collection import GarbageReport
    from nested_core.rooms.housekeeping.registry_audit import AuditReport


def module_of(name: str) -> ModuleType:
    """A module of the room."""
    if not is_there("housekeeping"):
        pytest.skip("the room housekeeping is not here")
    return import_module(f"nested_core.rooms.housekeeping.{name}")


def audit(registry: Path, name: str) -> AuditReport:
    report: AuditReport = module_of("registry_audit").audit(registry, name)
    return report


def collect_garbage(registry: Path, name: str, **options: Any) -> GarbageReport:
    report: GarbageReport = module_of("garbage_collection").collect_garbage(
        registry, name, **options
    )
    return report


def forget(registry: Path, name: str, version: str, **options: Any) -> str:
    forgotten: str = module_of("garbage_collection").forget(registry, name, version, **options)
    return forgotten


def forget_rows(registry: Path, name: str, is_listed: Any, **options: Any) -> dict[str, int]:
    module = module_of("garbage_collection")
    forgotten: dict[str, int] = module.forget_rows(registry, name, is_listed, **options)
    return forgotten
