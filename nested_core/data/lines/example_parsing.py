"""One line of JSONL -> one `Example`, or a `LineProblem` that names the check it failed.

The formats are those that mlx-lm trains on. Nothing is converted: a number in the place of a text
is a problem. Knows no other line and no tokenizer.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NotRequired

from pydantic import (
    AfterValidator,
    ConfigDict,
    Discriminator,
    Tag,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    WrapValidator,
    with_config,
)
from typing_extensions import TypedDict  # pydantic asks for this one below Python 3.12

from nested_core.data.lines.json_decoding import LineProblem, decode_json_object
from nested_core.data.lines.other_formats import (
    describe_conversion,
    describe_filled_context,
    describe_sharegpt,
    list_filled_context,
)
from nested_core.data.parallel_jobs import ByteRange
from nested_core.errors import DatasetError, shorten
from nested_core.storage.strict_files import UNBOUNDED, collect_strings, open_regular

Role = Literal["system", "user", "assistant", "tool"]
Format = Literal["chat", "completion", "text"]
WHITE_SPACE = b" \t\n\r"


@dataclass(frozen=True)
class FieldNames:
    """The JSON keys that hold the fields, as in mlx-lm's `*_feature` settings; and the roles."""

    prompt: str = "prompt"
    completion: str = "completion"
    text: str = "text"
    chat: str = "messages"
    allows_any_role: bool = False  # data_policy.roles: template
    group: str | None = None  # the field that data_policy.group names; no part of the example

    def key_of(self, field: str) -> str:
        """The key that holds a field of a format; its name, where none is configured."""
        key: str = getattr(self, field, field)
        return key


class Example(NamedTuple):
    """What mlx-lm tokenises: messages and tools for a chat or a completion, else the text."""

    format: Format
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    text: str = ""
    unknown_keys: frozenset[str] = frozenset()
    is_plain: bool = True  # no tools, and each message is a role and a content

    @property
    def approximate_characters(self) -> int:
        """About how many characters it has: those of its texts, and of all keys if it has tools."""
        if self.is_plain:
            return len(self.text) + sum(len(str(turn.get("content"))) for turn in self.messages)
        return sum(map(len, collect_strings([self.messages, self.tools])))


def is_tool_calling_message(message: Any) -> bool:
    """Whether this is an assistant's turn that calls tools; it may then have no content."""
    if not isinstance(message, dict) or message.get("role") != "assistant":
        return False
    return bool(message.get("tool_calls"))


def _require_function_name(value: dict[str, Any]) -> dict[str, Any]:
    function = value.get("function", value)
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name.strip():
        raise ValueError("no function name in it")
    return value


_ANY_ROLE_CONTEXT = "any role"


def _check_role(value: Any, check_known: Callable[[Any], str], info: ValidationInfo) -> str:
    """The role if it is a known one, or any text where the chat template judges roles."""
    if isinstance(value, str) and info.context == _ANY_ROLE_CONTEXT:
        return value
    return check_known(value)


_STRICT_MODEL_CONFIG = ConfigDict(strict=True, extra="ignore")
_Function = Annotated[dict[str, Any], AfterValidator(_require_function_name)]


@with_config(_STRICT_MODEL_CONFIG)
class _TextMessage(TypedDict):
    role: Annotated[Role, WrapValidator(_check_role)]
    content: str
    tool_call_id: NotRequired[str | None]


@with_config(_STRICT_MODEL_CONFIG)
class _ToolCallMessage(TypedDict):
    role: Literal["assistant"]
    content: NotRequired[str | None]
    tool_calls: list[_Function]


_Message = Annotated[
    Annotated[_TextMessage, Tag("speaking")] | Annotated[_ToolCallMessage, Tag("calling")],
    Discriminator(lambda message: "calling" if is_tool_calling_message(message) else "speaking"),
]


@with_config(_STRICT_MODEL_CONFIG)
class _ChatLine(TypedDict):
    chat: list[_Message]
    tools: NotRequired[list[_Function] | None]


@with_config(_STRICT_MODEL_CONFIG)
class _CompletionLine(TypedDict):
    prompt: str
    completion: str
    tools: NotRequired[list[_Function] | None]


@with_config(_STRICT_MODEL_CONFIG)
class _TextLine(TypedDict):
    text: str


@dataclass(frozen=True)
class RowFormat:
    """A kind of row. To add one, add its entry to FORMATS, and its name to `Format`.

    model: a TypedDict of the fields; each is under the key that FieldNames has for it, or its name.
    fields: those that a row of this kind has to have, and is known by.
    roles: where each of `fields` is the text of a turn, whose; else they are one field, which is a
        conversation, or plain text.
    is_templated: whether the chat template makes the tokens, so that there are prompts and answers.
    """

    model: type
    fields: tuple[str, ...]
    roles: tuple[Role, ...] = ()
    is_templated: bool = True

    @cached_property
    def validator(self) -> TypeAdapter[Any]:
        """Checks the fields of a row."""
        return TypeAdapter(self.model)

    def read_turns(self, values: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The turns in the fields of a row, as mlx-lm makes them; of plain text there are none."""
        if self.roles:
            pairs = zip(self.fields, self.roles, strict=True)
            return [{"role": role, "content": values[field]} for field, role in pairs]
        turns: list[dict[str, Any]] = values[self.fields[0]] if self.is_templated else []
        return turns


# In the order in which mlx-lm looks for them (tuner/datasets.py).
FORMATS: dict[Format, RowFormat] = {
    "completion": RowFormat(_CompletionLine, ("prompt", "completion"), ("user", "assistant")),
    "chat": RowFormat(_ChatLine, ("chat",)),
    "text": RowFormat(_TextLine, ("text",), is_templated=False),
}
TEMPLATED_FORMATS = [name for name, entry in FORMATS.items() if entry.is_templated]
UNTEMPLATED_FORMATS = [name for name in FORMATS if name not in TEMPLATED_FORMATS]
CONVERSATION_FORMATS = [name for name in TEMPLATED_FORMATS if not FORMATS[name].roles]
_PLAIN_MESSAGE_KEYS = frozenset(("role", "content"))
# Keys that chat templates read; what else a message holds never reaches the model.
_KNOWN_MESSAGE_KEYS = _PLAIN_MESSAGE_KEYS | {"name", "reasoning_content", "thinking"}
_KNOWN_MESSAGE_KEYS_BY_ROLE = {
    "assistant": _KNOWN_MESSAGE_KEYS | {"tool_calls"},
    "tool": _KNOWN_MESSAGE_KEYS | {"tool_call_id"},
}


def read_examples(
    path: Path,
    field_names: FieldNames,
    skip: set[int],
    byte_range: ByteRange | None = None,
    first_line: int = 1,
) -> Iterator[tuple[int, Example]]:
    """Yield (line, example) for each line that is not blank and not in `skip`.

    Reads all of the file, or a range whose first line has the number `first_line`. Raises
    DatasetError for a line that is no example: the file changed since it was judged.
    """
    byte_range = byte_range or ByteRange(0, path.stat().st_size)
    unread = byte_range.end - byte_range.start
    with open_regular(path, UNBOUNDED, follow_links=True) as (file, _):
        file.seek(byte_range.start)
        for line, raw in enumerate(file, start=first_line):
            unread -= len(raw)
            if unread < 0:
                return
            body = strip_line(raw, is_first=line == 1)
            if not body or line in skip:
                continue
            try:
                yield line, parse_line(body, field_names)
            except LineProblem as problem:
                reason = f"{path}:{line} changed while it was read: {problem}. Start again."
                raise DatasetError(reason) from None


def strip_line(raw: bytes, *, is_first: bool) -> bytes:
    """The line without white space around it, and the first without a byte-order mark."""
    if is_first:
        raw = raw.removeprefix(codecs.BOM_UTF8)
    return raw.strip(WHITE_SPACE)


def parse_line(raw: bytes, field_names: FieldNames) -> Example:
    """Parse one line (no byte-order mark, no line end); raises LineProblem, nothing else."""
    row = decode_json_object(raw)
    return _validate_example(row, _choose_format(row, field_names), field_names)


def _choose_format(row: dict[str, Any], field_names: FieldNames) -> Format:
    """The format by the keys that are there."""
    for name, kind in FORMATS.items():
        if all(field_names.key_of(field) in row for field in kind.fields):
            return name
    keys = [list(map(field_names.key_of, kind.fields)) for kind in FORMATS.values()]
    prompt, completion = field_names.prompt, field_names.completion
    hint = describe_conversion(row, prompt=prompt, completion=completion)
    for wanted in keys:
        missing = [key for key in wanted if key not in row]
        if len(missing) < len(wanted):
            raise LineProblem("missing-field", f"{missing[0]} is missing{hint}")
    *others, last = (" and ".join(map(repr, wanted)) for wanted in keys)
    present = shorten(", ".join(row) or "nothing")
    message = f"expected {', '.join(others)} or {last}; found {present}{hint}"
    raise LineProblem("unknown-format", message)


def _validate_example(row: dict[str, Any], name: Format, field_names: FieldNames) -> Example:
    """The example in a decoded line of this format; raises LineProblem for a wrong type."""
    kind = FORMATS[name]
    keys = {field: field_names.key_of(field) for field in kind.model.__annotations__}
    fields = {field: row[key] for field, key in keys.items() if key in row}
    try:
        context = _ANY_ROLE_CONTEXT if field_names.allows_any_role else None
        kind.validator.validate_python(fields, context=context)
    except ValidationError as error:
        hint = describe_sharegpt(row) if name in CONVERSATION_FORMATS else ""
        raise _describe_validation_error(error, keys, hint) from None
    messages = kind.read_turns(fields)
    odd = [turn for turn in messages if turn.keys() != _PLAIN_MESSAGE_KEYS]
    unknown = set(row.keys() - keys.values() - {field_names.group})
    if kind.is_templated and (dropped := list_filled_context(row, unknown)):
        raise LineProblem("unread-field", describe_filled_context(dropped))
    unknown |= {
        f"{field_names.chat}[].{key}"
        for turn in odd
        for key in _non_null_keys(turn)
        - _KNOWN_MESSAGE_KEYS_BY_ROLE.get(turn["role"], _KNOWN_MESSAGE_KEYS)
    }
    tools = fields.get("tools")
    is_plain = tools is None and all(_non_null_keys(turn) == _PLAIN_MESSAGE_KEYS for turn in odd)
    text = "" if kind.is_templated else fields[kind.fields[0]]
    return Example(name, messages, tools, text, frozenset(unknown), is_plain)


def _non_null_keys(message: dict[str, Any]) -> set[str]:
    """Its keys but for null ones: a table gives each turn the keys that any turn has."""
    return {key for key, value in message.items() if value is not None}


def _describe_validation_error(
    error: ValidationError, keys: dict[str, str], hint: str
) -> LineProblem:
    """The first of pydantic's errors as the problem of this line, and how many more there are."""
    problems = error.errors(include_url=False)
    first = problems[0]
    path = [part for part in first["loc"] if part not in ("speaking", "calling")]
    check = _name_of_failed_check(first["type"], path, first["input"])
    place = keys[str(path[0])] + "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}" for part in path[1:]
    )
    more = f" (and {len(problems) - 1} more in this line)" if len(problems) > 1 else ""
    if check == "missing-field":
        return LineProblem(check, f"{place} is missing{more}{hint}")
    expected = first["msg"].removeprefix("Value error, ")
    expected = expected[0].lower() + expected[1:]
    shown = _show_without_content(first["input"], check)
    return LineProblem(check, f"{place}: {expected}, found {shown}{more}")


def _show_without_content(value: Any, check: str) -> str:
    """A role's name, of anything else the type: a value may be large, and private."""
    if check == "unknown-role":
        return repr(shorten(value))
    return "null" if value is None else f"a {type(value).__name__}"


def _name_of_failed_check(error_type: str, path: list[int | str], value: Any) -> str:
    if error_type == "missing":
        return "missing-field"
    if "tool_calls" in path:
        return "malformed-tool-calls"
    if path[0] == "tools":
        return "malformed-tools"
    if value is None:
        return "null-field"
    is_role = error_type == "literal_error" and isinstance(value, str)
    return "unknown-role" if is_role else "wrong-type"
