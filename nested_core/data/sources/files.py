"""The files of a data set, each as lines of JSON, so that everything behind reads one format.

A .jsonl file is read where it lies; any other is turned into one in a folder of the caller's.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from os.path import lexists
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nested_core.data.settings import SPLITS, DataSettings
from nested_core.data.sources.formats import (
    Damaged,
    Record,
    read_array,
    read_csv,
    read_gzip,
    read_parquet,
)
from nested_core.data.sources.hub import Tables, open_listed, open_named
from nested_core.errors import ConfigError

_READERS: dict[str, Callable[[Path, frozenset[str]], Iterable[Record]]] = {
    ".jsonl.gz": read_gzip,
    ".json": read_array,
    ".csv": read_csv,
    ".parquet": read_parquet,
}
SUFFIXES = (".jsonl", *_READERS)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True, eq=False)
class Source:
    """One split: where its lines are, and which number a person knows each of them by.

    The number is the line of a .jsonl or .jsonl.gz, the line of a .csv that a record begins in, the
    element of a .json array and the row of a .parquet or of a hub's data set, all from 1.
    """

    file: str
    path: Path
    numbers: npt.NDArray[np.int32] | None = None  # by line of `path`; None: they are the same
    problems: dict[int, tuple[str, str]] = field(default_factory=dict)  # by line: check, message

    def lines_of(self, numbers: set[int]) -> set[int]:
        """The lines of `path`, from 1, that have these numbers."""
        if self.numbers is None:
            return numbers
        return set((np.searchsorted(self.numbers, sorted(numbers)) + 1).tolist())


def open_sources(settings: DataSettings, spool: Path) -> dict[str, Source]:
    """The splits that there are, made into lines in `spool` where they are not.

    Raises ConfigError where there is no such data set, or two files for one split; and OSError.
    """
    folder, is_trusted = Path(settings.data).expanduser(), settings.trust_remote_code
    if settings.hf_dataset:
        return _open_tables(open_listed(settings.hf_dataset, trust_remote_code=is_trusted), spool)
    if folder.is_dir():
        return _open_folder(folder, settings.json_keys, spool)
    if _HUB_NAME.fullmatch(settings.data) and not folder.exists():
        return _open_tables(open_named(settings.data, trust_remote_code=is_trusted), spool)
    raise ConfigError(
        f"data: {settings.data!r} is not a folder here; expected one with train.jsonl (or "
        f"{', '.join(SUFFIXES[1:])}), and best valid and test beside it."
    )


def _open_tables(tables: Tables, spool: Path) -> dict[str, Source]:
    return {
        split: spool_records(file, records, spool / f"{split}.jsonl")
        for split, (file, records) in tables.items()
    }


def _open_folder(folder: Path, json_keys: frozenset[str], spool: Path) -> dict[str, Source]:
    sources = {}
    for split in SPLITS:
        found = [path for suffix in SUFFIXES if lexists(path := folder / f"{split}{suffix}")]
        if len(found) > 1:
            names = " and ".join(path.name for path in found)
            raise ConfigError(
                f"data: {folder} holds {names}; each would be the {split} split. Keep one of them."
            )
        if found:
            sources[split] = _open_file(found[0], json_keys, spool)
    return sources


def _open_file(path: Path, json_keys: frozenset[str], spool: Path) -> Source:
    if not path.is_file():  # a pipe would be waited for without end
        return _of_no_file(path, spool / f"{path.name}.jsonl")
    suffix = path.name[path.name.index(".") :]
    if suffix == ".jsonl":
        return Source(path.name, path)
    return spool_records(path.name, _READERS[suffix](path, json_keys), spool / f"{path.name}.jsonl")


def _of_no_file(path: Path, spool: Path) -> Source:
    what = "a folder" if path.is_dir() else "a pipe, a device or a socket"
    what = what if path.exists() else "a link that leads nowhere"
    spool.write_bytes(b"\n")
    return Source(path.name, spool, None, {1: ("damaged-file", f"this is {what}; expected a file")})


def spool_records(file: str, records: Iterable[Record], path: Path) -> Source:
    """Write the records of `file` as lines of `path`; damage becomes the last of them."""
    numbers, problems = array("i"), dict[int, tuple[str, str]]()
    with path.open("wb") as spool:
        try:
            for number, line, problem in records:
                numbers.append(number)
                spool.write(line + b"\n")
                if problem is not None:
                    problems[len(numbers)] = problem
        except Damaged as damage:
            numbers.append(damage.number)
            spool.write(b"\n")
            message = f"{damage.message}; nothing from there on was read"
            problems[len(numbers)] = ("damaged-file", message)
    are_lines = all(line == number for line, number in enumerate(numbers, start=1))
    return Source(file, path, None if are_lines else np.asarray(numbers), problems)
