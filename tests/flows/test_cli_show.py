"""`validate --show N`: the tokens of the first examples and what is learnt, in every format."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.example import write_config
from tests.flows.conftest import Ended, called
from tests.formats import write_format, write_model

VALIDATE = ("validate", "-c", "config.yaml")
SHOW = (*VALIDATE, "--show", "3")
ALL = {"training": {"supervise": "all"}, "mask_prompt": False}
CASES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "text": ("text", {"mask_prompt": False}, (*SHOW, "--json")),
    "completion": ("completion", {"mask_prompt": True}, (*SHOW, "--json")),
    "chat all": ("chat", ALL, (*SHOW, "--json")),
    "tools": ("tools", {"mask_prompt": True}, (*SHOW, "--json")),
    "read by a person": ("chat", ALL, SHOW),
    "prompts too": ("chat", {"mask_prompt": False}, (*VALIDATE, "--show", "1")),
    "no tokenizer": ("text", {"mask_prompt": False}, (*SHOW, "--no-tokenize")),
    "none": ("text", {"mask_prompt": False}, (*VALIDATE, "--show", "0")),
}
ANSWER = "Go and see Kabul, the capital of Afghanistan!<|endoftext|>"
SECOND = "Go and see Bucharest, the capital of Romania!<|endoftext|>"
STRANGE = "a\x1b[31m\tb\x07 \u202e\u4e2d\u6587 \U0001f600 'quoted'\r\n"


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """Each case's command, run in a folder of its own."""
    folder = tmp_path_factory.mktemp("shown")
    model = str(write_model(folder / "model"))
    for case, (name, changes, _) in CASES.items():
        data = write_format(folder / case / "data", name)
        if case == "read by a person":
            write_third_line(data / "train.jsonl", strange_chat())
        write_config(folder / case / "config.yaml", model=model, data="data", **changes)
    return {case: called(*command, cwd=folder / case) for case, (_, _, command) in CASES.items()}


def strange_chat() -> dict[str, Any]:
    turns = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": STRANGE}]
    return {"messages": turns}


def write_third_line(path: Path, row: dict[str, Any]) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[2] = json.dumps(row)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.parametrize(
    ("case", "learnt"),
    [
        (
            "text",
            " want to see Afghanistan. Where to? Go and see Kabul, the capital of Afghanistan!"
            "<|endoftext|>",
        ),
        ("completion", ANSWER),
        ("chat all", ANSWER + SECOND),
        ("tools", ANSWER),
    ],
)
def test_the_document_has_every_token_and_which_are_learnt(shown, case, learnt) -> None:
    done = shown[case]
    assert done.code == 0, done.stderr
    examples = done.document["examples"]
    assert [(e["file"], e["line"]) for e in examples] == [("train.jsonl", n) for n in (1, 2, 3)]
    tokens = examples[0]["tokens"]
    assert all(set(token) == {"id", "text", "supervised"} for token in tokens)
    assert "".join(token["text"] for token in tokens if token["supervised"]) == learnt
    assert "I want to see Afghanistan. Where to?" in "".join(token["text"] for token in tokens)
    assert not tokens[0]["supervised"]


def test_a_person_reads_id_text_and_mark_within_a_hundred_columns(shown: dict[str, Ended]) -> None:
    done = shown["read by a person"]
    assert done.code == 0, done.stderr
    lines = done.stdout.splitlines()
    first = lines.index("train.jsonl:1: 44 tokens, 22 trained on (*)")
    assert max(map(len, lines[first:])) <= 100
    assert lines[first + 1].split()[:4] == ["3", "'<|user|>'", "45", "'I'"]
    example = " ".join(lines[first + 1 : lines.index("", first)])
    assert len(re.findall(r"\* *\d+ '", example)) == 22
    assert [line.split(":")[1] for line in lines if re.match(r"train.jsonl:\d", line)] == list(
        "123"
    )


def test_that_prompts_are_learnt_too_is_said_where_they_are(shown: dict[str, Ended]) -> None:
    note = "mask_prompt is false, as in mlx_lm: prompts are trained on too."
    assert note in shown["prompts too"].stdout
    assert note not in shown["read by a person"].stdout  # supervise: all learns answers alone


def test_control_characters_are_escaped(shown: dict[str, Ended]) -> None:
    text = shown["read by a person"].stdout
    text = text[text.index("train.jsonl:3:") :]
    for character in ("\x1b", "\x07", "\t", "\r", "\u202e"):
        assert character not in text
    assert r"'\x1b'" in text


@pytest.mark.parametrize("case", ["no tokenizer", "none"])
def test_there_must_be_tokens_to_show(shown: dict[str, Ended], case: str) -> None:
    assert shown[case].code == 2
    assert "N must be 1 or more, and --no-tokenize leaves no tokens" in shown[case].message()
