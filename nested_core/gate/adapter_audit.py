"""The audit of adapters from anywhere, with the base that they are for and no initial adapter.

What is asked of each is checks/one_adapter.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from nested_core.errors import ConfigError, DamagedError, shorten
from nested_core.gate.adapter_layout import AdapterFormat, BaseModelForAudit
from nested_core.gate.checks.one_adapter import (
    CHECKS_OF_ONE_ADAPTER,
    Audited,
    LogitEffect,
    ModuleEffect,
)
from nested_core.gate.judged import make_checks
from nested_core.models.peft.importing import PEFT_WEIGHTS
from nested_core.records.verdict import Reason
from nested_core.storage.adapter import CONFIG_NAME, WEIGHTS_NAME
from nested_core.storage.atomic import finite_or_none
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.safetensors_files import REASONS_BY_UNSAFE_SUFFIX

OnAudited = Callable[[str, int, int], None]


@dataclass(frozen=True)
class AdapterAudit:
    """What the audit of one adapter folder says."""

    path: str
    reasons: tuple[Reason, ...]
    format: AdapterFormat | None = None
    modules: tuple[ModuleEffect, ...] = ()
    logits: LogitEffect | None = None

    @property
    def has_passed(self) -> bool:
        """Whether there is no reason against the adapter."""
        return not self.reasons

    @property
    def verdict(self) -> Literal["passed", "failed"]:
        """The word for it, as in gate.json."""
        return "passed" if self.has_passed else "failed"

    def to_json(self) -> dict[str, Any]:
        """The adapter's entry in the document that --json prints."""
        fields: dict[str, Any] = finite_or_none(asdict(self))
        return {"path": fields.pop("path"), "verdict": self.verdict} | fields

    def summary(self) -> str:
        """One line: the reasons, or what the adapter changes."""
        if not self.has_passed:
            return "; ".join(f"{r.code}: {r.message}" for r in self.reasons[:4])
        changed = f"{len(self.modules)} modules" if self.modules else "whole weights"
        moved = (
            "" if self.logits is None else f", logits move by {self.logits.max_abs_difference:.3g}"
        )
        return f"{changed}{moved}"


def find_adapters(path: Path, model: str) -> tuple[list[Path], list[Path]]:
    """The adapter folders that a path stands for, and folders in it that hold none.

    A path is an adapter, a run directory, or a folder of these, beside which the base `model` may
    lie. Raises ConfigError for another path.
    """
    if path.is_dir() and (adapter := _adapter_of_run(path)) is not None:
        return [adapter], []  # before its other files are looked at: none of them is read
    if not path.is_dir() or _is_adapter(path):
        return [path], []  # what is wrong with a file is found by reading it
    children = [child for child in sorted(path.iterdir()) if child.is_dir()]
    own = [child for child in children if not child.name.startswith(".")]
    adapters = [_adapter_of_run(child) or child for child in own]
    base = Path(model).resolve()
    found = [one for one in adapters if _is_adapter(one) and one.resolve() != base]
    if not found:
        raise ConfigError(
            f"{str(path):.300} holds no adapter, nor do the folders in it. Expected "
            f"{WEIGHTS_NAME} (mlx-lm) or {PEFT_WEIGHTS} (PEFT) beside {CONFIG_NAME}."
        )
    return found, [adapter for adapter in adapters if adapter not in found]


def _is_adapter(folder: Path) -> bool:
    """Whether a folder is to be audited: it has an adapter's files, or other weights."""
    names = [path.name for path in folder.iterdir()]
    is_weights = any(
        Path(name).suffix in {".safetensors", *REASONS_BY_UNSAFE_SUFFIX} for name in names
    )
    return is_weights or CONFIG_NAME in names


def _adapter_of_run(folder: Path) -> Path | None:
    run = RunDirectory(folder)
    return run.adapter if run.config.is_file() and run.adapter.is_dir() else None


def audit_adapters(
    folders: Sequence[Path], model: str, on_audited: OnAudited | None = None
) -> list[AdapterAudit]:
    """Audit each adapter folder against the base `model`, a folder or a repository of the hub.

    Raises ConfigError if the base cannot be opened, and DamagedError if the only adapter is damaged
    or not safe to read; among several, a damaged one is `unreadable`.
    """
    base = BaseModelForAudit(model)
    audits = []
    for folder in folders:
        try:
            audits.append(audit_adapter(folder, base))
        except DamagedError as error:
            if len(folders) == 1:
                raise
            reason = Reason("unreadable", shorten(error, 300))
            audits.append(AdapterAudit(str(folder), (reason,)))
        if on_audited is not None:
            on_audited("auditing adapters", len(audits), len(folders))
    return audits


def audit_adapter(folder: Path, base: BaseModelForAudit) -> AdapterAudit:
    """Audit one adapter folder; DamagedError if it is damaged or not safe to read."""
    audited = Audited(folder, base.layout_of(folder), base)
    make_checks(audited, CHECKS_OF_ONE_ADAPTER)
    reasons, modules = tuple(audited.reasons), tuple(audited.modules)
    return AdapterAudit(str(folder), reasons, audited.layout.format, modules, audited.logits)
