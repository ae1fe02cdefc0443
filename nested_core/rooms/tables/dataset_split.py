"""A random split of a data set that has only train: rows for valid and for test are taken out.

Rows that are equal but for case and white space go to one split together, for a held-out row that
is in train too measures nothing. Where answers are a few labels, each split has each of them about
as often as all rows have.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping
from glob import glob
from pathlib import Path
from tempfile import TemporaryDirectory

from nested_core.data.data_settings import DataSettings
from nested_core.data.sources.split_files import SplitFile, open_splits
from nested_core.errors import ConfigError
from nested_core.rooms.tables.chats import require_readable
from nested_core.rooms.tables.labels import find_labels
from nested_core.storage.atomic import canonical_json, new_directory
from nested_core.storage.untrusted_files import UNBOUNDED, open_regular

SPLIT_SEED = 0
HELD_OUT_SPLITS = ("valid", "test")


def split_dataset(data: str, share: float, target: Path) -> dict[str, int]:
    """Write train.jsonl, valid.jsonl and test.jsonl in a new folder; return the rows of each.

    Args:
        data: a folder with train and neither valid nor test, or files; they are read alone.
        share: of the rows, for valid and as much for test: at least one row each.
        target: the folder to make.

    The order is drawn with a fixed seed: the same rows give the same files. Raises ConfigError for
    data that cannot be split so, DatasetError where rows cannot be read, and FileExistsError where
    `target` is there.
    """
    require_share(share)
    if not (Path(data).exists() or glob(data, recursive=True)):
        raise ConfigError(f"--split takes a folder with train.jsonl, or files; {data} is neither.")
    with TemporaryDirectory(prefix="nested-tune-") as spool:
        train = require_train_alone(data, open_splits(DataSettings(data), Path(spool)))
        require_readable(train, data, "--split would lose")
        with open_regular(train.path, UNBOUNDED, follow_links=True) as (lines, _):
            rows = (row for raw in lines if (row := raw.removeprefix(b"\xef\xbb\xbf").strip()))
            parts = draw_splits(rows, share, data)
    write_splits(parts, target)
    return {split: len(lines) for split, lines in parts.items()}


def require_share(share: float) -> None:
    """Refuse a share that leaves nothing to train on, or takes nothing out."""
    if not 0 < share < 0.5:
        raise ConfigError(
            f"--split {share:g}: expected a share of the rows above 0 and below 0.5, such as 0.1, "
            f"which is taken for valid and as much again for test."
        )


def require_train_alone(data: str, splits: Mapping[str, SplitFile]) -> SplitFile:
    """The train split; ConfigError where there is another split, or no train."""
    others = [file.name for split, file in splits.items() if split != "train"]
    if others or "train" not in splits:
        there = f"has {' and '.join(others)} already" if others else "has no train.jsonl"
        raise ConfigError(
            f"--split takes rows out of train where there is neither valid nor test; {data} "
            f"{there}. Leave --split out, or give another folder."
        )
    return splits["train"]


def draw_splits(
    rows: Iterable[bytes], share: float, data: str, least_test: int = 1
) -> dict[str, list[bytes]]:
    """The lines of train, valid and test, drawn with a fixed seed.

    Args:
        rows: lines of JSON.
        share: of the rows, for valid and as much for test.
        data: where they are from, for messages.
        least_test: rows of test, where the share is fewer.

    Raises ConfigError where too few rows would be left for train.
    """
    groups = _group_equal_rows(rows)
    random.Random(SPLIT_SEED).shuffle(groups)
    groups = _spread_labels(groups)
    number = sum(map(len, groups))
    wanted = max(1, round(share * number))
    sizes = {"valid": wanted, "test": max(wanted, least_test)}
    parts: dict[str, list[bytes]] = {"train": [], "valid": [], "test": []}
    for split in HELD_OUT_SPLITS:
        while groups and len(parts[split]) < sizes[split]:
            parts[split] += groups.pop()
    parts["train"] = [line for group in groups for line in group]
    if not all(parts.values()):
        raise ConfigError(
            f"--split {share:g}: {data} has {number} rows, {len(groups)} of them left for train; "
            f"that is too few to take any out. Rows that are equal count as one."
        )
    return parts


def _spread_labels(groups: list[list[bytes]]) -> list[list[bytes]]:
    """The groups, so ordered that each stretch has each label about as often as all of them have.

    As they come where the answers of their chats are no labels. One that is rare stands in the
    middle, and so is trained on.
    """
    answers = [answer_of(group[0]) for group in groups]
    counts = Counter(answers)
    if "" in counts or not find_labels(counts):
        return groups
    seen: Counter[str] = Counter()
    places = []
    for answer in answers:
        places.append((seen[answer] + 0.5) / counts[answer])
        seen[answer] += 1
    order = sorted(range(len(groups)), key=places.__getitem__)
    return [groups[number] for number in order]


def answer_of(row: bytes) -> str:
    """The last turn of a chat; empty for any other row."""
    try:
        return str(json.loads(row)["messages"][-1]["content"])
    except (ValueError, KeyError, TypeError, IndexError):
        return ""


def write_splits(parts: Mapping[str, Iterable[bytes]], target: Path) -> None:
    """Write each split as JSON lines in a new folder."""
    with new_directory(target) as folder:
        for split, lines in parts.items():
            (folder / f"{split}.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))


def _group_equal_rows(rows: Iterable[bytes]) -> list[list[bytes]]:
    """The rows, those that are equal but for the order of keys, case and white space together."""
    groups: dict[str, list[bytes]] = {}
    for row in rows:
        try:
            text = canonical_json(json.loads(row)).decode()
        except ValueError:
            text = row.decode(errors="replace")  # the report on the new folder says what is wrong
        groups.setdefault(" ".join(text.casefold().split()), []).append(row)
    return list(groups.values())
