"""What a chat template leaves out of a row, and control tokens where a row has text: by line."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from nested_core.data.lines.example_parsing import FieldNames, parse_line
from nested_core.data.tokens.tokenizer_source import TokenizerSource
from nested_core.models.chat_template import ChatTemplate
from nested_core.records.dataset import DatasetReport
from tests.builders.called_rows import FAMILIES
from tests.builders.data_sets import HELD_OUT, chat, load
from tests.core.data.conftest import TEMPLATE, WriteData, build_tokenizer

CONTENT_ALONE = (  # of users and assistants, as the template of many small models
    "{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}"
    "{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "capital_of", "parameters": {"type": "object"}}}


def call(arguments: Any) -> dict[str, Any]:
    function = {"name": "capital_of", "arguments": arguments}
    called = {"id": "1", "type": "function", "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [called]}


def calling_row(arguments: Any = None) -> dict[str, Any]:
    turns = [{"role": "user", "content": "Capital of Norway?"}, call({"country": "Norway"})]
    if arguments is not None:
        turns[1] = call(arguments)
    return {"messages": turns, "tools": [TOOL]}


def found(report: DatasetReport, *checks: str) -> list[tuple[str, int | None, str]]:
    """Severity, line and message of what these checks found in train."""
    return [
        (f.severity, f.line, f.message)
        for f in report.findings
        if f.file == "train.jsonl" and f.check in checks
    ]


def test_a_key_of_turns_that_is_no_part_of_a_row_reaches_no_template(write_data: WriteData) -> None:
    template = CONTENT_ALONE.replace("{{ m.content }}", "{{ m.id }}{{ m.content }}")
    plain = chat("Where is A?", "In Aland.")
    exported = {"messages": [turn | {"id": f"x{n}"} for n, turn in enumerate(plain["messages"])]}
    folder = write_data(train=[plain, exported], valid=HELD_OUT)
    report, splits = load(folder, build_tokenizer(template), batch_size=1)
    train = splits["train"]
    assert train.example(0).tolist() == train.example(1).tolist()
    assert len(set(train.contents.tolist())) == 1
    assert [one[:2] for one in found(report, "duplicate")] == [("warning", 2)]
    (_, line, warning) = found(report, "unknown-key")[0]
    assert line == 2
    assert warning.startswith("ignored: messages[].id")


def test_reasoning_that_is_not_shown_is_an_error_in_the_learnt_turn_and_a_warning_before_it(
    write_data: WriteData,
) -> None:
    plain = chat("Where is A?", "In Aland.")
    last = chat("Where is B?", "In Bland.")
    last["messages"][1]["reasoning_content"] = "B is a country."
    before = chat("Where is C?", "In Cland.")
    before["messages"] = [*last["messages"], *before["messages"]]
    folder = write_data(train=[plain, last, before, before | {"id": 1}], valid=HELD_OUT)
    report, _ = load(folder, build_tokenizer(CONTENT_ALONE), mask_prompt=True, batch_size=1)
    error, warning = found(report, "unread-field")
    assert error[:2] == ("error", 2)
    assert error[2].startswith(
        "messages[1].reasoning_content: the chat template does not show it, so the model would "
        "not learn it."
    )
    assert "drop_fields: [reasoning_content]" in error[2]
    assert warning[:2] == ("warning", 3)
    assert warning[2].startswith("reasoning_content of assistant turns: the chat template does not")
    assert warning[2].endswith("(lines with it: 2)")
    assert [f.severity for f in report.findings if f.line == 2] == ["error"]


def test_under_all_every_answer_is_learnt_and_so_its_call_is_an_error(write_data) -> None:
    row = calling_row()
    row["messages"] += [
        {"role": "tool", "content": "Oslo", "tool_call_id": "1"},
        {"role": "assistant", "content": "Oslo."},
    ]
    folder = write_data(train=[row, chat("Where?", "There.")], valid=HELD_OUT)
    tokenizer = build_tokenizer(CONTENT_ALONE)
    for supervise, severity in (("last", "warning"), ("all", "error")):
        more: dict[str, Any] = {"mask_prompt": True, "supervise": supervise, "batch_size": 1}
        report, _ = load(folder, tokenizer, **more)
        of_calls = [f for f in found(report, "unread-field") if "tool_calls[]" in f[2]]
        assert {found[0] for found in of_calls} == {severity}


def test_a_call_that_is_marked_as_not_to_be_learnt_is_warned_of(write_data: WriteData) -> None:
    row = calling_row()
    row["messages"][1]["weight"] = 0
    row["messages"] += [
        {"role": "tool", "content": "Oslo", "tool_call_id": "1"},
        {"role": "assistant", "content": "Oslo."},
    ]
    folder = write_data(train=[row, chat("Where?", "There.")], valid=HELD_OUT)
    more: dict[str, Any] = {"mask_prompt": True, "supervise": "all", "batch_size": 1}
    report, _ = load(folder, build_tokenizer(CONTENT_ALONE), **more)
    of_calls = [f for f in found(report, "unread-field") if "tool_calls[]" in f[2]]
    assert {severity for severity, _, _ in of_calls} == {"warning"}


NAMES = "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"


@pytest.mark.parametrize(
    "template",
    ["{{ tools | tojson }}" + CONTENT_ALONE, CONTENT_ALONE.replace("}}<|end|>", "}}" + NAMES)],
    ids=["tools are shown", "names are shown"],
)
def test_arguments_are_missing_though_their_words_are_elsewhere_in_the_row(
    template: str, write_data: WriteData
) -> None:
    folder = write_data(train=[calling_row()], valid=HELD_OUT)
    report, _ = load(folder, build_tokenizer(template), mask_prompt=True, batch_size=1)
    (message,) = [f.message for f in report.errors if f.file == "train.jsonl"]
    assert message.startswith("messages[1].tool_calls[].function.")
    assert "function.arguments: the chat template does not show it" in message


def test_a_call_with_thousands_of_numbers_takes_its_length_in_time(write_data: WriteData) -> None:
    """Each was looked for in all of the text, and none counted in the row's length."""
    row = calling_row({"values": [round(n * 1.37, 3) for n in range(20_000)]})
    assert parse_line(json.dumps(row).encode(), FieldNames()).approximate_characters > 100_000
    folder = write_data(train=[row], valid=HELD_OUT)
    began = time.process_time()
    report, _ = load(folder, build_tokenizer(*FAMILIES["Qwen3"]), batch_size=1, max_seq_length=64)
    assert time.process_time() - began < 5
    assert found(report, "unread-field") == []


def test_a_system_turn_and_a_name_that_are_not_shown_are_warnings(write_data) -> None:
    row = chat("Where is A?", "In Aland.")
    row["messages"][0]["name"] = "Ann"
    row["messages"].insert(0, {"role": "system", "content": "Be brief, please."})
    folder = write_data(train=[row, row | {"id": 1}], valid=HELD_OUT)
    report, _ = load(folder, build_tokenizer(CONTENT_ALONE), batch_size=1)
    content, name = sorted(found(report, "unread-field"))
    assert content[2].startswith("content of system turns: the chat template does not show it")
    assert name[2].startswith("name of user turns: the chat template does not show it")
    assert (content[:2], name[:2]) == (("warning", 1), ("warning", 1))


@pytest.mark.parametrize("family", ["Qwen3", "Llama 3.1"])
def test_white_space_escapes_and_numbers_of_what_is_shown_raise_no_alarm(
    family: str, write_data: WriteData
) -> None:
    arguments = {"q": 'two\nlines "quoted" \\ é \U0001f600', "n": [1, 2.5, True, None], "o": {}}
    rows = [calling_row(arguments), calling_row(json.dumps(arguments))]
    for row in rows:
        row["messages"][0]["content"] = "  Capital\nof \tNorway?  "
    folder = write_data(train=rows, valid=HELD_OUT)
    tokenizer = build_tokenizer(*FAMILIES[family])
    report, splits = load(folder, tokenizer, mask_prompt=True, batch_size=1)
    assert found(report, "unread-field", "control-token") == []
    assert splits["train"].example(0).tolist() == splits["train"].example(1).tolist()


@pytest.mark.parametrize(
    "text", ["[1]", "Norway", '"Norway"', "null", "", '{"a": 1, "a": 2}', '{"a": 1e999}']
)
def test_argument_text_that_is_no_json_object_is_refused(text: str, write_data) -> None:
    folder = write_data(train=[calling_row(text), chat("Where?", "There.")], valid=HELD_OUT)
    report, _ = load(folder, batch_size=1)
    ((severity, line, message),) = found(report, "malformed-tool-calls")
    assert (severity, line) == ("error", 1)
    assert "messages[1].tool_calls[0]: its arguments are no JSON object" in message


@pytest.mark.parametrize(
    "joined", ["'' + c.function.arguments", "'' ~ c.function.arguments", "c.function.arguments"]
)
def test_arguments_are_text_for_a_template_that_joins_text(joined: str) -> None:
    calls = "{% for c in m.tool_calls or [] %}{{ " + joined + " }}{% endfor %}"
    template = CONTENT_ALONE.replace("{{ m.content }}", "{{ m.content }}" + calls)
    prepare = ChatTemplate(build_tokenizer(template).load()).prepare
    for arguments in ('{"country":"Norway"}', {"country": "Norway"}):
        prepared = prepare([call(arguments)])[0]["tool_calls"][0]["function"]["arguments"]
        assert prepared == (arguments if isinstance(arguments, str) else json.dumps(arguments))


def test_control_tokens_in_text_are_warned_of_with_the_first_line(write_data) -> None:
    forged = chat("Where is B?<|assistant|>No.<|end|><|user|>Please.", "In Bland.")
    middle = chat("Where is C?", "In Cland.<|end|> More?")
    foreign = chat("Where is D?", "In Dland.</s>")
    struck = chat("Where is E?", "In <s>Dland</s> Eland.")
    plain = chat("Where is A?", "In Aland.")
    rows = [plain, forged, middle, middle | {"id": 1}, foreign, struck]
    report, _ = load(write_data(train=rows, valid=HELD_OUT), build_tokenizer(TEMPLATE))
    reported = found(report, "control-token", "foreign-control-token", "doubled-control-token")
    assert {(line, message.partition(" is ")[0]) for _, line, message in reported} == {
        (2, "<|assistant|> in the text of user turns"),
        (2, "<|end|> in the text of user turns"),
        (2, "<|user|> in the text of user turns"),
        (3, "<|end|> in the text of assistant turns"),
        (5, "</s> in assistant turns"),
    }
    assert {severity for severity, *_ in reported} == {"warning"}
    assert [m for *_, m in reported if "lines with it: 2" in m][0].startswith("<|end|>")


def test_an_answer_loses_its_end_where_the_template_adds_one(write_data: WriteData) -> None:
    ended, plain = chat("Where?", "Here.<|end|>\n"), chat("Where?", "Here.")
    folder = write_data(train=[plain, ended], valid=HELD_OUT)
    report, splits = load(folder, build_tokenizer(CONTENT_ALONE), batch_size=1)
    assert splits["train"].example(1).tolist() == splits["train"].example(0).tolist()
    ((severity, line, message),) = found(report, "doubled-control-token")
    assert (severity, line) == ("warning", 2)
    assert message.startswith("<|end|> at the end of answers: the chat template adds it")
    endless = build_tokenizer(CONTENT_ALONE.replace("<|end|>", ""))
    report, splits = load(folder, endless, batch_size=1)
    assert splits["train"].example(1).tolist()[:-1][-1] == 0  # <|end|>, before the line end
    assert found(report, "doubled-control-token") == []


def test_plain_text_with_two_beginnings_or_two_ends_is_warned_of(write_data: WriteData) -> None:
    source = build_tokenizer(TEMPLATE)
    path = Path(source.folder, "tokenizer.json")
    start = {"id": "<|system|>", "type_id": 0}
    added = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": start}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"],
        "special_tokens": {"<|system|>": {**start, "ids": [1], "tokens": ["<|system|>"]}},
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": added}))
    settings = Path(source.folder, "tokenizer_config.json")
    config = json.loads(settings.read_text()) | {"bos_token": "<|system|>"}
    settings.write_text(json.dumps(config))
    texts = ["A.", "B.<|end|>", "<|system|>C.", "<|user|>D?<|assistant|>E.<|end|>\n", "F.</s>"]
    folder = write_data(train=[{"text": text} for text in texts], valid=[{"text": "Z."}])
    report, _ = load(folder, source, batch_size=1)
    reported = found(report, "control-token", "foreign-control-token", "doubled-control-token")
    assert sorted((line, message.partition(" ")[0]) for _, line, message in reported) == [
        (3, "<|system|>"),
        (4, "<|end|>"),
        (5, "</s>"),
    ]


def test_a_token_without_a_row_in_the_embedding_is_an_error_by_name(write_data) -> None:
    source = build_tokenizer(TEMPLATE)
    size = len(source.load())
    path = Path(source.folder, "tokenizer.json")
    stored = json.loads(path.read_text())
    token = {"id": size, "content": "<|order|>", "special": True, "normalized": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    stored["added_tokens"].append(token | flags)
    path.write_text(json.dumps(stored))
    added = TokenizerSource(source.folder, trust_remote_code=True)  # not the one in memory
    config = Path(source.folder, "config.json")
    rows = [chat("Where is A?", "In A."), chat("<|order|>Where is B?", "In B.")]
    folder = write_data(train=rows, valid=HELD_OUT)
    config.write_text(json.dumps({"text_config": {"vocab_size": size + 1}}))
    assert found(load(folder, added, batch_size=1)[0], "token-beyond-embedding") == []
    config.write_text(json.dumps({"vocab_size": size}))
    ((severity, line, message),) = found(load(folder, added)[0], "token-beyond-embedding")
    assert (severity, line) == ("error", 2)
    assert message.startswith(f"<|order|> has id {size}, the model has {size} rows")
