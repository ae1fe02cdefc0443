"""Registration of a verified run, with its provenance: configuration, data, parent and versions."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import suppress
from hashlib import sha256
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

from nested_core.backend import RECORDED_PACKAGES
from nested_core.config.resume import read_run_config
from nested_core.config.schema import FineTuneConfig
from nested_core.config.sections import SPLITS_BY_HELD_OUT_CHOICE
from nested_core.data.data_settings import DataSettings
from nested_core.data.earlier_examples import find_earlier_examples
from nested_core.data.example_digests import encode_digests
from nested_core.data.example_rows import read_content, read_split_rows
from nested_core.data.held_out_rows import as_test_set_alone
from nested_core.errors import ConfigError, DatasetError
from nested_core.gate.recheck import recheck_verdict
from nested_core.gate.tensors.base_compatibility import require_same_base
from nested_core.measure.losses.left_out_examples import read_run_training_digests
from nested_core.models.base_model import find_model_folder_offline
from nested_core.pipeline.continual import (
    conditions_digest,
    digest_held_out,
    record_trial,
    settings_digest,
)
from nested_core.records.dataset import (
    SplitStats,
    held_out_split,
    read_dataset_record,
)
from nested_core.records.metrics import cumulative_seconds, read_latest_values, read_metrics
from nested_core.records.plan import read_plan
from nested_core.records.promoted_to import add_promoted_to
from nested_core.records.run import Run
from nested_core.records.start import read_start
from nested_core.records.verdict_file import GATE_NAME, bind_verdict, read_verdict
from nested_core.registry import UNSET, Decision, Unset, register_and_promote
from nested_core.registry.data_store import RunExamples, keeps_examples
from nested_core.registry.folders import check_name, name_exists
from nested_core.registry.judgements import Judgement
from nested_core.registry.ledger import NO_ORIGIN, Origin
from nested_core.registry.promotion_policy import (
    describe_policy_refusal,
    register_by_policy,
    registry_location,
)
from nested_core.registry.queries import parent_version_of
from nested_core.registry.registration import PassedRun, read_passed_run, register_rejection
from nested_core.registry.versions import REGISTERED_AT_KEY, read_provenance, version_folder
from nested_core.storage.adapter import CONFIG_NAME, Adapter, read_adapter_config
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.untrusted_files import regular_sha256
from nested_core.text.digest_format import shorten_digest

TRAINING_KEY = "metrics_sha256"


def confirm_recorded_verdict(config: FineTuneConfig, run: RunDirectory) -> PassedRun:
    """Read gate.json, which has to say passed, and check that the files of the run bear that out.

    So must the base model, if it is on this machine. Raises ConfigError if nothing was judged,
    GateRejected if the adapter did not pass, DamagedError if verdict and files do not agree.
    """
    bound = bind_verdict(run.path, must_pass=True)
    adapter = recheck_verdict(config, run, bound)
    base = find_model_folder_offline(config.model)
    if base is not None:
        require_same_base(adapter, base)
    return PassedRun(bound, adapter)


def register_run(
    config: FineTuneConfig,
    run: RunDirectory,
    champion: str | None,
    *,
    origin: Origin = NO_ORIGIN,
) -> Decision:
    """Add the run's adapter to the configured registry, and promote it where that is asked for.

    `champion` is the champion when the run was judged. Returns what became of the version. Raises
    GateRejected if gate.json does not say that the adapter passed.
    """
    passed = read_passed_run(run.path)
    conditions = conditions_digest(config, run, champion)
    recorded = make_provenance(config, run, passed, champion, conditions)
    examples = read_run_examples(config, run, passed.version)
    return register_by_policy(
        passed, config.registry, recorded, champion, examples=examples, origin=origin
    )


def read_run_examples(
    config: FineTuneConfig, run: RunDirectory, version: str
) -> RunExamples | None:
    """The examples of a run for its version to keep; None where none are, or they are kept already.

    None, too, with a warning, where the data has changed since it was validated, or is gone.
    """
    registry, name = registry_location(config.registry)
    is_kept = keeps_examples(registry / name, version)
    if not config.registry.keep_data or is_kept:
        return None
    recorded = read_dataset_record(run.dataset).splits
    choice = config.gate.held_out
    settings = DataSettings.from_config(config)
    try:
        train = _read_validated_rows(settings, "train", recorded)
        held_out_sets: dict[str | None, list[dict[str, Any]]] = {
            split: _read_validated_rows(settings, split, recorded)
            for split in recorded
            if split != "train"
        }
        if choice in SPLITS_BY_HELD_OUT_CHOICE:
            held_out = held_out_sets.pop(held_out_split(choice, recorded), [])
        else:
            with as_test_set_alone(Path(choice).expanduser(), settings) as alone:
                held_out = _read_validated_rows(alone, "test", {})
    except (ConfigError, DatasetError, OSError) as error:
        warnings.warn(
            f"The registry keeps no examples of this run, which later runs would replay and be "
            f"judged by: {error}",
            stacklevel=2,
        )
        return None
    return RunExamples(
        _leave_out_dropped(config, run, train),
        held_out,
        config.continual.replay.keep,
        kept_out=[row for rows in held_out_sets.values() for row in rows],
    )


def _leave_out_dropped(
    config: FineTuneConfig, run: RunDirectory, train: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The rows without those that an ancestor holds out, and the run did not train on."""
    if (earlier := find_earlier_examples(config, run)) is None:
        return train
    dropped = {*earlier.find_dropped()}
    return [row for row in train if sha256(read_content(row)).hexdigest() not in dropped]


def _read_validated_rows(
    settings: DataSettings, split: str, recorded: Mapping[str, SplitStats]
) -> list[dict[str, Any]]:
    """The rows of a split; DatasetError where they are not those that were validated."""
    read = read_split_rows(settings, split)
    if read is None or (split in recorded and read.digest != recorded[split].digest):
        raise DatasetError(
            f"the {split} set of {settings.describe_source} has changed since it was validated"
        )
    return read.rows


def record_rejection(config: FineTuneConfig, run: RunDirectory) -> None:
    """Keep a verdict that rejects an adapter which is a version of the registry already.

    A run from the champion whose adapter is none is recorded as a trial.
    """
    if config.registry.path is None:
        return
    path, name = registry_location(config.registry)
    bound = bind_verdict(run.path)
    verdict = bound.verdict
    if name_exists(path, name):
        settings = read_adapter_config(run.adapter / CONFIG_NAME)
        judged = PassedRun(bound, Adapter(run.adapter, settings, {}))
        conditions = conditions_digest(config, run, verdict.rival)
        recorded = make_provenance(config, run, judged, verdict.rival, conditions)
        register_rejection(bound, path, name, recorded)
    reason = f"{', '.join(verdict.reason_names)}; {verdict.describe_loss()}"
    record_trial(config, run, verdict, verdict.outcome, reason)


def is_registered_from(config: FineTuneConfig, run: RunDirectory, version: str) -> bool:
    """Whether a version of the configured registry was registered from this training."""
    provenance = read_provenance(version_folder(*registry_location(config.registry), version))
    recorded = provenance.get(TRAINING_KEY)
    return recorded is not None and recorded == _hash_training_record(run)


def describe_reproduction(config: FineTuneConfig, run: RunDirectory, version: str) -> str | None:
    """One line where another training made the same adapter before; None for this run's own."""
    registry, name = registry_location(config.registry)
    provenance = read_provenance(version_folder(registry, name, version))
    recorded = provenance.get(TRAINING_KEY)
    if recorded is None or recorded == _hash_training_record(run):
        return None
    day = str(provenance.get(REGISTERED_AT_KEY))[:10]
    return (
        f"this run made the same adapter, byte for byte, as {provenance.get('run_dir')}, which was "
        f"registered as version {shorten_digest(version)} of {name} on {day}"
    )


def _hash_training_record(run: RunDirectory) -> str | None:
    """The hash of metrics.jsonl: its times tell a training from another that computed the same.

    It is that of the run wherever its folder lies, and after it is judged again.
    """
    return regular_sha256(run.metrics) if run.metrics.is_file() else None


def read_config_for_registry(run: RunDirectory, registry: Path, name: str) -> FineTuneConfig:
    """A run's configuration, with the registry and the name that a person promotes it to.

    Raises ConfigError for a name that is none.
    """
    check_name(name)
    config = read_run_config(run)
    place = {"path": str(registry), "name": name}
    return config.model_copy(update={"registry": config.registry.model_copy(update=place)})


def register_and_promote_run(
    config: FineTuneConfig,
    run: RunDirectory,
    *,
    by: str,
    expected_champion: str | None | Unset = UNSET,
) -> tuple[Decision, Judgement]:
    """Add the adapter of a run that was judged to the registry, and make it the champion.

    For a person, who decides over the policy. Returns what became of it, and the run's verdict.
    Holds the run for reading, and the registry from the one to the other. Raises what
    `confirm_recorded_verdict`, `register` and `promote` raise, and ConfigError while another
    process works on the run.
    """
    path, name = registry_location(config.registry)
    with run.locked_for_reading():
        passed = confirm_recorded_verdict(config, run)
        _note_registry(run, path, name)
        verdict = passed.bound.verdict
        recorded = make_provenance(config, run, passed, verdict.rival)
        candidate = Judgement.of_run(verdict, recorded)
        done = register_and_promote(
            run.path,
            path,
            name,
            recorded,
            by=by,
            expected_champion=expected_champion,
            against_policy=describe_policy_refusal(path, name, candidate),
            run=passed,
            examples=read_run_examples(config, run, passed.version),
        )
    return done, candidate


def _note_registry(run: RunDirectory, registry: Path, name: str) -> None:
    """Note in a run that it is promoted to another registry or name than its config.yaml has."""
    config = Run(run).config
    section = None if config is None else config.registry
    configured = section and section.path and (Path(section.path).resolve(), section.name)
    if configured != (registry.resolve(), name):
        with suppress(OSError):  # a run that nobody can write to is not removed either
            add_promoted_to(run.promoted_to, str(registry), name)


def describe_changed_held_out(config: FineTuneConfig, run: RunDirectory) -> str | None:
    """That the gate judged by other examples than it judged the champion by, in a sentence.

    None where they are the same, without a champion, or where one of the two is not recorded.
    """
    verdict = read_verdict(run.gate)
    champion, validation = verdict.rival, verdict.validation
    if champion is None or validation is None or config.registry.path is None:
        return None
    folder = version_folder(*registry_location(config.registry), champion)
    before = read_provenance(folder).get("validation_digest")
    now = digest_held_out(config, read_dataset_record(run.dataset))
    if before is None or now is None or before == now:
        return None
    earlier = read_verdict(folder / GATE_NAME).validation
    then = None if earlier is None else earlier.examples
    return (
        f"{validation.file} has changed since the champion {shorten_digest(champion)} was "
        f"evaluated on it: {then} examples then, {validation.examples} now"
    )


def make_provenance(
    config: FineTuneConfig,
    run: RunDirectory,
    judged: PassedRun,
    champion: str | None,
    conditions: str | None = None,
) -> dict[str, Any]:
    """The content of provenance.json: configuration, data, base, gate, parent and tool versions.

    The parent is the version that it was trained from, otherwise the champion that it follows.
    `conditions` is the `conditions_digest` of a run whose policy decides; None where a person does.
    """
    dataset = read_dataset_record(run.dataset)
    verdict = judged.bound.verdict
    initial = verdict.initial.digest
    base = judged.adapter.config.get("base_fingerprint")
    trained_on = read_run_training_digests(config, run, initial)
    return {
        "run_dir": str(run.path.resolve()),  # for people: folders move
        TRAINING_KEY: _hash_training_record(run),
        "config": config.model_dump(mode="json"),
        "settings_digest": settings_digest(config, base, run),
        "conditions_digest": conditions,
        "base_fingerprint": base,
        "chat_template": dataset.chat_template,
        "dataset_digest": dataset.digest,
        "train_digest": dataset.splits["train"].digest,
        "validation_digest": digest_held_out(config, dataset),
        "gate_sha256": judged.bound.files[GATE_NAME]["sha256"],
        "parent": parent_version_of(config, initial) or champion,
        "champion_at_gate": champion,
        "training_examples": None if trained_on is None else encode_digests(trained_on),
        "trained": _describe_trained(run),
        "start": None if (start := read_start(config, run)) is None else start.to_provenance(),
        "replay": _describe_replayed(config, run),
        "training_seconds": max(cumulative_seconds(read_metrics(run.metrics)), default=0.0),
        "packages": {package: installed_version(package) for package in RECORDED_PACKAGES},
    }


def _describe_trained(run: RunDirectory) -> dict[str, Any] | None:
    """How long the run trained, and on which file; None for a run without a plan."""
    plan = read_plan(run.plan)
    if plan is None:
        return None
    steps = int(read_latest_values(run.metrics).get("step", 0))
    return {
        "steps": steps,
        "planned_steps": plan.steps,
        "epochs": plan.passes_until(steps),
        "file": plan.training_file,
    }


def _describe_replayed(config: FineTuneConfig, run: RunDirectory) -> dict[str, Any] | None:
    """The earlier examples of the run, and how many trained tokens they were; None without any."""
    if (earlier := find_earlier_examples(config, run)) is None:
        return None
    return earlier.make_provenance(int(read_latest_values(run.metrics).get("replayed_tokens", 0)))
