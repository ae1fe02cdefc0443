"""The splits of a data set, each as a file of JSON lines, so that all other code reads one format.

A .jsonl file in UTF-8 is read in place; any other, and several files of one split, are converted to
one file in a temporary folder.
"""

from __future__ import annotations

import codecs
import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from glob import glob
from pathlib import Path
from typing import IO

import numpy as np

from nested_core import seams
from nested_core.config.names import HUB_NAME_PATTERN
from nested_core.data.data_settings import SPLITS, DataSettings
from nested_core.data.sources.file_formats import (
    MAX_LINE_BYTES,
    NumberedLine,
    RestOfFileUnreadable,
    TableReader,
    find_start_of_too_long_line,
    is_utf16,
    limit_expansion,
    read_gzip_jsonl,
    read_lines_before,
    read_utf16_jsonl,
)
from nested_core.errors import ConfigError, naming_as_given
from nested_core.process.cell import size_without_holes
from nested_core.records.dataset import FilePart
from nested_core.storage.addresses import is_in_bucket
from nested_core.storage.untrusted_files import UNBOUNDED, open_regular

_TABLE_SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet", *_TABLE_SUFFIXES, ".xlsx")
_PACKED_SUFFIXES = (".gz", ".parquet", ".xlsx")
_SUFFIX_PATTERN = re.compile(f"({'|'.join(map(re.escape, SUFFIXES))})$", re.IGNORECASE)
_SPLIT_BY_WORD = {
    **{split: split for split in SPLITS},
    **{"training": "train", "testing": "test"},
    **dict.fromkeys(("validation", "val", "dev", "eval"), "valid"),
}
_SPLIT_BY_HINT = _SPLIT_BY_WORD | {"evaluation": "valid", "holdout": "test", "heldout": "test"}
_SPLIT_WORDS = "|".join(_SPLIT_BY_WORD)
_SPLIT_HINTS = f"({'|'.join(_SPLIT_BY_HINT)})(?:set|data)?"
_ALONE = (0, 2)  # ranks of `_rank_split_name` of which a split has one file
_HINT = 4
_COPIED_BYTES = 2**20  # at a time
_MAX_SHOWN_PARTS = 2


@dataclass(frozen=True, eq=False)
class SplitFile:
    """One split as a file of JSON lines, with the number of each line in its original file.

    name: the split's name in findings.
    numbers: the original number of each line, from 1: the line of a .jsonl or .jsonl.gz, the line
        of a table at which a record begins, the element of a .json array, the row of a .parquet or
        of a hub data set. In a split of several files it counts through all of them; `parts`
        translates it.
    """

    name: str
    path: Path
    numbers: np.typing.NDArray[np.int32] | None = None  # by line of `path`; None: they are the same
    problems: dict[int, tuple[str, str]] = field(default_factory=dict)  # by line: check, message
    parts: tuple[FilePart, ...] = ()  # where there are several files
    delimiters: tuple[str, ...] = ()  # of tables: commas, semicolons ...
    tags: Mapping[str, str] = field(default_factory=dict)  # of files in object storage, by name

    def physical_lines_of(self, numbers: set[int]) -> set[int]:
        """Return the lines of `path`, from 1, that have these original numbers."""
        if self.numbers is None:
            return numbers
        return set((np.searchsorted(self.numbers, sorted(numbers)) + 1).tolist())

    def number_of(self, line: int) -> int:
        """Return the original number of a line of `path`, from 1."""
        return line if self.numbers is None else int(self.numbers[line - 1])


def open_splits(settings: DataSettings, spool: Path) -> dict[str, SplitFile]:
    """Return the existing splits of a data set, converted to JSON lines if necessary.

    spool: a folder for converted files.

    Raises ConfigError if there is no such data set, or two files for one split; and OSError.
    """
    if is_in_bucket(settings.data) and not settings.hf_dataset:
        return _open_fetched(settings, spool)
    if settings.hf_dataset:
        return _open_hub_tables("hf_dataset", settings, spool)
    if paths := _find_split_files(settings.data):
        return {split: _open_files(paths[split], settings, spool) for split in paths}
    folder = Path(settings.data)
    if folder.is_dir():
        return {}
    if HUB_NAME_PATTERN.fullmatch(settings.data) and not folder.exists():
        return _open_hub_tables(f"data: {settings.data}", settings, spool)
    what = "is a file" if folder.is_file() else "does not exist"
    raise ConfigError(
        f"data: {settings.data!r} is not a folder here: {folder.absolute()} {what}. Expected one "
        f"with train.jsonl (or {', '.join(SUFFIXES[1:])}), and best valid and test beside it; or, "
        f"to train on alone, one such file or a pattern of them, as rows/*.csv."
    )


def _find_split_files(data: str) -> dict[str, list[Path]]:
    """Return the files of each split (train, valid, test) that there is.

    data: a folder, whose files are known by their names (`_rank_split_name`); or a file or a
        pattern such as rows/*.csv, of which all files are train.

    Raises ConfigError for two files that would both be one split, such as train.jsonl and
    train.csv, and for a pattern that matches files named after different splits.
    """
    folder = Path(data)
    if not folder.is_dir():
        names = sorted(glob(data, recursive=True)) if not folder.is_file() else [data]
        files = [Path(name) for name in names if _SUFFIX_PATTERN.search(name)]
        named = {next(_rank_split_name(path), (0, ""))[1]: path.name for path in files}
        if len(named) > 1 and not named.keys().isdisjoint({"valid", "test"}):
            listed = " and ".join(named.values())
            raise ConfigError(
                f"data: {data} matches {listed}, which are named after different splits, and all "
                f"that a pattern matches is trained on. Give the folder, or another pattern."
            )
        return {"train": files} if files else {}
    found: dict[str, dict[int, list[Path]]] = {}
    for path in sorted(folder.iterdir()):
        if _SUFFIX_PATTERN.search(path.name):
            for rank, split in _rank_split_name(path):
                found.setdefault(split, {}).setdefault(rank, []).append(path)
    has_plain_train = min(found.get("train", {_HINT: []})) < _HINT
    files_of = {}
    for split in SPLITS:
        rank = min(found.get(split, {_HINT: []}))
        if split not in found or (has_plain_train and rank == _HINT):
            continue
        paths = files_of[split] = found[split][rank]
        if rank in _ALONE and len(paths) > 1:
            listed = " and ".join(path.name for path in paths)
            raise ConfigError(
                f"data: {folder} holds {listed}; each would be the {split} split. Keep one of them."
            )
    return files_of


def _rank_split_name(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the split that a file is named after, if any, and how plainly: 0 is its very name.

    1 is a number behind it (train-2), 2 and 3 are the same of another word for it (validation), 4
    is a hint: such a word at an end of a longer name (tickets_test, TicketsTest), or a word for it
    that eval sets have too (held_out, testset). The plainest files of a folder count.
    """
    stem = _SUFFIX_PATTERN.sub("", path.name)
    stem = re.sub("[-. ]|(?<=[A-Za-z])(?=[A-Z][a-z])", "_", stem).lower().replace("ld_out", "ldout")
    if (plain := re.fullmatch(rf"({_SPLIT_WORDS})(_?\d.*)?", stem)) is not None:
        split = _SPLIT_BY_WORD[plain[1]]
        yield 2 * (plain[1] != split) + (plain[2] is not None), split
    elif hint := re.fullmatch(rf"{_SPLIT_HINTS}([_\d].*)?|.*_{_SPLIT_HINTS}(_?\d+)?", stem):
        yield _HINT, _SPLIT_BY_HINT[hint[1] or hint[3]]


@dataclass(frozen=True)
class HubReader:
    """A room's reader of data sets of the Hugging Face hub.

    open_tables: returns the name and the lines of each split.
    """

    open_tables: Callable[[DataSettings], Mapping[str, tuple[str, Iterable[NumberedLine]]]]


@dataclass(frozen=True)
class FetchedData:
    """A data set that was fetched from object storage.

    path: of the local file, or of the folder with its files.
    tags: the entity tag of each file, by its name.
    """

    path: str
    tags: Mapping[str, str]


@dataclass(frozen=True)
class BucketReader:
    """A room's reader of data sets in object storage.

    fetch: fetches the data set at an address, as far as it is not here yet.
    """

    fetch: Callable[[str], FetchedData]


def _open_fetched(settings: DataSettings, spool: Path) -> dict[str, SplitFile]:
    """Return the splits of a data set in object storage, each with the entity tags of its files.

    Raises ConfigError if the room mirror is not installed, or if it cannot be fetched.
    """
    fetched = seams.load_only(BucketReader, f"data: {settings.data}").fetch(settings.data)
    with naming_as_given(fetched.path, settings.data):
        splits = open_splits(replace(settings, data=fetched.path), spool)
    names = {s: {part.name for part in f.parts} or {f.name} for s, f in splits.items()}
    return {
        split: replace(file, tags={n: t for n, t in fetched.tags.items() if n in names[split]})
        for split, file in splits.items()
    }


def _open_hub_tables(key: str, settings: DataSettings, spool: Path) -> dict[str, SplitFile]:
    """Return the splits of a hub data set as files.

    Raises ConfigError if the room hub is not installed.
    """
    tables = seams.load_only(HubReader, key).open_tables(settings)
    return {
        split: _write_split_lines(name, lines, spool / f"{split}.jsonl")
        for split, (name, lines) in tables.items()
    }


def _open_files(paths: Sequence[Path], settings: DataSettings, spool: Path) -> SplitFile:
    """Return the files of one split as one file, concatenated in order.

    spool: a folder for converted files.

    The result knows at which line number each file begins, so that findings name the original file;
    numbers and problems of the files are shifted by the lines before them.
    """
    if len(paths) == 1:
        return _open_file(paths[0], settings, spool)
    are_told_by_name = len({path.name for path in paths}) == len(paths)
    names = [path.name if are_told_by_name else str(path) for path in paths]
    joined = spool / f"{names[0].replace(os.sep, '-')}.joined.jsonl"
    numbers: list[np.typing.NDArray[np.int32]] = []
    problems: dict[int, tuple[str, str]] = {}
    parts: list[FilePart] = []
    delimiters: dict[str, None] = {}
    # Lines of the joined file, and numbers of lines in the original files, which may be more: a
    # record of a table can have several lines
    lines_before = numbers_before = 0
    with joined.open("wb") as file, ExitStack() as stack:
        for reader in seams.load_all(TableReader):
            stack.enter_context(reader.sharing_process())
        for name, path in zip(names, paths, strict=True):
            part = _open_file(path, settings, spool)
            lines = _append_lines(part.path, file)
            counted = np.arange(1, lines + 1, dtype=np.int32)
            part_numbers = counted if part.numbers is None else part.numbers
            parts.append(FilePart(name, numbers_before))
            numbers.append(part_numbers + np.int32(numbers_before))
            problems |= {line + lines_before: problem for line, problem in part.problems.items()}
            delimiters |= dict.fromkeys(part.delimiters)
            lines_before += lines
            numbers_before += int(part_numbers[-1]) if lines else 0
            if part.path.parent == spool:  # a converted copy, and no file of the user's
                part.path.unlink()
    shown = " + ".join(names[:_MAX_SHOWN_PARTS])
    more = f" + {len(names) - _MAX_SHOWN_PARTS} more" if len(names) > _MAX_SHOWN_PARTS else ""
    return SplitFile(
        shown + more, joined, np.concatenate(numbers), problems, tuple(parts), tuple(delimiters)
    )


def _append_lines(path: Path, file: IO[bytes]) -> int:
    """Append a file of lines without its byte-order mark; return its number of lines."""
    lines = 0
    last = b"\n"
    with open_regular(path, UNBOUNDED, follow_links=True) as (part, _):
        content = part.read(_COPIED_BYTES).removeprefix(codecs.BOM_UTF8)
        while content:
            file.write(content)
            lines += content.count(b"\n")
            last = content[-1:]
            content = part.read(_COPIED_BYTES)
    if last != b"\n":
        file.write(b"\n")
        lines += 1
    return lines


def _open_file(path: Path, settings: DataSettings, spool: Path) -> SplitFile:
    """Return a split of one file, converted to JSON lines if necessary.

    spool: a folder for the converted file. A file that is JSON lines already is used where it lies.

    What is wrong with the content, such as a damaged file, is a problem in the returned split.
    Raises ConfigError if `data_format: csv` is set and the file is no table, and for any but JSON
    lines if the room tables is not installed.
    """
    spooled = spool / f"{path.name}.jsonl"
    if not path.is_file():  # a pipe would be waited for without end
        what = "a folder" if path.is_dir() else "a pipe, a device or a socket"
        what = what if path.exists() else "a link that leads nowhere"
        return _unread_file(path.name, spooled, f"this is {what}; expected a file")
    suffix = _SUFFIX_PATTERN.findall(path.name)[0].lower()
    size = path.stat().st_size
    if settings.data_format == "csv" and suffix not in _TABLE_SUFFIXES:
        raise ConfigError(
            f"data_format: csv, but {path} is no table ({', '.join(_TABLE_SUFFIXES)}). Leave "
            f"data_format out, or give tables alone."
        )
    is_utf16_jsonl = suffix.startswith(".jsonl") and is_utf16(path)
    if suffix == ".jsonl" and not is_utf16_jsonl:
        # A line that is too long for memory ends the split; the lines before it are copied
        end = find_start_of_too_long_line(path) if size > MAX_LINE_BYTES else None
        if end is None:
            return SplitFile(path.name, path)
        return _write_split_lines(path.name, read_lines_before(path, end), spooled)
    if size > 2 * size_without_holes(path):
        message = "most of this file is a hole; take it again from its source"
        return _unread_file(path.name, spooled, message)
    delimiters: tuple[str, ...] = ()
    if suffix.startswith(".jsonl"):
        lines = (read_utf16_jsonl if is_utf16_jsonl else read_gzip_jsonl)(path)
    else:
        reader = seams.load_only(TableReader, path.name)
        lines, delimiter = reader.read(path, suffix, settings.json_keys)
        delimiters = () if delimiter is None else (delimiter,)
    is_packed = suffix.endswith(_PACKED_SUFFIXES)
    bounded = limit_expansion(lines, size, is_packed=is_packed)
    split = _write_split_lines(path.name, bounded, spooled)
    return replace(split, delimiters=delimiters)


def _unread_file(name: str, spooled: Path, message: str) -> SplitFile:
    """Return a split of one line, whose problem is why its file is not read."""
    spooled.write_bytes(b"\n")
    return SplitFile(name, spooled, problems={1: ("damaged-file", message)})


def _write_split_lines(name: str, lines: Iterable[NumberedLine], path: Path) -> SplitFile:
    """Write the lines of a split to `path` as JSON lines.

    name: the original file, for messages.
    lines: lines with their numbers in the original file. Where reading them fails because the file
        is damaged, an empty last line is written, which has the damage as its problem.
    """
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
