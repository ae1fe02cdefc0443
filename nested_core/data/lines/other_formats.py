"""Rows in formats of other programs (Alpaca, ShareGPT, other names): how to convert them.

Looks at the keys of a row, and at whether they hold texts or turns; never at what a text says.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from nested_core.errors import shorten
from nested_core.storage.strict_files import collect_strings

_PROMPT_KEYS = ("prompt", "question", "query", "instruction", "input", "problem", "user")
_COMPLETION_KEYS = (
    "completion",
    "response",
    "answer",
    "output",
    "assistant",
    "solution",
    "target",
)
_TEXT_KEYS = ("content", "document", "body", "story", "code")
# What belongs to a conversation, beside its last prompt and answer, in Alpaca's and such formats.
_CONTEXT_KEYS = ("system", "history", "instruction", "input")
DOCS_SECTION = "docs/data.md, Other formats"


def describe_conversion(row: Mapping[str, Any], *, prompt: str, completion: str) -> str:
    """What to set or to convert, after a semicolon; empty for a row of no format known here.

    `prompt` and `completion` are the keys that are configured for these fields.
    """
    if sharegpt := describe_sharegpt(row):
        return sharegpt
    if _is_preference_pair(row):
        return _describe_preference_pair(row, prompt)
    names = suggest_field_names(row, prompt=prompt, completion=completion)
    if "chat_feature" in names:
        chat = shorten(names["chat_feature"])
        return f"; {chat} holds turns: set chat_feature: {chat}"
    if "text_feature" not in names:
        unread = list_filled_context(row, {*row} - {prompt, completion, *names.values()})
        if names and unread:
            return f"; {describe_filled_context(unread)}"
    settings = [f"{key}: {name}" for key, name in names.items()]
    return f"; set {' and '.join(settings)}" if settings else ""


def list_filled_context(row: Mapping[str, Any], keys: Collection[str]) -> list[str]:
    """Those of `keys` that are part of a row's conversation and have a text in them."""
    return [
        key
        for key in row
        if key in keys
        and key.casefold() in _CONTEXT_KEYS
        and any(not text.isspace() for text in collect_strings(row[key]) if text)
    ]


def describe_filled_context(keys: Collection[str]) -> str:
    """What training would leave out of a row that has these keys, and what to do about it."""
    listed = " and ".join(map(shorten, keys))
    return (
        f"training would leave out what stands in {listed}: make each row a chat under messages "
        f"({DOCS_SECTION}, has a script), or take {listed} out of the rows"
    )


def _is_preference_pair(row: Mapping[str, Any]) -> bool:
    return {"chosen", "rejected"} <= row.keys()


def _describe_preference_pair(row: Mapping[str, Any], prompt: str) -> str:
    """What training on the preferred answer alone would need."""
    asked = _first_text_key(row, _PROMPT_KEYS)
    if _is_list_of_turns(row["chosen"], "role"):
        settings = "chat_feature: chosen"
    elif asked is None:
        settings = "text_feature: chosen"
    else:
        settings = "completion_feature: chosen"
        settings = settings if asked == prompt else f"prompt_feature: {asked} and {settings}"
    return (
        "; chosen and rejected are preference pairs, and training on preferences (DPO, ORPO) is "
        f"not supported: to learn the chosen answers alone, set {settings}"
    )


def suggest_field_names(
    row: Mapping[str, Any], *, prompt: str = "prompt", completion: str = "completion"
) -> dict[str, str]:
    """The keys of the configuration that name a row's fields, but those that name them already.

    None for a preference pair: to leave out what was rejected is for a person to decide.
    """
    if _is_preference_pair(row):
        return {}
    chat = next((key for key, value in row.items() if _is_list_of_turns(value, "role")), None)
    if chat is not None:
        return {"chat_feature": chat}
    found = {
        "prompt_feature": (_first_text_key(row, _PROMPT_KEYS), prompt),
        "completion_feature": (_first_text_key(row, _COMPLETION_KEYS), completion),
    }
    names = [name for name, _ in found.values()]
    if None not in names:
        return {key: str(name) for key, (name, now) in found.items() if name != now}
    text = _first_text_key(row, _TEXT_KEYS) if names == [None, None] else None
    return {"text_feature": text} if text is not None else {}


def describe_sharegpt(row: Mapping[str, Any]) -> str:
    """How turns {from, value} become turns {role, content}; empty where there are none."""
    key = next((key for key, value in row.items() if _is_list_of_turns(value, "from")), None)
    if key is None:
        return ""
    return (
        f"; {shorten(key)} is ShareGPT's: make each turn {{from, value}} a turn {{role, content}} "
        f"under messages, human as user and gpt as assistant ({DOCS_SECTION})"
    )


def _is_list_of_turns(value: Any, key: str) -> bool:
    """Whether this is a list of objects of which the first has the key, as turns do."""
    return (
        isinstance(value, list) and bool(value) and isinstance(value[0], dict) and key in value[0]
    )


def _first_text_key(row: Mapping[str, Any], names: Collection[str]) -> str | None:
    """The row's key for the first of the names, in whatever case, that holds a text."""
    keys = {key.casefold(): key for key, value in row.items() if isinstance(value, str)}
    return next((keys[name] for name in names if name in keys), None)
