"""Automatic promotion: whether a registered version becomes champion, and if not, why.

The decision is made and carried out under one lock of the name's folder, when the version is
registered. The hourly `reconcile` decides in the same way about versions whose run was killed in
between, or whose policy became less strict. The decision rests on the version's own files, which
are re-hashed before the champion changes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from nested_core import seams
from nested_core.config.key_properties import settings_that_make_loss
from nested_core.config.schema import FineTuneConfig
from nested_core.config.sections import RegistrySection
from nested_core.errors import (
    ConfigError,
    DamagedError,
    GateRejected,
    NestedTuneError,
    describe_first_problem,
    quote_path,
)
from nested_core.records.loss_conclusion import describe_smallest_visible
from nested_core.records.verdict import ChampionLoss, Noise, Validation, Verdict
from nested_core.registry.folders import VERSIONS_FOLDER_NAME
from nested_core.registry.judgements import Judgement, choose_verdict, read_verdicts
from nested_core.registry.ledger import NO_ORIGIN, Ledger, Origin
from nested_core.registry.link_and_views import NameFolder, read_link, reading, writing
from nested_core.registry.mirroring import set_mirror
from nested_core.registry.policy import (
    APPROVE_KEY,
    PromotionRule,
    RegistryPolicy,
    find_looser_bounds,
    policy_of,
    read_policy,
)
from nested_core.registry.promote_and_rollback import UNSET, Unset, promote_in_folder
from nested_core.registry.promotion_outcome import Approval, Decision
from nested_core.registry.queries import verify
from nested_core.registry.registration import NewVersion, registering
from nested_core.registry.versions import (
    PROVENANCE_NAME,
    how_to_mend,
    read_provenance,
    registered_versions,
    version_folder,
)
from nested_core.text.digest_format import shorten_digest
from nested_core.text.loss_format import (
    format_change,
    format_difference,
    format_interval,
    format_loss,
    loss_name_for_file,
)

OTHER_ANSWERS = "the base's and those of one fixed answer"


def read_candidate(
    registry: Path, name: str, version: str, against: str | None | Unset = UNSET
) -> Judgement:
    """Read the verdict on a version that decides its promotion: the newest against a champion.

    against: the champion; today's by default.

    Raises ConfigError for an unknown version, DamagedError for a damaged file.
    """
    # Under the lock: a gc at the same time would leave half of the files, which looks like damage.
    with reading(registry, name) as (folder, ledger):
        champion = read_link(folder) if isinstance(against, Unset) else against
        return choose_candidate(folder, ledger, version, champion)


def choose_candidate(folder: Path, ledger: Ledger, version: str, champion: str | None) -> Judgement:
    """Return the newest verdict on a version against this champion; call under the folder's lock.

    Without a verdict against it, the newest of all. Raises ConfigError for an unknown version.

    ledger: the adapter's history.
    """
    if version not in registered_versions(folder):
        raise ConfigError(f"{folder} has no version {version!r:.80}.")
    return choose_verdict(read_verdicts(folder, version, ledger), champion)


def register_by_policy(
    new: NewVersion, section: RegistrySection, champion: str | None, *, origin: Origin = NO_ORIGIN
) -> Decision:
    """Register a run's adapter and promote it if run and registry allow it, under one lock.

    champion: the champion that the run was judged against; if another version is champion now, the
        outcome is "superseded".

    Raises what `register` raises.
    """
    with registering(new, *registry_location(section)) as (folder, manifest):
        version = new.run.version
        if section.mirror is not None:
            set_mirror(folder.path, section.mirror)
        return decide(folder, section, version, champion, origin=origin, manifest=manifest)


def promote_by_recorded_policy(
    registry: Path, name: str, version: str, *, origin: Origin = NO_ORIGIN
) -> Decision:
    """Decide about a version by the policy, and against the champion, recorded with its verdict.

    Returns "superseded" if the champion changed after this version was registered, even if that
    change was later rolled back.
    """
    with writing(registry, name) as folder:
        return _decide_as_recorded(folder, version, origin)


def promote_missed_versions(
    registry: Path, name: str, *, origin: Origin = NO_ORIGIN
) -> dict[str, Decision]:
    """Promote what missed its promotion: decide again about each version that was never champion.

    A version misses it if its process ends between registration and promotion, say. The newest
    version comes first. Returns the decision for each version. A second call changes nothing. A
    damaged version gets the outcome "damaged" and does not prevent the promotion of another.
    """
    with writing(registry, name) as folder:
        was_champion = {change.version for change in folder.ledger.changes()}
        missed = [v for v in registered_versions(folder.path) if v not in was_champion]
        # By the number of the last history line on the version, -1 without a line: oldest first
        last_line = {v: lines[-1][0] for v, lines in folder.ledger.by_version.items()}
        missed.sort(key=lambda version: last_line.get(version, -1))
        decisions = {}
        for version in reversed(missed):
            try:
                decisions[version] = _decide_as_recorded(folder, version, origin)
            except (DamagedError, GateRejected) as error:
                decisions[version] = Decision("damaged", version, reason=f"damaged: {error}")
        return decisions


def _decide_as_recorded(folder: NameFolder, version: str, origin: Origin) -> Decision:
    """Decide about a version by the policy and against the champion recorded with its verdict.

    folder: the adapter's locked folder in the registry.
    """
    champion = folder.champion
    if version == champion:
        return Decision("already_champion", version, champion)
    candidate = choose_candidate(folder.path, folder.ledger, version, champion)
    if candidate.facts.policy is None:
        return Decision("refused", version, champion, "its provenance records no policy")
    if folder.ledger.changes(candidate.line_number + 1):
        return Decision("superseded", version, champion)
    section = recorded_section(folder.path, candidate)
    return decide(folder, section, version, candidate.facts.champion_at_gate, origin=origin)


def decide(
    folder: NameFolder,
    section: RegistrySection,
    version: str,
    expected_champion: str | None,
    *,
    origin: Origin,
    manifest: str | None = None,
) -> Decision:
    """Promote a version automatically, or return why it is not promoted.

    Automatically is without a person who asks for it. The champion is the version in use.

    folder: the adapter's locked folder in the registry.
    section: the run's section `registry`; of it and the registry's policy the stricter counts.
    expected_champion: the champion that the verdict compared with.
    manifest: the hash of the version's manifest, if its files were verified under this lock
        already.
    """
    champion = folder.champion
    if version == champion:
        return Decision("already_champion", version, champion)
    candidate = choose_candidate(folder.path, folder.ledger, version, champion)
    refusal = find_refusal(folder.path, folder.ledger, section, candidate, expected_champion)
    if refusal is not None:
        return refusal
    manifest = manifest or folder.verify(version)
    fields = {"by": "policy", "manifest": manifest, "automatic": True, **vars(origin)}
    return promote_in_folder(folder, version, expected_champion, fields)


def compare_losses(
    registry: Path, name: str, candidate: Judgement, champion: str
) -> tuple[float, float] | None:
    """Return the losses of a version and of the champion, in this order, on the same examples.

    candidate: the verdict on the version. champion: the other version.

    The losses come from the verdict if it measured this champion; else from the champion's own
    verdict if all that makes a loss was the same. None if there is no such pair. Raises
    DamagedError for a champion that has changed since it was registered.
    """
    if (losses := candidate.verdict.losses_beside(champion)) is not None:
        return losses
    verify(registry, name, champion)
    measured = read_candidate(registry, name, champion)
    made_of = _loss_made_of(registry, name, candidate)
    if made_of is None or made_of != _loss_made_of(registry, name, measured):
        return None
    loss, champion_loss = candidate.loss_after, measured.loss_after
    return None if loss is None or champion_loss is None else (loss, champion_loss)


def _loss_made_of(registry: Path, name: str, judgement: Judgement) -> dict[str, object] | None:
    """Return what makes the loss of a verdict: held-out rows, base, tokenizer and settings.

    judgement: the verdict on a registered version. The settings are those of its run, which no
        later verdict of the run changes.

    None if rows, base or vocabulary are not recorded, as in a version of 0.2.0. None as well if
    rows were left out because an adapter was trained on them, since it is not recorded which.
    """
    validation, rows = judgement.verdict.validation, judgement.facts.validation_digest
    recorded = read_provenance(version_folder(registry, name, judgement.version))
    made_of = {key: recorded.get(key) for key in ("base_fingerprint", "vocabulary")}
    made_of |= {"rows": rows}
    if validation is None or validation.left_out != 0 or None in made_of.values():
        return None
    settings = settings_that_make_loss(FineTuneConfig, recorded.get("config", {}))
    return settings | made_of | {"chat_template": recorded.get("chat_template")}


@dataclass(frozen=True)
class PromotionNotes:
    """What to tell a person about a promotion.

    losses: the losses of the new champion and of the one that it replaced.
    warning: set if the new one has the higher loss on the same data, answers that are broken or
        show no learning, or a doubt that only a person may decide about.
    """

    losses: str | None = None
    warning: str | None = None


def describe_promotion(
    registry: Path, name: str, done: Decision, candidate: Judgement | None = None
) -> PromotionNotes:
    """Describe a newly promoted version and the champion that it replaced.

    Empty if the decision promoted nothing; without the losses if a file is damaged.

    done: the decision. candidate: the verdict on the version; read from the registry if None.
    """
    if done.outcome != "promoted":
        return PromotionNotes()
    try:
        if candidate is None:
            candidate = read_candidate(registry, name, done.version, against=done.previous)
        notes = _describe_losses(registry, name, done, candidate)
    except (NestedTuneError, OSError):  # it is promoted; an audit tells what is damaged
        if candidate is None:
            return PromotionNotes()
        notes = PromotionNotes()
    verdict, warnings = candidate.verdict, [notes.warning, candidate.verdict.doubt]
    if broken := verdict.broken_answers:
        warnings.append(f"training broke the answers of this adapter: {broken}")
    if doubtful := verdict.doubtful_answers:
        warnings.append(f"its answers are not above {OTHER_ANSWERS}: {doubtful}")
    text = "; ".join(filter(None, reversed(warnings)))
    go_back = f". To go back: `nested-tune rollback {name} --registry {quote_path(registry)}`"
    return replace(notes, warning=text + (go_back if done.previous else "") if text else None)


def _describe_losses(
    registry: Path, name: str, done: Decision, candidate: Judgement
) -> PromotionNotes:
    """Describe the losses of a newly promoted version and of the champion that it replaced.

    The verdict's words come first, such as `passed, better loss; no questions asked`.
    """
    validation = candidate.verdict.validation
    text = f"{shorten_digest(done.version)}: {candidate.verdict.describe()}"
    if validation is None or validation.loss_after is None:
        return PromotionNotes(text + _describe_measured_champion(registry, name, done))
    change = format_change(validation.loss_before, validation.loss_after)
    text += f"; loss on {validation.file} {change} by training"
    if done.previous is None:
        return PromotionNotes(f"{text}; there was no champion before it")
    losses = compare_losses(registry, name, candidate, done.previous)
    previous = shorten_digest(done.previous)
    if losses is None:
        text += f"; {previous}, the champion before, has no loss that was measured alike"
        return PromotionNotes(text)
    loss, rival = map(format_loss, losses)
    text += f"; on the same examples {loss}, the champion before, {previous}: {rival}"
    if losses[0] <= losses[1]:
        return PromotionNotes(text)
    warning = (
        f"version {shorten_digest(done.version)} has a higher "
        f"{loss_name_for_file(candidate.file)} on the same data, {loss}, than the champion that it "
        f"replaced, {previous}, {rival}"
    )
    return PromotionNotes(text, warning)


def _describe_measured_champion(registry: Path, name: str, done: Decision) -> str:
    """Describe the replaced champion's loss beside a version without one; "" without one."""
    if done.previous is None:
        return ""
    before = read_candidate(registry, name, done.previous)
    if before.loss_after is None:
        return ""
    return (
        f"; the champion before, {shorten_digest(done.previous)}, has a "
        f"{loss_name_for_file(before.file)} of {format_loss(before.loss_after)}. To go back: "
        f"`nested-tune rollback {name} --registry {quote_path(registry)}`"
    )


def find_refusal_as_recorded(folder: Path, ledger: Ledger, candidate: Judgement) -> Decision | None:
    """Return why a version's recorded policy did not promote it; None if it would be promoted.

    folder: the adapter's folder in the registry, REGISTRY/NAME.
    ledger: the adapter's history.
    """
    section = recorded_section(folder, candidate)
    return find_refusal(folder, ledger, section, candidate, candidate.facts.champion_at_gate)


def recorded_section(folder: Path, candidate: Judgement) -> RegistrySection:
    """Return the configuration section `registry` that was recorded with a verdict on a version.

    Raises DamagedError if the record is not such a section.

    folder: the adapter's folder in the registry, REGISTRY/NAME.
    """
    location = {"path": str(folder.parent), "name": folder.name}
    recorded = dict(candidate.facts.policy or {})
    recorded.pop("await_serving", None)  # which 0.2.0 recorded for servers to be waited for
    try:
        return RegistrySection.model_validate(recorded | location)
    except ValidationError as error:
        version = folder / VERSIONS_FOLDER_NAME / candidate.version
        raise DamagedError(
            f"{version / PROVENANCE_NAME} records no policy: {describe_first_problem(error)}. "
            f"{how_to_mend(version)}"
        ) from error


def registry_location(section: RegistrySection) -> tuple[Path, str]:
    """Return the registry's folder and the adapter's name.

    Raises ConfigError if they are not configured.
    """
    if section.location is None:
        raise ConfigError("registry: path and name are needed to register an adapter.")
    return section.location


def describe_policy_refusal(registry: Path, name: str, candidate: Judgement) -> str | None:
    """Return what the registry's policy requires and a run lacks, before a person promotes it.

    candidate: the run's verdict, which need not be registered. None if the policy is met or there
        is no policy.
    """
    if read_policy(registry, name) is None:
        return None
    section = RegistrySection(path=str(registry), name=name, promote="always")
    with reading(registry, name) as (folder, ledger):
        refusal = find_refusal(folder, ledger, section, candidate, read_link(folder))
    return None if refusal is None else refusal.sentence


def effective_rule(section: RegistrySection) -> PromotionRule:
    """Return what an automatic promotion needs, by a run's section and the registry's policy."""
    return PromotionRule.of(section.promote, read_policy(*registry_location(section)))


def find_refusal(
    folder: Path,
    ledger: Ledger,
    section: RegistrySection,
    candidate: Judgement,
    champion: str | None,
    *,
    is_approved: bool = False,
) -> Decision | None:
    """Return why a version is not promoted automatically; None if it is to be promoted.

    Of the run's setting `registry.promote` and that of the registry's policy the stricter counts.
    If they ask for a person's approval, the decision is that the version waits, or what the person
    decided.

    folder: the adapter's folder in the registry, REGISTRY/NAME.
    ledger: the adapter's history.
    section: the run's configuration of the registry.
    candidate: the verdict on the version.
    champion: the version in use; None before the first promotion.
    is_approved: a person has approved; nobody is asked again, and the comparison with the policy's
        reference (a fixed version), which limits automatic promotions alone, is skipped.
    """
    policy = policy_of(folder, ledger)
    rule = PromotionRule.of(section.promote, policy)
    if rule.is_never:
        is_own = section.promote == "never"
        whose = "registry.promote" if is_own else f"the policy of {section.name}"
        return Decision("registered", candidate.version, champion, f"{whose} is never")
    reason = _why_not_promoted(section, candidate, champion, rule, policy)
    if reason is None and rule.asks_person:
        if is_approved:
            return None
        approval = seams.load_only(Approval, APPROVE_KEY)
        return approval.decide(ledger, section, candidate, champion)
    if reason is None and policy is not None:
        reason = _why_beyond_bound(policy, ledger, candidate)
    return None if reason is None else Decision("refused", candidate.version, champion, reason)


def _why_not_promoted(
    section: RegistrySection,
    candidate: Judgement,
    champion: str | None,
    rule: PromotionRule,
    policy: RegistryPolicy | None,
) -> str | None:
    """Return why verdict and policy do not allow a promotion; None if they do.

    In turn: the verdict must be sound, with bounds that are no looser than the policy's, and with
    held-out examples if they are required; then the losses must allow a promotion. Approval by a
    person and the policy's reference (a fixed version to compare with) are checked elsewhere.
    """
    if (reason := _why_not_sound(candidate, rule)) is not None:
        return reason
    if looser := find_looser_bounds(policy, candidate.verdict.thresholds):
        return (
            f"its gate had looser thresholds than the policy of {section.name} "
            f"({', '.join(looser)}): run the gate again with --resume"
        )
    if not rule.asks_person and (reason := _why_not_judged(candidate, champion)) is not None:
        return reason
    if candidate.loss_after is None and section.require_validation:
        validation = candidate.verdict.validation
        if validation is not None and validation.left_out:
            return (
                f"the adapter or a version before it was trained on all {validation.left_out} "
                f"held-out examples, and registry.require_validation is on"
            )
        return "there was no validation set, and registry.require_validation is on"
    noise: Noise = "paired" if policy is not None else candidate.verdict.noise
    if not rule.must_be_better:
        needs_enough = section.require_validation and not rule.asks_person
        return _why_too_few_prompts(candidate, champion) if needs_enough else None
    if champion is None:
        reason = _why_not_better_than_start(section, candidate, noise)
    else:
        reason = _why_not_better(section, candidate, champion, noise)
    return reason or _why_answers_promote_nothing(candidate.verdict)


def _why_not_judged(candidate: Judgement, champion: str | None) -> str | None:
    """Return what the verdict could not measure, though a bound rests on it; None if nothing.

    champion: the version in use; None before the first promotion.
    """
    verdict = candidate.verdict
    compared = (verdict.validation, verdict.champion)
    if any(one is not None and one.left_out is None for one in compared):
        return (
            "what it or the champion was trained on is not known, so that rows they learnt may "
            "judge them: a person decides"
        )
    increase = verdict.bound("max_ancestor_loss_increase")
    is_unmeasured = all(ancestor.is_unmeasured for ancestor in verdict.ancestors)
    if increase is None or champion is None or not is_unmeasured:
        return None
    reasons = dict.fromkeys(ancestor.not_compared for ancestor in verdict.ancestors)
    why = "; ".join(filter(None, reasons)) or "there is no comparison with the champion"
    return (
        f"gate.max_ancestor_loss_increase is {increase:g}, and on no earlier version's examples "
        f"could the losses be compared ({why}): a person decides"
    )


def _why_beyond_bound(policy: RegistryPolicy, ledger: Ledger, candidate: Judgement) -> str | None:
    """Return why a version may be worse than the policy's reference by more than the margin.

    The reference is a fixed version: compared with champions alone, many small losses in a row
    could add up. Returns None if the version is shown to be within the margin, is the reference
    itself, if the policy has none, and before the first champion.

    ledger: the adapter's history.
    """
    if policy.reference is None or ledger.champion is None:
        return None
    version = policy.find_reference(ledger)
    if version is None:
        return (
            f"the reference is not there (policy reference: {policy.reference}): no champion of "
            f"its promotions is left that was not rolled back"
        )
    if version == candidate.version:
        return None
    which = f"the reference {shorten_digest(version)} (policy reference: {policy.reference})"
    record = candidate.verdict.reference
    if record is None or record.version != version:
        return (
            f"the gate did not evaluate {which} on this version's held-out examples: run the gate "
            f"again with --resume"
        )
    if record.not_compared is not None or record.loss is None or record.difference is None:
        return f"not compared with {which}: {record.not_compared or 'there is no loss'}"
    if record.conclusion in ("better", "no_worse") and not record.has_few_prompts:
        return None
    margin = "none" if record.margin is None else f"+{record.margin:.2g}"
    high = "not known" if record.one_sided_high is None else f"{record.one_sided_high:+.2g}"
    return (
        f"may be worse than {which} by more than the margin: "
        f"{format_difference(record.difference)} from its {format_loss(record.loss)} on "
        f"{record.examples} examples, one-sided 95 % end {high}, margin {margin} {record.unit}"
    )


def _why_not_sound(candidate: Judgement, rule: PromotionRule) -> str | None:
    """Return why the verdict does not allow a promotion: failed, or broken answers.

    Returns None if it does.

    Broken answers do not count if a person is asked, who sees them.
    """
    verdict = candidate.verdict
    if not verdict.has_passed:
        codes = ", ".join(reason.code for reason in verdict.reasons)
        return f"the gate, run again, rejected it: {codes}"
    doubt = verdict.broken_answers or verdict.doubt
    if doubt and not rule.asks_person:
        return f"{doubt}: a person decides"
    return None


def _why_answers_promote_nothing(verdict: Verdict) -> str | None:
    """Return why the answers to `gate.tasks` are not better; None if they are, or none are asked.

    They have to be no worse than the champion's, and to show more than the base's and than one
    constant answer.
    """
    if doubtful := verdict.doubtful_answers:
        return f"its answers are not above {OTHER_ANSWERS}: {doubtful}"
    behind = [task.describe() for task in verdict.tasks if task.may_be_behind_champion]
    return f"its answers may be worse than the champion's: {behind[0]}" if behind else None


def _why_too_few_prompts(candidate: Judgement, champion: str | None) -> str | None:
    """Say that the compared held-out examples have fewer than 5 different prompts.

    Returns None if they have more.
    """
    record: Validation | ChampionLoss | None = candidate.verdict.champion
    which = " that are compared with the champion's"
    if record is None or candidate.verdict.rival != champion or record.difference is None:
        record, which = candidate.verdict.validation, ""
    few = None if record is None else record.describe_few_prompts()
    if record is None or few is None:
        return None
    return (
        f"there are {record.examples} held-out examples{which}: {few} "
        f"(registry.require_validation is on)"
    )


def _why_not_better_than_start(
    section: RegistrySection, candidate: Judgement, noise: Noise
) -> str | None:
    """Return why a first version is not better than the adapter it started from; None if it is."""
    validation = candidate.verdict.validation
    if validation is None or validation.loss_before is None or validation.loss_after is None:
        return "there is no validation loss to compare with that of the adapter it began from"
    if validation.is_better(section.min_improvement, noise):
        return None
    rival = f"that of the adapter it began from, {format_loss(validation.loss_before)}"
    return _describe_comparison(section, candidate, validation, validation.loss_after, rival)


def _why_not_better(
    section: RegistrySection, candidate: Judgement, champion: str, noise: Noise
) -> str | None:
    """Return why a version is not better than the champion on the same examples; None if it is.

    Better is a loss that is lower by more than `registry.min_improvement`, and beyond `noise`: with
    "paired" the whole confidence interval of the difference must be, with "none" only the mean.
    """
    if candidate.loss_after is None:
        return "there is no validation loss to compare with the champion's"
    record = candidate.verdict.champion
    if record is None or record.version != champion:
        return (
            f"the gate did not evaluate the champion {shorten_digest(champion)} on this version's "
            "held-out examples: run the gate again with --resume"
        )
    if record.loss is None or record.difference is None:
        return record.not_compared or "the gate records no comparison with the champion"
    if record.is_better(section.min_improvement, noise):
        return None
    loss = record.loss + record.difference
    rival = f"the champion's {format_loss(record.loss)}"
    return _describe_comparison(section, candidate, record, loss, rival)


def _describe_comparison(
    section: RegistrySection,
    candidate: Judgement,
    record: Validation | ChampionLoss,
    loss: float,
    rival: str,
) -> str:
    """Say why a candidate does not count as better than another adapter, with the figures.

    It may not be lower at all, not significantly lower, lower by less than the configured margin,
    or there may be too few examples to tell.

    record: the comparison with the other adapter. loss: the candidate's.
    rival: names the other adapter and its loss in the text.
    """
    difference = record.difference or 0.0
    data = f"{candidate.file}, {record.examples} examples"
    if record.left_out:
        data += f", {record.left_out} left out that an adapter was trained on"
    margin = f" by more than {section.min_improvement:g}" if section.min_improvement else ""
    loss_name = loss_name_for_file(candidate.file)
    losses = f"{loss_name} {format_loss(loss)} is not better{margin} than {rival}"
    unproven = f"{losses}, or not significantly ({data})"  # the beginning of most answers
    # Too few prompts, no noise bound, or too few examples for an interval
    if (few := record.describe_few_prompts()) is not None:
        return f"{unproven}: {few}"
    if candidate.verdict.noise == "none":
        return f"{losses} ({data})"
    if record.interval is None or record.smallest_visible is None:
        return f"{unproven}: too few to detect a difference"
    figures = f"{unproven}: {format_difference(difference)} with a 95 % interval of"
    # Significant, but not by enough; significant only without correction; or neither
    corrected = record.corrected_interval  # for the choice of the step by the same examples
    if record.interval[1] < 0 and (corrected is None or corrected[1] < 0):
        return (
            f"{losses} ({data}): it is significantly lower, by {-difference:.2g}, and "
            f"registry.min_improvement asks for more than {section.min_improvement:g}"
        )
    if corrected is not None and record.interval[1] < 0:
        validation = candidate.verdict.validation
        among = 1 if validation is None else validation.chosen_among
        return (
            f"{figures} {format_interval(corrected)}, corrected for {among} steps "
            f"that these examples chose among; a test.jsonl needs no correction"
        )
    return (
        f"{figures} {format_interval(record.interval)}; these examples "
        f"{describe_smallest_visible(record.smallest_visible, record.unit)}"
    )
