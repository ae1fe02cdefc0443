"""Notes on the texts of a row: those that the model would not see, or see as something else.

A chat template reads only the keys that its author thought of: tool calls, reasoning, a system turn
or a name may be missing from the rendered text without an error. And a tokenizer reads the text of
a control token as that token, wherever it is: forged turns, doubled ends, tokens of other models.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from nested_core.data.data_settings import Targets
from nested_core.data.lines.example_parsing import Example
from nested_core.data.tokens.tokenizer_source import TokenizerSource
from nested_core.models.chat_template import (
    ChatTemplate,
    Tokenizer,
    chat_template_of,
    end_token_ids,
    list_end_texts,
)
from nested_core.records.dataset import Severity
from nested_core.storage.untrusted_files import iterate_scalars

UNREAD_CHECK = "unread-field"
_REASONING_KEYS = ("reasoning_content", "thinking")
SHOWN_CHARACTERS = 40
ARGUMENTS = "tool_calls[].function.arguments"
MAX_ARGUMENTS = 500  # texts and numbers of a row's calls that are looked for in what is rendered
_KEYS_TO_DROP = {*_REASONING_KEYS, "name", "tools"}
_ESCAPES_PATTERN = re.compile(r"""(?:\\(?:u[0-9a-fA-F]{4}|["'\\/bfnrt]))+""")

CONTROL_CHECK = "control-token"
FOREIGN_CHECK = "foreign-control-token"
DOUBLED_CHECK = "doubled-control-token"
# Turns and ends of ChatML, Llama, Gemma, Mistral, Phi and DeepSeek.
_KNOWN_CONTROL_TOKENS = (
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    *("<|begin_of_text|>", "<|start_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),
    *("<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>"),
    *("[INST]", "[/INST]", "<|user|>", "<|assistant|>", "<|end|>"),
    *("<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
)
_END_IN_HTML = "</s>"  # the end of struck text too, so that it counts only where a text ends
_OTHER_MARKUP = ("think_start", "think_end", "tool_call_start", "tool_call_end")


class Note(NamedTuple):
    """A problem or doubt about one row, worded the same for all rows that have it."""

    severity: Severity
    check: str
    message: str


@dataclass(frozen=True)
class TokenizerChecks:
    """A room's checks of rows that need the base's tokenizer.

    make: returns the check of a tokenizer, which returns notes on an example and its tokens.
    depends_on: returns what the notes depend on beside the tokenizer's files; None for nothing.
    """

    make: Callable[[TokenizerSource], Callable[[Example, Sequence[int]], list[Note]]]
    depends_on: Callable[[TokenizerSource], str | None]


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
            yield RowText(turn, role, ARGUMENTS, spellings)
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


def _spell_leaves(value: object) -> Iterator[tuple[str, ...]]:
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
    arguments = [text for text in texts if text.key == ARGUMENTS]
    if len(arguments) > MAX_ARGUMENTS:  # each is looked for in the whole text
        texts = [text for text in texts if text.key != ARGUMENTS] + arguments[:MAX_ARGUMENTS]
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
    place = 0
    for text in texts:  # mostly they follow each other; to count each is quadratic
        if (found := rendered.find(text, place)) < 0:
            break
        place = found + len(text)
    else:
        return True
    joined = "\0".join(texts)
    return all([rendered.count(text) >= joined.count(text) for text in texts])


def _find_unshown_texts(texts: Sequence[RowText], rendered: str) -> list[RowText]:
    """Return the texts that are missing in the rendered text, ignoring white space and escapes."""
    if shows_all(rendered, [text.spellings[0] for text in texts]):
        return []
    variants = {_fold(rendered), _fold(unescape(rendered)), _fold(html.unescape(rendered))}
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


def unescape(text: str) -> str:
    """Undo escapes of JSON and Python strings in a text."""

    def decode(match: re.Match[str]) -> str:
        """Decode one run of escape sequences."""
        escaped = match[0].replace("\\'", "'")
        return str(json.loads(f'"{escaped}"'))

    return _ESCAPES_PATTERN.sub(decode, text)


class _ControlTokens(NamedTuple):
    """The texts of a tokenizer's control tokens, and a pattern of these and of foreign ones."""

    texts: frozenset[str]
    pattern: re.Pattern[str]


@lru_cache(maxsize=4)
def control_tokens_of(tokenizer: Tokenizer) -> _ControlTokens:
    """Return the tokenizer's control tokens: special ones, and the chat template's around turns.

    Markers of thoughts and tool calls are not included.
    """
    example = chat_template_of(tokenizer).example
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    markup = {getattr(tokenizer, name, None) for name in _OTHER_MARKUP}
    texts = {token.content for token in added if token.special or token.content in example}
    texts -= markup
    foreign = set(_KNOWN_CONTROL_TOKENS) - {token.content for token in added}
    words = [re.escape(text) for text in sorted(texts | foreign, key=len, reverse=True)]
    if _END_IN_HTML not in texts:
        words.append(rf"{_END_IN_HTML}(?=\s*(?:\0|\Z))")
    return _ControlTokens(frozenset(texts), re.compile("|".join(words)))


def has_control_token(texts: Sequence[str], tokenizer: Tokenizer) -> bool:
    """Return whether a text has a control token, of this tokenizer or of another model."""
    return control_tokens_of(tokenizer).pattern.search("\0".join(texts)) is not None


def note_control_tokens(texts: Sequence[RowText], tokenizer: Tokenizer) -> list[Note]:
    """Return a warning for each control token in a text, of this tokenizer or of another model.

    A control token, such as <|im_end|>, has a meaning in the chat template that the text of a row
    should not have.
    """
    notes: list[Note] = []
    tokens = control_tokens_of(tokenizer)
    if not has_control_token([text.spellings[0] for text in texts], tokenizer):
        return notes
    for text in texts:
        where = f"{text.role} turns" if text.turn is not None else "tools"
        for word in dict.fromkeys(tokens.pattern.findall(text.spellings[0])):
            if word in tokens.texts:
                message = (
                    f"{word} in the text of {where} is read as this control token of the model: "
                    f"as an end or a turn that is none. Take it out of the text"
                )
                notes.append(Note("warning", CONTROL_CHECK, message))
            else:
                notes.append(_note_foreign_token(word, where))
    return notes


def _note_foreign_token(word: str, where: str) -> Note:
    """Build the warning for a control token of another model.

    word: the token's text. where: the texts that have it, for the message.
    """
    return Note(
        "warning",
        FOREIGN_CHECK,
        f"{word} in {where} is a control token of other models, which this one reads as letters. "
        f"Take it out of the text, or write the token of this model",
    )


def note_removed_end_texts(
    messages: Sequence[Mapping[str, Any]],
    prepared: Sequence[Mapping[str, Any]],
    template: ChatTemplate,
) -> list[Note]:
    """Return a warning for each end-of-sequence text that was removed from the end of answers.

    messages: the row's turns; prepared: the turns given to the template, of which such texts were
        removed. template: its `ends` are the end-of-sequence texts that it adds itself.
    """
    removed = [
        before["content"][len(after["content"]) :]
        for before, after in zip(messages, prepared, strict=True)
        if before.get("content") not in (None, after["content"])
    ]
    return [
        Note(
            "warning",
            DOUBLED_CHECK,
            f"{end} at the end of answers: the chat template adds it, so it was taken from the "
            f"text. Take it out of the rows",
        )
        for end in template.ends
        if any(end in text for text in removed)
    ]


def note_other_prompt(template: ChatTemplate, broken_turn: int) -> Note:
    """Return a note that a row does not begin as its question is asked when it is served.

    broken_turn: -1 if its learnt tokens were located all the same; else it is an error.
    """
    asked, learnt = (text[:SHOWN_CHARACTERS] for text in template.unlike_rows)
    message = (
        f"asked, the chat template goes on with {asked!r} where a row goes on with {learnt!r}, so "
        f"that serve and chat send another beginning than is learnt. Take a template whose "
        f"generation prompt begins the answers of rows too"
    )
    return Note("warning" if broken_turn < 0 else "error", "prompt-not-a-prefix", message)


def note_tokens_in_text(text: str, tokens: Sequence[int], tokenizer: Tokenizer) -> tuple[Note, ...]:
    """Return warnings for a plain text: doubled start or end tokens, and foreign control tokens.

    tokens: the tokens of the text, with those that the tokenizer and mlx-lm add at its ends.
    """
    notes = []
    start = getattr(tokenizer, "bos_token_id", None)
    if start is not None and list(tokens[:2]) == [start, start]:
        name = tokenizer.convert_ids_to_tokens(start)
        message = f"{name} twice at the start of texts: the tokenizer adds it. Take it out of them"
        notes.append(Note("warning", DOUBLED_CHECK, message))
    end = tokenizer.eos_token
    if end and _ends_in_two_ends(text, tokens, tokenizer):
        message = f"{end} after texts that end already: mlx-lm adds it. End the texts with it alone"
        notes.append(Note("warning", DOUBLED_CHECK, message))
    control = control_tokens_of(tokenizer)
    words = control.pattern.findall(text)
    foreign = dict.fromkeys(word for word in words if word not in control.texts)
    return (*notes, *(_note_foreign_token(word, "texts") for word in foreign))


def _ends_in_two_ends(text: str, tokens: Sequence[int], tokenizer: Tokenizer) -> bool:
    """Return whether the text has an end token of its own before the one that is appended.

    tokens: the tokens of the text, with the end that is appended.
    """
    stripped = text.rstrip()
    if not stripped.endswith(list_end_texts(tokenizer)):
        return False
    return stripped != text or len(tokens) > 1 and tokens[-2] in end_token_ids(tokenizer)
