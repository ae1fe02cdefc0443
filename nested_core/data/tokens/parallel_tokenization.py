"""Tokenize the valid lines of all splits to files on disk, on all cores.

Ranges of lines are jobs, whose files are joined in order; the result does not depend on the number
of processes. What a job does with a row is in example_encoding.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nested_core.data import parallel_jobs
from nested_core.data.data_settings import DataSettings
from nested_core.data.parallel_jobs import OnProgress
from nested_core.data.sources.split_files import SplitFile
from nested_core.data.tokens.example_encoding import (
    EXAMPLE_FACTS_DTYPE,
    current_line_path,
    facts_path,
    run_tokenization_job,
)
from nested_core.data.tokens.tokenized_split import SplitWriter
from nested_core.data.tokens.tokenizer_source import TokenizerSource
from nested_core.models.base_model import vocabulary_size
from nested_core.records.dataset import PromptFormat
from nested_core.storage.untrusted_files import UNBOUNDED, open_regular

TOKENIZATION_JOB = f"{run_tokenization_job.__module__}:{run_tokenization_job.__name__}"
RANGE_BYTES = 2**20
# A tokenizer takes some 180 bytes of memory for each character of a text.
MAX_ROW_CHARACTERS = 1_000_000
MAX_ROW_CHARACTERS_PER_TOKEN = 32  # of max_seq_length, where that allows for more
MIN_BYTES_FOR_WORKERS = 4 * 2**20  # below this, starting processes takes longer than the work


@dataclass(frozen=True, eq=False)
class TokenFacts:
    """What the token rules need to know about a split; lines are original line numbers.

    examples: a record of EXAMPLE_FACTS_DTYPE for each example.
    problems: (line, check, message) for each line that could not be tokenized.
    overlong: the lines left out for their length.
    doubts: by (check, message), the first line with this doubt and the number of lines.
    openings: by "system" and "tools", different values of the examples as JSON: one, if all have
        the same.
    """

    examples: np.typing.NDArray[np.void]
    problems: list[tuple[int, str, str]]
    overlong: frozenset[int] = frozenset()
    doubts: Mapping[tuple[str, str], tuple[int, int]] = field(default_factory=dict)
    openings: Mapping[str, set[str]] = field(default_factory=dict)

    def read_prompt_format(self, *, is_chat: bool) -> PromptFormat:
        """Return how the examples begin; `is_chat` says whether the chat template formats them."""
        shared = {key: json.loads(*each) for key, each in self.openings.items() if len(each) == 1}
        return PromptFormat(is_chat, **shared)


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
    max_characters = max(MAX_ROW_CHARACTERS, MAX_ROW_CHARACTERS_PER_TOKEN * settings.max_seq_length)
    shared = {
        "job": TOKENIZATION_JOB,
        "files": tokenizer.files,
        "embedding_rows": vocabulary_size(Path(tokenizer.folder)),
        "field_names": asdict(settings.field_names),
        "max_seq_length": settings.max_seq_length,
        "max_row_characters": max_characters,
        "drops_overlong": settings.policy.overlong == "drop",
        "targets": settings.supervised_targets,
    }
    ranges = [
        (split, shared | request)
        for split, lines in splits.items()
        for request in _make_job_requests(lines, folder / split, max_characters)
    ]
    if processes is None:
        size = sum(lines.source.path.stat().st_size for lines in splits.values())
        processes = 1 if size < MIN_BYTES_FOR_WORKERS else parallel_jobs.count_usable_cores()

    def report_progress(done: int) -> None:
        """Report how many ranges of lines have been tokenized."""
        if on_progress is not None:
            on_progress("tokenising", done, len(ranges))

    requests = [request for _, request in ranges]
    answers = parallel_jobs.run_jobs(
        requests, processes=processes, on_done=report_progress, in_cells=True
    )
    with ExitStack() as stack:
        stack.enter_context(closing(answers))  # type: ignore[type-var]
        joined = {}
        for split, lines in splits.items():
            writer = stack.enter_context(closing(SplitWriter(folder / split)))
            joined[split] = _SplitJoiner(lines.source, writer)
        for (split, request), answer in zip(ranges, answers, strict=True):
            joined[split].add_part(Path(str(request["part"])), answer)
    return {split: parts.joined_facts() for split, parts in joined.items()}


def _make_job_requests(
    lines: LinesToTokenize, prefix: Path, max_characters: int
) -> Iterator[dict[str, object]]:
    """Yield the request of each job on a split: which lines it reads and skips, where it writes.

    prefix: the beginning of the paths that the jobs write to; the job's number is added.
    max_characters: of a row; a longer one is not tokenized.

    The file is read here only to know the number of each range's first line.
    """
    path = lines.source.path
    is_original = lines.source.numbers is None and lines.source.name == path.name
    first_line = 1
    skip = sorted(lines.source.physical_lines_of(set(lines.skip)))
    with open_regular(path, UNBOUNDED, follow_links=True) as (file, _):
        for number, byte_range in enumerate(
            parallel_jobs.cut_file_into_line_ranges(path, RANGE_BYTES)
        ):
            texts = file.read(byte_range.end - byte_range.start).split(b"\n")
            next_line = first_line + len(texts) - 1
            part = prefix.with_name(f"{prefix.name}-{number}").absolute()
            skipped = skip[bisect_left(skip, first_line) : bisect_left(skip, next_line + 1)]
            yield {
                "path": str(path.absolute()),
                "byte_range": byte_range,
                "first_line": first_line,
                "skip": skipped,
                "part": str(part),
                "characters": byte_range.end - byte_range.start,
                "longest": min(max_characters, max(map(len, texts))),
                "done": f"making tokens of {lines.source.name}",
                "line_file": str(current_line_path(part)) if is_original else None,
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
        self._openings: dict[str, set[str]] = {}

    def add_part(self, part: Path, answer: dict[str, Any]) -> None:
        """Append a job's results to those of the split: its files, and the answer it returned.

        part: the beginning of the names of the job's files.

        Jobs count lines in the converted file; all lines are renumbered as in the original file.
        """
        examples = np.fromfile(facts_path(part), EXAMPLE_FACTS_DTYPE)
        facts_path(part).unlink()
        examples["line"] = self._original_line_numbers(examples["line"])
        self._writer.append_part(part, examples)
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
        for key, values in answer["openings"].items():
            self._openings.setdefault(key, set()).update(values)

    def _original_line_numbers(self, lines: np.typing.ArrayLike) -> np.typing.NDArray[np.int32]:
        """Convert line numbers of the converted file to original ones."""
        indices = np.asarray(lines, np.int32)
        numbers = self._source.numbers
        return indices if numbers is None else numbers[indices - 1]

    def joined_facts(self) -> TokenFacts:
        """Return the facts of all parts."""
        examples = np.concatenate(self._examples)
        overlong = frozenset(self._overlong)
        return TokenFacts(examples, self._problems, overlong, self._doubts, self._openings)
