"""The check that training did not break the answers to a few sample prompts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from nested_core.errors import NestedTuneError
from nested_core.gate.checks.base import WITHOUT_MODEL
from nested_core.gate.judged import Check, JudgedRun
from nested_core.gate.sample_answers import ask_samples
from nested_core.gate.sample_bounds import judge_samples
from nested_core.records.verdict import Reason, SampleVerdict
from nested_core.storage.sample_answers_file import render_sample_answers
from nested_core.text.stages import stages


def _find_broken_answers(judged: JudgedRun) -> Iterator[Reason]:
    """Ask base and adapter; one that cannot be asked is no verdict under `gate.samples: warn`."""
    must_pass = judged.bounds.samples == "fail"
    try:
        rows = ask_samples(judged.base, judged.evidence)
    except (NestedTuneError, OSError, MemoryError, RuntimeError, ValueError) as error:
        if must_pass:
            raise
        reason = f"{type(error).__name__}: {error}"
        stages.warning("samples: not answered, which is no verdict: %s", reason)
        samples = SampleVerdict(asked=0, not_asked=reason[:300])
    else:
        samples = judge_samples(rows)
        if rows:
            judged.written_files[judged.run.sample_answers.name] = render_sample_answers(rows)
    judged.verdict = replace(judged.verdict, samples=samples)
    if samples.are_broken and must_pass:
        yield Reason("answers_broken", f"{samples.describe()}; gate.samples is fail")


SAMPLES = Check(
    "sample answers",
    _find_broken_answers,
    stopped_by=WITHOUT_MODEL,
    bounds=("samples",),
    stage="answers of base and adapter to sample prompts",
)
