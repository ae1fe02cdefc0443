"""The question whether a person approves a version, and the answer: a yes promotes, a no is kept.

A no holds for every version of the same data set and settings: nobody is asked about those again.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

from nested_core.config.sections import RegistrySection
from nested_core.errors import DamagedError
from nested_core.registry.judgements import Judgement, read_verdicts
from nested_core.registry.ledger import (
    CHAMPION_CHANGE_ACTIONS,
    NO_ORIGIN,
    Entry,
    Ledger,
    Origin,
    describe_author,
)
from nested_core.registry.link_and_views import read_link, reading, writing
from nested_core.registry.policy import policy_of
from nested_core.registry.promote_and_rollback import promote_in_folder
from nested_core.registry.promotion_outcome import Approval, Decision
from nested_core.registry.promotion_policy import choose_candidate, find_refusal
from nested_core.registry.versions import resolve_version
from nested_core.text.digest_format import shorten_digest

QUESTION_STANDS_FOR = timedelta(days=7)  # as long as the flow `promote` waits for an answer


def decide_question(
    ledger: Ledger, section: RegistrySection, candidate: Judgement, champion: str | None
) -> Decision:
    """Report that a version waits for a person, or that one declined it or its data and settings.

    candidate: the verdict on the version, which promotes it but for the person's word.
    """
    facts = candidate.facts
    line = find_decline(ledger, candidate.version, facts.dataset_digest, facts.settings_digest)
    version = shorten_digest(candidate.version)
    if line is None:
        whose = (
            "registry.promote" if section.promote == "approve" else f"the policy of {section.name}"
        )
        reason = f"waiting for approval of {version}: {whose} is approve"
        return Decision("waiting", candidate.version, champion, reason)
    alike = "" if line.version == candidate.version else f" ({shorten_digest(str(line.version))})"
    day = f"{datetime.fromisoformat(line.time):%d %b %Y}"
    reason = (
        f"declined already{alike}, on {day} by {describe_author(line.fields())}. Nobody is asked "
        f"again until data or settings change"
    )
    return Decision("declined", candidate.version, champion, reason)


def approve(
    registry: Path,
    name: str,
    version: str,
    *,
    by: str,
    expected_champion: str | None,
    origin: Origin = NO_ORIGIN,
) -> Decision:
    """Promote what a person has approved while this champion stood; otherwise say why not.

    The registry's policy must be met, except its reference, which limits automatic promotions
    alone. What the run's configuration asked for does not count, for a person decided. `by` is who
    answered, as that was typed.
    """
    with writing(registry, name) as held:
        champion = held.champion
        if version == champion:
            return Decision("already_champion", version, champion)
        if champion != expected_champion:
            return Decision("superseded", version, champion)
        if refusal := _refuse_question(held.path, held.ledger, version):
            return refusal
        fields = {"by": by, "manifest": held.verify(version), **origin.fields()}
        return promote_in_folder(held, version, champion, fields)


def find_refusal_of_question(registry: Path, name: str, version: str) -> Decision | None:
    """Explain why a person is not asked: the policy of the registry refuses the version anyway.

    None if the policy lets a person decide, and without a policy.
    """
    with reading(registry, name) as (folder, ledger):
        return _refuse_question(folder, ledger, version)


def _refuse_question(folder: Path, ledger: Ledger, version: str) -> Decision | None:
    if policy_of(folder, ledger) is None:
        return None
    section = RegistrySection(
        path=str(folder.parent), name=folder.name, promote="approve", require_validation=False
    )
    champion = read_link(folder)
    candidate = choose_candidate(folder, ledger, version, champion)
    return find_refusal(folder, ledger, section, candidate, champion, is_approved=True)


def decline(
    registry: Path,
    name: str,
    version: str,
    *,
    by: str,
    reason: str | None = None,
    origin: Origin = NO_ORIGIN,
) -> None:
    """Record that a person did not approve a version; saying so again adds nothing.

    The line has the digests of its data set and settings: no other version of both is asked about.
    """
    with writing(registry, name) as held:
        declined = resolve_version(held.path, version, held.ledger)
        if find_decline(held.ledger, declined) is not None:
            return
        facts = read_verdicts(held.path, declined, held.ledger)[-1].facts
        fields = {"dataset_digest": facts.dataset_digest, "settings_digest": facts.settings_digest}
        held.record("declined", declined, by, reason=reason, **fields, **origin.fields())


def find_decline(
    ledger: Ledger,
    version: str,
    dataset_digest: str | None = None,
    settings_digest: str | None = None,
) -> Entry | None:
    """Return the newest line in which a person declined a version, or one of the same two digests.

    A line counts until its version or this one becomes champion: somebody has changed his mind.
    """
    made_of = (dataset_digest, settings_digest)
    risen: set[str | None] = set()  # the champions since the line
    for entry in reversed(ledger.entries):
        if entry.action in CHAMPION_CHANGE_ACTIONS:
            risen.add(entry.version)
        if entry.action != "declined" or risen & {version, entry.version}:
            continue
        is_alike = None not in made_of and made_of == (entry.dataset_digest, entry.settings_digest)
        if entry.version == version or is_alike:
            return entry
    return None


def may_be_approved(folder: Path, version: str, ledger: Ledger, age: timedelta) -> bool:
    """Tell whether a version that never was champion waits for a person; gc keeps it then.

    Its own policy or its name's leaves it to a person, none has said no, and the question still
    stands. `age` is the time since its last verdict.
    """
    if age >= QUESTION_STANDS_FOR:
        return False
    try:
        facts = read_verdicts(folder, version, ledger)[-1].facts
    except DamagedError:  # an audit reports it
        return False
    if find_decline(ledger, version, facts.dataset_digest, facts.settings_digest) is not None:
        return False
    modes = ((facts.policy or {}).get("promote"), (ledger.policy() or {}).get("promote"))
    return "approve" in modes and "never" not in modes


APPROVAL = Approval(decide_question, may_be_approved)
