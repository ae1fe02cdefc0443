"""The sound lines of all splits -> their tokens on disk, and what the token rules need of each.

Truncates as mlx-lm does, keeps count of it, and supervises no pad token. Judges nothing. Ranges of
lines are jobs for all cores; the result is the same in any number of processes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nested_core.data import parallel_jobs
from nested_core.data.lines.examples import Example, Features, read_examples
from nested_core.data.parallel_jobs import ByteRange, OnProgress
from nested_core.data.settings import DataSettings
from nested_core.data.sources.files import SplitFile
from nested_core.data.tokens.example_encoding import EncodedExample, Span, encode_example
from nested_core.data.tokens.tokenized_split import ExampleWriter, SplitWriter
from nested_core.data.tokens.tokenizer_source import TokenizerSource
from nested_core.errors import shorten

JOB = "nested_core.data.tokens.parallel_tokenization:tokenize_range"
RANGE_BYTES = 2**20
SMALL_BYTES = 4 * 2**20  # below this, starting processes takes longer than the work

EXAMPLE_FACTS = np.dtype(
    [("line", "<i4"), ("full_length", "<i4"), ("length", "<i4"), ("supervised", "<i4")]
    + [("shortest", "<i4"), ("broken_turn", "<i4"), ("has_end", "?")]
)


@dataclass(frozen=True, eq=False)
class TokenFacts:
    """What the token rules need to know: a record of EXAMPLE_FACTS for each example of a split,
    (line, what was raised) for each line that the chat template did not take, and the lines that
    were left out for their length.

    shortest: tokens of the shortest learnt stretch, up to the last end-of-sequence token in it;
    has_end: whether every learnt stretch has such a token.
    """

    examples: npt.NDArray[np.void]
    problems: list[tuple[int, str]]
    overlong: frozenset[int] = frozenset()


@dataclass(frozen=True, eq=False)
class SoundLines:
    """The lines of one split that are to be tokenised: all but the blank and those to skip.

    `skip` and the lines in TokenFacts are the numbers that a person knows a line by.
    """

    source: SplitFile
    skip: frozenset[int]


def tokenize_splits(
    folder: Path,
    splits: Mapping[str, SoundLines],
    settings: DataSettings,
    tokenizer: TokenizerSource,
    *,
    processes: int | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, TokenFacts]:
    """Write the tokens of each split into a folder that exists; return the facts of each.

    Every example is cut to `max_seq_length` tokens, as mlx-lm does when it makes a batch; a line
    for which the chat template raises is left out, and so is an overlong one where the policy says
    so. One process a core, where that saves time.
    """
    shared = {
        "job": JOB,
        "tokenizer": asdict(tokenizer),
        "features": asdict(settings.features),
        "max_seq_length": settings.max_seq_length,
        "drops_overlong": settings.policy.overlong == "drop",
        "targets": settings.targets,
    }
    ranges = [
        (split, shared | request)
        for split, lines in splits.items()
        for request in _cut_into_ranges(lines, folder / split)
    ]
    if processes is None:
        size = sum(lines.source.path.stat().st_size for lines in splits.values())
        processes = 1 if size < SMALL_BYTES else parallel_jobs.usable_cores()
    requests = [request for _, request in ranges]
    answers = parallel_jobs.run_jobs(
        requests, processes=processes, on_done=_counted(on_progress, len(requests))
    )
    with ExitStack() as stack:
        stack.enter_context(closing(answers))  # type: ignore[type-var]
        joined = {split: stack.enter_context(SplitWriter(folder / split)) for split in splits}
        numbered = {split: lines.source for split, lines in splits.items()}
        return _join(joined, numbered, ranges, answers)


def _counted(on_progress: OnProgress | None, total: int) -> Callable[[int], None] | None:
    return None if on_progress is None else lambda done: on_progress("tokenising", done, total)


def _cut_into_ranges(lines: SoundLines, prefix: Path) -> Iterator[dict[str, Any]]:
    """What each job on a file reads, skips and writes; the lines before it are counted."""
    path = lines.source.path
    first_line, skip = 1, sorted(lines.source.lines_of(set(lines.skip)))
    with path.open("rb") as file:
        for number, byte_range in enumerate(parallel_jobs.line_ranges(path, RANGE_BYTES)):
            next_line = first_line + file.read(byte_range.end - byte_range.start).count(b"\n")
            skipped = skip[bisect_left(skip, first_line) : bisect_left(skip, next_line + 1)]
            yield {
                "path": str(path),
                "byte_range": byte_range,
                "first_line": first_line,
                "skip": skipped,
                "part": f"{prefix}-{number}",
            }
            first_line = next_line


def _join(
    joined: Mapping[str, SplitWriter],
    numbered: Mapping[str, SplitFile],
    ranges: Sequence[tuple[str, dict[str, Any]]],
    answers: Iterator[dict[str, Any]],
) -> dict[str, TokenFacts]:
    """Put the parts together as they come, in order."""
    records: dict[str, list[npt.NDArray[np.void]]] = {split: [] for split in joined}
    problems: dict[str, list[tuple[int, str]]] = {split: [] for split in joined}
    overlong: dict[str, set[int]] = {split: set() for split in joined}
    for (split, request), answer in zip(ranges, answers, strict=True):
        part = Path(request["part"])
        found = np.fromfile(_facts_path(part), EXAMPLE_FACTS)
        _facts_path(part).unlink()
        raised = [(line, problem) for line, problem in answer["problems"]]
        dropped = answer["overlong"]
        if (numbers := numbered[split].numbers) is not None:
            found["line"] = numbers[found["line"] - 1]
            raised = [(int(numbers[line - 1]), problem) for line, problem in raised]
            dropped = [int(numbers[line - 1]) for line in dropped]
        joined[split].join(part, found["line"], found["length"])
        records[split].append(found)
        problems[split] += raised
        overlong[split].update(dropped)
    empty = np.zeros(0, EXAMPLE_FACTS)
    return {
        split: TokenFacts(
            np.concatenate([empty, *records[split]]), problems[split], frozenset(overlong[split])
        )
        for split in joined
    }


def tokenize_range(request: dict[str, Any]) -> dict[str, Any]:
    """The job: a range of lines as tokens, flags and facts in files; the answer names the rest."""
    tokenizer = TokenizerSource(**request["tokenizer"]).load()
    ends, facts = _end_tokens(tokenizer), list[tuple[Any, ...]]()
    problems, overlong = list[tuple[int, str]](), list[int]()
    part, max_seq_length = Path(request["part"]), request["max_seq_length"]
    with ExampleWriter(part) as writer:
        for line, example in _read(request):
            try:
                encoded = encode_example(example, tokenizer, request["targets"])
            except Exception as error:  # a template is its author's program: it may raise anything
                problems.append((line, shorten(f"{type(error).__name__}: {error}", 160)))
                continue
            if request["drops_overlong"] and len(encoded.tokens) > max_seq_length:
                overlong.append(line)
                continue
            kept = encoded.tokens[:max_seq_length]
            spans = _cut(encoded.spans, len(kept))
            writer.add(kept, _flags(spans, len(kept)))
            facts.append((line, *_describe(encoded, kept, spans, ends)))
    np.array(facts, EXAMPLE_FACTS).tofile(_facts_path(part))
    return {"problems": problems, "overlong": overlong}


def _facts_path(part: Path) -> Path:
    return part.with_name(f"{part.name}.facts")


def _read(request: dict[str, Any]) -> Iterator[tuple[int, Example]]:
    return read_examples(
        Path(request["path"]),
        Features(**request["features"]),
        set(request["skip"]),
        ByteRange(*request["byte_range"]),
        request["first_line"],
    )


def _cut(spans: Iterable[Span], length: int) -> list[Span]:
    """The spans within the tokens that are kept, and without the first, which nothing predicts."""
    cut = [(max(begin, 1), min(end, length)) for begin, end in spans]
    return [(begin, end) for begin, end in cut if begin < end]


def _flags(spans: list[Span], length: int) -> bytearray:
    """One byte a token: 1 where it is learnt."""
    flags = bytearray(length)
    for begin, end in spans:
        flags[begin:end] = b"\1" * (end - begin)
    return flags


def _end_tokens(tokenizer: Any) -> frozenset[int]:
    ends = getattr(tokenizer, "eos_token_ids", None) or {tokenizer.eos_token_id}
    return frozenset(ends) - {None}


def _describe(
    encoded: EncodedExample, kept: list[int], spans: list[Span], ends: frozenset[int]
) -> tuple[int, int, int, int, int, bool]:
    """The fields of EXAMPLE_FACTS after the line."""
    learnt = [kept[begin:end] for begin, end in spans]
    sizes = [_size_before_end(tokens, ends) for tokens in learnt]
    if spans and spans[-1][1] == len(kept) < len(encoded.tokens):
        sizes[-1] = len(learnt[-1]), sizes[-1][1]  # its end is cut off
    return (
        len(encoded.tokens),
        len(kept),
        sum(map(len, learnt)),
        min((size for size, _ in sizes), default=0),
        encoded.broken_turn,
        bool(sizes) and all(has_end for _, has_end in sizes),
    )


def _size_before_end(tokens: list[int], ends: frozenset[int]) -> tuple[int, bool]:
    """The tokens before the last end-of-sequence token, or all; and whether there is one."""
    for place in range(len(tokens) - 1, -1, -1):
        if tokens[place] in ends:
            return place, True
    return len(tokens), False
