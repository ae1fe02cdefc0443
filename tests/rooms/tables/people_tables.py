"""Ten tables as people have them, each with the questions and answers that are in it."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date as day
from datetime import timedelta
from pathlib import Path
from typing import Any

from tests.rooms.tables.workbooks import date, write_workbook

Pair = tuple[str, str]
TOPICS = {"shipping": "parcel", "billing": "invoice", "account": "password"}


@dataclass(frozen=True)
class PeopleTable:
    """A table: how its file is written, the flags that name its columns, the pairs in it.

    score: the one that fits its answers, of an eval set.
    """

    file: str
    write: Callable[[Path], Sequence[Pair]]
    flags: tuple[str, ...]
    score: str = "exact"
    system: str | None = None


def tickets(count: int, seed: int = 0) -> list[tuple[int, str, str, str, str]]:
    """Number, subject, text, topic and priority of so many tickets."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        topic, thing = draw.choice(list(TOPICS.items()))
        text = f"My {thing} {draw.randrange(10**6)} is lost.\nHelp!"
        rows.append((1000 + number, f"The {thing}", text, topic, draw.choice(("low", "high"))))
    return rows


def write_csv(path: Path, *rows: Sequence[Any], **dialect: Any) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, **dialect).writerows(rows)


def write_helpdesk(path: Path) -> list[Pair]:
    rows = tickets(60)
    header = ("Ticket ID", "Created", "Requester", "Subject", "Description", "Category", "Priority")
    own = ((n, "2026-11-01", "Ann, B.", s, t, c, p) for n, s, t, c, p in rows)
    write_csv(path, header, *own)
    return [
        (f"Subject: {s}\n{t}", json.dumps({"Category": c, "Priority": p})) for _, s, t, c, p in rows
    ]


def write_survey(path: Path) -> list[Pair]:
    moods = ("Zufrieden", "Unzufrieden", "Neutral")
    rows = [
        (f"Der Service am {n}. Tag war {n % 7} von 7 Punkten wert.", moods[n % 3])
        for n in range(40)
    ]
    write_csv(path, ("Was können wir besser machen?", "Stimmung"), *rows, delimiter=";")
    return rows


def write_glossary(path: Path) -> list[Pair]:
    rows = [(f"Term {n}", f"What a thing of kind {n} is called, and why.") for n in range(30)]
    write_csv(path, ("Term", "Definition"), *rows, delimiter="\t")
    return rows


def write_faq(path: Path) -> list[Pair]:
    rows = [(f"How do I do {n}?", f"First {n}, then {n + 1}.") for n in range(30)]
    write_csv(path, ("Frage", "Antwort"), *rows)
    return rows


def write_parquet(path: Path) -> list[Pair]:
    import polars as pl

    rows = [{"text": f"I felt {n} after it.", "label": n % 4, "score": n / 3} for n in range(40)]
    pl.DataFrame(rows).write_parquet(path)
    return [(str(row["text"]), str(row["label"])) for row in rows]


def write_titled_workbook(path: Path) -> list[Pair]:
    rows = tickets(45)
    rows.sort(key=lambda row: row[3])
    cells: list[Sequence[Any]] = [("Support, November 2026",), (), ("Text", "Topic", "Id")]
    merged = ["A1:C1"]
    first = 4
    for topic in TOPICS:
        own = [row for row in rows if row[3] == topic]
        cells += [
            (text, topic if n == 0 else None, number)
            for n, (number, _, text, _, _) in enumerate(own)
        ]
        merged.append(f"B{first}:B{first + len(own) - 1}")
        first += len(own)
    ordered = [row for topic in TOPICS for row in rows if row[3] == topic]
    write_workbook(path, cells, merged=merged)
    return [(text, topic) for _, _, text, topic, _ in ordered]


def write_numbers_and_dates(path: Path) -> list[Pair]:
    rows: list[Sequence[Any]] = [("Item", "Due", "Amount")]
    pairs = []
    for n in range(36):
        rows.append((f"Invoice {n}", date(46000 + n), 12.5 * n))
        due = day(1899, 12, 30) + timedelta(days=46000 + n)
        pairs.append((f"Invoice {n} is due on {due}", f"{12.5 * n:.15g}"))
    write_workbook(path, rows)
    return pairs


def write_empty_answers(path: Path) -> list[Pair]:
    rows = [(f"Note {n} of the day", "" if n % 3 else f"Done by {n}") for n in range(60)]
    write_csv(path, ("Note", "Answer given"), *rows)
    return [(note, answer) for note, answer in rows if answer]


def write_wide(path: Path) -> list[Pair]:
    names = [f"Field {n}" for n in range(40)]
    rows = [[f"{n}.{column}" for column in range(40)] for n in range(30)]
    write_csv(path, names, *rows)
    return [(row[17], row[39]) for row in rows]


def write_long(path: Path, count: int = 200_000) -> list[Pair]:
    rows = [(n, f"What is {n} and {n}?", f"{2 * n}") for n in range(count)]
    write_csv(path, ("id", "sum", "total"), *rows)
    return [(question, answer) for _, question, answer in rows]


def named(question: str, answer: str) -> tuple[str, ...]:
    return ("--prompt-feature", question, "--completion-feature", answer)


TABLES: dict[str, PeopleTable] = {
    "helpdesk export": PeopleTable(
        "tickets.csv",
        write_helpdesk,
        (
            *("--template", r"Subject: {Subject}\n{Description}"),
            *("--completion-features", "Category,Priority"),
        ),
        "json",
        "You sort tickets.",
    ),
    "survey": PeopleTable(
        "umfrage.csv", write_survey, named("Was können wir besser machen?", "Stimmung"), "exact"
    ),
    "glossary": PeopleTable("glossary.tsv", write_glossary, named("Term", "Definition")),
    "two-column FAQ": PeopleTable("faq.csv", write_faq, named("Frage", "Antwort")),
    "parquet of the hub": PeopleTable(
        "train.parquet", write_parquet, named("text", "label"), "exact"
    ),
    "workbook with a title and merged cells": PeopleTable(
        "export.xlsx", write_titled_workbook, named("Text", "Topic"), "exact", "Be short."
    ),
    "numbers and dates": PeopleTable(
        "due.xlsx",
        write_numbers_and_dates,
        ("--template", "{Item} is due on {Due}", "--completion-feature", "Amount"),
        "number",
    ),
    "empty answers": PeopleTable("notes.csv", write_empty_answers, named("Note", "Answer given")),
    "40 columns": PeopleTable("wide.csv", write_wide, named("Field 17", "Field 39"), "number"),
    "200,000 rows": PeopleTable("long.csv", write_long, named("sum", "total"), "number"),
}
