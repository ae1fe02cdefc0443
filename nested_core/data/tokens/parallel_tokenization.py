"""Tokenize the valid lines of all splits to files on disk, and collect facts for the token rules.

It truncates as mlx-lm does, and counts what is lost; no pad token gets into the target mask. Ranges
of lines are jobs for all cores; the result does not depend on the number of processes.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nested_core import seams
from nested_core.data import parallel_jobs
from nested_core.data.data_settings import DataSettings
from nested_core.data.lines.example_parsing import Example, FieldNames, read_examples
from nested_core.data.lines.marks import describe_nothing_to_learn
from nested_core.data.parallel_jobs import ByteRange, OnProgress
from nested_core.data.sources.split_files import SplitFile
from nested_core.data.tokens.example_encoding import EncodedExample, Span, encode_example
from nested_core.data.tokens.template_time_limit import (
    BASE_LIMIT_SECONDS,
    TemplateTimeLimit,
    TemplateTooSlow,
)
from nested_core.data.tokens.tokenized_split import SplitWriter, write_token_part
from nested_core.data.tokens.tokenizer_source import TokenizerSource
from nested_core.errors import ConfigError, shorten
from nested_core.models.base_model import describe_token_beyond, vocabulary_size
from nested_core.models.chat_template import end_token_ids
from nested_core.storage.untrusted_files import UNBOUNDED, open_regular

TOKENIZATION_JOB = "nested_core.data.tokens.parallel_tokenization:run_tokenization_job"
RANGE_BYTES = 2**20
MIN_BYTES_FOR_WORKERS = 4 * 2**20  # below this, starting processes takes longer than the work
# A tokenizer takes some 180 bytes of memory for each character of a text.
MAX_ROW_CHARACTERS = 1_000_000
ROW_TOO_LONG_CHECK = "row-too-long"
UNCUTTABLE_CHECK = "too-long-to-be-cut"
BEYOND_EMBEDDING_CHECK = "token-beyond-embedding"
MAX_ROW_CHARACTERS_PER_TOKEN = 32  # of max_seq_length, where that allows for more

EXAMPLE_FACTS_DTYPE = np.dtype(
    [
        ("line", "<i4"),
        ("full_length", "<i4"),  # in tokens, before truncation
        ("length", "<i4"),  # in tokens, after it
        ("supervised", "<i4"),  # tokens in the target mask
        ("shortest", "<i4"),  # tokens of the shortest target span before its end-of-sequence token
        ("broken_turn", "<i4"),  # see EncodedExample
        ("has_end", "?"),  # whether every target span has an end-of-sequence token
    ]
)


@dataclass(frozen=True, eq=False)
class TokenFacts:
    """What the token rules need to know about a split; lines are original line numbers.

    examples: a record of EXAMPLE_FACTS_DTYPE for each example.
    problems: (line, check, message) for each line that could not be tokenized.
    overlong: the lines left out for their length.
    doubts: by (check, message), the first line with this doubt and the number of lines.
    """

    examples: npt.NDArray[np.void]
    problems: list[tuple[int, str, str]]
    overlong: frozenset[int] = frozenset()
    doubts: Mapping[tuple[str, str], tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class LinesToTokenize:
    """The lines of one split to be tokenized: all but blank ones and those in `skip`.

    skip: original line numbers.
    """

    source: SplitFile
    skip: frozenset[int]


def tokenize_splits(
    folder: Path,
    splits: Mapping[str, LinesToTokenize],
    settings: DataSettings,
    tokenizer: TokenizerSource,
    *,
    processes: int | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, TokenFacts]:
    """Write the tokens of each split to files in an existing folder; return facts about each.

    The lines are cut into ranges, worker processes tokenize a range each, and their files are
    joined in order.

    Every example is cut to `max_seq_length` tokens, as mlx-lm does in a batch. A line is left out
    if the chat template raises for it, if it has too many characters, or if it is too long and
    data_policy drops such lines.

    processes: None for one a core, if there is enough to tokenize.
    """
    shared = {
        "job": TOKENIZATION_JOB,
        "tokenizer": asdict(tokenizer),
        "embedding_rows": vocabulary_size(Path(tokenizer.folder)),
        "field_names": asdict(settings.field_names),
        "max_seq_length": settings.max_seq_length,
        "drops_overlong": settings.policy.overlong == "drop",
        "targets": settings.supervised_targets,
    }
    ranges = [
        (split, shared | request)
        for split, lines in splits.items()
        for request in _make_job_requests(lines, folder / split)
    ]
    if processes is None:
        size = sum(lines.source.path.stat().st_size for lines in splits.values())
        processes = 1 if size < MIN_BYTES_FOR_WORKERS else parallel_jobs.count_usable_cores()

    def report_progress(done: int) -> None:
        """Report how many ranges of lines have been tokenized."""
        if on_progress is not None:
            on_progress("tokenising", done, len(ranges))

    requests = [request for _, request in ranges]
    answers = parallel_jobs.run_jobs(requests, processes=processes, on_done=report_progress)
    with ExitStack() as stack:
        stack.enter_context(closing(answers))  # type: ignore[type-var]
        joined = {}
        for split, lines in splits.items():
            writer = stack.enter_context(closing(SplitWriter(folder / split)))
            joined[split] = _SplitJoiner(lines.source, writer)
        for (split, request), answer in zip(ranges, answers, strict=True):
            joined[split].add_part(Path(str(request["part"])), answer)
    return {split: parts.joined_facts() for split, parts in joined.items()}


def _make_job_requests(lines: LinesToTokenize, prefix: Path) -> Iterator[dict[str, Any]]:
    """Yield the request of each job on a split: which lines it reads and skips, where it writes.

    prefix: the beginning of the paths that the jobs write to; the job's number is added.

    The file is read here only to know the number of each range's first line.
    """
    path = lines.source.path
    first_line = 1
    skip = sorted(lines.source.physical_lines_of(set(lines.skip)))
    with open_regular(path, UNBOUNDED, follow_links=True) as (file, _):
        for number, byte_range in enumerate(
            parallel_jobs.cut_file_into_line_ranges(path, RANGE_BYTES)
        ):
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


class _SplitJoiner:
    """Joins the results of a split's jobs in order, with line numbers of the original file."""

    def __init__(self, source: SplitFile, writer: SplitWriter) -> None:
        """Create it without parts; `writer` receives the tokens."""
        self._source = source
        self._writer = writer
        self._examples = [np.zeros(0, EXAMPLE_FACTS_DTYPE)]
        self._problems: list[tuple[int, str, str]] = []
        self._overlong: set[int] = set()
        self._doubts: dict[tuple[str, str], tuple[int, int]] = {}

    def add_part(self, part: Path, answer: dict[str, Any]) -> None:
        """Append a job's results to those of the split: its files, and the answer it returned.

        part: the beginning of the names of the job's files.

        Jobs count lines in the converted file; all lines are renumbered as in the original file.
        """
        examples = np.fromfile(_facts_path(part), EXAMPLE_FACTS_DTYPE)
        _facts_path(part).unlink()
        examples["line"] = self._original_line_numbers(examples["line"])
        self._writer.append_part(part, examples["line"], examples["length"])
        self._examples.append(examples)
        lines = self._original_line_numbers(answer["problem_lines"])
        self._problems += [
            (line, check, message)
            for line, (check, message) in zip(lines.tolist(), answer["problems"], strict=True)
        ]
        self._overlong.update(self._original_line_numbers(answer["overlong"]).tolist())
        first_lines = self._original_line_numbers([line for *_, line, _ in answer["doubts"]])
        for line, (check, message, _, count) in zip(
            first_lines.tolist(), answer["doubts"], strict=True
        ):
            # Another range may have had this doubt before: its first line stays, counts add up
            first_line, earlier_count = self._doubts.get((check, message), (line, 0))
            self._doubts[check, message] = first_line, earlier_count + count

    def _original_line_numbers(self, lines: npt.ArrayLike) -> npt.NDArray[np.int32]:
        """Convert line numbers of the converted file to original ones."""
        indices = np.asarray(lines, np.int32)
        numbers = self._source.numbers
        return indices if numbers is None else numbers[indices - 1]

    def joined_facts(self) -> TokenFacts:
        """Return the facts of all parts."""
        examples = np.concatenate(self._examples)
        return TokenFacts(examples, self._problems, frozenset(self._overlong), self._doubts)


def run_tokenization_job(request: dict[str, Any]) -> dict[str, Any]:
    """Tokenize a range of lines; write tokens, masks and facts to files, return the problems.

    request: the settings of `tokenize_splits` that a worker process needs, and what is this job's
        own: the lines to read and to skip, and `part`, the beginning of the names of its files.

    Returns by line: examples that cannot be tokenized, those that are dropped for their length, and
    doubts (each warning with its first line and how many lines have it).
    """
    source = TokenizerSource(**request["tokenizer"])
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
    facts: list[tuple[Any, ...]] = []
    problems: dict[int, _EncodingProblem] = {}
    overlong: list[int] = []
    doubts: dict[tuple[str, str], list[int]] = {}  # the first line, and how many
    all_tokens = array("i")
    target_mask = bytearray()
    # Each example is a problem, too long, or appended to the arrays
    for line, encoded in _encode_examples(examples, source, request):
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
        spans = _truncate_spans(encoded.spans, len(tokens))
        start = len(all_tokens)
        all_tokens.extend(tokens)
        target_mask += bytes(len(tokens))
        for begin, end in spans:
            target_mask[start + begin : start + end] = b"\1" * (end - begin)
        facts.append((line, *_make_example_facts(encoded, tokens, spans, end_tokens)))
        for doubt in dict.fromkeys((note.check, note.message) for note in encoded.notes):
            doubts.setdefault(doubt, [line, 0])[1] += 1  # one line more has this doubt
    write_token_part(part, all_tokens, target_mask)
    np.array(facts, EXAMPLE_FACTS_DTYPE).tofile(_facts_path(part))
    return {
        "problem_lines": list(problems),
        "problems": list(problems.values()),
        "overlong": overlong,
        "doubts": [(*doubt, *line_and_count) for doubt, line_and_count in doubts.items()],
    }


class _EncodingProblem(NamedTuple):
    """Why an example was not tokenized: the name of the check and a sentence."""

    check: str
    message: str


def _encode_examples(
    examples: Iterable[tuple[int, Example]], source: TokenizerSource, request: Mapping[str, Any]
) -> Iterator[tuple[int, EncodedExample | _EncodingProblem]]:
    """Yield each line with its tokenized example, or why it could not be tokenized.

    examples: line numbers and parsed rows. request: the job's settings, such as max_seq_length.

    A row with too many characters is not tried, as it would take very long. With `targets: last`
    nothing is left to learn of a row whose last turn is marked as not to be learnt (`masked`).

    Raises ConfigError if the template exceeds its time limit.
    """
    tokenizer = source.load()
    checks = [part(source) for part in seams.load_all("tokenizer_checks")]
    max_seq_length = request["max_seq_length"]
    most = max(MAX_ROW_CHARACTERS, MAX_ROW_CHARACTERS_PER_TOKEN * max_seq_length)
    with TemplateTimeLimit() as limit:
        for line, example in examples:
            if (characters := example.approximate_characters) > most:
                yield line, _row_too_long(characters, most, max_seq_length)
                continue
            last = len(example.messages) - 1
            if request["targets"] == "last" and last in example.masked:
                message = describe_nothing_to_learn([last], example.masked)
                hint = ", or learn the other answers with training.supervise: all"
                yield line, _EncodingProblem("nothing-to-learn", message + hint)
                continue
            try:
                with limit.watching(characters):
                    encoded = encode_example(example, tokenizer, request["targets"])
            except TemplateTooSlow:
                raise ConfigError(
                    f"model: the chat template in {source.folder} took longer than "
                    f"{BASE_LIMIT_SECONDS:g} s for line {line} of {Path(request['path']).name}, "
                    f"and may never end. Mend the template, or give another model."
                ) from None
            except Exception as error:  # a template is its author's program: it may raise anything
                problem = shorten(f"{type(error).__name__}: {error}", 160)
                message = f"the chat template does not take these turns: {problem}"
                yield line, _EncodingProblem("chat-template-raised", message)
            else:
                more = [note for check in checks for note in check(example, encoded.tokens)]
                encoded = replace(encoded, notes=(*encoded.notes, *more)) if more else encoded
                yield line, _find_problem(encoded, tokenizer, request) or encoded


def _find_problem(
    encoded: EncodedExample, tokenizer: Any, request: Mapping[str, Any]
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


def _row_too_long(characters: int, most: int, max_seq_length: int) -> _EncodingProblem:
    """Build the problem of a row with too many characters.

    most: how many characters are allowed.
    """
    return _EncodingProblem(
        ROW_TOO_LONG_CHECK,
        f"{characters:,} characters, of which {max_seq_length:,} tokens (max_seq_length) would be "
        f"kept; a row has at most {most:,}. Split it, raise max_seq_length, or let "
        f"data_policy.overlong be drop",
    )


def _facts_path(part: Path) -> Path:
    """Return the path of a part's file of facts."""
    return part.with_name(f"{part.name}.facts")


def _truncate_spans(spans: Iterable[Span], length: int) -> list[Span]:
    """Cut spans to the first `length` tokens, without token 0, which nothing predicts."""
    cut = [(max(begin, 1), min(end, length)) for begin, end in spans]
    return [(begin, end) for begin, end in cut if begin < end]


def _make_example_facts(
    encoded: EncodedExample, tokens: list[int], spans: list[Span], end_tokens: frozenset[int]
) -> tuple[int, int, int, int, int, bool]:
    """Return what is recorded of a tokenized example, in the order of EXAMPLE_FACTS_DTYPE.

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
