"""What is wrong or doubtful with a data set of preferences, beyond what single lines say.

Pairs that contradict each other, labels that are all the same, and answers whose length alone tells
which one is chosen. A pair that is trained on and held out is the check `leakage` of every row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from nested_core.data.lines.example_parsing import Example
from nested_core.records.dataset import Finding
from nested_core.storage.atomic import canonical_json

Splits = Mapping[str, Mapping[int, Example]]
MIN_EXAMPLES_FOR_LENGTH = 20
MAX_LENGTH_CORRELATION = 0.3  # of length and choice; below it, length is no strong hint
MIN_SHARE_OF_A_LABEL = 0.05


def judge_pairs(splits: Splits) -> Iterator[Finding]:
    """Findings on pairs, each with a split in place of a file."""
    first: dict[tuple[bytes, bytes], tuple[str, int]] = {}
    for split, line, example in _iterate(splits):
        prompt, chosen, rejected = _keys_of_pair(example)
        swapped = first.get((prompt, rejected + b"\0" + chosen))
        if swapped is not None:
            yield Finding(
                split,
                line,
                "error",
                "swapped-pair",
                f"the same two answers to the same prompt stand in {_name(swapped)} the other way "
                f"round: leave out the wrong one of both rows",
            )
        first.setdefault((prompt, chosen + b"\0" + rejected), (split, line))
    for split, examples in splits.items():
        yield from _judge_lengths(split, list(examples.values()))


def judge_labels(splits: Splits) -> Iterator[Finding]:
    """Findings on answers with a label, each with a split in place of a file."""
    first: dict[bytes, tuple[str, int, bool]] = {}
    for split, line, example in _iterate(splits):
        key = _key([example.messages, example.tools])
        label = bool(example.rest["label"])
        other = first.setdefault(key, (split, line, label))
        if other[2] != label:
            message = (
                f"{_name(other[:2])} has the same answer with the other label: leave out the wrong "
                f"one of both rows"
            )
            yield Finding(split, line, "error", "swapped-label", message)
    for split, examples in splits.items():
        counts = Counter(bool(example.rest["label"]) for example in examples.values())
        rarer, total = min(counts[True], counts[False]), sum(counts.values())
        if not rarer and total:
            word = "true" if counts[True] else "false"
            message = f"every label is {word}: without the other one there is nothing to prefer"
            yield Finding(split, None, "error", "one-label", message)
        elif total and rarer < MIN_SHARE_OF_A_LABEL * total:
            message = (
                f"only {rarer:,} of {total:,} answers have the label "
                f"{str(counts[True] < counts[False]).lower()}: raise desirable_weight or "
                f"undesirable_weight in training.loss_config for them"
            )
            yield Finding(split, None, "warning", "few-of-a-label", message)


def correlate_length_and_choice(chosen: Iterable[int], rejected: Iterable[int]) -> float:
    """Pearson's correlation, over all answers, of the log of the length with being chosen.

    The mean length of the two answers of a pair is taken out first, so that prompts with long
    answers do not hide what distinguishes the two; 0 where all lengths are equal.
    """
    lengths = np.log1p(np.array([list(chosen), list(rejected)], np.float64))
    within = lengths - lengths.mean(axis=0)
    spread = float(np.sqrt((within**2).mean()))
    return float(within[0].mean()) / spread if spread else 0.0


def _judge_lengths(split: str, pairs: list[Example]) -> Iterator[Finding]:
    """A warning where the length of answers tells which one is chosen."""
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


def _iterate(splits: Splits) -> Iterator[tuple[str, int, Example]]:
    for split, examples in splits.items():
        for line, example in examples.items():
            yield split, line, example


def _keys_of_pair(example: Example) -> tuple[bytes, bytes, bytes]:
    """Prompt, chosen and rejected answer, each as bytes to compare by."""
    *prompt, chosen = example.messages
    return _key([prompt, example.tools]), _key(chosen["content"]), _key(example.rest["rejected"])


def _key(value: Any) -> bytes:
    return canonical_json(value)


def _name(place: tuple[str, int]) -> str:
    return f"{place[0]}, line {place[1]},"
