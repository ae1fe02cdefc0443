"""Files as people have them: read to the tokens of the same OpenAI rows, or refused by line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from nested_core.data.data_settings import DataSettings
from nested_core.data.dataset_loading import load_dataset
from nested_core.data.lines.example_parsing import DATA_FORMATS, FORMATS
from nested_core.data.tokens.tokenized_split import TokenizedSplit
from nested_core.data.tokens.tokenizer_source import TokenizerSource
from nested_core.errors import ConfigError
from nested_core.records.dataset import DatasetReport
from tests.example import example_config, require_refused

Turn = dict[str, Any]
Files = dict[str, bytes]
BOM = b"\xef\xbb\xbf"


def turn(role: str, content: Any, **more: Any) -> Turn:
    return {"role": role, "content": content, **more}


def chat(*texts: str, system: str | None = None, **more: Any) -> dict[str, Any]:
    """An OpenAI row: the user and the assistant in turn, after a system prompt."""
    turns = [turn("assistant" if n % 2 else "user", text) for n, text in enumerate(texts)]
    return {"messages": ([turn("system", system)] if system else []) + turns, **more}


def said(speaker: str, value: Any) -> dict[str, Any]:
    return {"from": speaker, "value": value}


def alpaca(instruction: Any, output: Any, **more: Any) -> dict[str, Any]:
    return {"instruction": instruction, "output": output, **more}


def sharegpt(*turns: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"conversations": list(turns), **more}


def lines(*rows: Any, end: bytes = b"\n") -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + end for row in rows)


def rows(*given: Any) -> Files:
    """A train.jsonl of these rows."""
    return {"train.jsonl": lines(*given)}


def write(folder: Path, files: Files) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


FUNCTION = {"name": "find_bike", "parameters": {"yard": "string"}}
TOOL = {"type": "function", "function": FUNCTION}
FIND = {"name": "find_bike", "arguments": {"yard": "Süd"}}
SELL = {"name": "sell_bike", "arguments": {"to": "Ann"}}
CALL, CALL_TOO = ({"type": "function", "function": call} for call in (FIND, SELL))
ASKED = [
    turn("user", "Is there one?"),
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    turn("tool", '["red"]'),
    turn("assistant", "A red one."),
]
TABLE = (  # the delimiter is in a cell as well
    'Frage{0}Antwort{0}{0}\r\n"Was kostet das, ""heute""?"{0}"21 €{0}\r\nmorgen 22 €"{0}{0}\r\n'
    "{0}{0}{0}\r\nJa?{0}Nein.{0}{0}\r\n"
)


def asked_in_table(delimiter: str) -> list[dict[str, Any]]:
    answer = f"21 €{delimiter}\r\nmorgen 22 €"
    return [chat('Was kostet das, "heute"?', answer), chat("Ja?", "Nein.")]


NAMES = {"prompt_feature": "Frage", "completion_feature": "Antwort"}

# Files, what they are called, the same conversations as OpenAI rows, and settings if any.
READ: dict[str, tuple[Any, ...]] = {
    "Alpaca with input": (
        rows(
            alpaca("Übersetze.", "twenty-one euros", input="21 €"),
            alpaca("Say 日本.", "日本", input=""),
            alpaca("Say hi.", "Hi 🙂", input=None),
            alpaca("", "Two.", input="1 and 1?"),
        ),
        "train.jsonl: alpaca, 4 of 4 rows",
        [
            chat("Übersetze.\n21 €", "twenty-one euros"),
            chat("Say 日本.", "日本"),
            chat("Say hi.", "Hi 🙂"),
            chat("1 and 1?", "Two."),
        ],
    ),
    "Alpaca with system and history": (
        rows(
            alpaca("And now?", "3", input="", system="Count.", history=[["a", "1"], ["b", "2"]]),
            alpaca("Thank you!", "Gladly.", system="", history=[], input=""),
        ),
        "train.jsonl: alpaca, 2 of 2 rows",
        [chat("a", "1", "b", "2", "And now?", "3", system="Count."), chat("Thank you!", "Gladly.")],
    ),
    "an array over many lines, with a byte-order mark": (
        {"train.json": BOM + json.dumps([alpaca("A?", "B", input="c\nd")], indent=2).encode()},
        "train.json: alpaca, 1 of 1 row",
        [chat("A?\nc\nd", "B")],
    ),
    "Alpaca in a table": (
        {
            "train.csv": b"instruction,input,output,history\r\n"
            b'"Add, please.","1\nand 1",2,"[[""Hi"", ""Hello, you""]]"\r\nSay hi.,,Hi,\r\n'
        },
        "train.csv: alpaca, 2 of 2 rows, separated by commas",
        [chat("Hi", "Hello, you", "Add, please.\n1\nand 1", "2"), chat("Say hi.", "Hi")],
    ),
    "Alpaca in a parquet": (
        {},
        "train.parquet: alpaca, 2 of 2 rows",
        [chat("A?\nb", "C", system="S"), chat("D?", "E")],
    ),
    "Alpaca packed": (
        {"train.jsonl.gz": gzip.compress(lines(alpaca("A?", "B", input="c"), end=b"\r\n"))},
        "train.jsonl.gz: alpaca, 1 of 1 row",
        [chat("A?\nc", "B")],
    ),
    "Alpaca with a field that is dropped": (
        rows(alpaca("A?", "B", input="c d", note="Not for you.")),
        "train.jsonl: alpaca, 1 of 1 row",
        [chat("A?", "B")],
        {"drop_fields": ("note", "input"), "data_format": "alpaca"},
    ),
    "ShareGPT": (
        rows(
            sharegpt(said("human", "Where?"), said("gpt", "In Örebro."), id="identity_0"),
            sharegpt(*map(said, ("human", "gpt") * 2, ("a", "b", "c", "d")), system=None),
        ),
        "train.jsonl: sharegpt, 2 of 2 rows",
        [chat("Where?", "In Örebro."), chat("a", "b", "c", "d")],
    ),
    "ShareGPT with a system prompt, as a turn and as a field": (
        rows(
            sharegpt(said("system", "Be brief."), said("human", "a"), said("gpt", "b")),
            sharegpt(said("human", "a"), said("gpt", "c"), system="Be long."),
            sharegpt(said("human", "a"), said("gpt", "d"), system=" "),
        ),
        "train.jsonl: sharegpt, 3 of 3 rows",
        [chat("a", "b", system="Be brief."), chat("a", "c", system="Be long."), chat("a", "d")],
        {"data_format": "sharegpt"},
    ),
    "ShareGPT with tools, LLaMA-Factory's spelling": (
        rows(
            sharegpt(
                said("human", "Is there one?"),
                said("function_call", json.dumps(FIND)),
                said("observation", '["red"]'),
                said("gpt", "A red one."),
                tools=json.dumps([FUNCTION]),
            )
        ),
        "train.jsonl: sharegpt, 1 of 1 row",
        [{"messages": ASKED, "tools": [TOOL]}],
    ),
    "ShareGPT with two calls at once, other spellings": (
        rows(
            sharegpt(
                said("User", "Both."),
                said("tool_call", [FIND, CALL_TOO]),
                said("tool", "1"),
                said("function_response", "2"),
                said("ChatGPT", "Done."),
            )
        ),
        "train.jsonl: sharegpt, 1 of 1 row",
        [
            {
                "messages": [
                    turn("user", "Both."),
                    turn("assistant", "", tool_calls=[CALL, CALL_TOO]),
                    turn("tool", "1"),
                    turn("tool", "2"),
                    turn("assistant", "Done."),
                ]
            }
        ],
    ),
    "conversations of {role, content}, and both in one": (
        rows(
            sharegpt(turn("user", "a"), turn("assistant", "b")),
            sharegpt(turn("human", "a"), turn("gpt", "c")),
            sharegpt(said("human", "a"), turn("assistant", "d")),
        ),
        "train.jsonl: sharegpt, 3 of 3 rows",
        [chat("a", "b"), chat("a", "c"), chat("a", "d")],
    ),
    "ShareGPT's turns under messages": (
        rows({"messages": [said("human", "a"), said("gpt", "b")]}),
        "train.jsonl: chat, 1 of 1 row",
        [chat("a", "b")],
    ),
    "contents in parts of text": (
        rows(
            {
                "messages": [
                    turn("system", [{"type": "text", "text": "S"}]),
                    turn("user", [{"type": "text", "text": t} for t in ("one ", "two")]),
                    turn("assistant", "b"),
                ]
            }
        ),
        "train.jsonl: chat, 1 of 1 row",
        [chat("one two", "b", system="S")],
    ),
    "OpenAI's tools": (
        rows({"messages": ASKED, "tools": [TOOL]}),
        "train.jsonl: chat, 1 of 1 row",
        [{"messages": ASKED, "tools": [TOOL]}],
        {"data_format": "tools"},
    ),
    "a chat by another name, byte-order mark, CRLF": (
        {"train.jsonl": BOM + lines({"dialog": chat("a", "b")["messages"]}, end=b"\r\n")},
        "train.jsonl: chat, 1 of 1 row",
        [chat("a", "b")],
        {"chat_feature": "dialog"},
    ),
    "a table of a spreadsheet, semicolons": (
        {"train.csv": BOM + TABLE.format(";").encode()},
        "train.csv: completions, 2 of 2 rows, separated by semicolons",
        asked_in_table(";"),
        NAMES | {"data_format": "csv"},
    ),
    "the same, packed, with tabs": (
        {"train.tsv.gz": gzip.compress(TABLE.format("\t").encode())},
        "train.tsv.gz: completions, 2 of 2 rows, separated by tabs",
        asked_in_table("\t"),
        NAMES,
    ),
    "UTF-16, as a spreadsheet writes Unicode text": (
        {"train.csv": TABLE.format("\t").encode("utf-16")},
        "train.csv: completions, 2 of 2 rows, separated by tabs",
        asked_in_table("\t"),
        NAMES,
    ),
    "UTF-16 in a file of lines, packed in another, and an array": (
        {
            "train-1.jsonl": f"\ufeff{lines(chat('ä', '日')).decode()}".encode("utf-16-be"),
            "train-2.jsonl.gz": gzip.compress(lines(chat("ö", "🙂")).decode().encode("utf-16")),
            "train-3.json": json.dumps([chat("ü", "b")], ensure_ascii=False).encode("utf-16"),
        },
        "train-1.jsonl + train-2.jsonl.gz + 1 more: chat, 3 of 3 rows",
        [chat("ä", "日"), chat("ö", "🙂"), chat("ü", "b")],
    ),
    "messages and tools that are JSON text": (
        rows(
            {"messages": json.dumps(ASKED), "tools": json.dumps([TOOL])},
            {"messages": json.dumps(chat("a", "b", note="")["messages"]), "tools": ""},
        ),
        "train.jsonl: chat, 2 of 2 rows",
        [{"messages": ASKED, "tools": [TOOL]}, chat("a", "b")],
    ),
    "a header whose commas are no delimiters": (
        {"train.csv": b"prompt;completion, whole\nA, b?;C\nD?;E, f, g\n"},
        "train.csv: completions, 2 of 2 rows, separated by semicolons",
        [chat("A, b?", "C"), chat("D?", "E, f, g")],
        {"completion_feature": "completion, whole", "data_format": "completions"},
    ),
    "conversations in cells": (
        {
            "train.tsv": b"id\tconversations\n1\t"
            + b'"'
            + lines([said("human", "a\tb"), said("gpt", "c")], end=b"").replace(b'"', b'""')
            + b'"\n'
        },
        "train.tsv: sharegpt, 1 of 1 row, separated by tabs",
        [chat("a\tb", "c")],
    ),
    "several numbered files": (
        {
            "train-2.json": json.dumps([sharegpt(said("human", "c"), said("gpt", "d"))]).encode(),
            "train-1.jsonl": b"\n" + lines(sharegpt(said("human", "a"), said("gpt", "b")))[:-1],
            "train-3.jsonl": BOM + lines(sharegpt(said("human", "e"), said("gpt", "f"))),
        },
        "train-1.jsonl + train-2.json + 1 more: sharegpt, 3 of 3 rows",
        [chat("a", "b"), chat("c", "d"), chat("e", "f")],
    ),
    "a pattern over folders": (
        {"a/rows.csv": b"prompt,completion\na,b\n", "b/rows.csv": b"prompt;completion\nc;d\n"},
        "{folder}/a/rows.csv + {folder}/b/rows.csv: completions, 2 of 2 rows, separated by commas "
        "and semicolons",
        [chat("a", "b"), chat("c", "d")],
        {"data": "*/*.csv"},
    ),
    "a table's nulls, and labels": (
        rows(
            sharegpt(
                said("human", "a") | {"role": None, "content": None},
                turn("assistant", "b", **{"from": None, "value": None}),
                title=None,
                source="web",
            )
        ),
        "train.jsonl: sharegpt, 1 of 1 row",
        [chat("a", "b")],
    ),
    "one file": (
        {"rows.CSV": b"text|prompt|completion\n|a|b\n"},
        "rows.CSV: completions, 1 of 1 row, separated by bars",
        [chat("a", "b")],
        {"data": "rows.CSV", "data_format": "completions", "drop_fields": ("text",)},
    ),
}


def load(
    folder: Path, settings: dict[str, Any], tokenizer: TokenizerSource | None = None
) -> tuple[DatasetReport, dict[str, TokenizedSplit]]:
    data = str(folder / settings.get("data", ""))
    own = {name: value for name, value in settings.items() if name != "data"}
    return load_dataset(
        DataSettings(data, batch_size=1, mask_prompt=tokenizer is not None, **own), tokenizer
    )


def tokens_and_masks(split: TokenizedSplit) -> list[tuple[list[int], list[bool]]]:
    return [
        (split.example(index).tolist(), split.example_mask(index).tolist())
        for index in range(len(split))
    ]


@pytest.fixture(scope="module")
def openai_tokens(tmp_path_factory, tokenizer) -> dict[str, list[tuple[list[int], list[bool]]]]:
    """Tokens and masks of the OpenAI rows of each of READ, read as one file."""
    expected = [row for _, _, own, *_ in READ.values() for row in own]
    folder = write(tmp_path_factory.mktemp("openai"), rows(*expected))
    report, splits = load(folder, {}, tokenizer)
    assert report.errors == ()
    read = iter(tokens_and_masks(splits["train"]))
    return {name: [next(read) for _ in own] for name, (_, _, own, *_) in READ.items()}


@pytest.mark.parametrize("name", READ)
def test_a_file_as_people_have_it_gives_the_tokens_of_the_same_openai_rows(
    name: str, tmp_path: Path, tokenizer: TokenizerSource, openai_tokens: dict[str, Any]
) -> None:
    files, called, _, *more = READ[name]
    write(tmp_path, files)
    if not files:
        rows = [alpaca("A?", "C", input="b", system="S"), alpaca("D?", "E")]
        pl.DataFrame(rows).write_parquet(tmp_path / "train.parquet")
    report, splits = load(tmp_path, more[0] if more else {}, tokenizer)
    assert [str(error) for error in report.errors] == []
    assert tokens_and_masks(splits["train"]) == openai_tokens[name]
    assert any(np.any(mask) for _, mask in openai_tokens[name])
    assert report.splits["train"].describe_format() == called.format(folder=tmp_path)


GOOD_ALPACA = [alpaca("A?", "B"), alpaca("C?", "D")]
GOOD_SHAREGPT = [sharegpt(said("human", text), said("gpt", "yes")) for text in "ab"]
PAIR = {"chosen": "Good one.", "rejected": "Bad one."}

# Each stands in the third line of a file, after two good rows.
BROKEN_ROWS: dict[str, tuple[Any, ...]] = {
    "no output": ({"instruction": "a"}, "missing-field: output is missing"),
    "null output": (alpaca("a", None), "null-field: output: "),
    "several outputs": (alpaca("a", ["b", "c"]), "wrong-type: output: "),
    "blank output": (alpaca("a", " \n"), "blank-field: output has no text in it"),
    "nothing asked": (alpaca("", "b", input=" "), "blank-field: instruction has no"),
    "half a pair of history": (
        alpaca("a", "b", history=[["c", "d"], ["e"]]),
        "wrong-type: history[1]: ",
    ),
    "a blank answer in the history": (
        alpaca("a", "b", system="s", history=[["c", ""]]),
        "blank-field: history[0][1] has no text in it",
    ),
    "a field that nothing reads": (
        alpaca("a", "b", **{"note.to": "Think before."}),
        "unread-field: what is in note.to; drop_fields: [note.to] leaves it out on purpose",
    ),
    "a filled input beside configured names": (
        {"q": "Is it 1?", "output": "Yes.", "input": "1"},
        "unread-field: leave out what is in input; drop_fields: [input]",
        [{"q": "a", "output": "b"}, {"q": "c", "output": "d"}],
    ),
    "an image": (alpaca("a", "b", images=["a.png"]), "unread-field: drop_fields: [images]"),
    "context beside a prompt": (
        {"prompt": "e", "completion": "f", "context": "Oslo", "id": 7, "source": "web"},
        "unread-field: leave out what is in context; drop_fields: [context]",
        [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}],
    ),
    "thoughts in a turn": (
        {"messages": [turn("user", "e"), turn("assistant", "f", why="It is so.")]},
        "unread-field: leave out what is in messages[].why; drop_fields: [why]",
        [chat("a", "b"), chat("c", "d")],
    ),
    "another row": (GOOD_SHAREGPT[0], "mixed-format: this line is sharegpt", GOOD_ALPACA),
    "an unknown speaker": (
        sharegpt(said("narrator", "a"), said("gpt", "b")),
        "unknown-role: conversations[0].from: ",
    ),
    "a null value": (
        sharegpt(said("human", "a"), said("gpt", None)),
        "null-field: conversations[1].value: ",
    ),
    "no value": (
        sharegpt({"from": "human"}, said("gpt", "b")),
        "missing-field: conversations[0].value is missing",
    ),
    "a blank turn after a system prompt": (
        sharegpt(said("human", ""), said("gpt", "b"), system="s"),
        "blank-field: conversations[0] has no text",
    ),
    "a call that is no JSON": (
        sharegpt(said("human", "a"), said("function_call", "find()")),
        "malformed-tool-calls: conversations[1].value is not the JSON of a call",
    ),
    "a call without a name": (
        sharegpt(said("human", "a"), said("function_call", '{"arguments": {}}')),
        "malformed-tool-calls: conversations[1].value[0]: no function name in it",
    ),
    "tools that are no JSON": (
        sharegpt(said("human", "a"), said("gpt", "b"), tools="find"),
        "malformed-tools: tools: ",
    ),
    "conversations that are a text": ({"conversations": "human: a"}, "wrong-type: conversations: "),
    "no answer": (
        sharegpt(said("human", "a"), said("gpt", "b"), said("human", "c")),
        "last-turn-not-assistant: the turns are user, assistant, user",
    ),
    "an answer first": (
        sharegpt(said("gpt", "a"), said("human", "b"), said("gpt", "c")),
        "role-order: the turns are assistant, user",
    ),
    "two system prompts": (
        sharegpt(said("system", "s"), said("human", "b"), said("gpt", "c"), system="S"),
        "role-order: the turns are system, system, user",
    ),
    "a result that nobody asked for": (
        sharegpt(said("human", "a"), said("observation", "b"), said("gpt", "c")),
        "tool-without-call: the turns are user, tool",
    ),
    "a preference pair": (
        {"prompt": "a"} | PAIR,
        "preference-pair: set completion_feature: chosen and drop_fields: [rejected]",
    ),
    "a bad answer of LLaMA-Factory's KTO rows": (
        alpaca("e", "f", kto_tag=False),
        "preference-pair: kto_tag: false marks an answer that is not to be learnt",
        [row | {"kto_tag": True} for row in GOOD_ALPACA],
    ),
    "a bad answer of TRL's rows": (
        {"prompt": "c", "completion": "No.", "label": False},
        "preference-pair: drop_fields: [label]",
        [{"prompt": text, "completion": "Yes.", "label": True} for text in "ab"],
    ),
    "a bad answer that ends a chat": (
        {"messages": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "No."}]}
        | {"label": False},
        "preference-pair: label: false marks an answer that is not to be learnt",
        [{"prompt": text, "completion": "Yes.", "label": True} for text in "ab"],
    ),
    "a preference pair of Alpaca's": (
        {"instruction": "a", "input": "b"} | PAIR,
        "preference-pair: set prompt_feature: instruction, completion_feature: chosen and "
        "drop_fields: [rejected]",
    ),
    "a preference pair of ShareGPT's": (
        sharegpt(said("human", "a"), chosen=said("gpt", "b"), rejected=said("gpt", "c")),
        "preference-pair: make each the last turn of its row",
    ),
}
# Files with settings, and the place of their one error.
BROKEN_FILES: dict[str, tuple[Files, dict[str, Any], str]] = {
    "a chat where Alpaca is configured": (
        {"train.jsonl": lines(GOOD_ALPACA[0], chat("a", "b"))},
        {"data_format": "alpaca"},
        "train.jsonl:2: missing-field: instruction is missing, which data_format: alpaca needs",
    ),
    "a plain chat where tools are configured": (
        {"train.jsonl": lines({"messages": ASKED, "tools": [TOOL]}, chat("a", "b"))},
        {"data_format": "tools"},
        "train.jsonl:2: missing-field: tools is missing",
    ),
    "a cell too many between semicolons": (
        {"train.csv": b'prompt;completion\n"a\nb";c\nd;e;f\ng;h\n'},
        {},
        "train.csv:4: cell-count: expected 2 cells as in the header, found 3",
    ),
    "an open quote": (
        {"train.tsv": b'prompt\tcompletion\na\tb\n"c\td\n'},
        {},
        "train.tsv:3: damaged-file: unexpected end of data",
    ),
    "latin-1 of a spreadsheet": (
        {"train.csv": "prompt;completion\na;b\nc;café\n".encode("latin-1")},
        {},
        "train.csv:3: not-utf8: Save the file as UTF-8",
    ),
    "a packed table that is cut off": (
        {"train.csv.gz": gzip.compress(b"prompt,completion\na,b\n" * 9)[:-9]},
        {},
        "train.csv.gz:19: damaged-file: the gzip file is cut off in this line",
    ),
    "a line of the second of several files": (
        {
            "train-1.jsonl": lines(*GOOD_ALPACA),
            "train-2.csv": b'instruction,output\n"e\nf",g\nh,""\n',
        },
        {},
        "train-2.csv:4: blank-field: output has no text in it",
    ),
    "a column beside a prompt and an answer": (
        {"train.csv": b"Frage;Antwort;System\na;b;\nc;d;Be kind.\n"},
        NAMES,
        "train.csv:3: unread-field: drop_fields: [System]",
    ),
}
BROKEN_FILES |= {
    name: (
        rows(*(good[0] if good else GOOD_SHAREGPT if "conversations" in row else GOOD_ALPACA), row),
        {"prompt_feature": "q", "completion_feature": "output"} if "q" in row else {},
        f"train.jsonl:3: {says}",
    )
    for name, (row, says, *good) in BROKEN_ROWS.items()
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_a_broken_file_is_named_by_its_line(name: str, tmp_path: Path) -> None:
    """Its one error, as the report shows it: what is expected are its first words, or some."""
    files, settings, expected = BROKEN_FILES[name]
    file, line, check, says = expected.split(": ", 2)[0].split(":") + expected.split(": ", 2)[1:]
    (error,) = load(write(tmp_path, files), settings)[0].errors
    assert (error.file, error.line, error.check) == (file, int(line), check)
    assert says in error.message


def places(report: DatasetReport, check: str) -> Sequence[str]:
    return [str(finding) for finding in report.findings if finding.check == check]


def test_lines_of_several_files_are_named_by_file_and_line_there(tmp_path, tokenizer) -> None:
    def rows(*texts: str) -> bytes:
        return lines(*(alpaca(f"{text}?", f"{text}.") for text in texts))

    held_out = alpaca("The long way home is the best one?", "c.")
    files = {
        "train-1.jsonl": rows("a", "b", "a"),
        "train-2.jsonl": rows("c", "b") + lines(alpaca("c?", "e.", meta=1)),
        "valid-1.jsonl": rows("d"),
        "valid-2.jsonl": rows("d", "c") + lines(held_out | {"output": "d"}),
        "test.jsonl": rows("d", "z"),
    }
    files["train-1.jsonl"] += lines(held_out)
    report, _ = load(write(tmp_path, files), {"max_seq_length": 8}, tokenizer)
    assert places(report, "duplicate") == [
        "train-1.jsonl:3: duplicate: the same example as line 1",
        "train-2.jsonl:2: duplicate: the same example as line 2 of train-1.jsonl",
    ]
    (leak,) = places(report, "leakage")
    assert leak.startswith("valid-2.jsonl:2: leakage: the same example is in train-2.jsonl:1;")
    (again,) = places(report, "test-in-valid")
    assert again.startswith("test.jsonl:1: test-in-valid: the same example is in valid-1.jsonl:1,")
    (repeated,) = places(report, "repeated-held-out")
    assert repeated.startswith("valid-2.jsonl:1: ")
    assert "the first of them line 1 of valid-1.jsonl;" in repeated
    (unknown,) = places(report, "unknown-key")
    assert unknown.startswith("train-2.jsonl:3: ")
    assert {place.split(":")[0] for place in places(report, "truncated")} >= {"train-1.jsonl"}
    policy = {"policy": DataSettings("").policy.model_copy(update={"duplicates": "drop"})}
    (dropped,) = places(load(tmp_path, policy)[0], "dropped-duplicate")
    assert dropped.startswith("train-1.jsonl:3: ")
    assert dropped.endswith("2 (train-1.jsonl:3, train-2.jsonl:2)")


def test_equal_rows_of_two_formats_are_one_example(tmp_path: Path) -> None:
    files = {
        "train.jsonl": lines(alpaca("a", "b", input="c", system="s")),
        "valid.jsonl": lines(chat("a\nc", "b", system="s")),
    }
    assert [found.check for found in load(write(tmp_path, files), {})[0].errors] == ["leakage"]


def test_a_field_that_repeats_what_is_trained_on_or_labels_it_is_no_loss(tmp_path: Path) -> None:
    row = chat("Where is it, please?", "In Oslo.", system="Be kind.")
    row |= {"prompt": "Where is it, please?", "category": "QA", "url": "http://a.b/" + "c" * 99}
    report = load(write(tmp_path, {"train.jsonl": lines(row)}), {})[0]
    assert report.errors == ()
    (warning,) = places(report, "unknown-key")
    assert "ignored: category, prompt, url" in warning


def test_each_kind_of_row_can_be_configured() -> None:
    names = {"completions" if name == "completion" else name for name in FORMATS}
    assert {*DATA_FORMATS} == {"auto", "csv", "tools", *names}
    for name in DATA_FORMATS:
        assert example_config(data_format=name).data_format == name
    require_refused("'xml' is no format of rows; there are auto, alpaca, chat", data_format="xml")


def test_a_file_that_is_no_table_is_refused_where_tables_are_configured(tmp_path: Path) -> None:
    write(tmp_path, {"train.jsonl": lines(*GOOD_ALPACA)})
    with pytest.raises(ConfigError, match=r"data_format: csv, but .*train\.jsonl is no table"):
        load(tmp_path, {"data_format": "csv"})
