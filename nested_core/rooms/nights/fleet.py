"""Every name of a registry in a row: champion, since when, its loss and last change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from nested_core.errors import DamagedError
from nested_core.records.verdict_file import GATE_NAME, read_verdict
from nested_core.registry import list_names
from nested_core.registry.link_and_views import reading
from nested_core.registry.versions import version_folder
from nested_core.rooms.nights.pages import format_minute
from nested_core.text.digest_format import shorten_digest
from nested_core.text.loss_format import format_loss, join_units

COLUMNS = ("name", "champion", "since (UTC)", "loss", "verdict", "last change (UTC)")


@dataclass(frozen=True)
class NameStatus:
    """What a registry says of one name.

    champion, since: the version, and when it became champion; None before the first promotion.
    loss, unit, file: of the champion, on what it was judged by when it was registered.
    verdict: that verdict in words, such as `passed, better loss; no questions asked`.
    last_action, last_time: of the newest line of the history.
    problem: why the name cannot be read; the rest is empty then.
    """

    name: str
    champion: str | None = None
    since: str | None = None
    loss: float | None = None
    unit: str | None = None
    file: str | None = None
    verdict: str | None = None
    last_action: str | None = None
    last_time: str | None = None
    problem: str | None = None

    @classmethod
    def read(cls, registry: Path, name: str) -> Self:
        """Return the entry of a name; if its files are damaged, one with nothing but `problem`."""
        try:
            with reading(registry, name) as (_, ledger):
                entries, champion = ledger.entries, ledger.champion
            times = [entry.time for entry in ledger.changes() if entry.version == champion]
            verdict = None
            if champion is not None:
                verdict = read_verdict(version_folder(registry, name, champion) / GATE_NAME)
        except DamagedError as error:
            return cls(name, problem=str(error))
        last = entries[-1] if entries else None
        validation = None if verdict is None else verdict.validation
        return cls(
            name,
            champion,
            times[-1] if times else None,
            None if validation is None else validation.loss_after,
            None if validation is None else validation.unit,
            None if validation is None else validation.file,
            None if verdict is None else verdict.describe(),
            None if last is None else last.action,
            None if last is None else last.time,
        )

    def cells(self) -> tuple[str | None, ...]:
        """Return the row of a table, under COLUMNS."""
        if self.problem is not None:
            return (self.name, "damaged", None, None, None, None)
        champion = self.champion and shorten_digest(self.champion)
        loss = None if self.loss is None else format_loss(self.loss)
        last = self.last_time and f"{self.last_action} {format_minute(self.last_time)}"
        since = self.since and format_minute(self.since)
        return (self.name, champion, since, loss, self.verdict, last)


def read_fleet(registry: Path) -> list[NameStatus]:
    """Return every name of a registry, in order."""
    return [NameStatus.read(registry, name) for name in list_names(registry)]


def describe_losses(fleet: Sequence[NameStatus]) -> str:
    """Name what the losses of the rows are of."""
    files = ", ".join(sorted({each.file for each in fleet if each.file is not None})) or "none"
    units = join_units(each.unit for each in fleet)
    return f"Losses: {units}, on what each champion was judged by when it was made ({files})."
