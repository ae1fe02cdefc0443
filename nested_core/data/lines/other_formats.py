"""Rows in formats of other programs (Alpaca, ShareGPT, other names of fields): how to convert them.

Looks at the keys of a row, and at whether they hold texts or turns; never at a text.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from nested_core.errors import shorten

_PROMPT_KEYS = ("prompt", "question", "query", "instruction", "input", "problem", "user")
_COMPLETION_KEYS = (
    *("completion", "response", "answer", "output", "assistant", "solution", "target"),
    "chosen",
)
_TEXT_KEYS = ("content", "document", "body", "story", "code")
DOCS_SECTION = "docs/data.md, Other formats"


def describe_conversion(row: Mapping[str, Any], *, prompt: str, completion: str) -> str:
    """What to set or to convert, after a semicolon; empty for a row of no format known here.

    `prompt` and `completion` are the keys that are configured for these fields.
    """
    if sharegpt := describe_sharegpt(row):
        return sharegpt
    names = suggest_field_names(row, prompt=prompt, completion=completion)
    if "chat_feature" in names:
        chat = shorten(names["chat_feature"])
        return f"; {chat} holds turns: set chat_feature: {chat}"
    if {"instruction", "output"} <= row.keys() and row.get("input"):
        return (
            "; this is Alpaca's: write instruction and input into one prompt, output into "
            f"completion ({DOCS_SECTION})"
        )
    settings = [f"{key}: {name}" for key, name in names.items()]
    return f"; set {' and '.join(settings)}" if settings else ""


def suggest_field_names(
    row: Mapping[str, Any], *, prompt: str = "prompt", completion: str = "completion"
) -> dict[str, str]:
    """The keys of the configuration that name a row's fields, but those that name them already."""
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
    return next((name for name in names if isinstance(row.get(name), str)), None)
