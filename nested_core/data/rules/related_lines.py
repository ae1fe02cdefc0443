"""Relate lines to other lines: which earlier line each repeats, and which `data_policy` drops.

A line that is in valid or test too is dropped from train, never from those, so that the data that a
run is measured on stays the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl

from nested_core.config.sections import DataPolicy
from nested_core.data.data_settings import SPLITS
from nested_core.data.tokens.parallel_tokenization import TokenFacts
from nested_core.data.tokens.tokenized_split import array_path
from nested_core.records.dataset import Finding, Findings

_KEYS = ("content", "folded", "prompt")
_RELATIONS = ("repeats", "resembles", "answers_otherwise")


def add_repeat_columns(files: list[tuple[str, pl.DataFrame]]) -> list[pl.DataFrame]:
    """Add columns to the frames of train, valid and test that relate each row to other lines.

    All frames get file, train_file, is_train, file_format, and train lines: `repeats` (equal
    content), `resembles` (equal by `fold_text`) and `answers_otherwise` (equal
    prompt, other content). valid and test get `repeats_held_out`, the first line of the same file
    with equal content; test also gets valid_file and `line_in_valid` (equal content). The columns
    that were compared (content, folded, prompt) are removed.
    """
    keys = [_select_keys(frame) for _, frame in files]
    first_by_key = {key: _find_first_train_rows(keys, key) for key in _KEYS}
    train, valid, test = (
        frame.drop(_KEYS).with_columns(
            _relate_to_train(rows, first_by_key, is_train=index == 0),
            file=pl.lit(file, pl.Categorical),
            train_file=pl.lit(files[0][0], pl.Categorical),
            is_train=pl.lit(index == 0),
            file_format=pl.lit(_most_frequent_format(frame), pl.Categorical),
        )
        for index, ((file, frame), rows) in enumerate(zip(files, keys, strict=True))
    )
    train = train.with_columns(repeats_held_out=pl.lit(None, pl.Int32))
    valid = valid.with_columns(repeats_held_out=_earlier_line_by_content(keys[1]))
    test = test.with_columns(
        repeats_held_out=_earlier_line_by_content(keys[2]),
        valid_file=pl.lit(files[1][0], pl.Categorical),
        line_in_valid=_first_line_by_content(keys[2]["content"], keys[1]),
    )
    return [train, valid, test]


def _select_keys(frame: pl.DataFrame) -> pl.DataFrame:
    """Select what the rows of a file are compared by.

    Content is null for a line without an example.
    """
    content = pl.when(pl.col("format").is_not_null()).then("content")
    return frame.select("line", content, "folded", "prompt").with_row_index("row")


def _find_first_train_rows(files: list[pl.DataFrame], key: str) -> pl.DataFrame:
    """Return line and content of the first train row for each key that several rows have.

    Keys of only one row are left out, since grouping by them would take 300 bytes a row.
    """
    keys = np.concatenate([file[key].drop_nulls().to_numpy() for file in files])
    keys.sort()
    repeated = pl.Series(np.unique(keys[1:][keys[1:] == keys[:-1]]))
    rows = files[0].filter(pl.col(key).is_in(repeated.implode()))
    line = pl.col("line").first().alias(f"first_line_by_{key}")
    content = pl.col("content").first().alias(f"first_content_by_{key}")
    return rows.group_by(key).agg(line, *([] if key == "content" else [content]))


def _relate_to_train(
    rows: pl.DataFrame, first_by_key: dict[str, pl.DataFrame], *, is_train: bool
) -> list[pl.Series]:
    """Return the train lines that each row repeats, resembles or answers otherwise; mostly null.

    rows: the keys of a file's rows. first_by_key: from `_find_first_train_rows`.
    """
    has_first = [pl.col(key).is_in(first[key].implode()) for key, first in first_by_key.items()]
    # Only the few rows that have a relation are joined
    related = rows.filter(pl.any_horizontal(has_first))
    for key, first in first_by_key.items():
        related = related.join(first, on=key, how="left", maintain_order="left")
    related = related.with_columns(**_repeat_column_expressions(is_train=is_train))
    # Back into columns of all rows
    nothing = pl.repeat(None, rows.height, dtype=pl.Int32, eager=True)
    return [nothing.clone().scatter(related["row"], related[n]).alias(n) for n in _RELATIONS]


def _repeat_column_expressions(*, is_train: bool) -> dict[str, pl.Expr]:
    """Return the expressions of the columns `repeats`, `resembles` and `answers_otherwise`."""
    is_own = pl.lit(is_train) & (pl.col("first_line_by_content") == pl.col("line"))
    repeats = pl.when(~is_own).then("first_line_by_content")
    is_other = pl.col("first_content_by_folded") != pl.col("content")
    resembles = pl.when(is_other & repeats.is_null()).then("first_line_by_folded")
    is_answered = pl.col("first_content_by_prompt") != pl.col("content")
    is_new = repeats.is_null() & resembles.is_null()
    answers = pl.when(is_answered & is_new).then("first_line_by_prompt")
    return {"repeats": repeats, "resembles": resembles, "answers_otherwise": answers}


def _most_frequent_format(frame: pl.DataFrame) -> str | None:
    """Return the format of most rows; of equally frequent ones, the one that comes first."""
    formats = (
        frame.filter(pl.col("format").is_not_null())
        .group_by("format")
        .agg(pl.len(), pl.col("line").min())
        .sort("len", "line", descending=[True, False])
    )
    return formats["format"][0] if len(formats) else None


def _earlier_line_by_content(file: pl.DataFrame) -> pl.Series:
    """Return for each row the first line of the same file with equal content.

    It is null for that first line itself.
    """
    first = _first_line_by_content(file["content"], file)
    repeated = pl.when(pl.col("line") > pl.col("first")).then("first").cast(pl.Int32)
    return file.select("line").with_columns(first=first).select(repeated)["first"]


def _first_line_by_content(contents: pl.Series, file: pl.DataFrame) -> pl.Series:
    """Return the first line of a file with each of these contents; null without such a line."""
    examples = file.filter(pl.col("content").is_not_null())
    first = examples.group_by("content").agg(pl.col("line").first())
    return contents.to_frame().join(first, on="content", how="left", maintain_order="left")["line"]


def add_begun_chats(
    facts: Mapping[str, TokenFacts], folder: Path, find_place: Callable[[int], tuple[str, int]]
) -> frozenset[int]:
    """Add a problem to `facts` for each held-out example that begins a chat of train.

    Each answer of such a chat is learnt, so that a loss on its beginning says nothing.

    facts: of the splits that were tokenized to files in `folder`.
    find_place: returns the file of a line of train, and its number there.

    Returns the lines of all such chats.
    """
    if "train" not in facts:
        return frozenset()
    train, begun = facts["train"].examples, set[int]()
    lines = np.repeat(train["line"], train["beginnings"])
    beginnings = np.fromfile(array_path(folder / "train", "beginnings"), np.uint64)
    for held_out in (facts[split] for split in SPLITS[1:] if split in facts):
        for example in held_out.examples[np.isin(held_out.examples["content"], beginnings)]:
            chats = lines[beginnings == example["content"]].tolist()
            file, line = find_place(chats[0])
            message = f"{file}:{line} begins with the same turns, and that answer is learnt"
            held_out.problems.append((int(example["line"]), "leakage", message))
            begun.update(chats)
    return frozenset(begun)


Dropped = Mapping[str, frozenset[int]]
_MAX_SHOWN_LINES = 20
_DROP_REASON_TEXTS = {
    "duplicate": "they repeat an earlier example",
    "leakage": "valid or test has the same example, or the beginning of the chat",
    "overlong": "they are longer than max_seq_length",
    "held-out-before": "an earlier data set of the lineage holds them out",
}


def find_lines_by_content(frame: pl.DataFrame, contents: Sequence[str]) -> frozenset[int]:
    """Return the lines of a file whose examples have one of these SHA-256 (hexadecimal)."""
    keys = pl.Series(
        [int.from_bytes(bytes.fromhex(c)[:8], "little") for c in contents], dtype=pl.UInt64
    )
    is_one = pl.col("format").is_not_null() & pl.col("content").is_in(keys.implode())
    return _line_numbers(frame.filter(is_one))


def separate_dropped_lines(
    train: pl.DataFrame,
    held_out: list[pl.DataFrame],
    policy: DataPolicy,
    held_out_before: frozenset[int] = frozenset(),
) -> tuple[pl.DataFrame, list[pl.DataFrame], Dropped]:
    """Decide which lines of train data_policy drops.

    Return the frames and the dropped lines by reason.

    held_out_before: lines to drop whatever the policy is. In the returned frames `repeats` is null
        for dropped lines, so that no rule reports them as well.
    """
    dropped: dict[str, frozenset[int]] = {}
    no_line = pl.lit(None, pl.Int32)
    if policy.leakage == "drop":
        # A repeat of a leaked line is leaked too
        leaked = pl.concat([frame["repeats"] for frame in held_out]).drop_nulls().unique().implode()
        is_leaked = pl.col("line").is_in(leaked) | pl.col("repeats").is_in(leaked)
        dropped["leakage"] = _line_numbers(train.filter(is_leaked))
        train = train.with_columns(repeats=pl.when(~is_leaked).then("repeats"))
        held_out = [frame.with_columns(repeats=no_line) for frame in held_out]
    if policy.duplicates == "drop":
        dropped["duplicate"] = _line_numbers(train.filter(pl.col("repeats").is_not_null()))
        train = train.with_columns(repeats=no_line)
    if held_out_before:
        dropped = {reason: lines - held_out_before for reason, lines in dropped.items()}
        dropped["held-out-before"] = held_out_before
        of_kept = [pl.when(~pl.col(one).is_in([*held_out_before])) for one in ("line", "repeats")]
        train = train.with_columns(repeats=of_kept[0].then("repeats"))
        held_out = [frame.with_columns(repeats=of_kept[1].then("repeats")) for frame in held_out]
    return train, held_out, dropped


def _line_numbers(frame: pl.DataFrame) -> frozenset[int]:
    """Return the line numbers of a frame's rows."""
    return frozenset(frame["line"].to_list())


def add_dropped_lines(file: str, dropped: Dropped, findings: Findings) -> None:
    """Add one warning for each reason that dropped lines, with their count and first numbers."""
    for reason, lines in dropped.items():
        if lines:
            shown = findings.name_lines(file, sorted(lines), _MAX_SHOWN_LINES)
            why = _DROP_REASON_TEXTS[reason]
            message = f"lines dropped because {why}: {len(lines):,} ({shown})"
            place = findings.find_place(file, min(lines))
            findings.listed.append(Finding(*place, "warning", f"dropped-{reason}", message))


def describe_dropped(dropped: Dropped) -> str:
    """Describe the dropped lines by reason: `; dropped: 24, they repeat an earlier example`."""
    counted = {_DROP_REASON_TEXTS[reason]: len(lines) for reason, lines in dropped.items() if lines}
    return "".join(f"; dropped: {number:,}, {why}" for why, number in counted.items())
