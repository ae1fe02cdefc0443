"""Flatten one line of JSONL to a `LineRow`: what the rules need to know, and its text to compare.

It never raises for content: what is wrong with a line is in its row. It knows no other line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from typing import Any, NamedTuple
from unicodedata import normalize

from nested_core.data.lines.example_parsing import (
    ANY_ROLE,
    LETTER_BY_ROLE,
    Example,
    FieldNames,
    find_row_format,
    is_tool_calling_message,
    parse_line,
    strip_line,
)
from nested_core.data.lines.json_decoding import LineProblem, decode_json_object
from nested_core.storage.untrusted_files import collect_strings

_TOOL_CALL_LETTER, _ORPHAN_RESULT_LETTER, _OTHER_ROLE_LETTER = "c", "o", "x"
_ASCII_WHITE_SPACE = bytes(byte for byte in range(128) if chr(byte).isspace())
_LOWERCASE_BYTE_TABLE = bytes(range(256)).lower()
_as_json = json.JSONEncoder(ensure_ascii=False).encode
_ESCAPE_PATTERN = re.compile(r"\\(?:u....|.)")
# Up to four end texts of any base at the end of a text, folded; not all of it.
_NAMES = "im_end|endoftext|end_of_text|eot_id|eom_id|eot|end|return|call|end_of_turn_token"
_END = f"(?:\\|(?:{_NAMES})\\||/s|eos|end_of_turn|\uff5cend\u2581of\u2581sentence\uff5c)>"
_ENDS_PATTERN = re.compile(f'<(?<=[^\0"]<){_END}(?:<{_END}){{0,3}}(?=[\0"]|\\Z)'.encode())
_SPACE_BY_ESCAPE = {_as_json(chr(n))[1:-1]: chr(n) for n in range(32) if chr(n).isspace()}


class LineRow(NamedTuple):
    """One line of a data set as the rules read it.

    content: everything that is tokenized, as one text; shown: the texts in it.
    """

    format: str | None = None  # None: blank, or no example in it
    # A letter a turn: s(ystem), u(ser), a(ssistant), t(ool), c(all), o(rphan result), x (other).
    roles: str | None = None
    content: str | None = None
    shown: str | None = None
    blank_field: str | None = None
    unknown_keys: str | None = None
    is_blank: bool = False
    check: str | None = None  # the failed check, where the line holds no example
    message: str | None = None


def parse_line_to_row(raw: bytes, field_names: FieldNames, *, is_first: bool = False) -> LineRow:
    """Flatten one line, with or without its line end, to a row; never raises."""
    body = strip_line(raw, is_first=is_first)
    if not body:
        return LineRow(is_blank=True)
    try:
        example = parse_line(body, field_names)
    except LineProblem as problem:
        return LineRow(check=problem.check, message=problem.message)
    return flatten_example(example, field_names)


def flatten_example(example: Example, field_names: FieldNames) -> LineRow:
    """Flatten an example to a row."""
    roles = _letters_of_turns(example)
    content = _text_to_compare(example, roles)
    shown = (
        content
        if example.is_plain and not example.rest
        else "\n".join(collect_strings([example.messages, example.tools, example.rest]))
    )
    unknown = ", ".join(sorted(example.unknown_keys)) or None
    blank_field = _name_first_blank_field(example, field_names)
    return LineRow(example.format, roles, content, shown, blank_field, unknown)


def fold_text(content: bytes) -> bytes:
    """Return texts in a form that is equal for texts that say the same.

    Lower the case, remove what str.isspace takes for white space, and compose letters (NFC). An end
    text after other text, such as `<|im_end|>`, is removed, whichever base it is of.
    """
    if content.isascii():
        folded = content.translate(_LOWERCASE_BYTE_TABLE, _ASCII_WHITE_SPACE)
    else:
        folded = normalize("NFC", "".join(content.decode().casefold().split())).encode()
    return _ENDS_PATTERN.sub(b"", folded)


def digest_with_beginnings(example: Example) -> list[int]:
    """Return an example's digest, then that of its turns up to each learnt answer but the last.

    A digest is 64 bits of the SHA-256 of turns: what identifies them in any data set. Settings,
    what `fold_text` removes, marks of turns that are not learnt, system turns and tools do not
    count: whoever learnt the row with them knows its answer. A pair is known by its chosen answer.

    A run that learns every answer of a chat learns its beginnings too. Of a pair the last turn
    alone is learnt. The SHA-256 is of the folded JSON of `[[], turns[:-1]]`, NUL, and
    `[turns[-1:], {}]`; each turn is hashed once, so that the time is linear in the turns.
    """
    kind = find_row_format(example.format)
    if not kind.is_templated:
        return [_digest_after(sha256(), fold_text(example.text.encode()))]
    before, comma, beginnings = sha256(b"[[],["), b"", list[int]()
    digest = _digest_after(before, b"]]\0[[],{}]")
    for number, turn in enumerate(example.messages):
        if turn["role"] != "system":
            folded = fold_text(_json_to_compare(_turn_to_compare(turn)).encode())
            digest = _digest_after(before, b"]]\0[[" + folded + b"],{}]")
            before.update(comma + folded)
            comma = b","
        is_learnt = turn["role"] == "assistant" and number not in example.masked
        if is_learnt and kind.encode is None and number < len(example.messages) - 1:
            beginnings.append(digest)
    return [digest, *beginnings]


def encode_content(example: Example) -> bytes:
    """Return everything of an example that is tokenized, as UTF-8."""
    return _text_to_compare(example, _letters_of_turns(example)).encode()


def leave_out_settings(example: Example) -> Example:
    """Return an example without system turns, tools and marks of turns that are not learnt."""
    turns = [turn for turn in example.messages if turn["role"] != "system"]
    is_plain = all(turn.keys() == {"role", "content"} for turn in turns)
    return Example(example.format, turns, text=example.text, is_plain=is_plain, rest=example.rest)


def parse_row(row: Mapping[str, Any]) -> Example:
    """Return the example in a row of `read_split_rows`; one without text if it is not valid."""
    with suppress(LineProblem):
        return parse_line(json.dumps(row).encode(), ANY_ROLE)
    return Example("text", [])


def _digest_after(before: Any, content: bytes) -> int:
    """Return the first 64 bits of the SHA-256 of what was hashed before and of more content."""
    hasher = before.copy()
    hasher.update(content)
    return int.from_bytes(hasher.digest()[:8], "little")


def fold_questions(turns: Sequence[Mapping[str, Any]]) -> list[bytes]:
    """Return what was asked before each answer, in the form in which `fold_text` compares texts.

    That is one text for each answer (UTF-8): roles, contents and tool calls of all turns before
    it. System turns, tools and names do not count. The last turn counts as an answer, whatever its
    role. Two equal results mean the same question.
    """
    last = len(turns) - 1
    ends = (n for n, turn in enumerate(turns) if turn["role"] == "assistant" or n == last)
    return [*filter(None, (fold_turns(turns[:end]) for end in ends))]


def fold_turns(turns: Sequence[Mapping[str, Any]]) -> bytes:
    """Return roles, contents and tool calls of turns but the system's, folded by `fold_text`."""
    parts: list[str] = []
    for turn in turns:
        if turn["role"] != "system":
            calls = [call_to_compare(call) for call in turn.get("tool_calls", ())]
            text = _json_to_compare(calls) if calls else ""
            parts += [turn["role"], turn.get("content") or "", text]
    return fold_text("\0".join(parts).encode())


def _turn_to_compare(turn: Mapping[str, Any]) -> dict[str, object]:
    """Return a turn with each call as name and arguments, and without ids, which each log has anew.

    Results stand in their order.
    """
    compared = {key: value for key, value in turn.items() if key != "tool_call_id"}
    if is_tool_calling_message(turn):
        compared["tool_calls"] = [call_to_compare(call) for call in turn["tool_calls"]]
    return compared


def call_to_compare(call: Mapping[str, Any]) -> list[object]:
    """Return name and arguments of a call; arguments that are JSON text are decoded."""
    function = call.get("function", call)
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        arguments = decode_json_object(arguments.encode())
    return [function["name"], arguments]


def _json_to_compare(value: object) -> str:
    """Encode JSON values with the keys of objects in order, and white space in texts unescaped."""
    return _ESCAPE_PATTERN.sub(
        lambda found: _SPACE_BY_ESCAPE.get(found[0], found[0]), _as_json(_in_order(value))
    )


def _in_order(value: object) -> object:
    """Return JSON values with the keys of objects in order, whatever their case and white space."""
    if isinstance(value, dict):
        names = sorted(value, key=lambda name: (fold_text(name.encode()), name))
        return {name: _in_order(value[name]) for name in names}
    return [_in_order(item) for item in value] if isinstance(value, list) else value


def _letters_of_turns(example: Example) -> str:
    """Encode the roles as one letter a turn; a tool result without its call gets a letter too."""
    letters = ""
    ids: set[str] = set()
    for message in example.messages:
        letter = LETTER_BY_ROLE.get(message["role"], _OTHER_ROLE_LETTER)
        if is_tool_calling_message(message):
            letter = _TOOL_CALL_LETTER
            ids = {str(call["id"]) for call in message["tool_calls"] if call.get("id") is not None}
        elif letter == "t" and ids and message.get("tool_call_id") not in ids | {None}:
            letter = _ORPHAN_RESULT_LETTER
        letters += letter
    return letters


def _text_to_compare(example: Example, roles: str) -> str:
    """Return everything of an example that is tokenized, as one text.

    Fields are joined by NUL, which no valid line contains, so that different examples differ. The
    last NUL stands between prompt and answer. The order of keys, the ids of calls and the way in
    which their arguments are written make no difference. If some turns are not learnt, the text
    begins with a tab for each of those and a space for each other turn, but for a pair, of which
    the last turn alone is learnt.

    roles: a letter for each turn, by `_letters_of_turns`.
    """
    kind = find_row_format(example.format)
    if not kind.is_templated:
        return example.text
    turns_by_mark = ["\t" if turn in example.masked else " " for turn in range(len(roles))]
    before = "".join(turns_by_mark) if example.masked and kind.encode is None else ""
    if example.is_plain and not example.rest and _OTHER_ROLE_LETTER not in roles:
        return before + "\0".join([roles, *[message["content"] for message in example.messages]])
    functions = [tool.get("function", tool) | {"type": "function"} for tool in example.tools or ()]
    turns = list(map(_turn_to_compare, example.messages))
    before += _json_to_compare([functions, turns[:-1]])
    return f"{before}\0{_json_to_compare([turns[-1:], dict(example.rest)])}"


def _name_first_blank_field(example: Example, field_names: FieldNames) -> str | None:
    """Name the first field without text; None if every field has some.

    System and tool turns may be empty.
    """
    kind = find_row_format(example.format)
    if not kind.is_templated:
        return None if example.text.strip() else field_names.key_of(kind.fields[0])
    for index, message in enumerate(example.messages):
        content = message.get("content")
        if content and not content.isspace():
            continue
        if message["role"] in ("user", "assistant") and not is_tool_calling_message(message):
            if example.places:
                return example.places[index]
            if not kind.is_conversation:
                return field_names.key_of(kind.fields[index])
            return f"{field_names.chat}[{index}].content"
    return None
