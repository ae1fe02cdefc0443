"""Mistakes with flags and files of tables: one paragraph each, with a command that works.

A row is a mistake: the files, the flags, the exit code, and what is said. Where the paragraph ends
with a command, that command is parsed again and has to get past the mistake.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from flows.cli import build_parser
from flows.rooms.tables.command import prepare_data
from nested_core.rooms.tables.data_files import find_csv_delimiter
from tests.example import MODEL
from tests.flows.conftest import called
from tests.rooms.tables.people_tables import named
from tests.rooms.tables.workbooks import write_workbook

TICKETS = "Id,Created,Description,Triage,Priority\n" + "".join(
    f"{n},2026-11-01,My parcel {n} is not here,{'shipping' if n % 2 else 'billing'},{n % 3}\n"
    for n in range(30)
)
FAQ = "Question,Answer\n" + "".join(f"Is it {n}?,It is {n} indeed.\n" for n in range(30))
GOOD = named("Description", "Triage")


def chat(question: str, system: str | None = None) -> str:
    turns = [] if system is None else [{"role": "system", "content": system}]
    turns += [{"role": "user", "content": question}, {"role": "assistant", "content": "billing"}]
    return json.dumps({"messages": turns}) + "\n"


@dataclass(frozen=True)
class Mistake:
    """Files, flags after `init --model MODEL`, and what is said.

    works: whether the command at the end of the paragraph does the work; False where there is none
        that could be known, such as for a file that cannot be read.
    """

    says: tuple[str, ...]
    flags: tuple[str, ...] = GOOD
    data: str = "tickets.csv"
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    code: int = 2
    works: bool = True


MISTAKES: dict[str, Mistake] = {
    "no column named": Mistake(
        (
            "tickets.csv has the columns Id, Created, Description, Triage, Priority",
            "Name them. For example: `nested-tune init",
        ),
        flags=(),
    ),
    "another case": Mistake(
        ("has no column 'description'; did you mean 'Description'?",),
        named("description", "Triage"),
    ),
    "a letter wrong, where answers are longer than questions": Mistake(
        ("did you mean 'Question'?", "--prompt-feature Question --completion-feature Answer "),
        named("Quesion", "Answer"),
        data="faq.csv",
        files={"faq.csv": FAQ},
    ),
    "a column that is nowhere": Mistake(
        ("has no column 'Question'. tickets.csv has the columns Id,",), named("Question", "Triage")
    ),
    "the question alone": Mistake(
        ("question and answer, so --completion-feature is needed too",),
        ("--prompt-feature", "Description"),
    ),
    "the answer alone": Mistake(
        ("question and answer, so --prompt-feature or --template is needed too",),
        ("--completion-feature", "Triage"),
    ),
    "question and template": Mistake(
        ("argument --template: not allowed with argument --prompt-feature",),
        (*GOOD, "--template", "{Description}"),
        works=False,
    ),
    "one answer and several": Mistake(
        ("argument --completion-features: not allowed with argument --completion-feature",),
        (*GOOD, "--completion-features", "Triage,Priority"),
        works=False,
    ),
    "the same column twice in the answer": Mistake(
        ("--completion-features: 'Triage,Triage' names a column twice",),
        ("--prompt-feature", "Description", "--completion-features", "Triage,Triage"),
    ),
    "question and answer in one column": Mistake(
        ("are both the column 'Triage'",), named("Triage", "Triage")
    ),
    "a template with an open brace": Mistake(
        ("--template: 'Subject {Description' names no column", "Write a column as {Column}"),
        ("--template", "Subject {Description", "--completion-feature", "Triage"),
    ),
    "a template without a column": Mistake(
        ("--template: 'Sort this' names no column",),
        ("--template", "Sort this", "--completion-feature", "Triage"),
    ),
    "a template with a column that is not there": Mistake(
        ("has no column 'Descripton'; did you mean 'Description'?",),
        ("--template", "Sort: {Descripton}", "--completion-feature", "Triage"),
    ),
    "a template with code in it": Mistake(
        ("has no column 'Description.__class__'",),
        ("--template", "{Description.__class__}", "--completion-feature", "Triage"),
    ),
    "a system text and a file": Mistake(
        ("argument --system-file: not allowed with argument --system",),
        (*GOOD, "--system", "Sort.", "--system-file", "system.txt"),
        files={"system.txt": "Sort tickets."},
        works=False,
    ),
    "a system file that is not there": Mistake(
        ("--system-file: ", "system.txt", "or --system"), (*GOOD, "--system-file", "system.txt")
    ),
    "a system file without a text": Mistake(
        ("--system-file: system.txt has no text in it",),
        (*GOOD, "--system-file", "system.txt"),
        files={"system.txt": "\n"},
    ),
    "a system file of Windows": Mistake(
        ("--system-file: system.txt is not UTF-8",),
        (*GOOD, "--system-file", "system.txt"),
        files={"system.txt": b"Sch\xf6n"},
    ),
    "an eval set that takes all": Mistake(
        ("--suite 20: expected from 1 to 9 questions, for 30% of 30 questions are held out",),
        (*GOOD, "--suite", "20"),
    ),
    "an eval set without a question": Mistake(
        ("--suite -1: expected from 1 to 9 questions",), (*GOOD, "--suite", "-1")
    ),
    "half of the rows held out": Mistake(
        ("--split 0.5: expected a share of the rows above 0 and below 0.5",),
        (*GOOD, "--split", "0.5"),
    ),
    "held-out rows that are there already": Mistake(
        ("--split takes rows out of train", "has valid.csv already. Leave --split out"),
        (*GOOD, "--split", "0.1"),
        data="data",
        files={"data/train.csv": TICKETS, "data/valid.csv": TICKETS},
        works=False,
    ),
    "two files with other columns": Mistake(
        (
            "b.csv has no column 'Description' and no column 'Triage', as tickets.csv has",
            "b.csv has the columns Frage, Antwort",
            "--data files/b.csv",
        ),
        data="files",
        files={
            "files/tickets.csv": TICKETS,
            "files/b.csv": "Frage,Antwort\n" + "".join(f"wer {n},b{n}\n" for n in range(9)),
        },
    ),
    "two files without known columns": Mistake(
        ("tickets.csv has the columns Id,", "b.csv has the columns Frage, Antwort"),
        (),
        data="files/*.csv",
        files={
            "files/tickets.csv": TICKETS,
            "files/b.csv": "Frage,Antwort\n" + "".join(f"wer {n},b{n}\n" for n in range(9)),
        },
    ),
    "a workbook of the old kind": Mistake(
        ("tickets.xls is a file. Expected one with train.jsonl (or", ".xlsx"),
        data="tickets.xls",
        files={"tickets.xls": b"\xd0\xcf\x11\xe0"},
        works=False,
    ),
    "a CSV that was named a workbook": Mistake(
        ("tickets.xlsx:1: damaged-file: not an .xlsx workbook, or one with a password",),
        data="tickets.xlsx",
        files={"tickets.xlsx": TICKETS},
        code=3,
        works=False,
    ),
    "records with another number of cells": Mistake(
        ("bad.csv:3: cell-count: expected 2 cells as in the header, found 3", "Correct the file"),
        named("a", "b"),
        data="bad.csv",
        files={"bad.csv": "a,b\n1,2\n1,2,3\n"},
        code=3,
        works=False,
    ),
    "a column without any text": Mistake(
        (
            "empty.csv: there is nothing to train on. left out, without a text in Answer: 20 rows",
            "Name columns that are filled",
        ),
        named("Note", "Answer"),
        data="empty.csv",
        files={"empty.csv": "Note,Answer\n" + "a,\n" * 20},
        works=False,
    ),
    "too few rows": Mistake(
        ("few.csv has 2 rows",),
        named("a", "b"),
        data="few.csv",
        files={"few.csv": "a,b\n1,2\n3,4\n"},
        works=False,
    ),
    "plain text with a system text": Mistake(
        ("text.jsonl:1 is plain text, which has no question",),
        ("--system", "Be kind."),
        data="text.jsonl",
        files={"text.jsonl": '{"text": "Once upon a time."}\n'},
        code=3,
        works=False,
    ),
    "a column of text beside labels, no flag": Mistake(
        (
            "export.csv has the columns Id, Body, Category",
            "Name them. For example: `nested-tune init",
        ),
        (),
        data="export.csv",
        files={
            "export.csv": "Id,Body,Category\n"
            + "".join(f"{n},My mail {n} is lost.,{'ab'[n % 2]}\n" for n in range(12))
        },
    ),
    "carets between the cells": Mistake(
        ("tickets.csv has the columns Id^Created^Description^Triage",),
        files={"tickets.csv": TICKETS.replace(",", "^")},
        works=False,
    ),
    "UTF-16 without its mark": Mistake(
        ("tickets.csv:32: cell-count: expected 5 cells as in the header, found 1",),
        files={"tickets.csv": TICKETS.encode("utf-16-le")},
        code=3,
        works=False,
    ),
    "a workbook named .csv": Mistake(
        ("tickets.csv has no row to train on", "page named as a text file, save it as CSV"),
        files={"tickets.csv": b"PK\3\4 and more"},
        works=False,
    ),
    "a page of HTML named .csv": Mistake(
        ("tickets.csv has no row to train on", "page named as a text file, save it as CSV"),
        files={"tickets.csv": "<html><table><tr><td>a</td></tr></table></html>"},
        works=False,
    ),
    "a header without rows": Mistake(
        ("tickets.csv has no row to train on. Give a table with names of columns",),
        files={"tickets.csv": "Description,Triage\n"},
        works=False,
    ),
    "a folder without a table": Mistake(
        ("notes has no row to train on", "a folder with such files: .jsonl"),
        data="notes",
        files={"notes/read.txt": "hello"},
        works=False,
    ),
    "NaN, as pandas writes an empty cell": Mistake(
        ("no.jsonl:1: bad-json: not valid JSON at column 20: NaN is no JSON", "Correct the row"),
        named("q", "a"),
        data="no.jsonl",
        files={"no.jsonl": '{"q": "Why?", "a": NaN}\n' + '{"q": "Who?", "a": 1.5}\n' * 9},
        code=3,
        works=False,
    ),
    "a number beyond any float in an answer of several columns": Mistake(
        ("no.json:2: bad-json: the number 1e999 is beyond any float",),
        ("--prompt-feature", "q", "--completion-features", "q,a"),
        data="no.json",
        files={"no.json": '[{"q": "Who?", "a": 1.5}, {"q": "Why?", "a": 1e999}]'},
        code=3,
        works=False,
    ),
    "a NUL in one row": Mistake(
        ("faq.csv:9: nul-character: a text holds a NUL", "Correct the row, or take it out"),
        named("Question", "Answer"),
        data="faq.csv",
        files={"faq.csv": FAQ.replace("7 indeed", "7\0indeed")},
        code=3,
        works=False,
    ),
    "two columns of one name": Mistake(
        ("two columns of the header have one name: Description, Description, Triage",),
        files={"tickets.csv": "Description,Description,Triage\na,b,c\n"},
        code=3,
        works=False,
    ),
    "an answer that is left out": Mistake(
        ("--drop-fields leaves out 'Triage', which is the answer",),
        (*GOOD, "--drop-fields", "Triage"),
    ),
    "no name of an answer": Mistake(
        ("--completion-features: ',' names no column",),
        ("--prompt-feature", "Description", "--completion-features", ","),
    ),
    "a share in per cent": Mistake(
        ("--split 10%: expected a share of the rows above 0",), (*GOOD, "--split", "10%")
    ),
    "a word for the number of questions": Mistake(
        ("argument --suite: invalid int value: 'five'",), (*GOOD, "--suite", "five"), works=False
    ),
    **{
        f"{minutes} minutes": Mistake(
            (f"expected minutes above 0 and below 10,080, such as 5, found '{minutes}'", "--help"),
            (*GOOD, f"--minutes={minutes}"),
            works=False,
        )
        for minutes in ("0", "-1", "five", "nan", "1e9")
    },
    "an address": Mistake(
        ("https://example.com/t.csv is an address", "`curl -LO https://example.com/t.csv`"),
        data="https://example.com/t.csv",
        works=False,
    ),
    "an empty name of a file": Mistake(("--data is empty",), data="", works=False),
    "two names that are nearly right": Mistake(
        ("and no column 'triage'; did you mean 'Description' and 'Triage'?",),
        named("DESCRIPTION", "triage"),
    ),
    "no such file": Mistake(
        ("--data: there is no file ticket.csv. Did you mean tickets.csv?",),
        data="ticket.csv",
        works=False,
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_paragraph_with_the_command_that_works(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mistake = MISTAKES[name]
    for file, content in {"tickets.csv": TICKETS, **mistake.files}.items():
        path = tmp_path / file
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    words = ("init", "--data", mistake.data, "--model", str(MODEL), *mistake.flags)
    done = called(*words, "-o", "lora.yaml", cwd=tmp_path)
    message = done.message()
    for text in mistake.says:
        assert text in message
    assert done.code == mistake.code, message
    assert "Traceback" not in message
    assert message.strip().count("\n") == 0
    assert not any(path.name.endswith("-split") for path in tmp_path.iterdir())
    if mistake.works:
        monkeypatch.chdir(tmp_path)
        command = message.rpartition("`nested-tune init ")[2].partition("`")[0]
        arguments = build_parser("init").parse_args(["init", *shlex.split(command)])
        data_set = prepare_data(arguments).data_set
        assert data_set is not None
        assert data_set.rows["train"] > 0


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (named("Descr", "Triage"), "tickets.csv has no column 'Descr'"),
        (("--template", "{Subjekt}", "--completion-feature", "Triage"), "no column 'Subjekt'"),
        (GOOD, "tickets-split exists, and is not written over"),
    ],
)
def test_a_column_that_is_not_there_is_told_before_a_folder_that_is(
    flags: tuple[str, ...], says: str, tmp_path: Path
) -> None:
    (tmp_path / "tickets.csv").write_text(TICKETS)
    (tmp_path / "tickets-split").mkdir()
    done = called("init", "--data", "tickets.csv", "--model", str(MODEL), *flags, cwd=tmp_path)
    assert done.code == 2
    assert says in done.message()


def test_a_row_that_the_new_data_set_is_rejected_for_is_named_in_the_persons_own_file(
    tmp_path: Path,
) -> None:
    (tmp_path / "faq").mkdir()
    (tmp_path / "faq" / "train.csv").write_text(FAQ)
    rows = "Is it 3?,It is 3 indeed.\nIs it 5?,It is 5 indeed.\n"
    (tmp_path / "faq" / "valid.csv").write_text(f"Question,Answer\nWho?,I.\n{rows}")
    flags = named("Question", "Answer")
    done = called("init", "--data", "faq", "--model", str(MODEL), *flags, cwd=tmp_path)
    assert done.code == 3
    message = done.message()
    assert "valid.csv:3: leakage: the same example is in train.csv:5; " in message
    assert "(and 1 more)" in message
    assert "faq-split" not in message
    assert "nested-tune validate" not in message


@pytest.mark.parametrize("write", [{"hidden": (("Q", "A"), ("q", "a"))}, {}])
def test_a_workbook_without_a_visible_row_is_refused(tmp_path: Path, write: dict) -> None:
    write_workbook(tmp_path / "a.xlsx", (), **write)
    done = called("init", "--data", "a.xlsx", "--model", str(MODEL), *GOOD, cwd=tmp_path)
    assert "expected names of columns in a sheet that is not hidden, found none" in done.message()
    assert done.code == 3


@pytest.mark.slow("a long table")
def test_a_semicolon_is_found_where_prices_have_a_comma_in_every_row(tmp_path: Path) -> None:
    rows = "".join(f"{n};Rechnung {n};{n},50\n" for n in range(30))
    (tmp_path / "a.csv").write_text(f"Id;Text, lang;Preis\n{rows}")
    flags = named("Text, lang", "Preis")
    done = called("init", "--data", "a.csv", "--model", str(MODEL), *flags, cwd=tmp_path)
    assert done.code == 0, done.message()
    rows = (tmp_path / "a-split" / "train.jsonl").read_text()
    assert '"content": "Rechnung 3"}, {"role": "assistant", "content": "3,50"}' in rows


def test_a_tab_is_found_where_every_row_has_one_comma(tmp_path: Path) -> None:
    rows = "".join(f"Town {n}, east\tGo and see town {n}.\n" for n in range(30))
    (tmp_path / "a.tsv").write_text(f"Question, short\tAnswer\n{rows}")
    assert find_csv_delimiter(tmp_path / "a.tsv") == "\t"


def test_a_workbook_is_mapped_as_a_table_is(tmp_path: Path) -> None:
    write_workbook(tmp_path / "a.xlsx", (("Frage", "Antwort"), ("a", "b"), ("c", "d")))
    done = called("init", "--data", "a.xlsx", "--model", str(MODEL), cwd=tmp_path)
    assert "a.xlsx has the columns Frage, Antwort" in done.message()


def test_a_table_of_thousands_of_columns_is_one_short_paragraph(tmp_path: Path) -> None:
    header = ",".join(f"c{number}" for number in range(3_000))
    (tmp_path / "a.csv").write_text(f"{header}\n{header}\n")
    done = called("init", "--data", "a.csv", "--model", str(MODEL), cwd=tmp_path)
    assert done.code == 2
    assert "a.csv has the columns c0, c1, c2," in done.message()
    assert len(done.message()) < 3_000
