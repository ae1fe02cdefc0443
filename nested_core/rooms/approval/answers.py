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
    """Return whether a version waits for a person's approval, or was declined.

    A person who declined a version of the same data and settings declined this one too.

    candidate: the verdict on the version, by which it could be promoted without a person.
    """
    facts = candidate.facts
    entry = find_decline(ledger, candidate.version, facts.dataset_digest, facts.settings_digest)
    if entry is None:
        is_own = section.promote == "approve"
        rule = "registry.promote" if is_own else f"the policy of {section.name}"
        reason = f"waiting for approval of {shorten_digest(candidate.version)}: {rule} is approve"
        return Decision("waiting", candidate.version, champion, reason)
    other = "" if entry.version == candidate.version else f" ({shorten_digest(str(entry.version))})"
    day = f"{datetime.fromisoformat(entry.time):%d %b %Y}"
    reason = (
        f"declined already{other}, on {day} by {describe_author(entry.fields())}. Nobody is asked "
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
    """Promote a version that a person approved; return the decision, or why it is not promoted.

    The policy of the registry must be met, except its reference, which limits automatic promotions
    only. The policy of the run's configuration does not count, since a person decided.

    by: who answered, as typed.
    expected_champion: the champion when the question was asked; another one now supersedes it.
    """
    with writing(registry, name) as held:
        champion = held.champion
        if version == champion:
            return Decision("already_champion", version, champion)
        if champion != expected_champion:
            return Decision("superseded", version, champion)
        if refusal := _refuse_question(held.path, held.ledger, version):
            return refusal
        fields = {"by": by, "manifest": held.verify(version), **vars(origin)}
        return promote_in_folder(held, version, champion, fields)


def find_refusal_of_question(registry: Path, name: str, version: str) -> Decision | None:
    """Return a decision if a version was rejected, or the policy refuses it: nobody is asked then.

    None if the policy leaves it to a person, and without a policy.
    """
    with reading(registry, name) as (folder, ledger):
        return _refuse_question(folder, ledger, version)


def _refuse_question(folder: Path, ledger: Ledger, version: str) -> Decision | None:
    """Return what `find_refusal_of_question` does, for the folder of a name."""
    champion = read_link(folder)
    candidate = choose_candidate(folder, ledger, version, champion)
    if policy_of(folder, ledger) is None and candidate.verdict.has_passed:
        return None
    section = RegistrySection(
        path=str(folder.parent), name=folder.name, promote="approve", require_validation=False
    )
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
    """Record that a person declined a version; a second time adds nothing.

    The line has the digests of the version's data set and settings, so that nobody is asked about
    another version of both.
    """
    with writing(registry, name) as held:
        declined = resolve_version(held.path, version, held.ledger)
        if find_decline(held.ledger, declined) is not None:
            return
        facts = read_verdicts(held.path, declined, held.ledger)[-1].facts
        fields = {"dataset_digest": facts.dataset_digest, "settings_digest": facts.settings_digest}
        held.record("declined", declined, by, reason=reason, **fields, **vars(origin))


def find_decline(ledger: Ledger, version: str, *digests: str | None) -> Entry | None:
    """Return the latest line of the history that declines a version, or one with these digests.

    digests: of the data set and of the settings.

    A line counts until its version or this one becomes champion, since a person then changed the
    decision. None without such a line.
    """
    later_champions: set[str | None] = set()
    for entry in reversed(ledger.entries):
        if entry.action in CHAMPION_CHANGE_ACTIONS:
            later_champions.add(entry.version)
        if entry.action != "declined" or later_champions & {version, entry.version}:
            continue
        is_same = None not in digests and digests == (entry.dataset_digest, entry.settings_digest)
        if entry.version == version or is_same:
            return entry
    return None


def may_be_approved(folder: Path, version: str, ledger: Ledger, age: timedelta) -> bool:
    """Return whether a version that never was champion waits for a person; gc keeps it then.

    It waits if its policy or its name's leaves the promotion to a person, nobody has declined it,
    and it was judged so lately that the question is still open.

    age: the time since its last verdict.
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
