"""Rows of preferences, a prompt with a chosen and a rejected answer, and what is doubtful in them.

A pair becomes one example of tokens: the chosen conversation, then the rejected one, each begun
with the same prompt; of each the answer is supervised. side_by_side.py takes them apart again.
Beyond single lines, pairs that contradict each other and answers whose length alone tells which one
is chosen are reported. A pair that is trained on and held out is the check `leakage` of every row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NotRequired

import numpy as np
from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic asks for this one below Python 3.12

from nested_core.data.lines.example_parsing import (
    Example,
    Fields,
    Function,
    Message,
    RowFormat,
    RowFormats,
    Turns,
    describe_validation_error,
)
from nested_core.data.lines.json_decoding import LineProblem, parse_json_text
from nested_core.data.lines.other_formats import read_openai_turns
from nested_core.data.tokens.example_encoding import EncodedExample, encode_example
from nested_core.data.tokens.text_notes import Note
from nested_core.records.dataset import Finding
from nested_core.storage.atomic import canonical_json

Splits = Mapping[str, Mapping[int, Example]]
MIN_EXAMPLES_FOR_LENGTH = 20
MAX_LENGTH_CORRELATION = 0.3  # of length and choice; below it, length is no strong hint
EMPTY_ANSWER_CHECK = "empty-answer"


def judge_pairs(splits: Splits) -> Iterator[Finding]:
    """Yield findings on pairs: swapped pairs, and lengths that tell which answer is chosen.

    Their `file` is the name of the split.
    """
    first: dict[tuple[bytes, ...], str] = {}
    for split, pairs in splits.items():
        for line, pair in pairs.items():
            *prompt, chosen = pair.messages
            parts = ([prompt, pair.tools], chosen["content"], pair.rest["rejected"])
            context, better, worse = map(canonical_json, parts)
            first.setdefault((context, better, worse), f"{split}, line {line},")
            if (swapped := first.get((context, worse, better))) is not None:
                message = (
                    f"the same two answers to the same prompt stand in {swapped} the other way "
                    f"round: leave out the wrong one of both rows"
                )
                yield Finding(split, line, "error", "swapped-pair", message)
        yield from _judge_lengths(split, list(pairs.values()))


def correlate_length_and_choice(chosen: Iterable[int], rejected: Iterable[int]) -> float:
    """Return Pearson's correlation, over all answers, of log length with being chosen.

    The mean length of the two answers of a pair is taken out first, so that prompts with long
    answers do not hide what distinguishes the two; 0 where all lengths are equal.
    """
    lengths = np.log1p(np.array([list(chosen), list(rejected)], np.float64))
    within = lengths - lengths.mean(axis=0)
    spread = float(np.sqrt((within**2).mean()))
    return float(within[0].mean()) / spread if spread else 0.0


def _judge_lengths(split: str, pairs: list[Example]) -> Iterator[Finding]:
    """Yield a warning if the length of answers tells which one is chosen."""
    if len(pairs) < MIN_EXAMPLES_FOR_LENGTH:
        return
    chosen = [len(str(pair.messages[-1]["content"])) for pair in pairs]
    rejected = [len(str(pair.rest["rejected"])) for pair in pairs]
    correlation = correlate_length_and_choice(chosen, rejected)
    if abs(correlation) <= MAX_LENGTH_CORRELATION:
        return
    means = sum(chosen) / len(pairs), sum(rejected) / len(pairs)
    word = "longer" if correlation > 0 else "shorter"
    longer = sum(one > other for one, other in zip(chosen, rejected, strict=True))
    yield Finding(
        split,
        None,
        "warning",
        "length-tells-choice",
        f"chosen answers are {word}: {means[0]:,.0f} characters on average, rejected ones "
        f"{means[1]:,.0f}; the chosen one is the longer one in {longer:,} of {len(pairs):,} pairs, "
        f"and length and choice correlate by {correlation:+.2f}. A model may learn the length "
        f"alone: simpo and orpo divide by it, and more pairs of like length help",
    )


_TURNS_VALIDATOR = TypeAdapter(list[Message])


class _AnswerLine(TypedDict):
    """What each form of a pair has; `_prepare` checks the values, but those of tools."""

    rejected: Any
    tools: NotRequired[list[Function] | None]


class _PairLine(_AnswerLine):
    """A pair by its keys."""

    prompt: NotRequired[Any]
    chosen: NotRequired[Any]


class _ChatPairLine(_AnswerLine):
    """A pair whose chosen answer ends a chat."""

    chat: NotRequired[Any]


def _prepare(fields: Fields, place: str) -> Fields:
    """Bring a pair into one form: the prompt's turns, the chosen answer, and the rejected text.

    An answer may be a text, a turn of the assistant, or a whole conversation that ends with it. The
    conversations of a row must begin with the same turns, and end with the prompt if it is given
    too.

    place: the key of the prompt, for messages. Raises LineProblem for any other row.
    """
    is_chat = "chat" in fields
    before_chosen, chosen = _read_answer(fields["chat" if is_chat else "chosen"], "chosen")
    before_rejected, rejected = _read_answer(fields["rejected"], "rejected")
    before = before_chosen or before_rejected
    prompt = _read_turns(fields["prompt"], place) if "prompt" in fields else before
    is_same = before_rejected in ([], before)
    if not is_same or before not in ([], prompt, [*before[: -len(prompt)], *prompt]):
        raise LineProblem(
            "other-prompt",
            f"chosen and rejected begin with other turns than {place}, or than one another: a pair "
            f"has one prompt, and two answers to it",
        )
    prompt = before or prompt
    if not prompt:
        raise LineProblem("no-answer", f"{place} has no turn before the answer: give the prompt")
    if chosen["content"].split() == rejected["content"].split():
        raise LineProblem(
            "equal-answers",
            "chosen and rejected are equal, so that the row prefers nothing: leave it out",
        )
    places = () if is_chat or "prompt" not in fields else ("prompt",) * len(prompt) + ("chosen",)
    answers = {"chosen": chosen, "rejected": rejected["content"], "places": places}
    return {"tools": parse_json_text(fields.get("tools"), "tools"), "prompt": prompt, **answers}


def _parse_turns(value: Any, place: str) -> Any:
    """Return the turns in a table's cell; any other text as it is, for an answer may be JSON."""
    is_cell = isinstance(value, str) and value.lstrip().startswith("[{")
    if not is_cell or not ('"role"' in value or '"from"' in value):
        return value
    return parse_json_text(value, place)


def _read_turns(value: Any, place: str) -> list[dict[str, Any]]:
    """Return a text as the user's turn, or turns; LineProblem for anything else."""
    value = _parse_turns(value, place)
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    turns = read_openai_turns(value, place)
    if not isinstance(turns, list) or not turns:
        raise LineProblem("wrong-type", f"{place}: expected a text or turns, found none of them")
    try:
        _TURNS_VALIDATOR.validate_python(turns)
    except ValidationError as error:
        places = {str(number): f"{place}[{number}]" for number in range(len(turns))}
        raise describe_validation_error(error, places, {}) from None
    return turns


def _read_answer(value: Any, place: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the turns before an answer, if there are any, and the assistant's turn."""
    value = _parse_turns(value, place)
    if isinstance(value, str):
        value = {"role": "assistant", "content": value}
    *before, last = _read_turns([value] if isinstance(value, dict) else value, place)
    if last["role"] != "assistant" or not isinstance(last.get("content"), str):
        raise LineProblem("no-answer", f"{place}: expected the assistant's text as its last turn")
    if not last["content"].strip():
        raise LineProblem(EMPTY_ANSWER_CHECK, f"{place} has no text")
    return before, last


def _read(fields: Fields) -> Turns:
    turns = [*fields["prompt"], fields["chosen"]]
    return Turns(turns, fields["places"], {"rejected": fields["rejected"]})


def encode_pair(example: Example, tokenizer: Any) -> EncodedExample:
    """Encode a pair: the chosen conversation, then the rejected one, their answers supervised.

    If a turn of one cannot be located, that conversation alone is returned, with its broken turn.
    """
    chosen = _encode_answer(example, example.messages, tokenizer)
    answer = {"role": "assistant", "content": example.rest["rejected"]}
    rejected = _encode_answer(example, [*example.messages[:-1], answer], tokenizer)
    broken = chosen if chosen.broken_turn >= 0 else rejected
    if broken.broken_turn >= 0:
        return broken
    offset = len(chosen.tokens)
    spans = tuple((begin + offset, end + offset) for begin, end in rejected.spans)
    notes = [
        *chosen.notes,
        *(note for note in rejected.notes if note not in chosen.notes),
        *_note_empty_answer("chosen", chosen),
        *_note_empty_answer("rejected", rejected),
    ]
    return EncodedExample(
        [*chosen.tokens, *rejected.tokens], (*chosen.spans, *spans), notes=(*notes,), is_whole=True
    )


def _encode_answer(example: Example, turns: list[dict[str, Any]], tokenizer: Any) -> EncodedExample:
    """Return a conversation as any chat, its last turn supervised."""
    return encode_example(example._replace(format="chat", messages=turns), tokenizer, "last")


def _note_empty_answer(name: str, encoded: EncodedExample) -> list[Note]:
    """Return an error for an answer of which nothing is left to compare."""
    begin, end = encoded.spans[0]
    if begin >= 1 and end > begin:
        return []
    return [Note("error", EMPTY_ANSWER_CHECK, f"{name} has no tokens after its prompt")]


def _write(example: Example) -> dict[str, Any]:
    """Return the fields of a row as they are kept, without its tools."""
    *prompt, last = example.messages
    chosen = last if last.keys() > {"role", "content"} else last["content"]
    return {"prompt": prompt, "chosen": chosen, **example.rest}


PAIRS: Mapping[str, RowFormat] = {
    name: RowFormat(
        model,
        fields,
        _read,
        _prepare,
        is_conversation=False,
        encode=encode_pair,
        write=_write,
        judge=judge_pairs,
        contradict=lambda row: {**row, "chosen": row["rejected"], "rejected": row["chosen"]},
    )
    for name, model, fields in (
        ("pair", _PairLine, ("prompt", "chosen", "rejected")),
        ("chat_pair", _ChatPairLine, ("chat", "rejected")),
        ("conversation_pair", _PairLine, ("chosen", "rejected")),
    )
}


def suggest_loss(row: Mapping[str, Any]) -> str | None:
    """Return the loss that `init` begins with: dpo for a pair; else None."""
    return "dpo" if "rejected" in row and ("chosen" in row or "messages" in row) else None


ROWS = RowFormats(PAIRS, suggest_loss)
