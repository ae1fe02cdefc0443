"""Rows of preferences: a prompt with a chosen and a rejected answer, or an answer with a label.

A pair becomes one example of tokens: the chosen conversation, then the rejected one, each begun
with the same prompt; of each the answer is supervised. An answer with a label becomes its
conversation, and where it is not wanted one more token behind it, which nothing supervises.
side_by_side.py takes them apart again.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NotRequired

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict  # pydantic asks for this one below Python 3.12

from nested_core.data.lines.example_parsing import Example, Fields, RowFormat, Turns
from nested_core.data.lines.json_decoding import LineProblem, parse_json_text
from nested_core.data.lines.other_formats import read_openai_turns
from nested_core.data.tokens.example_encoding import EncodedExample, encode_example
from nested_core.data.tokens.text_notes import Note
from nested_core.rooms.preferences.row_rules import judge_labels, judge_pairs

_STRICT = ConfigDict(strict=True, extra="ignore")
EMPTY_ANSWER_CHECK = "empty-answer"
_ROLES = ("system", "user", "assistant", "tool")
UNWANTED_MARK = 1  # the token behind an answer that is not wanted: not 0, which is padding


class _Line(TypedDict):
    tools: NotRequired[list[dict[str, Any]] | None]


@with_config(_STRICT)
class _PairLine(_Line):
    prompt: list[dict[str, Any]]
    chosen: str
    rejected: str


@with_config(_STRICT)
class _ChatPairLine(_Line):
    chat: list[dict[str, Any]]
    rejected: str


@with_config(_STRICT)
class _ConversationPairLine(_Line):
    chosen: list[dict[str, Any]]
    rejected: list[dict[str, Any]]


@with_config(_STRICT)
class _LabelledLine(_Line):
    prompt: list[dict[str, Any]]
    completion: str
    label: bool


@with_config(_STRICT)
class _LabelledChatLine(_Line):
    chat: list[dict[str, Any]]
    label: bool


def _prepare_pair(fields: Fields, place: str) -> Fields:
    """Prompt as turns and answers as texts, however they are written.

    An answer may be a text, a turn of the assistant, or the whole conversation that ends with it.
    """
    prompt = _read_turns(fields["prompt"], place)
    answers = {}
    for name in ("chosen", "rejected"):
        before, answers[name] = _read_answer(fields[name], name)
        if before and _is_same_conversation(before, prompt):
            prompt = before
        elif before:
            raise LineProblem(
                "other-prompt",
                f"{name} begins with other turns than {place}: a pair has one prompt. Give the "
                f"answers alone, or leave {place} out",
            )
    return _with_tools(fields) | {"prompt": prompt, **answers}


def _is_same_conversation(before: list[dict[str, Any]], prompt: list[dict[str, Any]]) -> bool:
    """Whether the turns before an answer are the prompt, which may be the last of them alone."""
    return before in (prompt, [*before[: -len(prompt)], *prompt])


def _prepare_chat_pair(fields: Fields, place: str) -> Fields:
    turns = _read_turns(fields["chat"], place)
    before, rejected = _read_answer(fields["rejected"], "rejected")
    if before and before != turns[:-1]:
        raise LineProblem("other-prompt", f"rejected begins with other turns than {place}")
    return _with_tools(fields) | {"chat": turns, "rejected": rejected}


def _prepare_conversation_pair(fields: Fields, place: str) -> Fields:
    turns = {name: _read_turns(fields[name], name) for name in ("chosen", "rejected")}
    if turns["chosen"][:-1] != turns["rejected"][:-1]:
        raise LineProblem(
            "other-prompt",
            f"{place} and rejected differ before their last turns: a pair has one prompt, and two "
            f"answers to it",
        )
    return _with_tools(fields) | turns


def _prepare_labelled(fields: Fields, place: str) -> Fields:
    prompt = _read_turns(fields["prompt"], place)
    _, answer = _read_answer(fields["completion"], "completion")
    return _with_tools(fields) | {"prompt": prompt, "completion": answer}


def _prepare_labelled_chat(fields: Fields, place: str) -> Fields:
    return _with_tools(fields) | {"chat": _read_turns(fields["chat"], place)}


def _with_tools(fields: Fields) -> Fields:
    return fields | {"tools": parse_json_text(fields.get("tools"), "tools")}


def _parse_turns(value: Any, place: str) -> Any:
    """The turns in a table's cell; any other text as it is, for an answer may be JSON."""
    is_cell = isinstance(value, str) and value.lstrip().startswith("[{")
    if not is_cell or not ('"role"' in value or '"from"' in value):
        return value
    return parse_json_text(value, place)


def _read_turns(value: Any, place: str) -> list[dict[str, Any]]:
    """A text as the user's turn, or turns; LineProblem for anything else."""
    value = _parse_turns(value, place)
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    turns = read_openai_turns(value, place)
    if not isinstance(turns, list) or not turns:
        raise LineProblem("wrong-type", f"{place}: expected a text or turns, found none of them")
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or turn.get("role") not in _ROLES:
            raise LineProblem("unknown-role", f"{place}[{number}]: expected a role of {_ROLES}")
        if not isinstance(turn.get("content"), str) and not turn.get("tool_calls"):
            raise LineProblem("wrong-type", f"{place}[{number}].content: expected a text")
    return turns


def _read_answer(value: Any, place: str) -> tuple[list[dict[str, Any]], str]:
    """The turns before an answer, if there are any, and its text."""
    value = _parse_turns(value, place)
    if isinstance(value, str):
        if not value.strip():
            raise LineProblem(EMPTY_ANSWER_CHECK, f"{place} has no text")
        return [], value
    turns = _read_turns([value] if isinstance(value, dict) else value, place)
    return turns[:-1], _text_of_answer(turns, place)


def _text_of_answer(turns: list[dict[str, Any]], place: str) -> str:
    """The text of the last turn; LineProblem where it is not the assistant's, or calls tools."""
    last = turns[-1]
    if last["role"] != "assistant" or not isinstance(last.get("content"), str):
        raise LineProblem("no-answer", f"{place}: expected the assistant's text as its last turn")
    return str(last["content"])


def _require_different(chosen: str, rejected: str) -> None:
    if chosen.split() == rejected.split():
        raise LineProblem(
            "equal-answers",
            "chosen and rejected are equal, so that the row prefers nothing: leave it out",
        )


def _read_pair(fields: Fields) -> Turns:
    _require_different(fields["chosen"], fields["rejected"])
    turns = [*fields["prompt"], {"role": "assistant", "content": fields["chosen"]}]
    places = (*("prompt",) * len(fields["prompt"]), "chosen")
    return Turns(turns, places, {"rejected": fields["rejected"]})


def _read_chat_pair(fields: Fields) -> Turns:
    chosen = _text_of_answer(fields["chat"], "the last turn")
    _require_different(chosen, fields["rejected"])
    return Turns(fields["chat"], (), {"rejected": fields["rejected"]})


def _read_conversation_pair(fields: Fields) -> Turns:
    chosen = _text_of_answer(fields["chosen"], "chosen")
    rejected = _text_of_answer(fields["rejected"], "rejected")
    _require_different(chosen, rejected)
    return Turns(fields["chosen"], (), {"rejected": rejected})


def _read_labelled(fields: Fields) -> Turns:
    turns = [*fields["prompt"], {"role": "assistant", "content": fields["completion"]}]
    places = (*("prompt",) * len(fields["prompt"]), "completion")
    return Turns(turns, places, {"label": fields["label"]})


def _read_labelled_chat(fields: Fields) -> Turns:
    _text_of_answer(fields["chat"], "the last turn")
    return Turns(fields["chat"], (), {"label": fields["label"]})


def rejected_turns(example: Example) -> list[dict[str, Any]]:
    """The conversation of a pair that ends with the rejected answer."""
    return [*example.messages[:-1], {"role": "assistant", "content": example.rest["rejected"]}]


def encode_pair(example: Example, tokenizer: Any) -> EncodedExample:
    """The chosen conversation and behind it the rejected one, of each the answer supervised."""
    chosen = _encode_answer(example, example.messages, tokenizer)
    rejected = _encode_answer(example, rejected_turns(example), tokenizer)
    broken = chosen if chosen.broken_turn >= 0 else rejected
    if broken.broken_turn >= 0:
        return broken
    behind = len(chosen.tokens)
    spans = tuple((begin + behind, end + behind) for begin, end in rejected.spans)
    notes = [
        *chosen.notes,
        *(note for note in rejected.notes if note not in chosen.notes),
        *_note_empty_answer("chosen", chosen),
        *_note_empty_answer("rejected", rejected),
    ]
    return EncodedExample(
        [*chosen.tokens, *rejected.tokens],
        (*chosen.spans, *spans),
        notes=tuple(notes),
        is_whole=True,
    )


def encode_labelled(example: Example, tokenizer: Any) -> EncodedExample:
    """The conversation with its answer supervised, and UNWANTED_MARK where the label says no."""
    encoded = _encode_answer(example, example.messages, tokenizer)
    if encoded.broken_turn >= 0:
        return encoded
    mark = [] if example.rest["label"] else [UNWANTED_MARK]
    notes = (*encoded.notes, *_note_empty_answer("completion", encoded))
    return EncodedExample([*encoded.tokens, *mark], encoded.spans, notes=notes, is_whole=True)


def _encode_answer(example: Example, turns: list[dict[str, Any]], tokenizer: Any) -> EncodedExample:
    """A conversation as any chat, its last turn supervised."""
    return encode_example(example._replace(format="chat", messages=turns), tokenizer, "last")


def _note_empty_answer(name: str, encoded: EncodedExample) -> list[Note]:
    """An error for an answer of which nothing is left to compare."""
    begin, end = encoded.spans[0]
    if begin >= 1 and end > begin:
        return []
    return [Note("error", EMPTY_ANSWER_CHECK, f"{name} has no tokens after its prompt")]


def _write(answer: str, example: Example) -> dict[str, Any]:
    """The fields of a row as they are kept, with the answer under the key `answer`."""
    tools = {} if example.tools is None else {"tools": example.tools}
    prompt, last = example.messages[:-1], example.messages[-1]
    return {"prompt": prompt, answer: last["content"], **example.rest, **tools}


def _swap_answers(row: Mapping[str, Any]) -> dict[str, Any]:
    """The pair that prefers the rejected answer of a row that `_write` has written."""
    return {**row, "chosen": row["rejected"], "rejected": row["chosen"]}


def _negate_label(row: Mapping[str, Any]) -> dict[str, Any]:
    """The same answer with the other label."""
    return {**row, "label": not row["label"]}


_PAIR_PARTS: Any = {
    "is_conversation": False,
    "encode": encode_pair,
    "write": partial(_write, "chosen"),
    "judge": judge_pairs,
    "contradict": _swap_answers,
}
_LABELLED_PARTS: Any = {
    "is_conversation": False,
    "encode": encode_labelled,
    "write": partial(_write, "completion"),
    "judge": judge_labels,
    "contradict": _negate_label,
}
PAIRS: Mapping[str, RowFormat] = {
    "pair": RowFormat(
        _PairLine, ("prompt", "chosen", "rejected"), _read_pair, _prepare_pair, **_PAIR_PARTS
    ),
    "chat_pair": RowFormat(
        _ChatPairLine, ("chat", "rejected"), _read_chat_pair, _prepare_chat_pair, **_PAIR_PARTS
    ),
    "conversation_pair": RowFormat(
        _ConversationPairLine,
        ("chosen", "rejected"),
        _read_conversation_pair,
        _prepare_conversation_pair,
        **_PAIR_PARTS,
    ),
}
LABELS: Mapping[str, RowFormat] = {
    "labelled": RowFormat(
        _LabelledLine,
        ("prompt", "completion", "label"),
        _read_labelled,
        _prepare_labelled,
        **_LABELLED_PARTS,
    ),
    "labelled_chat": RowFormat(
        _LabelledChatLine,
        ("chat", "label"),
        _read_labelled_chat,
        _prepare_labelled_chat,
        **_LABELLED_PARTS,
    ),
}


def suggest_loss(row: Mapping[str, Any]) -> str | None:
    """The loss that `init` begins with: dpo for a pair, kto for a label that says no; else None."""
    if "rejected" in row and ("chosen" in row or "messages" in row):
        return "dpo"
    is_unwanted = row.get("label") is False and ("completion" in row or "messages" in row)
    return "kto" if is_unwanted else None
