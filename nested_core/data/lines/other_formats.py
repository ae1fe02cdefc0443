"""Rows of other programs: convert ShareGPT's turns, find unread fields, suggest settings.

Spellings are those of the formats' own readers: ShareGPT's of FastChat, axolotl and LLaMA-Factory
(data/converter.py), Alpaca's of stanford_alpaca and LLaMA-Factory.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from nested_core.data.lines.json_decoding import LineProblem, decode_json_text
from nested_core.errors import shorten
from nested_core.storage.untrusted_files import collect_strings, iterate_scalars

_PROMPT_KEYS = ("prompt", "question", "query", "instruction", "input", "problem", "user")
_COMPLETION_KEYS = ("completion", "response", "answer", "output", "assistant", "solution", "target")
_TEXT_KEYS = ("content", "document", "body", "story", "code")
# Beside a prompt and an answer these hold a part of the conversation, however short it is.
_CONTEXT_KEYS = frozenset(("system", "system_prompt", "history", "instruction", "input", "context"))
# By which a row says how good an answer is, or which of two is the better one.
RATING_KEYS = frozenset(("chosen", "rejected", "kto_tag", "label"))
_MEDIA_KEYS = frozenset(("image", "images", "audio", "audios", "video", "videos"))
# What stands in a field that says something of a row: a word, an id, an address, a hash.
_LABEL_PATTERN = re.compile(r"\s*(?:[!-~]*|\w{1,12})\s*")

_SPEAKERS_BY_ROLE = {
    "user": ("human", "user"),
    "assistant": ("gpt", "chatgpt", "assistant", "model", "bot"),
    "system": ("system",),
    "tool": ("tool", "observation", "function", "function_response", "tool_response"),
}
_ROLE_BY_SPEAKER = {name: role for role, names in _SPEAKERS_BY_ROLE.items() for name in names}
_CALLING_SPEAKERS = ("function_call", "tool_call")
SHAREGPT_SPELLINGS = {"role": "from", "content": "value", "tool_calls": "value"}


def read_openai_turns(turns: object, place: str, *, is_sharegpt: bool = False) -> object:
    """Convert turns to {role, content}, from ShareGPT's {from, value} or lists of text parts.

    is_sharegpt: roles may have ShareGPT's names under `role`, too.

    Anything that is no list of turns is returned as it is, to be validated later. Parts are joined
    as mlx_lm.server joins them (process_message_content). Raises LineProblem for a part that is no
    text.
    """
    if not isinstance(turns, list):
        return turns
    read = []
    for index, turn in enumerate(turns):
        if isinstance(turn, dict):
            if is_sharegpt or "from" in turn:
                turn = _rename_sharegpt_turn(turn, f"{place}[{index}]")
            if isinstance(turn.get("content"), list):
                text = _join_text_parts(turn["content"], f"{place}[{index}].content")
                turn = turn | {"content": text}
        read.append(turn)
    return read


def _rename_sharegpt_turn(turn: dict[str, object], place: str) -> dict[str, object]:
    """Convert a ShareGPT turn to OpenAI's keys and roles."""
    renamed = {key: value for key, value in turn.items() if key not in ("from", "value")}
    for ours, theirs in (("role", "from"), ("content", "value")):
        if theirs in turn and renamed.get(ours) is None:  # a table has null for what is not there
            renamed[ours] = turn[theirs]
    speaker = renamed.get("role")
    speaker = speaker.casefold() if isinstance(speaker, str) else speaker
    if speaker in _CALLING_SPEAKERS:
        calls = _read_function_calls(renamed.get("content"), f"{place}.value")
        return renamed | {"role": "assistant", "content": "", "tool_calls": calls}
    return renamed | ({"role": _ROLE_BY_SPEAKER[speaker]} if speaker in _ROLE_BY_SPEAKER else {})


def _read_function_calls(value: object, place: str) -> list[object]:
    """Convert JSON of {"name": ..., "arguments": ...}, or a list of it, to OpenAI's tool calls."""
    try:
        value = decode_json_text(value) if isinstance(value, str) else value
    except ValueError as error:
        reason = f"{place} is not the JSON of a call, {{name, arguments}}: {error}"
        raise LineProblem("malformed-tool-calls", reason) from None
    return [wrap_function(call) for call in (value if isinstance(value, list) else [value])]


def wrap_function(function: object) -> object:
    """Wrap a bare function as OpenAI's tool or tool call; anything else is returned as it is."""
    if isinstance(function, dict) and "function" not in function:
        return {"type": "function", "function": function}
    return function


def _join_text_parts(parts: list[object], place: str) -> str:
    """Join the text parts of a content; LineProblem for a part that is no text."""
    texts: list[str] = []
    for index, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        text = part.get("text") if isinstance(part, dict) and kind == "text" else None
        if not isinstance(text, str):
            raise LineProblem(
                "wrong-type",
                f"{place}[{index}]: expected a part of text, {{type: text, text: ...}}, "
                f"found {shorten(kind)!r}; nothing else can be trained on",
            )
        texts.append(text)
    return "".join(texts)


def list_unread_fields(
    row: Mapping[str, object], keys: Collection[str], trained: Collection[object]
) -> list[str]:
    """Return those of `keys` whose texts belong to the conversation but are not trained on.

    trained: everything that is trained on. A field counts if it has more than one word that is not
        in `trained`, any text under a key known for context, or an image or sound.
    """
    names = [key for key in row if key in keys]
    if not names:
        return []
    learnt = "\0".join(collect_strings(list(trained)))
    return [key for key in names if _is_lost(key.casefold(), row[key], learnt)]


def _is_lost(key: str, value: object, learnt: str) -> bool:
    """Return whether a field has text that is not in `learnt`, or is an image or sound."""
    if key in _MEDIA_KEYS:
        return bool(value)
    return any(
        key in _CONTEXT_KEYS if _LABEL_PATTERN.fullmatch(text) else text.strip() not in learnt
        for text in iterate_scalars(value)
        if isinstance(text, str) and text.strip()
    )


def describe_unread_fields(row: Mapping[str, object], keys: Collection[str]) -> str:
    """Say which fields training would leave out, and what to do about it.

    keys: the fields, from `list_unread_fields`.
    """
    listed = " and ".join(map(shorten, keys))
    names = ", ".join(shorten(key.rpartition("[].")[2]) for key in keys)
    alpaca = (
        "data_format: alpaca reads input, history and system; "
        if {"instruction", "output"} <= row.keys() and {"input", "history", "system"} & set(keys)
        else ""
    )
    return (
        f"training would leave out what is in {listed}; {alpaca}drop_fields: [{names}] leaves "
        f"it out on purpose"
    )


def describe_field_names(row: Mapping[str, object], *, prompt: str, completion: str) -> str:
    """Return the keys to set for a row of this form, after a semicolon; "" for an unknown form.

    prompt, completion: the keys that are configured now.
    """
    names = suggest_field_names(row, prompt=prompt, completion=completion)
    settings = [f"{key}: {shorten(name)}" for key, name in names.items()]
    return f"; set {' and '.join(settings)}" if settings else ""


def is_preference_pair(row: Mapping[str, object]) -> bool:
    """Return whether a row has a chosen and a rejected answer."""
    return {"chosen", "rejected"} <= row.keys()


def refuse_rated_answer(row: Mapping[str, object], prompt: str, *, is_chosen_read: bool) -> None:
    """Raise LineProblem for a preference pair, and for an answer that is marked as a bad one.

    prompt: the configured key of the prompt.
    is_chosen_read: whether the chosen answer of a pair is trained on alone, on purpose.
    """
    if is_preference_pair(row) and not is_chosen_read:
        raise LineProblem("preference-pair", _describe_preference_pair(row, prompt))
    if mark := _find_mark_of_bad_answer(row):
        message = (
            f"{mark}: false marks an answer that is not to be learnt. Leave this row out; or, "
            f"where its prompt has a good answer too, make one row of both (prompt, chosen, "
            f"rejected) and set training.loss: dpo. drop_fields: [{mark}] trains on it on purpose"
        )
        raise LineProblem("preference-pair", message)


def _find_mark_of_bad_answer(row: Mapping[str, object]) -> str | None:
    """Return the key that marks the answer as bad (KTO of LLaMA-Factory or TRL), or None."""
    if row.get("kto_tag") is False:
        return "kto_tag"
    is_answer = not row.keys().isdisjoint(("completion", "messages", "conversations"))
    return "label" if row.get("label") is False and is_answer else None


def _describe_preference_pair(row: Mapping[str, object], prompt: str) -> str:
    """Say that preference pairs need another loss, and how to train on the chosen answers alone.

    prompt: the configured key of the prompt.
    """
    asked = _first_text_key(row, _PROMPT_KEYS)
    others = [value for key, value in row.items() if key not in ("chosen", "rejected")]
    if _is_list_of_turns(row["chosen"]):
        advice = "set chat_feature: chosen and drop_fields: [rejected]"
    elif not isinstance(row["chosen"], str) or any(map(_is_list_of_turns, others)):
        advice = "make each the last turn of its row, and leave rejected out"
    else:
        named = "text_feature: chosen" if asked is None else "completion_feature: chosen"
        named = named if asked in (None, prompt) else f"prompt_feature: {asked}, {named}"
        advice = f"set {named} and drop_fields: [rejected]"
    return (
        f"chosen and rejected are preference pairs: to train on both, set training.loss: dpo; to "
        f"learn the chosen answers alone, {advice}"
    )


def suggest_field_names(
    row: Mapping[str, object], *, prompt: str = "prompt", completion: str = "completion"
) -> dict[str, str]:
    """Return the `*_feature` settings that the configuration needs to read such a row.

    prompt, completion: the fields that it reads now; a setting that would not change them is left
        out. For a preference pair, which needs a person's decision, nothing is suggested.
    """
    if is_preference_pair(row):
        return {}
    chat = next((key for key, value in row.items() if _is_list_of_turns(value)), None)
    if chat is not None:
        return {"chat_feature": chat}
    fields = {
        "prompt_feature": (_first_text_key(row, _PROMPT_KEYS), prompt),
        "completion_feature": (_first_text_key(row, _COMPLETION_KEYS), completion),
    }
    suggested = [field for field, _ in fields.values()]
    if None not in suggested:
        return {key: str(field) for key, (field, current) in fields.items() if field != current}
    text = _first_text_key(row, _TEXT_KEYS) if suggested == [None, None] else None
    return {"text_feature": text} if text is not None else {}


def _is_list_of_turns(value: object) -> bool:
    """Return whether a value is a list of objects whose first one has a role, as turns have."""
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return False
    return bool(value[0].keys() & {"role", "from"})


def _first_text_key(row: Mapping[str, object], names: Collection[str]) -> str | None:
    """Return the row's key for the first of the names that has a text, ignoring case."""
    keys = {key.casefold(): key for key, value in row.items() if isinstance(value, str)}
    return next((keys[name] for name in names if name in keys), None)
