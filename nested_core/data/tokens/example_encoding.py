"""Tokenize examples as mlx-lm does, and find the token spans that the loss counts.

`encode_example` tokenizes one, of which nothing is truncated or rejected; a template that rewrites
earlier turns is only recorded. `run_tokenization_job` tokenizes those of a range of lines: it
truncates as mlx-lm does, and counts what is lost; no pad token gets into the target mask.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nested_core import seams
from nested_core.data.data_settings import Targets
from nested_core.data.lines.example_parsing import (
    Example,
    FieldNames,
    find_row_format,
    read_examples,
)
from nested_core.data.lines.line_rows import digest_with_beginnings
from nested_core.data.lines.marks import describe_nothing_to_learn
from nested_core.data.parallel_jobs import ByteRange
from nested_core.data.tokens.text_notes import (
    Note,
    TokenizerChecks,
    has_control_token,
    list_texts,
    note_control_tokens,
    note_other_prompt,
    note_removed_end_texts,
    note_tokens_in_text,
    note_unshown_texts,
    shows_all,
)
from nested_core.data.tokens.tokenized_split import write_token_part
from nested_core.data.tokens.tokenizer_source import TokenizerSource
from nested_core.errors import shorten
from nested_core.models.base_model import describe_token_beyond
from nested_core.models.chat_template import Messages, Tokenizer, chat_template_of, end_token_ids
from nested_core.models.tokenizer_cell import limit_text

ROW_TOO_LONG_CHECK = "row-too-long"
UNCUTTABLE_CHECK = "too-long-to-be-cut"
BEYOND_EMBEDDING_CHECK = "token-beyond-embedding"

EXAMPLE_FACTS_DTYPE = np.dtype(
    [
        ("line", "<i4"),
        ("beginnings", "<i4"),  # how many of `TokenizedSplit.beginnings` it has
        ("content", "<u8"),  # see _digest_beginnings
        ("full_length", "<i4"),  # in tokens, before truncation
        ("length", "<i4"),  # in tokens, after it
        ("supervised", "<i4"),  # tokens in the target mask
        ("shortest", "<i4"),  # tokens of the shortest target span before its end-of-sequence token
        ("broken_turn", "<i4"),  # see EncodedExample
        ("has_end", "?"),  # whether every target span has an end-of-sequence token
    ]
)
TURNS_BETWEEN_WHOLE = 64  # to render each beginning as a whole is quadratic in the turns
TURNS_OF_A_RENDERING = 32  # for which a row has as much time again: each may be one of the whole
MOST_CHARACTERS_AGAIN = 1_500_000
CURRENT_LINE_DTYPE = np.dtype("<i8")

Span = tuple[int, int]
# Adds what the template puts before an answer.
_GENERATION_PROMPT = {"add_generation_prompt": True}


@dataclass(frozen=True)
class EncodedExample:
    """One tokenized example before truncation.

    spans: the token ranges [begin, end) that the loss counts, ascending.
    broken_turn: the index of the first message whose templated prompt is not a prefix of the whole
        templated example; -1 if all are.
    notes: what of the row is missing in the tokens, or is read as something else.
    is_whole: whether the example must not be truncated, since it would then mean something else.
    """

    tokens: list[int]
    spans: tuple[Span, ...]
    broken_turn: int = -1
    notes: tuple[Note, ...] = ()
    is_whole: bool = False


def encode_example(example: Example, tokenizer: Tokenizer, targets: Targets) -> EncodedExample:
    """Tokenize an example as mlx_lm/tuner/datasets.py does, with the spans that the loss counts.

    targets: `last` starts where mlx-lm's prompt mask ends. `all` covers each assistant turn, from
        the end of the templated turns before it to the end of the templated turns up to it. A turn
        marked as not to be learnt is in no span; under `last` the caller must check that the last
        one is learnt.

    Turns are prepared for the template first (ChatTemplate). Raises what the template raises.
    """
    kind = find_row_format(example.format)
    if kind.encode is not None:
        encoded: EncodedExample = kind.encode(example, tokenizer)
        return encoded
    if not kind.is_templated:
        tokens = _encode_text(example.text, tokenizer)
        notes = note_tokens_in_text(example.text, tokens, tokenizer)
        return EncodedExample(tokens, ((0, len(tokens)),), notes=notes)
    templated = _TemplatedExample(example, tokenizer)
    if targets == "last":
        encoded = _supervise_last_turn(example, templated)
    elif targets == "whole":
        encoded = _supervise_whole_but_masked_turns(example, templated)
    else:
        encoded = _supervise_all_turns(example, templated)
    notes = templated.list_notes(targets, encoded.broken_turn)
    return replace(encoded, notes=notes) if notes else encoded


def _encode_text(text: str, tokenizer: Tokenizer) -> list[int]:
    """Tokenize a plain text and append the end-of-sequence token if it is missing."""
    tokens = list(tokenizer.encode(text))
    end = tokenizer.eos_token_id
    if end is not None and (not tokens or tokens[-1] != end):
        tokens.append(end)
    return tokens


def _supervise_last_turn(example: Example, templated: _TemplatedExample) -> EncodedExample:
    """Return the example with a span over its last turn."""
    tokens = templated.tokens
    last = len(example.messages) - 1
    prompt = _GENERATION_PROMPT if example.messages[last]["role"] == "assistant" else {}
    begin = templated.prefix_length(last, **prompt)
    if begin is None:
        return EncodedExample(tokens, (), last)
    return EncodedExample(tokens, ((begin, len(tokens)),))


def _supervise_all_turns(example: Example, templated: _TemplatedExample) -> EncodedExample:
    """Return the example with a span over each learnt assistant turn."""
    turns = [turn for turn, one in enumerate(example.messages) if one["role"] == "assistant"]
    learnt = [turn for turn in turns if turn not in example.masked]
    spans, broken_turn = _locate_turns(example, templated, learnt)
    return EncodedExample(templated.tokens, tuple(spans), broken_turn)


def _supervise_whole_but_masked_turns(
    example: Example, templated: _TemplatedExample
) -> EncodedExample:
    """Return the example with spans over everything except the turns not to be learnt."""
    tokens = templated.tokens
    masked, broken_turn = _locate_turns(example, templated, sorted(example.masked))
    edges = [0, *chain.from_iterable(masked), len(tokens)]
    spans = zip(edges[::2], edges[1::2], strict=True)
    return EncodedExample(tokens, tuple(span for span in spans if span[0] < span[1]), broken_turn)


def _locate_turns(
    example: Example, templated: _TemplatedExample, turns: Sequence[int]
) -> tuple[list[Span], int]:
    """Return the token span of each of these turns, and the first turn that cannot be located.

    The span of an answer begins after what the template puts before it. Locating stops at the first
    turn that cannot be located; the second value is -1 if all can.
    """
    tokens = templated.tokens
    spans: list[Span] = []
    for turn in turns:
        is_answer = example.messages[turn]["role"] == "assistant"
        prompt = _GENERATION_PROMPT if is_answer else {}
        begin = 0 if turn == 0 and not is_answer else templated.prefix_length(turn, **prompt)
        is_last = turn == len(example.messages) - 1
        end = len(tokens) if is_last else templated.prefix_length(turn + 1)
        if begin is None or end is None:
            return spans, turn
        spans.append((begin, end))
    return spans, -1


class _TemplatedExample:
    """A templated example's text and tokens, and how many tokens its first turns take.

    The first turns, templated and tokenized by themselves, must give the first tokens of the whole.
    Tokenizing each prefix anew is quadratic in the turns, so their texts are looked up among the
    positions at which tokens of the whole end. An added token, such as <|end|>, splits a text into
    parts that are tokenized independently, so only what follows the last one is compared.
    """

    def __init__(self, example: Example, tokenizer: Tokenizer) -> None:
        """Render and tokenize the example with the tokenizer's chat template."""
        self._example = example
        self._tokenizer = tokenizer
        self._template = chat_template_of(tokenizer)
        self._messages = self._template.prepare(example.messages)
        self._text = ""  # empty where the tokens are not those of a text
        self.tokens: list[int]
        self._encoded: Any = None  # what the tokenizer made of the text
        self._known = 0, "", ""  # how many turns were rendered as a whole, their text, its end
        self._agreed: set[tuple[object, ...]] | None = set()  # where parts were the whole's; or not
        if self._template.text_tokenizer is None:
            self.tokens = self.tokenize_first_turns(len(self._messages))
            return
        self._text = self._render(self._messages)
        self._encoded = self._template.text_tokenizer(self._text, add_special_tokens=False)
        self.tokens = self._encoded["input_ids"]

    def list_notes(self, targets: Targets, broken_turn: int) -> tuple[Note, ...]:
        """Return notes on texts that the template leaves out, and on control tokens in the texts.

        broken_turn: the first turn whose tokens cannot be located, or -1. With one, the row is
            refused anyway, and texts that are left out are not looked for.
        """
        example = self._example
        is_other = self._is_asked_otherwise()
        notes = [note_other_prompt(self._template, broken_turn)] if is_other else []
        # The usual row: unchanged turns, all of which are in the templated text. No more notes.
        if example.is_plain and self._messages == example.messages:
            contents = [turn["content"] for turn in self._messages]
            if not has_control_token(contents, self._tokenizer) and shows_all(self._text, contents):
                return tuple(notes)
        texts = list_texts(self._messages, example.tools)
        notes += note_removed_end_texts(example.messages, self._messages, self._template)
        notes += note_control_tokens(texts, self._tokenizer)
        if self._text and broken_turn < 0:
            notes += note_unshown_texts(texts, self._text, example, targets)
        return tuple(notes)

    def _is_asked_otherwise(self) -> bool:
        """Whether the row does not begin as its last question is asked, if its answer is learnt."""
        last = len(self._messages) - 1
        is_learnt = self._messages[last]["role"] == "assistant" and last not in self._example.masked
        if not (is_learnt and self._text and self._template.unlike_rows[0]):
            return False
        return not self._text.startswith(self._render_first_turns(last, **_GENERATION_PROMPT))

    @cached_property
    def _offsets(self) -> list[tuple[int, int]]:
        """Start and end of each token in the text, in characters.

        Empty without a fast tokenizer.
        """
        is_located = self._encoded is not None and self._encoded.is_fast
        return self._encoded.encodings[0].offsets if is_located else []

    @cached_property
    def _counts(self) -> dict[int, int]:
        """The number of tokens up to each character position at which a token ends."""
        return {end: count for count, (_, end) in enumerate(self._offsets, start=1)}

    def prefix_length(self, turns: int, **more: object) -> int | None:
        """Return how many tokens the first turns take.

        Returns None if they are not a prefix of the whole.
        """
        if self._offsets:
            text = self._render_first_turns(turns, **more)
            if (count := self._count_tokens_of_prefix(text)) is not None:
                return count
        prefix = self.tokenize_first_turns(turns, **more)
        return len(prefix) if self.tokens[: len(prefix)] == prefix else None

    def _count_tokens_of_prefix(self, prefix: str) -> int | None:
        """Return how many tokens a prefix of the text takes, by token offsets.

        Returns None if undecided.
        """
        count = self._counts.get(len(prefix))
        if count is None or not self._text.startswith(prefix):
            return None
        added = _added_token_ids(self._tokenizer)
        last = next((i for i in range(count - 1, -1, -1) if self.tokens[i] in added), None)
        if last is None:
            return None
        rest = prefix[self._offsets[last][0] :]
        encoding = self._tokenizer.backend_tokenizer.encode(rest, add_special_tokens=False)
        return count if encoding.ids == self.tokens[last:count] else None

    def tokenize_first_turns(self, turns: int, **more: object) -> list[int]:
        """Tokenize the first turns by themselves."""
        return self._template.tokenize(self._messages[:turns], self._example.tools, **more)

    def _render_first_turns(self, turns: int, **more: object) -> str:
        """Render the text of the first turns by themselves.

        Of many turns every TURNS_BETWEEN_WHOLE-th beginning is rendered as a whole; the turns after
        it are rendered behind the last turns before it, and their text is put behind its own. The
        first of each stretch are compared with the whole: a template may look at the first turns.
        """
        before = (turns - 1) // TURNS_BETWEEN_WHOLE * TURNS_BETWEEN_WHOLE
        if before > 0 and self._agreed is not None:
            with suppress(Exception):  # a template that refuses these takes the whole, perhaps
                text = self._render_in_parts(before, turns, **more)
                stretch = before, *more.items()
                if text is not None and stretch not in self._agreed:
                    is_whole = text == self._render(self._messages[:turns], **more)
                    self._agreed = {*self._agreed, stretch} if is_whole else None
                if text is not None and self._agreed is not None:
                    return text
        return self._render(self._messages[:turns], **more)

    def _render_in_parts(self, before: int, turns: int, **more: object) -> str | None:
        """Render the turns after `before` behind the last ones before it, and put the whole first.

        Returns None if the text of the last ones does not begin that of both.
        """
        messages = self._messages
        opening = int(messages[0]["role"] == "system")
        # A conversation may begin as this one does, or go on so: agents are asked once
        begins = (
            (first, one)
            for first in (opening, opening + 1)
            for one in range(before - 1, before - TURNS_BETWEEN_WHOLE, -1)
            if messages[one]["role"] == messages[first]["role"]
        )
        first, begin = next(begins, (opening, opening))
        last = [*messages[:first], *messages[begin:before]]
        if self._known[0] != before:
            self._known = before, self._render(messages[:before]), self._render(last)
        _, whole, end = self._known
        text = self._render([*last, *messages[before:turns]], **more)
        return whole + text[len(end) :] if text.startswith(end) else None

    def _render(self, messages: Messages, **more: object) -> str:
        return self._template.render(messages, self._example.tools, **more)


@lru_cache(maxsize=2)
def _added_token_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the ids of added tokens that split a text before it is normalized."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(token for token, description in added if not description.normalized)


def run_tokenization_job(request: dict[str, Any]) -> dict[str, object]:
    """Tokenize a range of lines; write tokens, masks and facts to files, return the problems.

    request: the settings of `tokenize_splits` that a worker process needs, and what is this job's
        own: the lines to read and to skip, and `part`, the beginning of the names of its files.

    Returns by line: examples that cannot be tokenized, those that are dropped for their length, and
    doubts (each warning with its first line and how many lines have it).
    """
    folder, trusts_code, _ = request["files"]
    source = TokenizerSource(folder, trusts_code)
    end_tokens = end_token_ids(source.load())
    part = Path(request["part"])
    max_seq_length = request["max_seq_length"]
    examples = read_examples(
        Path(request["path"]),
        FieldNames(**request["field_names"]),
        set(request["skip"]),
        ByteRange(*request["byte_range"]),
        request["first_line"],
    )
    facts: list[tuple[object, ...]] = []
    problems: dict[int, _EncodingProblem] = {}
    overlong: list[int] = []
    doubts: dict[tuple[str, str], list[int]] = {}  # the first line, and how many
    all_tokens = array("i")
    target_mask = bytearray()
    all_beginnings: list[int] = []
    # Each example is a problem, too long, or appended to the arrays
    openings: dict[str, set[str]] = {"system": set(), "tools": set()}
    current_line = np.memmap(current_line_path(part), CURRENT_LINE_DTYPE, "w+", shape=1)
    watched = _watch_examples(examples, openings, current_line)
    for line, (content, *beginnings), encoded in _encode_examples(watched, source, request):
        # A row of too many characters is not even tokenized; under `drop` it is dropped as well
        if isinstance(encoded, _EncodingProblem):
            if request["drops_overlong"] and encoded.check == ROW_TOO_LONG_CHECK:
                overlong.append(line)
            else:
                problems[line] = encoded
            continue
        if request["drops_overlong"] and len(encoded.tokens) > max_seq_length:
            overlong.append(line)
            continue
        tokens = encoded.tokens[:max_seq_length]
        cut = ((max(begin, 1), min(end, len(tokens))) for begin, end in encoded.spans)
        spans = [(begin, end) for begin, end in cut if begin < end]  # nothing predicts token 0
        all_beginnings += beginnings
        start = len(all_tokens)
        all_tokens.extend(tokens)
        target_mask += bytes(len(tokens))
        for begin, end in spans:
            target_mask[start + begin : start + end] = b"\1" * (end - begin)
        more = _make_example_facts(encoded, tokens, spans, end_tokens)
        facts.append((line, len(beginnings), content, *more))
        for doubt in dict.fromkeys((note.check, note.message) for note in encoded.notes):
            doubts.setdefault(doubt, [line, 0])[1] += 1  # one line more has this doubt
    current_line_path(part).unlink()
    write_token_part(part, tokens=all_tokens, target_mask=target_mask, beginnings=all_beginnings)
    np.array(facts, EXAMPLE_FACTS_DTYPE).tofile(facts_path(part))
    return {
        "problem_lines": list(problems),
        "problems": list(problems.values()),
        "overlong": overlong,
        "doubts": [(*doubt, *line_and_count) for doubt, line_and_count in doubts.items()],
        "openings": {key: sorted(values)[:2] for key, values in openings.items()},
    }


def _watch_examples(
    examples: Iterable[tuple[int, Example]],
    openings: Mapping[str, set[str]],
    current_line: np.typing.NDArray[np.int64],
) -> Iterator[tuple[int, Example]]:
    """Yield the examples, and add the system text and tools of each as JSON to `openings`.

    current_line: gets the line of the example that is worked on, int64 [1].
    """
    for line, example in examples:
        current_line[0] = line
        first = next(iter(example.messages), {})
        system = first.get("content") if first.get("role") == "system" else None
        openings["system"].add(json.dumps(system))
        openings["tools"].add(json.dumps(example.tools))
        yield line, example


class _EncodingProblem(NamedTuple):
    """Why an example was not tokenized: the name of the check and a sentence."""

    check: str
    message: str


def _encode_examples(
    examples: Iterable[tuple[int, Example]], source: TokenizerSource, request: Mapping[str, Any]
) -> Iterator[tuple[int, list[int], EncodedExample | _EncodingProblem]]:
    """Yield each line with its digests and tokenized example, or why it could not be tokenized.

    examples: line numbers and parsed rows. request: the job's settings, such as max_seq_length.

    A row with too many characters is not tried, as it would take very long. With `targets: last`
    nothing is left to learn of a row whose last turn is marked as not to be learnt (`masked`).

    A cell is ended (SIGPROF) at a row that takes too long.
    """
    tokenizer = source.load()
    checks = [room.make(source) for room in seams.load_all(TokenizerChecks)]
    max_seq_length = request["max_seq_length"]
    most = request["max_row_characters"]
    for line, example in examples:
        if (characters := example.approximate_characters) > most:
            message = (
                f"{characters:,} characters, of which {max_seq_length:,} tokens "
                f"(max_seq_length) would be kept; a row has at most {most:,}. Split it, raise "
                f"max_seq_length, or let data_policy.overlong be drop"
            )
            yield line, [0], _EncodingProblem(ROW_TOO_LONG_CHECK, message)
            continue
        last = len(example.messages) - 1
        if request["targets"] == "last" and last in example.masked:
            message = describe_nothing_to_learn([last], example.masked)
            hint = ", or learn the other answers with training.supervise: all"
            yield line, [0], _EncodingProblem("nothing-to-learn", message + hint)
            continue
        again = characters * (len(example.messages) // TURNS_OF_A_RENDERING)
        limit_text(characters + min(again, MOST_CHARACTERS_AGAIN))
        checked: EncodedExample | _EncodingProblem
        try:
            encoded = encode_example(example, tokenizer, request["targets"])
        except MemoryError:
            raise
        except BaseException as error:  # a template may raise anything, tokenizers a PanicException
            problem = shorten(f"{type(error).__name__}: {error}", 160)
            message = f"the chat template does not take these turns: {problem}"
            digests, checked = [0], _EncodingProblem("chat-template-raised", message)
        else:
            more = [note for check in checks for note in check(example, encoded.tokens)]
            encoded = replace(encoded, notes=(*encoded.notes, *more)) if more else encoded
            checked = _find_problem(encoded, tokenizer, request) or encoded
            digests = _digest_beginnings(example, tokenizer, request["targets"])
        limit_text(request["characters"])  # of all rows together: what follows is none's
        yield line, digests, checked


def _digest_beginnings(example: Example, tokenizer: Tokenizer, targets: Targets) -> list[int]:
    """Return the digest of an example, then those of its beginnings that end in a learnt answer.

    They are without end texts at the end, which make no other tokens: the chat template's are taken
    from answers; of a plain text that ends already none is added.
    """
    turns = chat_template_of(tokenizer).prepare(example.messages)
    text = example.text.removesuffix(tokenizer.eos_token or "")
    digests = digest_with_beginnings(example._replace(messages=turns, text=text))
    return digests[:1] if targets == "last" else digests


def _find_problem(
    encoded: EncodedExample, tokenizer: Tokenizer, request: Mapping[str, Any]
) -> _EncodingProblem | None:
    """Return why a tokenized example must not be trained on; None for a sound one.

    These are errors found while it was encoded, a row too long that cannot be cut, and a token for
    which the model has no embedding.

    request: the job's settings, such as max_seq_length.
    """
    for note in encoded.notes:
        if note.severity == "error":
            return _EncodingProblem(note.check, note.message)
    length, most = len(encoded.tokens), request["max_seq_length"]
    if encoded.is_whole and length > most and not request["drops_overlong"]:
        return _EncodingProblem(
            UNCUTTABLE_CHECK,
            f"{length:,} tokens, and max_seq_length is {most:,}: a row of this kind is not cut. "
            f"Raise it, or leave such rows out with data_policy.overlong: drop",
        )
    kept = encoded.tokens[:most]
    if problem := describe_token_beyond(tokenizer, kept, request["embedding_rows"]):
        return _EncodingProblem(BEYOND_EMBEDDING_CHECK, problem)
    return None


def current_line_path(part: Path) -> Path:
    """Return the path of the file that has the line which a part's job works on."""
    return part.with_name(f"{part.name}.line")


def facts_path(part: Path) -> Path:
    """Return the path of a part's file of facts."""
    return part.with_name(f"{part.name}.facts")


def _make_example_facts(
    encoded: EncodedExample, tokens: list[int], spans: list[Span], end_tokens: frozenset[int]
) -> tuple[int, int, int, int, int, bool]:
    """Return what is recorded of a tokenized example: the last fields of EXAMPLE_FACTS_DTYPE.

    tokens, spans: tokens, and the ranges of them that the loss counts, after truncation to
        max_seq_length.

    Returns its tokens before and after truncation, how many the loss counts, the fewest of them in
    one answer (without end-of-sequence tokens), the first turn that could not be located (-1 for
    none), and whether each answer ends in an end-of-sequence token.
    """
    answers = [tokens[begin:end] for begin, end in spans]
    sizes = [_tokens_before_eos(answer, end_tokens) for answer in answers]
    has_end = bool(sizes) and all(ends for _, ends in sizes)
    if spans and spans[-1][1] == len(tokens) < len(encoded.tokens):
        sizes[-1] = len(answers[-1]), has_end  # its own end is cut off
    return (
        len(encoded.tokens),
        len(tokens),
        sum(map(len, answers)),
        min((size for size, _ in sizes), default=0),
        encoded.broken_turn,
        has_end,
    )


def _tokens_before_eos(tokens: list[int], end_tokens: frozenset[int]) -> tuple[int, bool]:
    """Return how many tokens precede the last end token (or all), and whether there is one."""
    for index in range(len(tokens) - 1, -1, -1):
        if tokens[index] in end_tokens:
            return index, True
    return len(tokens), False
