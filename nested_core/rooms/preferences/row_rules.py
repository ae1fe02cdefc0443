"""What is wrong or doubtful with a data set of preferences, beyond what single lines say.

Pairs that contradict each other, and answers whose length alone tells which one is chosen. A pair
that is trained on and held out is the check `leakage` of every row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from nested_core.data.lines.example_parsing import Example
from nested_core.records.dataset import Finding
from nested_core.storage.atomic import canonical_json

Splits = Mapping[str, Mapping[int, Example]]
MIN_EXAMPLES_FOR_LENGTH = 20
MAX_LENGTH_CORRELATION = 0.3  # of length and choice; below it, length is no strong hint


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
