"""Whether training broke the answers to sample prompts, from the file that holds them.

Nothing here needs a model: `promote` does it again and compares.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from nested_core.errors import JUDGE_AGAIN, DamagedError
from nested_core.records.verdict import SampleVerdict, Verdict
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.sample_answers_file import BrokenHow, SampleAnswers, read_sample_answers

MIN_PROMPTS = 3  # fewer answers of a sound base judge nothing


def is_sound(damage: BrokenHow | None) -> bool:
    """Whether a base's answer lets its prompt judge: an answer that is merely long does."""
    return damage not in ("empty", "repeated")


def judge_samples(rows: Sequence[SampleAnswers]) -> SampleVerdict:
    """How many of the answers training broke, of those to prompts whose base's answer is sound.

    An answer without an end counts where the base's had one.
    """
    judged = [row for row in rows if is_sound(row.base_broken)]
    if len(judged) < MIN_PROMPTS:
        return SampleVerdict(asked=len(rows))
    ways = Counter(
        row.adapter_broken
        for row in judged
        if row.adapter_broken is not None
        and not (row.adapter_broken == "endless" and row.base_broken == "endless")
    )
    return SampleVerdict(
        asked=len(rows),
        judged=len(judged),
        broken=sum(ways.values()),
        ways={str(way): count for way, count in sorted(ways.items())},
    )


def require_same_samples(run: RunDirectory, recorded: Verdict, *, has_answers: bool) -> None:
    """Raise DamagedError unless the recorded judgement is that of the answers in the run's file.

    `has_answers` is whether the run's manifest lists that file. That nothing was asked is taken as
    recorded where it does not.
    """
    samples = recorded.samples
    if not has_answers and (samples is None or samples.not_asked is not None):
        return
    now = judge_samples(read_sample_answers(run.sample_answers) if has_answers else ())
    if samples != now:
        raise DamagedError(
            f"{run.gate} is not the verdict on {run.sample_answers.name} beside it: samples "
            f"differ.",
            advice=JUDGE_AGAIN,
        )
