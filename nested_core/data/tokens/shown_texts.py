"""Check that the texts of a row are in what the chat template renders from it.

A template reads only the keys that its author thought of: tool calls, reasoning, a system turn or a
    name may be missing from the rendered text without an error.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from nested_core.data.data_settings import Targets
from nested_core.data.lines.example_parsing import Example
from nested_core.records.dataset import Severity
from nested_core.storage.untrusted_files import iterate_scalars

UNREAD_CHECK = "unread-field"
_REASONING_KEYS = ("reasoning_content", "thinking")
_KEYS_TO_DROP = {*_REASONING_KEYS, "name", "tools"}
_ESCAPES_PATTERN = re.compile(r"""(?:\\(?:u[0-9a-fA-F]{4}|["'\\/bfnrt]))+""")


class Note(NamedTuple):
    """A problem or doubt about one row, worded the same for all rows that have it."""

    severity: Severity
    check: str
    message: str


class RowText(NamedTuple):
    """A text of a row that the template should render.

    turn: the index of its turn; None for a text of the tools.
    key: the key that it is under.
    spellings: how a template may write it: one, or several for numbers, true, false and null.
    """

    turn: int | None
    role: str
    key: str
    spellings: tuple[str, ...]


def list_texts(messages: Sequence[Mapping[str, Any]], tools: Any = None) -> list[RowText]:
    """List the texts of turns and tools that are more than white space.

    If equal texts are listed, the first one is matched first, so those that every template renders
    come first, and later turns before earlier ones, whose reasoning some templates leave out.
    """
    texts: list[RowText] = []
    more: list[RowText] = []
    for turn, message in reversed(list(enumerate(messages))):
        role = message["role"]
        content = message.get("content")
        if content and not content.isspace():
            listed = more if role == "system" else texts
            listed.append(RowText(turn, role, "content", (content,)))
        if len(message) > 2 or "content" not in message:
            more += _list_texts_of_other_keys(turn, message)
    return texts + more + _list_texts_of_tools(tools or ())


def _list_texts_of_other_keys(turn: int, message: Mapping[str, Any]) -> Iterator[RowText]:
    """Yield the texts of a turn's other keys: tool calls, reasoning and name."""
    role = message["role"]
    for call in message.get("tool_calls") or ():
        function = call.get("function", call)
        yield RowText(turn, role, "tool_calls[].function.name", (function["name"],))
        for spellings in _spell_leaves(function.get("arguments")):
            yield RowText(turn, role, "tool_calls[].function.arguments", spellings)
    # A template reads one of both names, and transformers gives it the text under either.
    reasoning = {message[key]: key for key in reversed(_REASONING_KEYS) if message.get(key)}
    for text, key in reasoning.items():
        yield RowText(turn, role, key, (str(text),))
    # A tool's name is that of the function that was called.
    if role != "tool" and message.get("name"):
        yield RowText(turn, role, "name", (str(message["name"]),))


def _list_texts_of_tools(tools: Iterable[Mapping[str, Any]]) -> list[RowText]:
    """List names and descriptions of the tools' functions."""
    functions = [tool.get("function", tool) for tool in tools]
    return [
        RowText(None, "", "tools", (text,))
        for function in functions
        for text in (function["name"], function.get("description"))
        if isinstance(text, str) and text.strip()
    ]


def _spell_leaves(value: Any) -> Iterator[tuple[str, ...]]:
    """Yield the spellings of each text, number and so on in a JSON value, in JSON and Python."""
    for leaf in iterate_scalars(value):
        if not isinstance(leaf, str):
            yield tuple(dict.fromkeys((json.dumps(leaf), str(leaf))))
        elif leaf.strip():
            yield (leaf,)


def note_unshown_texts(
    texts: Sequence[RowText], rendered: str, example: Example, targets: Targets
) -> list[Note]:
    """Return an error for supervised texts that were not rendered, and warnings for others.

    rendered: the text that the template rendered.
    """
    notes = []
    last = len(example.messages) - 1
    errors: dict[str, str] = {}
    for text in _find_unshown_texts(texts, rendered):
        if text.turn is None:
            where, is_supervised = text.key, False
        else:
            is_learnt = text.turn == last or (targets != "last" and text.role == "assistant")
            # With the whole row in the loss, a template may still drop earlier turns' reasoning.
            if targets == "whole" and text.key in _REASONING_KEYS:
                is_learnt = text.turn == last
            is_learnt = is_learnt and text.turn not in example.masked
            is_supervised = is_learnt and text.key != "name"  # which no model writes
            where = f"{text.key} of {text.role} turns"
        if is_supervised:
            place = example.places[text.turn or 0] if example.places else f"messages[{text.turn}]"
            errors[f"{place}.{text.key}"] = text.key
            continue
        notes.append(Note("warning", UNREAD_CHECK, _describe_unshown(where, [text.key], "see")))
    if errors:
        keys = list(dict.fromkeys(errors.values()))
        message = _describe_unshown(" and ".join(errors), keys, "learn")
        notes.append(Note("error", UNREAD_CHECK, message))
    return notes


def _describe_unshown(where: str, keys: Sequence[str], verb: str) -> str:
    """Say which text the template does not render, and what to do about it.

    where: the missing texts' places, for the message. keys: the keys that they are under.
    verb: what the model would not do with them: see or learn.
    """
    droppable = [key for key in keys if key in _KEYS_TO_DROP]
    remedy = "write it where the template shows it"
    if droppable == list(keys):
        remedy = f"leave it out on purpose with drop_fields: [{', '.join(keys)}]"
    return (
        f"{where}: the chat template does not show it, so the model would not {verb} it. Take a "
        f"model whose chat template shows it, or {remedy}"
    )


def shows_all(rendered: str, texts: Sequence[str]) -> bool:
    """Return whether each text is in the rendered text, as often as in the row."""
    joined = "\0".join(texts)
    return all([rendered.count(text) >= joined.count(text) for text in texts])


def _find_unshown_texts(texts: Sequence[RowText], rendered: str) -> list[RowText]:
    """Return the texts that are missing in the rendered text, ignoring white space and escapes."""
    if shows_all(rendered, [text.spellings[0] for text in texts]):
        return []
    variants = {_fold(rendered), _fold(_unescape(rendered)), _fold(html.unescape(rendered))}
    shown = ""
    missing = []
    for text in sorted(texts, key=lambda text: -len(text.spellings[0])):
        folded = tuple(map(_fold, text.spellings))
        if any(one.count(word) > shown.count(word) for one in variants for word in folded):
            shown += f"\0{folded[0]}"
        else:
            missing.append(text)
    return missing


def _fold(text: str) -> str:
    """Remove white space from a text, since templates trim and indent."""
    return "".join(text.split())


def _unescape(text: str) -> str:
    """Undo escapes of JSON and Python strings in a text."""

    def decode(match: re.Match[str]) -> str:
        """Decode one run of escape sequences."""
        escaped = match[0].replace("\\'", "'")
        return str(json.loads(f'"{escaped}"'))

    return _ESCAPES_PATTERN.sub(decode, text)
