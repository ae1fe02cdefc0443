"""The values of the field that `data_policy.group` names: rows with equal values are one draw."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from nested_core.data.data_settings import DataSettings
from nested_core.data.sources.split_files import open_splits
from nested_core.errors import DatasetError
from nested_core.storage.atomic import canonical_json
from nested_core.storage.strict_files import UNBOUNDED, open_regular


def read_group_values(settings: DataSettings, split: str, lines: Sequence[int]) -> list[str | None]:
    """The field's value in rows of a split, as JSON text; None where a row lacks it, or has null.

    Args:
        settings: where the data is, and in `policy` the field's name.
        split: train, valid or test.
        lines: the numbers that people know the rows by, ascending.

    Raises DatasetError where no row has the field.
    """
    field = settings.policy.group
    with TemporaryDirectory(prefix="nested-tune-") as spool:
        file = open_splits(settings, Path(spool))[split]
        wanted = sorted(file.physical_lines_of(set(map(int, lines))))
        values = _read_field(file.path, wanted, field)
    if not any(value is not None for value in values):
        raise DatasetError(
            f"data_policy.group: no row of {file.name} has a field {field!r}. Give one that rows "
            f"have, such as a document or a conversation's id, or leave it out."
        )
    return values


def _read_field(path: Path, wanted: Sequence[int], field: str | None) -> list[str | None]:
    """The field of these physical lines, from 1, ascending."""
    values: list[str | None] = []
    remaining = iter(wanted)
    following = next(remaining, None)
    with open_regular(path, UNBOUNDED, follow_links=True) as (file, _):
        for number, line in enumerate(file, 1):
            if number != following:
                continue
            following = next(remaining, None)
            row = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
            value = row.get(field) if isinstance(row, dict) else None
            values.append(None if value is None else canonical_json(value).decode())
    return values
