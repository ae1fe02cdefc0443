"""Trials: what became of runs from the champion that made no new one, so that none is made again.

The line of a version (`registered`, `judged`) holds the digest of all that it was made and judged
under. Where a run made no version, a line `tried` does, once for the same conditions.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from nested_core.config.sections import RegistrySection
from nested_core.errors import shorten
from nested_core.records.outcome_names import WORDS_IN_SENTENCE, Outcome
from nested_core.records.skip import Skip
from nested_core.registry.folders import create_name_folder, name_exists
from nested_core.registry.judgements import Judgement, choose_verdict, read_verdicts
from nested_core.registry.ledger import Entry, Ledger, describe_author
from nested_core.registry.link_and_views import reading, writing_folder
from nested_core.registry.promotion_outcome import Decision
from nested_core.registry.promotion_policy import find_refusal, registry_location
from nested_core.registry.registration import REGISTRATION_AUTHOR
from nested_core.registry.versions import registered_versions
from nested_core.text.digest_format import shorten_digest

MAX_REASON_CHARACTERS = 500


def record_trial(registry: Path, name: str, conditions: str, reason: str, **fields: str) -> None:
    """Append a `tried` line for a run that registered no version to the history of `name`.

    Nothing is appended if the history has a line with the same `conditions_digest` already. The
    folder of the name is created if it is missing, because even a first run can be rejected.

    conditions: the digest of everything that decided the outcome of the run.
    reason: what the gate found, in a sentence.
    fields: further fields of the line: `outcome`, `run`, `adapter`, and `dataset_digest` and
        `settings_digest`, which tell a person what differs between the conditions of two runs.
    """
    with writing_folder(create_name_folder(registry, name)) as folder:
        if _find_line(folder.path, folder.ledger, conditions) is None:
            fields |= {"conditions_digest": conditions}
            fields |= {"reason": shorten(reason, MAX_REASON_CHARACTERS)}
            folder.record("tried", None, REGISTRATION_AUTHOR, **fields)


def find_reason_to_skip(
    section: RegistrySection, conditions_digest: str, champion: str | None
) -> Skip | None:
    """Return why a run under these conditions cannot make a champion; None if it should train.

    conditions_digest: the hash of everything that decides the outcome of a run.
    champion: the version in use that the run would have to beat.

    The history of the name is searched for an earlier run under the same conditions. If that run
    registered a version, the promotion policy judges the version again, because a person may have
    approved or declined it since. Raises DamagedError if a version cannot be read.
    """
    registry, name = registry_location(section)
    if not name_exists(registry, name):
        return None
    with reading(registry, name) as (folder, ledger):
        line = _find_line(folder, ledger, conditions_digest)
        if line is None:
            return None
        if line.version is None:  # the earlier run was rejected, and registered nothing
            return _describe_trial(line)
        if rollback := ledger.barred_versions().get(line.version):
            reason = f"rolled back on {_day(rollback)} by {describe_author(rollback.fields())}"
            return Skip(Outcome.SKIPPED_HOPELESS, reason, version=line.version)
        verdicts = read_verdicts(folder, line.version, ledger)
        alike = [one for one in verdicts if one.facts.conditions_digest == conditions_digest]
        candidate = choose_verdict(alike or verdicts, champion)
        decision = find_refusal(folder, ledger, section, candidate, champion)
        has_passed = verdicts[-1].verdict.has_passed  # else nobody is asked about it any more
        if decision is None or (decision.outcome == "waiting" and not has_passed):
            return None
        return _describe_refusal(line, candidate, decision)


def _find_line(folder: Path, ledger: Ledger, conditions_digest: str) -> Entry | None:
    """Return the newest history line with `conditions_digest`, or None.

    A line whose version is no longer on disk is passed over.

    folder: the adapter's folder in the registry, REGISTRY/NAME.
    """
    versions = registered_versions(folder)
    for line in reversed(ledger.entries):
        if line.conditions_digest == conditions_digest and line.version in (None, *versions):
            return line
    return None


def _describe_trial(line: Entry) -> Skip:
    """Return the reason to skip a run whose earlier trial registered no version."""
    words = WORDS_IN_SENTENCE.get(str(line.outcome), str(line.outcome))
    champion = "no champion" if line.previous is None else "this champion"
    details = f"with this data, these settings and {champion} (run {line.run}): {line.reason}"
    return Skip(Outcome.SKIPPED_HOPELESS, f"{words} on {_day(line)}", details)


def _describe_refusal(line: Entry, candidate: Judgement, decision: Decision) -> Skip:
    """Return the reason to skip a run whose conditions already produced a refused version.

    line: the history line of the earlier run.
    candidate: the judgement on its version.
    decision: the refusal of the promotion policy.
    """
    version, day = shorten_digest(candidate.version), _day(line)
    if decision.outcome == "waiting":
        reason = f"{version} of {day}, on the same data, waits for approval"
        return Skip(Outcome.SKIPPED_UNCHANGED, reason, version=candidate.version)
    if decision.outcome == "registered":
        reason = f"the same data made {version} on {day}"
        details = f"and {decision.sentence}"
        return Skip(Outcome.SKIPPED_UNCHANGED, reason, details, candidate.version)
    if decision.outcome == "declined":
        return Skip(Outcome.SKIPPED_HOPELESS, decision.sentence, version=candidate.version)
    details = f"({version}, on the same data): {decision.sentence}"
    return Skip(Outcome.SKIPPED_HOPELESS, f"not promoted on {day}", details, candidate.version)


def _day(line: Entry) -> str:
    """Format the date of a history line, such as `24 Nov 2026`."""
    return f"{datetime.fromisoformat(line.time):%d %b %Y}"
