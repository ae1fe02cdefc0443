"""The typed fields of an example in each format that mlx-lm trains on, checked by pydantic.

Takes nothing for granted and converts nothing: a number where a text belongs is a problem.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, NotRequired

from pydantic import (
    AfterValidator,
    ConfigDict,
    Discriminator,
    Tag,
    TypeAdapter,
    ValidationError,
    with_config,
)
from typing_extensions import TypedDict  # pydantic asks for this one below Python 3.12

from nested_core.data.lines.decoding import LineProblem
from nested_core.errors import shorten

Role = Literal["system", "user", "assistant", "tool"]
Format = Literal["chat", "completion", "text"]


@dataclass(frozen=True)
class Features:
    """The JSON keys that hold the fields, as in mlx-lm's `*_feature` settings."""

    prompt: str = "prompt"
    completion: str = "completion"
    text: str = "text"
    chat: str = "messages"


class Example(NamedTuple):
    """What mlx-lm tokenises: messages and tools for a chat or a completion, else the text."""

    format: Format
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    text: str = ""
    unknown_keys: frozenset[str] = frozenset()
    is_plain: bool = True  # no tools, and each message is a role and a content


def calls_tools(message: Any) -> bool:
    """Whether this is an assistant's turn that calls tools; it may then have no content."""
    if not isinstance(message, dict) or message.get("role") != "assistant":
        return False
    return bool(message.get("tool_calls"))


def as_messages(prompt: str, completion: str) -> list[dict[str, Any]]:
    """A completion as the two-turn chat that mlx-lm makes of it."""
    user = {"role": "user", "content": prompt}
    return [user, {"role": "assistant", "content": completion}]


def _names_a_function(value: dict[str, Any]) -> dict[str, Any]:
    function = value.get("function", value)
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name.strip():
        raise ValueError("no function name in it")
    return value


_STRICT = ConfigDict(strict=True, extra="ignore")
_Function = Annotated[dict[str, Any], AfterValidator(_names_a_function)]


@with_config(ConfigDict(strict=True, extra="forbid"))
class PlainMessage(TypedDict):
    """A turn with a role and a text and nothing else, as almost all are."""

    role: Role
    content: str


@with_config(_STRICT)
class _Speaking(TypedDict):
    role: Role
    content: str
    tool_call_id: NotRequired[str | None]


@with_config(_STRICT)
class _Calling(TypedDict):
    role: Literal["assistant"]
    content: NotRequired[str | None]
    tool_calls: list[_Function]


_Message = Annotated[
    Annotated[_Speaking, Tag("speaking")] | Annotated[_Calling, Tag("calling")],
    Discriminator(lambda message: "calling" if calls_tools(message) else "speaking"),
]


@with_config(_STRICT)
class _Chat(TypedDict):
    chat: list[_Message]
    tools: NotRequired[list[_Function] | None]


@with_config(_STRICT)
class _Completion(TypedDict):
    prompt: str
    completion: str
    tools: NotRequired[list[_Function] | None]


@with_config(_STRICT)
class _Text(TypedDict):
    text: str


_TYPES: dict[Format, TypeAdapter[Any]] = {
    "chat": TypeAdapter(_Chat),
    "completion": TypeAdapter(_Completion),
    "text": TypeAdapter(_Text),
}
_FIELDS: dict[Format, tuple[str, ...]] = {
    "chat": ("chat", "tools"),
    "completion": ("prompt", "completion", "tools"),
    "text": ("text",),
}
_PLAIN_KEYS = frozenset(("role", "content"))
# Keys that chat templates read; what else a message holds never reaches the model.
_MESSAGE_KEYS = _PLAIN_KEYS | {"name", "reasoning_content", "thinking"}
_KEYS_OF_ROLE = {
    "assistant": _MESSAGE_KEYS | {"tool_calls"},
    "tool": _MESSAGE_KEYS | {"tool_call_id"},
}


def check_types(row: dict[str, Any], kind: Format, features: Features) -> Example:
    """The example in a decoded line of this format; raises LineProblem for a wrong type."""
    keys = {field: getattr(features, field, field) for field in _FIELDS[kind]}
    fields = {field: row[key] for field, key in keys.items() if key in row}
    try:
        _TYPES[kind].validate_python(fields)
    except ValidationError as error:
        raise _describe(error, keys) from None
    unknown = set(row.keys() - keys.values())
    if kind == "text":
        return Example(kind, [], text=fields["text"], unknown_keys=frozenset(unknown))
    if kind == "completion":
        messages = as_messages(fields["prompt"], fields["completion"])
    else:
        messages = fields["chat"]
    odd = [turn for turn in messages if turn.keys() != _PLAIN_KEYS]
    unknown |= {f"{features.chat}[].{key}" for turn in odd for key in _unknown(turn)}
    tools = fields.get("tools")
    is_plain = tools is None and all(_keys_in_use(turn) == _PLAIN_KEYS for turn in odd)
    return Example(kind, messages, tools, "", frozenset(unknown), is_plain)


def _unknown(message: dict[str, Any]) -> set[str]:
    return _keys_in_use(message) - _KEYS_OF_ROLE.get(message["role"], _MESSAGE_KEYS)


def _keys_in_use(message: dict[str, Any]) -> set[str]:
    """Its keys but for null ones: a table gives each turn the keys that any turn has."""
    return {key for key, value in message.items() if value is not None}


def _describe(error: ValidationError, keys: dict[str, str]) -> LineProblem:
    """The first of pydantic's errors as the problem of this line, and how many more there are."""
    problems = error.errors(include_url=False)
    kind, found = problems[0]["type"], problems[0]["input"]
    path = [part for part in problems[0]["loc"] if part not in ("speaking", "calling")]
    check = _name_of(kind, path, found)
    place = keys[str(path[0])] + "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}" for part in path[1:]
    )
    more = f" (and {len(problems) - 1} more in this line)" if len(problems) > 1 else ""
    if kind == "missing":
        return LineProblem(check, f"{place} is missing{more}")
    expected = problems[0]["msg"].removeprefix("Value error, ")
    expected = expected[0].lower() + expected[1:]
    return LineProblem(check, f"{place}: {expected}, found {_show(found, check)}{more}")


def _show(found: Any, check: str) -> str:
    """A role's name, of anything else the type: a value may be large, and private."""
    if check == "unknown-role":
        return repr(shorten(found))
    return "null" if found is None else f"a {type(found).__name__}"


def _name_of(kind: str, path: list[int | str], found: Any) -> str:
    if kind == "missing":
        return "missing-field"
    if "tool_calls" in path:
        return "malformed-tool-calls"
    if path[0] == "tools":
        return "malformed-tools"
    if found is None:
        return "null-field"
    return "unknown-role" if kind == "literal_error" and isinstance(found, str) else "wrong-type"
