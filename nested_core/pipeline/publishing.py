"""Registration of a verified run, with its provenance: configuration, data, parent and versions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic_core import to_jsonable_python

from nested_core.backend import RECORDED_PACKAGES
from nested_core.config.resume import read_run_config
from nested_core.config.schema import FineTuneConfig
from nested_core.config.sections import SPLITS_BY_HELD_OUT_CHOICE
from nested_core.data.data_settings import DataSettings
from nested_core.data.earlier_examples import find_earlier_examples
from nested_core.data.example_rows import RowKeys, Rows, read_split_rows
from nested_core.data.held_out_rows import as_test_set_alone, digest_held_out_file
from nested_core.errors import NO_SPACE_ERRNOS, ConfigError, DatasetError
from nested_core.gate.recheck import recheck_verdict
from nested_core.gate.tensors.base_compatibility import require_same_base
from nested_core.measure.losses.left_out_examples import read_run_rows
from nested_core.models.base_model import TrainedTokenizer, find_model_folder_offline
from nested_core.pipeline.continual import (
    conditions_digest,
    digest_held_out,
    record_trial,
    settings_digest,
)
from nested_core.records.dataset import DatasetReport, SplitStats, held_out_split
from nested_core.records.judged_run import (
    JudgedRun,
    hash_metrics,
    read_judged_run,
    read_rejected_run,
)
from nested_core.records.outcome_names import Outcome
from nested_core.records.promoted_to import add_promoted_to
from nested_core.records.run_status import AdapterRuns
from nested_core.records.start import read_start
from nested_core.records.verdict import Verdict
from nested_core.records.verdict_file import GATE_NAME, read_verdict
from nested_core.registry import UNSET, Decision, Unset, register_and_promote
from nested_core.registry.data_store import RunExamples, keeps_examples
from nested_core.registry.folders import check_name, name_exists
from nested_core.registry.judgements import Judgement
from nested_core.registry.ledger import NO_ORIGIN, Origin, read_ledger
from nested_core.registry.promotion_policy import (
    describe_policy_refusal,
    register_by_policy,
    registry_location,
)
from nested_core.registry.queries import list_versions, parent_version_of
from nested_core.registry.registration import NewVersion, register_rejection
from nested_core.registry.versions import REGISTERED_AT_KEY, read_provenance, version_folder
from nested_core.report.outcome import describe_kept_champion, find_kept_champion
from nested_core.storage.run_directory import RunDirectory
from nested_core.text.digest_format import shorten_digest

if TYPE_CHECKING:  # it loads what trains, and promoting needs none of that
    from nested_core.models.session import Session

TRAINING_KEY = "metrics_sha256"


def confirm_recorded_verdict(config: FineTuneConfig, run: RunDirectory) -> JudgedRun:
    """Read gate.json, which must say passed, and check that the run's files are those it judged.

    The base model, its tokenizer and chat template are checked too if they are on this machine.
    Raises ConfigError if nothing was judged, or the run was trained with others; GateRejected if
    the adapter did not pass, DamagedError if verdict and files do not agree.
    """
    judged = recheck_verdict(config, run)
    if base := find_model_folder_offline(config.model):
        require_same_base(judged.adapter, base)
        TrainedTokenizer.read(run.dataset).require_in(base, str(run.path))
    return judged


def find_judged_run(run: RunDirectory, session: Session) -> JudgedRun:
    """Return the judged run from the session's memory, or else read it from its folder."""
    return _find_in_hand(run, session) or read_judged_run(run.path)


def _find_in_hand(run: RunDirectory, session: Session) -> JudgedRun | None:
    """Return the judged run from the session's memory; None if it is not there."""
    is_in_hand = session.judged is not None and session.judged.folder.path == run.path
    return session.judged if is_in_hand else None


def register_run(
    config: FineTuneConfig, judged: JudgedRun, champion: str | None, *, origin: Origin = NO_ORIGIN
) -> Decision:
    """Register a run that passed, and promote it if run and registry allow.

    champion: the champion that the run was judged against.

    An adapter that has to be better than the champion that it follows, and is not, is recorded as a
    trial and not registered, unless it is a version already: then its new verdict counts. Returns
    the decision on its promotion. Raises ConfigError if no registry is configured.
    """
    registry, name = registry_location(config.registry)
    is_version = name_exists(registry, name) and judged.version in list_versions(registry, name)
    kept = None if is_version else find_kept_champion(config, judged.folder, judged.verdict)
    if kept is not None:
        reason = describe_kept_champion(judged.verdict, kept)
        record_trial(config, judged, Outcome.KEPT_CHAMPION, reason)
        return Decision("not_better", judged.version, kept, reason)
    recorded = _make_provenance_with_conditions(config, judged, champion)
    new = _read_new_version(config, judged, recorded)
    return register_by_policy(new, config.registry, champion, origin=origin)


def _read_new_version(
    config: FineTuneConfig, judged: JudgedRun, recorded: Mapping[str, object]
) -> NewVersion:
    """Read what registration records of a run, and `recorded`, before the registry is locked."""
    registry, name = registry_location(config.registry)
    forgettings = read_ledger(registry / name).count_forgettings()
    examples = read_run_examples(config, judged)
    are_stored = examples is None and config.registry.keep_data
    return NewVersion(judged, recorded, examples, are_stored, forgettings)


def read_run_examples(config: FineTuneConfig, judged: JudgedRun) -> RunExamples | None:
    """Read the examples of a run that its version stores in the registry.

    Later runs train on them again and are judged by them. They are the training examples, those
    that the gate judged by, and all others that were held out (`kept_out`). None if the registry
    keeps no data, or has this version's already. All are left out, with a warning, if the data has
    changed since it was validated, or is gone.
    """
    registry, name = registry_location(config.registry)
    are_stored = keeps_examples(registry / name, judged.version)
    if not config.registry.keep_data or are_stored:
        return None
    recorded = judged.dataset.splits
    choice = config.gate.held_out
    settings = DataSettings.from_config(config)
    examples = RunExamples((), (), config.continual.replay.keep)
    # The split that the gate judged by; None where that is a file of its own
    sets = {"train": "train", held_out_split(choice, recorded): "held_out"}

    def add(split: str, rows: Rows) -> None:
        if split == "train":
            rows = _leave_out_dropped(config, judged.folder, rows)
        examples.add(sets.get(split, "kept_out"), rows)

    try:
        for split in recorded:
            _take_validated_rows(settings, split, recorded, partial(add, split))
        if choice not in SPLITS_BY_HELD_OUT_CHOICE:
            with as_test_set_alone(Path(choice), settings) as alone:
                _take_validated_rows(alone, "test", {}, partial(examples.add, "held_out"))
            validation = judged.verdict.validation  # after the file was read, as for the splits
            if validation is None or validation.file_sha256 != digest_held_out_file(choice):
                raise DatasetError(f"{choice} has changed since the gate judged by it")
    except (ConfigError, DatasetError, OSError) as error:
        if isinstance(error, OSError) and error.errno in NO_SPACE_ERRNOS:
            raise  # no room for the temporary file: nothing is wrong with the data
        warnings.warn(
            f"The registry keeps no examples of this run, which later runs would replay and be "
            f"judged by: {error}",
            stacklevel=2,
        )
        examples = RunExamples((), ())
        examples.listed.dropped = sum(split.rows for split in recorded.values())
    return examples


def _leave_out_dropped(config: FineTuneConfig, run: RunDirectory, train: Rows) -> Rows:
    """Leave out rows that the run did not train on because an ancestor holds them out."""
    earlier = find_earlier_examples(config, run)
    dropped = set() if earlier is None else {*earlier.find_dropped()}
    return (row for row in train if not dropped or RowKeys.of(row).content.hex() not in dropped)


def _take_validated_rows(
    settings: DataSettings,
    split: str,
    recorded: Mapping[str, SplitStats],
    take: Callable[[Rows], None],
) -> None:
    """Give `take` the rows of a split; DatasetError if they changed since they were validated.

    recorded: the splits in dataset.json.
    """
    read = read_split_rows(settings, split, take)
    if read is None or (split in recorded and read.digest != recorded[split].digest):
        raise DatasetError(
            f"the {split} set of {settings.describe_source} has changed since it was validated"
        )


def record_rejection(config: FineTuneConfig, run: RunDirectory, session: Session) -> None:
    """Record a rejecting verdict in the registry.

    If the adapter is already a version, the verdict is kept beside it. If not, a run that follows
    the champion is recorded as a trial.
    """
    if config.registry.path is None:
        return
    judged = _find_in_hand(run, session) or read_rejected_run(run.path)
    verdict = judged.verdict
    path, name = registry_location(config.registry)
    if name_exists(path, name):
        recorded = _make_provenance_with_conditions(config, judged, verdict.rival)
        register_rejection(NewVersion(judged, recorded), path, name)
    reason = f"{', '.join(verdict.reason_names)}; {verdict.describe_loss()}"
    record_trial(config, judged, verdict.outcome, reason)


def is_registered_from(config: FineTuneConfig, run: RunDirectory, version: str) -> bool:
    """Return whether a version of the configured registry was registered from this training."""
    provenance = read_provenance(version_folder(*registry_location(config.registry), version))
    recorded = provenance.get(TRAINING_KEY)
    return recorded is not None and recorded == hash_metrics(run)


def describe_reproduction(config: FineTuneConfig, judged: JudgedRun) -> str | None:
    """Return a line if another training made the same adapter before; None otherwise."""
    registry, name = registry_location(config.registry)
    provenance = read_provenance(version_folder(registry, name, judged.version))
    recorded = provenance.get(TRAINING_KEY)
    if recorded in (None, judged.metrics_sha256):
        return None
    day = str(provenance.get(REGISTERED_AT_KEY))[:10]
    return (
        f"this run made the same adapter, byte for byte, as {provenance.get('run_dir')}, which was "
        f"registered as version {shorten_digest(judged.version)} of {name} on {day}"
    )


def register_and_promote_run(
    run: RunDirectory,
    registry: Path,
    name: str,
    *,
    by: str,
    expected_champion: str | None | Unset = UNSET,
) -> tuple[Decision, Judgement]:
    """Register the adapter of a judged run and make it the champion, as a person's decision.

    It overrides the registry's policy; what the policy would have refused is recorded in the
    history. Returns the decision, and the run's verdict. The run is locked for reading and the
    registry for writing.

    registry, name: where it is registered, whatever registry the run's configuration names.
    by: who promotes, for the history.
    expected_champion: if another version is champion, the outcome is "superseded"; UNSET expects
        none in particular.

    Raises ConfigError for an invalid name and for a run that was not judged or that another process
    works on, GateRejected for a verdict that is not "passed", DamagedError for files that changed
    since.
    """
    check_name(name)
    own = read_run_config(run)
    location = {"path": str(registry), "name": name}
    config = own.model_copy(update={"registry": own.registry.model_copy(update=location)})
    with run.locked_for_reading():
        judged = confirm_recorded_verdict(config, run)
        is_own = AdapterRuns.of(registry, name).are_named_by(own.registry.location)
        if not is_own:
            with suppress(OSError):  # a run that nobody can write to is not removed either
                add_promoted_to(run.promoted_to, registry, name)
        champion = judged.verdict.rival if is_own else None  # it is a version of the run's registry
        recorded = make_provenance(config, judged, champion)
        candidate = Judgement.of_run(judged.verdict, recorded)
        refusal = describe_policy_refusal(registry, name, candidate)
        new = replace(_read_new_version(config, judged, recorded), by=by, was_judged_now=False)
        done = register_and_promote(
            new, registry, name, expected_champion=expected_champion, against_policy=refusal
        )
    return done, candidate


def describe_changed_held_out(
    config: FineTuneConfig, verdict: Verdict, dataset: DatasetReport
) -> str | None:
    """Return a sentence if the champion was judged on other held-out examples than this run.

    Their losses are then not comparable with those that the champion's own verdict records.

    Returns None if they are the same, without a champion, or if one of the two is not recorded.
    """
    champion, validation = verdict.rival, verdict.validation
    if champion is None or validation is None or config.registry.path is None:
        return None
    folder = version_folder(*registry_location(config.registry), champion)
    before = read_provenance(folder).get("validation_digest")
    now = digest_held_out(config, dataset, verdict)
    if before is None or now is None or before == now:
        return None
    earlier = read_verdict(folder / GATE_NAME).validation
    then = None if earlier is None else earlier.examples
    return (
        f"{validation.file} has changed since the champion {shorten_digest(champion)} was "
        f"evaluated on it: {then} examples then, {validation.examples} now"
    )


def _make_provenance_with_conditions(
    config: FineTuneConfig, judged: JudgedRun, champion: str | None
) -> dict[str, object]:
    """Build the provenance of a run whose promotion a policy decides, with `conditions_digest`."""
    recorded = make_provenance(config, judged, champion)
    conditions = conditions_digest(config, judged.dataset, recorded["settings_digest"], champion)
    return recorded | {"conditions_digest": conditions}


def make_provenance(
    config: FineTuneConfig, judged: JudgedRun, champion: str | None
) -> dict[str, Any]:
    """Build provenance.json: configuration, data, base, gate, parent version and package versions.

    The parent is the version that the adapter was trained from, else the champion that it follows.

    champion: the version that the gate compared it with; None if there was none.
    """
    run, dataset, training = judged.folder, judged.dataset, judged.training
    initial, base = judged.verdict.initial.digest, judged.base_fingerprint
    earlier = find_earlier_examples(config, run)
    return {
        "run_dir": str(run.path.resolve()),  # for people: folders move
        TRAINING_KEY: judged.metrics_sha256,
        "config": config.model_dump(mode="json"),
        "settings_digest": settings_digest(config, base, run, dataset),
        "conditions_digest": None,  # the caller sets it, except where a person decides
        "base_fingerprint": base,
        "chat_template": dataset.chat_template,
        "vocabulary": dataset.vocabulary,
        "prompt_format": to_jsonable_python(dataset.prompt_format),
        "dataset_digest": dataset.digest,
        "train_digest": dataset.splits["train"].digest,
        "validation_digest": digest_held_out(config, dataset, judged.verdict),
        "gate_sha256": judged.bound.files[GATE_NAME]["sha256"],
        "parent": parent_version_of(config, initial) or champion,
        "champion_at_gate": champion,
        **read_run_rows(run).to_json(),
        "trained": training.schedule,
        "start": None if (start := read_start(config, run)) is None else start.to_provenance(),
        "replay": None if earlier is None else earlier.make_provenance(training.replayed_tokens),
        "training_seconds": training.seconds,
        "packages": {package: installed_version(package) for package in RECORDED_PACKAGES},
    }
