"""Parse one line of JSONL to an `Example`, or raise a `LineProblem` with the failed check.

The only place that converts rows of any format to turns of a conversation: mlx-lm's formats, and
those of other programs. No value is converted: a number in place of a text is a problem. It knows
neither other lines nor a tokenizer. A row of plain turns is read here alone; other_formats and
marks are asked about what a row has beyond them.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple, NotRequired

from pydantic import (
    AfterValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    WrapValidator,
    with_config,
)
from pydantic_core import from_json
from typing_extensions import TypedDict  # pydantic asks for this one below Python 3.12

from nested_core.data.lines.json_decoding import (
    LineProblem,
    decode_json_object,
    has_too_many_values,
    parse_json_text,
)
from nested_core.data.lines.marks import take_marks
from nested_core.data.lines.other_formats import (
    RATING_KEYS,
    SHAREGPT_SPELLINGS,
    describe_field_names,
    describe_unread_fields,
    list_unread_fields,
    read_openai_turns,
    refuse_rated_answer,
    wrap_function,
)
from nested_core.data.parallel_jobs import ByteRange
from nested_core.errors import DatasetError, shorten
from nested_core.seams import is_there, load_all, load_for_loss
from nested_core.storage.untrusted_files import UNBOUNDED, has_repeated_key, open_regular

Role = Literal["system", "user", "assistant", "tool"]
ANY_LOSS = "any"
_JSON_WHITE_SPACE = b" \t\n\r"
# A turn without a text, in the content of a plain row: all that str.isspace takes for space.
BLANK_TURN_PATTERN = r"\x00[\s\x1c-\x1f]*(?:\x00|$)"
# A role as one letter, in the content of a row.
LETTER_BY_ROLE = {"system": "s", "user": "u", "assistant": "a", "tool": "t"}


@dataclass(frozen=True)
class FieldNames:
    """How a row is read: mlx-lm's `*_feature` settings, and our own keys about rows."""

    prompt: str = "prompt"
    completion: str = "completion"
    text: str = "text"
    chat: str = "messages"
    allows_any_role: bool = False  # data_policy.roles: template
    group: str | None = None  # the field that data_policy.group names; no part of the example
    data_format: str = "auto"
    drop: Sequence[str] = ()  # keys of rows and turns that are as good as absent
    loss: str | None = None  # whose rows are read; ANY_LOSS: those of each, and of none

    def key_of(self, field: str) -> str:
        """Return the JSON key for a field of a format: as configured, or the field's own name."""
        key: str = getattr(self, field, field)
        return key


ANY_ROLE = FieldNames(allows_any_role=True, loss=ANY_LOSS)


class Example(NamedTuple):
    """A parsed row: messages and tools of a chat or a completion, or a plain text."""

    format: str  # the name of a RowFormat
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    text: str = ""
    unknown_keys: frozenset[str] = frozenset()
    is_plain: bool = True  # no tools, and each message is a role and a content
    places: tuple[str, ...] = ()  # the field of each turn, where it is not that of a chat
    masked: Mapping[int, str] = MappingProxyType({})  # turns not to be learnt, and the mark of each
    rest: Mapping[str, Any] = MappingProxyType({})  # what a room's row has beside its turns

    @property
    def approximate_characters(self) -> int:
        """About how many characters the example has, numbers included."""
        if self.is_plain and not self.rest:
            return len(self.text) + sum(len(str(turn.get("content"))) for turn in self.messages)
        whole = [self.messages, self.tools, self.rest]
        return len(json.dumps(whole, ensure_ascii=False, default=dict))


def is_tool_calling_message(message: object) -> bool:
    """Return whether a message is an assistant's turn with tool calls, which needs no content."""
    if not isinstance(message, dict) or message.get("role") != "assistant":
        return False
    return bool(message.get("tool_calls"))


def _require_function_name(value: dict[str, object]) -> dict[str, object]:
    """Return a tool or tool call if its function has a name; else raise ValueError."""
    function = value.get("function", value)
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name.strip():
        raise ValueError("no function name in it")
    return value


def _require_argument_object(value: dict[str, Any]) -> dict[str, object]:
    """Return a tool call if its arguments are an object, JSON text of one, or missing.

    Raises ValueError for any other arguments.
    """
    arguments = value.get("function", value).get("arguments")
    if arguments is None or isinstance(arguments, dict):
        return value
    try:
        decode_json_object(arguments.encode() if isinstance(arguments, str) else b"")
    except LineProblem as problem:
        reason = problem if isinstance(arguments, str) else f"a {type(arguments).__name__}"
        raise ValueError(f"its arguments are no JSON object ({reason})") from None
    return value


_ANY_ROLE_CONTEXT = "any role"


def _check_role(value: object, check_known: Callable[[object], str], info: ValidationInfo) -> str:
    """Return a known role; with `data_policy.roles: template`, any text."""
    if isinstance(value, str) and info.context == _ANY_ROLE_CONTEXT:
        return value
    return check_known(value)


_STRICT_MODEL_CONFIG = ConfigDict(strict=True, extra="ignore")
Function = Annotated[dict[str, object], AfterValidator(_require_function_name)]


@with_config(_STRICT_MODEL_CONFIG)
class _TextMessage(TypedDict):
    """A message with a text, of any role."""

    role: Annotated[Role, WrapValidator(_check_role)]
    content: str
    tool_call_id: NotRequired[str | None]


@with_config(_STRICT_MODEL_CONFIG)
class _ToolCallMessage(TypedDict):
    """An assistant's message that calls tools."""

    role: Literal["assistant"]
    content: NotRequired[str | None]
    tool_calls: list[Annotated[Function, AfterValidator(_require_argument_object)]]


Message = Annotated[
    Annotated[_TextMessage, Tag("speaking")] | Annotated[_ToolCallMessage, Tag("calling")],
    Discriminator(lambda message: "calling" if is_tool_calling_message(message) else "speaking"),
]


@with_config(_STRICT_MODEL_CONFIG)
class _ChatLine(TypedDict):
    """The fields of a row in mlx-lm's chat format."""

    chat: list[Message]
    tools: NotRequired[list[Function] | None]


@with_config(_STRICT_MODEL_CONFIG)
class _PromptLine(TypedDict):
    """The fields of a row in mlx-lm's completion format."""

    prompt: str
    completion: str
    tools: NotRequired[list[Function] | None]


@with_config(_STRICT_MODEL_CONFIG)
class _TextLine(TypedDict):
    """The field of a row of plain text."""

    text: str


@with_config(_STRICT_MODEL_CONFIG)
class _ShareGptLine(TypedDict):
    """The fields of a row in ShareGPT's format."""

    conversations: list[Message]
    system: NotRequired[str | None]
    tools: NotRequired[list[Function] | None]


@with_config(_STRICT_MODEL_CONFIG)
class _AlpacaLine(TypedDict):
    """The fields of a row in Alpaca's format."""

    instruction: str
    output: str
    input: NotRequired[str | None]
    system: NotRequired[str | None]
    history: NotRequired[list[Annotated[list[str], Field(min_length=2, max_length=2)]] | None]
    tools: NotRequired[list[Function] | None]


class Turns(NamedTuple):
    """The turns of a row.

    places: the row's field that each turn is from, for messages.
    rest: what else the row has, for rows of rooms.
    """

    messages: list[dict[str, Any]]
    places: tuple[str, ...] = ()
    rest: Mapping[str, Any] = MappingProxyType({})


Fields = dict[str, Any]


def read_completion(fields: Mapping[str, object]) -> Turns:
    """Build the two turns that mlx-lm makes of a prompt and a completion."""
    return Turns(
        [
            {"role": "user", "content": fields["prompt"]},
            {"role": "assistant", "content": fields["completion"]},
        ]
    )


def _prepare_chat(fields: Fields, place: str) -> Fields:
    """Decode JSON text and other spellings in a chat row's turns and tools."""
    turns = parse_json_text(fields["chat"], place)
    if not (isinstance(turns, list) and all(map(_is_plain_turn, turns))):
        turns = read_openai_turns(turns, place)
    return _parse_tools(fields, place) | {"chat": turns}


def _is_plain_turn(turn: Any) -> bool:
    """Return whether a turn is a role and a text, and nothing else."""
    is_plain = isinstance(turn, dict) and turn.keys() == _PLAIN_MESSAGE_KEYS
    return is_plain and isinstance(turn["content"], str)


def _parse_tools(fields: Fields, _: str) -> Fields:
    """Decode tools that are given as JSON text."""
    return fields | {"tools": parse_json_text(fields.get("tools"), "tools")}


def _prepare_sharegpt(fields: Fields, place: str) -> Fields:
    """Convert a ShareGPT row's turns to OpenAI's form, and its tools."""
    conversation = parse_json_text(fields["conversations"], place)
    turns = read_openai_turns(conversation, place, is_sharegpt=True)
    return _wrap_tools(fields, place) | {"conversations": turns}


def _prepare_alpaca(fields: Fields, place: str) -> Fields:
    """Decode JSON text in an Alpaca row's history and tools."""
    history = parse_json_text(fields.get("history"), "history")
    return _wrap_tools(fields, place) | {"history": history}


def _wrap_tools(fields: Fields, place: str) -> Fields:
    """Decode the tools, and wrap those that are given as functions alone."""
    tools = _parse_tools(fields, place)["tools"]
    return fields | {"tools": list(map(wrap_function, tools)) if isinstance(tools, list) else tools}


def _read_sharegpt(fields: Fields) -> Turns:
    """Build the turns of a ShareGPT row: its optional system prompt, then the conversation."""
    turns = fields["conversations"]
    places = tuple(f"conversations[{index}]" for index in range(len(turns)))
    system = _system_turn(fields)
    return Turns(system + turns, ("system",) * len(system) + places)


def _read_alpaca(fields: Fields) -> Turns:
    """Build the turns of an Alpaca row: system, history, instruction with input, and output.

    As LLaMA-Factory does, the input follows the instruction on a new line.
    """
    asked = [text for key in ("instruction", "input") if (text := fields.get(key)) and text.strip()]
    texts = [text for pair in fields.get("history") or () for text in pair]
    places = [f"history[{index // 2}][{index % 2}]" for index in range(len(texts))]
    texts += ["\n".join(asked), fields["output"]]
    turns = [{"role": "assistant" if i % 2 else "user", "content": t} for i, t in enumerate(texts)]
    system = _system_turn(fields)
    return Turns(system + turns, (*("system",) * len(system), *places, "instruction", "output"))


def _system_turn(fields: Fields) -> list[dict[str, Any]]:
    """Build the system turn of a row; empty without a system prompt."""
    system = fields.get("system")
    return [{"role": "system", "content": system}] if system and system.strip() else []


@dataclass(frozen=True)
class RowFormat:
    """A format of rows. To add one, add its entry to FORMATS, or to those of a room's loss.

    model: a TypedDict of the fields; each is under the key that FieldNames has for it, or its name.
    fields: the required fields, by which the format is recognized.
    read: builds the turns from validated fields; None for plain text.
    prepare: converts other spellings to what the model describes; it also gets the key of the first
        field, for messages.
    is_conversation: whether the row has roles of its own, whose order is checked.
    encode: for rows of a room: converts an example, with the tokenizer, to an EncodedExample
        (data/tokens/example_encoding.py).
    write: for rows of a room: converts an example to a row under the default keys, without tools.
    judge: for rows of a room: yields Findings about the valid examples of each split, by their
        lines; each names a split instead of a file.
    contradict: for rows of a room: the one row that says the opposite of a row under the default
        keys. None: any other answer to the same prompt contradicts it.
    """

    model: type
    fields: tuple[str, ...]
    read: Callable[[Fields], Turns] | None
    prepare: Callable[[Fields, str], Fields] | None = None
    is_conversation: bool = True
    encode: Callable[[Example, Any], Any] | None = None
    write: Callable[[Example], dict[str, object]] | None = None
    judge: Callable[[Mapping[str, Mapping[int, Example]]], Iterator[Any]] | None = None
    contradict: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None

    @cached_property
    def validator(self) -> TypeAdapter[object]:
        """The pydantic validator of the fields."""
        return TypeAdapter(self.model)

    @property
    def is_templated(self) -> bool:
        """Whether a chat template builds the tokens, so that there are prompts and answers."""
        return self.read is not None


# Those of mlx-lm in the order in which it looks for them (tuner/datasets.py), then the others: what
# it reads, it reads as before.
FORMATS: dict[str, RowFormat] = {
    "completion": RowFormat(
        _PromptLine, ("prompt", "completion"), read_completion, _parse_tools, is_conversation=False
    ),
    "chat": RowFormat(_ChatLine, ("chat",), lambda fields: Turns(fields["chat"]), _prepare_chat),
    "text": RowFormat(_TextLine, ("text",), None, is_conversation=False),
    "sharegpt": RowFormat(_ShareGptLine, ("conversations",), _read_sharegpt, _prepare_sharegpt),
    "alpaca": RowFormat(_AlpacaLine, ("instruction", "output"), _read_alpaca, _prepare_alpaca),
}
_FIELDS_BY_FORMAT = {name: entry.fields for name, entry in FORMATS.items()}
# The one format that a value of `data_format` asks for, and the fields that each row has then.
_FIELDS_BY_SETTING: dict[str, dict[str, tuple[str, ...]]] = {
    **{name: {name: fields} for name, fields in _FIELDS_BY_FORMAT.items()},
    "completions": {"completion": FORMATS["completion"].fields},
    "tools": {"chat": ("chat", "tools")},
}
# What `data_format` may be: csv takes tables alone, whatever their rows are.
DATA_FORMATS = ("auto", *sorted(_FIELDS_BY_SETTING.keys() - {"completion"}), "csv")
MLX_LM_FORMATS: tuple[str, ...] = ("completion", "chat", "text")
TEMPLATED_FORMATS = [name for name, entry in FORMATS.items() if entry.is_templated]
UNTEMPLATED_FORMATS = [name for name in FORMATS if name not in TEMPLATED_FORMATS]
CONVERSATION_FORMATS = [name for name, entry in FORMATS.items() if entry.is_conversation]
_PLAIN_MESSAGE_KEYS = frozenset(("role", "content"))
# Keys that chat templates read; any other key of a message is dropped: it never reaches the model.
_KNOWN_MESSAGE_KEYS = _PLAIN_MESSAGE_KEYS | {"name", "reasoning_content", "thinking"}
_KNOWN_MESSAGE_KEYS_BY_ROLE = {
    "assistant": _KNOWN_MESSAGE_KEYS | {"tool_calls"},
    "tool": _KNOWN_MESSAGE_KEYS | {"tool_call_id"},
}


@dataclass(frozen=True)
class RowFormats:
    """What a room adds for its losses: the only rows that they read.

    formats: by name.
    suggest_loss: returns the loss that `init` suggests for data with a row like this one, as JSON
        has it; None for none of the room's.
    """

    formats: Mapping[str, RowFormat]
    suggest_loss: Callable[[Mapping[str, object]], str | None]


@cache
def formats_of_loss(loss: str | None) -> Mapping[str, RowFormat]:
    """Return the row formats of a loss, by name; None gives those of plain fine-tuning."""
    if loss is None:
        return FORMATS
    if loss != ANY_LOSS:
        return load_for_loss(loss, RowFormats).formats
    return {n: one for room in load_all(RowFormats) for n, one in room.formats.items()} | FORMATS


def find_row_format(name: str) -> RowFormat:
    """Return the row format with this name, of the core or of a room."""
    return FORMATS[name] if name in FORMATS else formats_of_loss(ANY_LOSS)[name]


def formats_of_plain_rows(field_names: FieldNames) -> frozenset[str]:
    """Return the formats that the fast parser may read, if a row has no key beyond the format's."""
    if field_names.loss is not None:
        return frozenset()
    read = {field_names.key_of(field) for entry in FORMATS.values() for field in entry.fields}
    if (read | _PLAIN_MESSAGE_KEYS).intersection(field_names.drop):
        return frozenset()
    formats = _formats_to_look_for(field_names)
    return frozenset(name for name in formats if formats[name] == _FIELDS_BY_FORMAT[name])


def read_examples(
    path: Path,
    field_names: FieldNames,
    skip: set[int] | None = None,
    byte_range: ByteRange | None = None,
    first_line: int = 1,
    *,
    only: Container[int] | None = None,
) -> Iterator[tuple[int, Example]]:
    """Yield (line number, example) for each line that is not blank and not in `skip`.

    skip: numbers of lines, such as those found invalid before; None skips what is invalid.
    byte_range: the part of the file to read, whose first line has the number `first_line`; None for
        all of it.
    only: numbers of the lines to read; None for all.

    Raises DatasetError for an invalid line that is not skipped: the file has changed since it was
    checked.
    """
    byte_range = byte_range or ByteRange(0, path.stat().st_size)
    unread = byte_range.end - byte_range.start
    with open_regular(path, UNBOUNDED, follow_links=True) as (file, _):
        file.seek(byte_range.start)
        for line, raw in enumerate(file, start=first_line):
            unread -= len(raw)
            if unread < 0:
                return
            if only is not None and line not in only:
                continue
            body = strip_line(raw, is_first=line == 1)
            if not body or (skip is not None and line in skip):
                continue
            try:
                yield line, parse_line(body, field_names)
            except LineProblem as problem:
                if skip is None:
                    continue
                reason = f"{path}:{line} changed while it was read: {problem}. Start again."
                raise DatasetError(reason) from None


def strip_line(raw: bytes, *, is_first: bool) -> bytes:
    """Return a line without surrounding white space, and the first one without byte-order mark."""
    if is_first:
        raw = raw.removeprefix(codecs.BOM_UTF8)
    return raw.strip(_JSON_WHITE_SPACE)


def parse_plain_row(raw: bytes, field_names: FieldNames) -> tuple[str, str, str] | None:
    """Parse a line of the most common shapes fast: return (format, roles, content), else None.

    For None, and for a content that matches BLANK_TURN_PATTERN, callers use `parse_line`.
    The line must not have an escaped NUL.
    """
    if has_too_many_values(raw):
        return None
    try:
        row = from_json(raw, cache_strings="keys")
        messages = row.get(field_names.chat)
        if messages is None:
            return _read_plain_fields(raw, row, field_names)
        roles = "".join([LETTER_BY_ROLE[message["role"]] for message in messages])
        content = "\0".join([roles, *[message["content"] for message in messages]])
    except (ValueError, TypeError, KeyError, AttributeError):  # not the shape of a plain line
        return None
    # Had a turn or the line any other key, there would be more strings than these.
    if not messages or has_repeated_key(raw, 1 + 4 * len(messages)):
        return None
    return "chat", roles, content


def _read_plain_fields(
    raw: bytes, row: dict[str, str], field_names: FieldNames
) -> tuple[str, str, str] | None:
    """Return what `parse_plain_row` does for a completion or a text.

    Raises TypeError if a value is no text.
    """
    if has_repeated_key(raw, 2 * len(row)):
        return None
    if len(row) == 2 and field_names.prompt in row and field_names.completion in row:
        content = "\0".join(["ua", row[field_names.prompt], row[field_names.completion]])
        return "completion", "ua", content
    if len(row) == 1 and field_names.text in row:
        text = row[field_names.text]
        return None if not text or text.isspace() else ("text", "", text)
    return None


def parse_line(raw: bytes, field_names: FieldNames) -> Example:
    """Parse one line, without byte-order mark and line end; raise LineProblem if it is invalid."""
    row = decode_json_object(raw)
    if field_names.drop:
        row = _drop_keys(row, frozenset(field_names.drop), field_names.chat)
    return _read_example(row, _choose_format(row, field_names), field_names)


def _drop_keys(row: dict[str, object], keys: frozenset[str], chat: str) -> dict[str, object]:
    """Return a row without these keys, also within its turns.

    chat: the key of the turns.
    """
    kept = {key: value for key, value in row.items() if key not in keys}
    for key in kept.keys() & {chat, "conversations"}:
        turns = parse_json_text(kept[key], key)
        if isinstance(turns, list):
            kept[key] = [_drop_keys(t, keys, "") if isinstance(t, dict) else t for t in turns]
    return kept


def find_format(row: Mapping[str, object], field_names: FieldNames) -> str | None:
    """Return the configured format if the row has its fields, or the first whose fields it has.

    Returns None if no format matches.
    """
    for name, fields in _formats_to_look_for(field_names).items():
        if all(field_names.key_of(field) in row for field in fields):
            return name
    return None


def _formats_to_look_for(field_names: FieldNames) -> Mapping[str, tuple[str, ...]]:
    """Return the required fields of each format that a row may have under these settings."""
    if field_names.loss is not None:
        return {name: kind.fields for name, kind in formats_of_loss(field_names.loss).items()}
    return _FIELDS_BY_SETTING.get(field_names.data_format, _FIELDS_BY_FORMAT)


def _choose_format(row: dict[str, object], field_names: FieldNames) -> str:
    """Return the name of the format that a row is in, known by its fields.

    field_names: the keys that are configured for each field, and `data_format` or a loss with
        formats of its own, either of which limits the formats to look for.

    Raises LineProblem for a row without a known format, a preference pair (`chosen` and `rejected`)
    and a row with a mark of bad answers, such as `label: false`.
    """
    is_for_loss = field_names.loss is not None  # it may take pairs and marks that others refuse
    if is_for_loss and (found := find_format(row, field_names)):
        return found
    if not RATING_KEYS.isdisjoint(row):
        read = (field_names.completion, field_names.text, field_names.chat)
        refuse_rated_answer(row, field_names.prompt, is_chosen_read="chosen" in read)
    if found := find_format(row, field_names):
        return found
    # No format fits: say what is missing, or what was expected
    formats = _formats_to_look_for(field_names)
    is_wanted = formats is not _FIELDS_BY_FORMAT and not is_for_loss
    hint = (
        ""
        if is_wanted or is_for_loss
        else describe_field_names(row, prompt=field_names.prompt, completion=field_names.completion)
    )
    keys = [list(map(field_names.key_of, fields)) for fields in formats.values()]
    for expected in keys:
        missing = [key for key in expected if key not in row]
        is_told = is_wanted or len(missing) < len(expected)
        if is_told and field_names.loss != ANY_LOSS:
            asked = ""
            if is_wanted or is_for_loss:
                by = "training.loss" if is_for_loss else "data_format"
                asked = f", which {by}: {field_names.loss or field_names.data_format} needs"
            raise LineProblem("missing-field", f"{missing[0]} is missing{asked}{hint}")
    *others, last = (" and ".join(map(repr, expected)) for expected in keys)
    expected_keys = f"{', '.join(others)} or {last}" if others else last
    present = shorten(", ".join(row) or "nothing", 130)
    takes_names = "; `nested-tune init` takes the names of your columns"
    advice = hint or (takes_names if is_there("tables") else "")
    message = f"expected {expected_keys}; found {present}{advice}"
    raise LineProblem("unknown-format", message)


def _read_example(row: dict[str, Any], name: str, field_names: FieldNames) -> Example:
    """Convert a decoded row of a known format to an Example.

    name: the format, such as `chat`.

    Raises LineProblem for a value of a wrong type, and for a key, of the row or of a turn, that
    would be ignored although it holds content.
    """
    kind = find_row_format(name)
    keys = {field: field_names.key_of(field) for field in kind.model.__annotations__}
    fields = {field: row[key] for field, key in keys.items() if key in row}
    if kind.prepare is not None:
        fields = kind.prepare(fields, keys[kind.fields[0]])
    try:
        context = _ANY_ROLE_CONTEXT if field_names.allows_any_role else None
        kind.validator.validate_python(fields, context=context)
    except ValidationError as error:
        raise describe_validation_error(error, keys, row) from None
    # A plain text has no turns
    messages, places, rest = Turns([]) if kind.read is None else kind.read(fields)
    # A key that is no field of the format is a mark (`weight: 0`), or is not trained on
    ignored = set(row.keys() - keys.values() - {field_names.group})
    masked: dict[int, str] = {}
    if ignored or any(turn.keys() != _PLAIN_MESSAGE_KEYS for turn in messages):
        chat_places = [f"{keys[kind.fields[0]]}[{index}]" for index in range(len(messages))]
        more = {key: row[key] for key in ignored}
        marks, masked = take_marks(more, messages, places or chat_places)
        ignored -= marks
    if kind.read is None:
        return Example(name, [], None, fields[kind.fields[0]], frozenset(ignored))
    tools = fields.get("tools") or None  # an empty list of tools is none
    # In a format of mlx-lm, keys of its other formats may be ignored, as mlx-lm does
    harmless = _mlx_lm_keys(field_names) if name in MLX_LM_FORMATS else set()
    lost = list_unread_fields(row, ignored - harmless, [messages, tools, rest])
    lost += _remove_ignored_keys(messages, f"{field_names.key_of(kind.fields[0])}[].", ignored)
    if lost:
        raise LineProblem("unread-field", describe_unread_fields(row, list(dict.fromkeys(lost))))
    is_plain = tools is None and all(turn.keys() == _PLAIN_MESSAGE_KEYS for turn in messages)
    return Example(name, messages, tools, "", frozenset(ignored), is_plain, places, masked, rest)


def _remove_ignored_keys(turns: list[Fields], prefix: str, ignored: set[str]) -> Iterator[str]:
    """Remove from each turn the keys that are not trained on, and add them to `ignored`.

    Yields those that hold content of the conversation, with `prefix`, such as `messages[].`.
    """
    for index, turn in enumerate(turns):
        if turn.keys() != _PLAIN_MESSAGE_KEYS:
            trained = _KNOWN_MESSAGE_KEYS_BY_ROLE.get(turn["role"], _KNOWN_MESSAGE_KEYS)
            filled = _remove_blank_values(turn)
            turns[index] = {key: value for key, value in filled.items() if key in trained}
            removed = filled.keys() - trained
            ignored |= {prefix + key for key in removed}
            yield from (prefix + k for k in list_unread_fields(filled, removed, [turns[index]]))


def _mlx_lm_keys(field_names: FieldNames) -> set[str]:
    """Return the keys of mlx-lm's formats, which are ignored if a row matches several formats."""
    return {field_names.key_of(field) for name in MLX_LM_FORMATS for field in FORMATS[name].fields}


def _remove_blank_values(message: dict[str, object]) -> dict[str, Any]:
    """Return a turn without keys whose value is null, blank text, or an empty list or object.

    A blank `content` stays, except beside tool calls.
    """
    needed = ("role",) if is_tool_calling_message(message) else ("role", "content")
    return {key: value for key, value in message.items() if key in needed or not _is_blank(value)}


def _is_blank(value: object) -> bool:
    """Return whether a value is null, an empty list or object, or a text of white space."""
    return (value.strip() if isinstance(value, str) else value) in (None, "", [], {})


def describe_validation_error(
    error: ValidationError, keys: dict[str, str], row: dict[str, object]
) -> LineProblem:
    """Convert pydantic's first error to a LineProblem, with the number of further errors.

    keys: the row's JSON key for each field.
    """
    problems = error.errors(include_url=False)
    first = problems[0]
    # Without pydantic's tags for the two kinds of turns, which are no keys of the row
    path = [part for part in first["loc"] if part not in ("speaking", "calling")]
    check = _name_of_failed_check(first["type"], path, first["input"])
    place = _name_place(path, keys, row)
    more = f" (and {len(problems) - 1} more in this line)" if len(problems) > 1 else ""
    if check == "missing-field":
        return LineProblem(check, f"{place} is missing{more}")
    expected = first["msg"].removeprefix("Value error, ")
    expected = expected[0].lower() + expected[1:]
    shown = _show_without_content(first["input"], check)
    return LineProblem(check, f"{place}: {expected}, found {shown}{more}")


def _name_place(path: list[int | str], keys: dict[str, str], row: dict[str, object]) -> str:
    """Name a place in a row, such as `messages[0].content`, by the keys that the row uses."""
    place = keys[str(path[0])]
    value = parse_json_text(row.get(place), place)
    for part in path[1:]:
        if isinstance(part, int):
            place += f"[{part}]"
            value = value[part] if isinstance(value, list) else None
        else:
            is_sharegpt = isinstance(value, dict) and ("from" in value or "value" in value)
            place += f".{SHAREGPT_SPELLINGS.get(part, part) if is_sharegpt else part}"
    return place


def _show_without_content(value: object, check: str) -> str:
    """Describe a value by its type, which may be large or private; a role by its name."""
    if check == "unknown-role":
        return repr(shorten(value))
    return "null" if value is None else f"a {type(value).__name__}"


def _name_of_failed_check(error_type: str, path: list[int | str], value: object) -> str:
    """Return the name of the check that a pydantic error stands for."""
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
