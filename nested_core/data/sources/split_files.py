"""The splits of a data set, each as a file of JSON lines, so that all else reads one format.

A .jsonl file is read where it lies; any other is turned into one in a folder of the caller's.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from os.path import lexists
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nested_core.config.names import HUB_NAME_PATTERN
from nested_core.data.data_settings import SPLITS, DataSettings
from nested_core.data.sources.file_formats import (
    MAX_LINE_BYTES,
    NumberedLine,
    RestOfFileUnreadable,
    find_start_of_too_long_line,
    limit_expansion,
    read_csv,
    read_gzip_jsonl,
    read_json_array,
    read_lines_before,
    read_parquet,
)
from nested_core.data.sources.hub_datasets import (
    HubTables,
    open_configured_datasets,
    open_dataset_by_name,
)
from nested_core.errors import ConfigError

_READER_BY_SUFFIX: dict[str, Callable[[Path, frozenset[str]], Iterable[NumberedLine]]] = {
    ".jsonl.gz": read_gzip_jsonl,
    ".json": read_json_array,
    ".csv": read_csv,
    ".parquet": read_parquet,
}
SUFFIXES = (".jsonl", *_READER_BY_SUFFIX)
_PACKED_SUFFIXES = (".jsonl.gz", ".parquet")


@dataclass(frozen=True, eq=False)
class SplitFile:
    """One split: its name in findings, its lines of JSON, and the number that each has for people.

    The number is the line of a .jsonl or .jsonl.gz, the line of a .csv that a record begins in, the
    element of a .json array and the row of a .parquet or of a hub's data set, all from 1.
    """

    name: str
    path: Path
    numbers: npt.NDArray[np.int32] | None = None  # by line of `path`; None: they are the same
    problems: dict[int, tuple[str, str]] = field(default_factory=dict)  # by line: check, message

    def physical_lines_of(self, numbers: set[int]) -> set[int]:
        """The lines of `path`, from 1, that have these numbers."""
        if self.numbers is None:
            return numbers
        return set((np.searchsorted(self.numbers, sorted(numbers)) + 1).tolist())


def open_splits(settings: DataSettings, spool: Path) -> dict[str, SplitFile]:
    """The splits that the data set has, made into JSON lines in `spool` unless they are.

    Raises ConfigError if there is no such data set, or two files for one split; and OSError.
    """
    folder = Path(settings.data)
    is_trusted = settings.trust_remote_code
    if settings.hf_dataset:
        return _write_hub_tables(
            open_configured_datasets(settings.hf_dataset, trust_remote_code=is_trusted), spool
        )
    if folder.is_dir():
        return _open_split_folder(folder, settings.json_keys, spool)
    if HUB_NAME_PATTERN.fullmatch(settings.data) and not folder.exists():
        return _write_hub_tables(
            open_dataset_by_name(settings.data, trust_remote_code=is_trusted), spool
        )
    raise ConfigError(
        f"data: {settings.data!r} is not a folder here: {folder.absolute()} "
        f"{'is a file' if folder.is_file() else 'does not exist'}. Expected one with train.jsonl "
        f"(or {', '.join(SUFFIXES[1:])}), and best valid and test beside it."
    )


def _write_hub_tables(tables: HubTables, spool: Path) -> dict[str, SplitFile]:
    return {
        split: _write_split_lines(name, lines, spool / f"{split}.jsonl")
        for split, (name, lines) in tables.items()
    }


def _open_split_folder(
    folder: Path, json_keys: frozenset[str], spool: Path
) -> dict[str, SplitFile]:
    files = {}
    for split in SPLITS:
        paths = [path for suffix in SUFFIXES if lexists(path := folder / f"{split}{suffix}")]
        if len(paths) > 1:
            names = " and ".join(path.name for path in paths)
            raise ConfigError(
                f"data: {folder} holds {names}; each would be the {split} split. Keep one of them."
            )
        if paths:
            files[split] = _open_split_file(paths[0], json_keys, spool)
    return files


def _open_split_file(path: Path, json_keys: frozenset[str], spool: Path) -> SplitFile:
    spooled = spool / f"{path.name}.jsonl"
    if not path.is_file():  # a pipe would be waited for without end
        return _make_split_of_unreadable_path(path, spooled)
    suffix = path.name[path.name.index(".") :]
    size = path.stat().st_size
    if suffix == ".jsonl":
        end = find_start_of_too_long_line(path) if size > MAX_LINE_BYTES else None
        if end is None:
            return SplitFile(path.name, path)
        return _write_split_lines(path.name, read_lines_before(path, end), spooled)
    lines = limit_expansion(
        _READER_BY_SUFFIX[suffix](path, json_keys), size, is_packed=suffix in _PACKED_SUFFIXES
    )
    return _write_split_lines(path.name, lines, spooled)


def _make_split_of_unreadable_path(path: Path, spooled: Path) -> SplitFile:
    """A split of one empty line, whose problem says what stands in the place of a file."""
    what = "a folder" if path.is_dir() else "a pipe, a device or a socket"
    what = what if path.exists() else "a link that leads nowhere"
    spooled.write_bytes(b"\n")
    problem = ("damaged-file", f"this is {what}; expected a file")
    return SplitFile(path.name, spooled, problems={1: problem})


def _write_split_lines(name: str, lines: Iterable[NumberedLine], path: Path) -> SplitFile:
    """Write the lines of a split to `path`; damage becomes the last of them."""
    numbers = array("i")
    problems: dict[int, tuple[str, str]] = {}
    with path.open("wb") as spooled:
        try:
            for numbered in lines:
                number, line, problem = numbered
                numbers.append(number)
                spooled.write(line + b"\n")
                if problem is not None:
                    problems[len(numbers)] = problem
        except RestOfFileUnreadable as damage:
            numbers.append(damage.number)
            spooled.write(b"\n")
            message = f"{damage.message}; nothing from there on was read"
            problems[len(numbers)] = ("damaged-file", message)
    are_lines = all(line == number for line, number in enumerate(numbers, start=1))
    return SplitFile(name, path, None if are_lines else np.asarray(numbers), problems)
