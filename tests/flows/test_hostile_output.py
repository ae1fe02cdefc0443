"""Hostile strings through every path that prints: nothing in them acts on a terminal or a page."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import mlx.core as mx
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from prefect.client.schemas.actions import ArtifactCreate

from flows.process import os_errors
from flows.terminal import console, token_view
from nested_core import errors
from nested_core.data.tokens.tokenized_split import ShownExample, ShownToken
from nested_core.storage.adapter import CONFIG_NAME, write_adapter
from nested_core.text.document import Cell, Document, Facts, Section, Table, Text
from nested_core.text.foreign_text import escape
from tasks import log_text
from tasks.artifact_client import ArtifactClient
from tests.example import MODEL
from tests.flows.conftest import called
from tests.hostile_text import HOSTILE, MARK, UNSAFE, assert_safe

ERRORS = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, errors.NestedTuneError)
]


def print_a_table(text: str) -> None:
    console.print_table((text, "b"), [(text, 1.5), (None, text)], title=text)


def print_tokens(text: str) -> None:
    token_view.print_examples([ShownExample(text, 1, (ShownToken(1, text, True),))])


def show_progress(text: str) -> None:
    console.print_progress(text, text)


def print_a_line(text: str) -> None:
    console.print_line(text)


def describe_an_os_error(text: str) -> None:
    error = os_errors.explain(OSError(2, "No such file or directory", text))
    console.print_progress(str(error))


def print_a_document(text: str) -> None:
    table = Table(text, (text,), [(Cell(text, "bad", text),)])
    console.print_blocks(Text(text), Facts([(text, text)]), Section(text, [table]))


PRINTERS: list[Callable[[str], None]] = [
    print_a_table,
    print_tokens,
    show_progress,
    print_a_line,
    print_a_document,
    describe_an_os_error,
]


@pytest.mark.parametrize("show", PRINTERS)
def test_what_is_printed_is_safe_and_shows_the_text(show, capfd) -> None:
    for name, text in HOSTILE.items():
        show(text)
        written = "".join(capfd.readouterr())
        assert_safe(written)
        assert MARK in written, name


@pytest.mark.parametrize("name", HOSTILE)
def test_markup_of_rich_is_shown_and_not_obeyed(name, capfd) -> None:
    for text in ("[/red]", "[bold]a[/bold]", "[link=x]a[/link]", ":boom:"):
        console.print_table(("a",), [(text + HOSTILE[name][:60],)])
        assert text in capfd.readouterr().out


@pytest.mark.parametrize("name", HOSTILE)
def test_a_document_is_json_and_keeps_the_text(name, capfd) -> None:
    text = HOSTILE[name]
    console.print_json({text: [text], "loss": float("nan"), "pair": (1.0, float("inf"))})
    written = capfd.readouterr().out
    assert UNSAFE.search(written) is None
    assert json.loads(written) == {text: [text], "loss": None, "pair": [1.0, None]}


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_of_ours_is_safe_as_text(error: type[errors.NestedTuneError]) -> None:
    for name, text in HOSTILE.items():
        shown = str(error(f"{text} is wrong"))
        assert UNSAFE.search(shown) is None, name
        assert MARK in shown, name


@pytest.mark.parametrize("name", HOSTILE)
def test_a_log_line_of_a_run_is_safe_however_it_is_formed(name: str) -> None:
    text = HOSTILE[name]
    for message, arguments in (
        (text.replace("%", "%%"), ()),
        ("%s", (text,)),
        ("%(a)s", ({"a": text},)),
    ):
        record = logging.LogRecord("prefect.task_runs", 20, "", 0, message, arguments, None)
        assert log_text.escape_foreign_text(record)
        assert UNSAFE.search(record.getMessage()) is None
        assert MARK in record.getMessage()


def test_the_logs_of_runs_have_the_filter() -> None:
    for name in log_text.LOGGERS_OF_RUNS:
        assert logging.getLogger(name).filters.count(log_text.escape_foreign_text) == 1


class SentArtifacts(ArtifactClient):
    """What would be sent to Prefect's server, by key."""

    def __init__(self) -> None:
        self._client: Any = self
        self._flow_run = None
        self._published = {}
        self.data: dict[str, Any] = {}
        self.descriptions: list[str] = []

    def create_artifact(self, artifact: ArtifactCreate) -> Any:
        """In place of the server's client."""
        self.data[str(artifact.key)] = artifact.data
        self.descriptions.append(str(artifact.description))
        return SimpleNamespace(id=uuid4())


@pytest.mark.parametrize("name", HOSTILE)
def test_an_artifact_holds_no_markup_of_others(name: str) -> None:
    text, sent = HOSTILE[name], SentArtifacts()
    sent.publish_page("page", Document(text, [Text(text)]), text)
    sent.publish_table("table", [{text: text, "loss": 1.5}], text)
    sent.publish_progress("progress", 50.0, text)
    (row,) = json.loads(sent.data["table"])
    assert len(sent.descriptions) == 3
    for shown in (sent.data["page"].replace("\n", ""), *row, *sent.descriptions):
        assert UNSAFE.search(shown) is None
        for markup in ("](", "<img", "<script", "https://", "www."):
            assert re.search(rf"(?<!\\){re.escape(markup)}", shown) is None
    assert row["loss"] == "1.5"


@given(st.text(st.characters(codec=None)))
def test_no_text_at_all_gets_through(text: str) -> None:
    assert UNSAFE.search(escape(text)) is None


def hostile_data(folder: Path) -> Path:
    """A data set with every hostile string as a key, a role, a key twice and an unknown format."""
    folder.mkdir()
    rows: list[str] = []
    for text in HOSTILE.values():
        if len(text) > 1_000:
            continue
        turns = [{"role": text, "content": "a"}, {"role": "assistant", "content": "b"}]
        rows.append(json.dumps({"messages": turns}))
        rows.append(json.dumps({"text": "a" + text, text: 1}))
        rows.append(json.dumps({text: 1, "x": 2}))
        key = json.dumps(text)
        rows.append(f'{{"text": "a", {key}: 1, {key}: 2}}')
        rows.append(json.dumps({text: [{"from": "human", "value": "a"}]}))
        rows.append(
            text.replace("\n", " ")
            .encode("utf-8", "surrogateescape" if "\udcff" in text else "replace")
            .decode("latin-1")
        )
    (folder / "train.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def test_validate_prints_hostile_data_safely(tmp_path: Path) -> None:
    data = hostile_data(tmp_path / "data")
    done = called("validate", "--data", data, "--no-tokenize", "--model", MODEL, cwd=tmp_path)
    assert done.code == 3
    assert_safe(done.stdout + done.stderr)
    assert MARK in done.stdout


@pytest.mark.parametrize("name", HOSTILE)
def test_a_configuration_of_hostile_keys_and_values_is_refused_safely(name, tmp_path) -> None:
    text = HOSTILE[name]
    content = {text: 1, "model": text, "nested": {text: 1, "fast": text}, "iters": text}
    try:
        written = yaml.safe_dump(content, allow_unicode=False).encode()
    except UnicodeEncodeError:
        written = f"? {text}\n: 1\n".encode("utf-8", "surrogatepass")
    (tmp_path / "config.yaml").write_bytes(written)
    done = called("validate", "-c", "config.yaml", cwd=tmp_path)
    assert done.code == 2
    assert_safe(done.stderr)
    assert "unexpected" not in done.message()


@pytest.mark.parametrize("name", HOSTILE)
def test_an_adapter_of_hostile_names_is_judged_safely(name: str, tmp_path: Path) -> None:
    text = HOSTILE[name][:200]
    folder = tmp_path / "adapter"
    folder.mkdir()
    try:
        write_adapter(
            folder,
            {f"{text}.lora_a": mx.zeros((2, 2)), f"{text}.lora_b": mx.zeros((2, 2))},
            {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 1.0}},
        )
    except (UnicodeEncodeError, TypeError, ValueError):
        return  # no such name can be written
    config: dict[str, Any] = {
        "fine_tune_type": "lora",
        "model": text,
        "base_fingerprint": text,
        text: text,
    }
    config["lora_parameters"] = {"rank": 2, "scale": 1.0, "keys": [text], text: text}
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    done = called("verify", folder, folder, cwd=tmp_path)
    assert done.code in (4, 6)
    assert_safe(done.stdout + done.stderr)
    imported = called("import-peft", folder, "--model", MODEL, "--out", "out", cwd=tmp_path)
    assert imported.code in (2, 6)
    assert_safe(imported.stderr)
