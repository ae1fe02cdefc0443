"""A random split of a data set that has only train: rows for valid and for test are taken out.

Rows that are equal but for case and white space go to one split together, and so do rows that
nearly are one another: a held-out row that is in train too measures nothing. Where answers are a
few labels, each split has each of them about as often as all rows have.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from glob import glob
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nested_core import seams
from nested_core.data.data_settings import DataSettings
from nested_core.data.sources.split_files import SplitFile, open_splits
from nested_core.errors import ConfigError
from nested_core.rooms.tables.chats import require_readable
from nested_core.rooms.tables.labels import find_labels
from nested_core.storage.atomic import canonical_json, new_directory
from nested_core.storage.untrusted_files import UNBOUNDED, open_regular
from nested_core.text.value_format import format_count

SPLIT_SEED = 0


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
    read_share(share)
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


def read_share(given: str | float) -> float:
    """Return the share; ConfigError if it leaves nothing to train on, or takes nothing out."""
    with suppress(ValueError):
        if 0 < (share := float(given)) < 0.5:
            return share
    raise ConfigError(
        f"--split {given}: expected a share of the rows above 0 and below 0.5, such as 0.1, which "
        f"is taken for valid and as much again for test."
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

    Near-duplicates are kept together unless too few of them would be left to hold out. Raises
    ConfigError where too few rows would be left for train.
    """
    equal = _group_equal_rows(rows)
    number = sum(map(len, equal))
    wanted = max(1, round(share * number))
    sizes = {"valid": wanted, "test": max(wanted, least_test)}
    parts = _draw_groups(_join_near_duplicates(equal), sizes)
    if any(not size <= len(parts[split]) <= 2 * size for split, size in sizes.items()):
        parts = _draw_groups(equal, sizes)
    if not all(parts.values()):
        raise ConfigError(
            f"--split {share:g}: {data} has {format_count(number, 'row')}, {len(parts['train'])} "
            f"of them left for train; that is too few to take any out. Rows that are equal count "
            f"as one."
        )
    return parts


def _draw_groups(groups: list[list[bytes]], sizes: Mapping[str, int]) -> dict[str, list[bytes]]:
    """The lines of train, valid and test, each group in one of them.

    sizes: how many rows valid and test are to have. They have more where no group is small enough.
    """
    shuffled = groups.copy()
    random.Random(SPLIT_SEED).shuffle(shuffled)
    left = _spread_labels(shuffled)
    parts: dict[str, list[bytes]] = {"train": []}
    for split, size in sizes.items():
        taken: list[bytes] = []
        too_large = []
        for group in reversed(left):
            if len(taken) + len(group) > size:
                too_large.append(group)
            else:
                taken += group
        left = too_large[::-1]
        while left and len(taken) < size:
            taken += left.pop(min(range(len(left)), key=lambda index: len(left[index])))
        parts[split] = taken
    parts["train"] = [line for group in left for line in group]
    return parts


def _join_near_duplicates(groups: list[list[bytes]]) -> list[list[bytes]]:
    """The groups, those whose rows nearly are one another as one."""
    texts = ["\n".join(_list_texts(_parse(group[0]))) for group in groups]
    for near in seams.load_all("near_duplicates"):
        return [[line for index in same for line in groups[index]] for same in near.group(texts)]
    return groups


def _list_texts(value: Any) -> list[str]:
    """The texts in a row, without keys and the roles of turns."""
    if isinstance(value, dict):
        value = [inner for key, inner in value.items() if key != "role"]
    if isinstance(value, list):
        return [text for inner in value for text in _list_texts(inner)]
    return [value] if isinstance(value, str) else []


def _spread_labels(groups: list[list[bytes]]) -> list[list[bytes]]:
    """The groups, so ordered that each stretch has each label about as often as all of them have.

    As they come where the answers of their chats are no labels. One that is rare stands in the
    middle, and so is trained on.
    """
    answers = [_answer_of(group[0]) for group in groups]
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


def _answer_of(row: bytes) -> str:
    """The last turn of a chat; empty for any other row."""
    try:
        return str(json.loads(row)["messages"][-1]["content"])
    except (ValueError, KeyError, TypeError, IndexError):
        return ""


def _parse(row: bytes) -> Any:
    """Return a row's JSON; its text if it is none, which the report on the new folder tells."""
    try:
        return json.loads(row)
    except ValueError:
        return row.decode(errors="replace")


def write_splits(parts: Mapping[str, Iterable[bytes]], target: Path) -> None:
    """Write each split as JSON lines in a new folder."""
    with new_directory(target) as folder:
        for split, lines in parts.items():
            (folder / f"{split}.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))


def _group_equal_rows(rows: Iterable[bytes]) -> list[list[bytes]]:
    """The rows, those that are equal but for the order of keys, case and white space together."""
    groups: dict[str, list[bytes]] = {}
    for row in rows:
        text = canonical_json(_parse(row)).decode()
        groups.setdefault(" ".join(text.casefold().split()), []).append(row)
    return list(groups.values())
