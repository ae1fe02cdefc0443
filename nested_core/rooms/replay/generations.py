"""What each generation of an adapter kept of earlier nights: a table of losses, night by night.

Each gate measures the loss on what the versions before were judged by, always on the same examples,
so that the figures of several gates make a row. A gate that finds an example superseded leaves it
out from then on: a row shows what is still true.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from nested_core.errors import NestedTuneError
from nested_core.records.verdict import Verdict
from nested_core.records.verdict_file import GATE_NAME, read_verdict
from nested_core.registry.data_store import read_lineage
from nested_core.registry.folders import name_exists
from nested_core.registry.versions import version_folder
from nested_core.text.digest_format import shorten_digest
from nested_core.text.document import Table
from nested_core.text.loss_format import format_loss, join_units

MAX_GENERATIONS = 10
CAPTION = "Loss of each generation, oldest first, on what earlier versions were judged by; "


def tabulate_generations(
    registry: Path, name: str, champion: str, candidate: Verdict | None = None
) -> Table | None:
    """A row for each version in the champion's lineage, a column for each generation after it.

    `candidate` is the verdict on a run that is judged beside the champion, which is the last column
    then. None if no gate has measured anything of the kind, and where the registry cannot be
    read: its own commands say what is wrong with it.
    """
    losses: dict[tuple[str, str], float | None] = {}
    units: set[str] = set()
    generations = []
    with suppress(NestedTuneError, OSError):
        if not name_exists(registry, name):
            return None
        generations = read_lineage(registry, name, champion)[:MAX_GENERATIONS][::-1]
        folders = [version_folder(registry, name, version) for version in generations]
        verdicts = [read_verdict(place / GATE_NAME) for place in folders if place.is_dir()]
        for verdict in [*verdicts, *([candidate] if candidate else [])]:
            for ancestor in verdict.ancestors:
                if ancestor.loss is not None:
                    units.add(ancestor.unit)
                    losses[ancestor.version, str(verdict.rival)] = ancestor.loss
                    losses[ancestor.version, verdict.trained.digest] = ancestor.loss_after
    if candidate is not None:
        generations.append(candidate.trained.digest)
    rows = [
        (
            f"judged by the data of {shorten_digest(version)}",
            *(
                format_loss(losses[version, one]) if (version, one) in losses else None
                for one in generations
            ),
        )
        for version in generations
        if any(judged == version for judged, _ in losses)
    ]
    caption = CAPTION + join_units(units)
    return Table(caption, ("", *map(shorten_digest, generations)), rows) if rows else None


def list_tables(
    registry: Path, name: str, champion: str, candidate: Verdict | None = None
) -> list[Table]:
    """The table of `tabulate_generations`, if there is one."""
    table = tabulate_generations(registry, name, champion, candidate)
    return [] if table is None else [table]
