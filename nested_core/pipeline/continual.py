"""Continual training: start a run from the champion, or skip it if its outcome is known.

The outcome is known if data and settings are the champion's, or if a run under the same conditions
ended before. A champion whose tensors were trained with another rank, scale, keys or base model is
refused.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from importlib.metadata import version as installed_version
from pathlib import Path

from nested_core import seams
from nested_core.backend import RECORDED_PACKAGES
from nested_core.config.key_properties import replace_configured_paths, settings_that_shape_adapter
from nested_core.config.schema import FineTuneConfig
from nested_core.config.section_base import PathRule
from nested_core.data.earlier_examples import Replay, find_earlier_examples
from nested_core.data.held_out_rows import digest_held_out_file
from nested_core.models.base_model import (
    describe_computation,
    find_model_folder,
    fingerprint_base_model,
    is_same_base,
)
from nested_core.records.dataset import DatasetReport, held_out_split, read_dataset_record
from nested_core.records.judged_run import JudgedRun
from nested_core.records.outcome_names import Outcome
from nested_core.records.skip import Skip
from nested_core.records.start import read_start
from nested_core.records.verdict import Verdict
from nested_core.registry import holding_champion, read_champion, trials, verify
from nested_core.registry.folders import name_exists
from nested_core.registry.policy import read_reference
from nested_core.registry.promotion_policy import effective_rule, registry_location
from nested_core.registry.versions import read_provenance, version_folder
from nested_core.storage.adapter import Adapter, read_adapter
from nested_core.storage.atomic import digest_json
from nested_core.storage.kept_hashes import cached_sha256
from nested_core.storage.run_directory import RunDirectory
from nested_core.text.digest_format import shorten_digest

ANCESTORS_KEY = "gate.max_ancestor_loss_increase"


def champion_or_none(registry: Path, name: str) -> str | None:
    """Return the champion of an adapter name: the version in use.

    Returns None without a champion, or without such a registry or name.
    """
    return read_champion(registry, name) if name_exists(registry, name) else None


def starting_champion(config: FineTuneConfig) -> Adapter | None:
    """Read and verify the champion that the run starts from; None if it starts from no champion.

    Raises DamagedError if its files have changed since it was registered.
    """
    with _holding_starting_champion(config) as champion:
        if champion is None:
            return None
        registry, name = registry_location(config.registry)
        verify(registry, name, champion)
        return read_adapter(version_folder(registry, name, champion))


def find_reason_to_skip(config: FineTuneConfig, run: RunDirectory) -> Skip | None:
    """Return why a validated run need not be trained; None if it should be.

    It need not if the champion was trained on the same data with the same settings, or if an
    earlier run under the same conditions could not replace the champion. It is None as well if the
    run does not follow the champion (`continual.from`), if `continual.skip_unchanged` is off, and
    if the run has begun to train. Raises DamagedError if the champion's provenance, or a version
    that an earlier run made, cannot be read.
    """
    continual = config.continual
    if continual.start is None or not continual.skip_unchanged or run.initial.exists():
        return None
    champion = _champion_trained_alike(config, run)
    if champion is not None:
        reason = f"data unchanged since {shorten_digest(champion)}"
        return Skip(Outcome.SKIPPED_UNCHANGED, reason, version=champion)
    champion = champion_or_none(*registry_location(config.registry))
    dataset = read_dataset_record(run.dataset)
    base = fingerprint_base_model(find_model_folder(config.model))
    settings = settings_digest(config, base, run, dataset)
    conditions = conditions_digest(config, dataset, settings, champion)
    if conditions is None:
        return None
    return trials.find_reason_to_skip(config.registry, conditions, champion)


def _champion_trained_alike(config: FineTuneConfig, run: RunDirectory) -> str | None:
    """Return the champion if it was made from this run's data with the same settings, else None.

    The data are all rows, held-out ones included, since they choose the step and judge it. What the
    champion was made from is recorded in its provenance.json.
    """
    with _holding_starting_champion(config) as champion:
        if champion is None:
            return None
        provenance = read_provenance(version_folder(*registry_location(config.registry), champion))
    dataset = read_dataset_record(run.dataset)
    base, recorded = find_model_folder(config.model), provenance.get("base_fingerprint")
    if not isinstance(recorded, str) or not is_same_base(recorded, base):
        return None
    now = (
        dataset.digest,
        digest_held_out(config, dataset),
        settings_digest(config, recorded, run, dataset),
    )
    keys = ("dataset_digest", "validation_digest", "settings_digest")
    return champion if now == tuple(map(provenance.get, keys)) else None


def conditions_digest(
    config: FineTuneConfig, dataset: DatasetReport, settings: str, champion: str | None
) -> str | None:
    """Return the SHA-256 of everything that decides the outcome of a run that follows `champion`.

    That is: the champion, all splits of the data, base model, tokenizer, settings, the gate's
    thresholds and files, the ancestors' examples if they judge, the promotion rule and its
    reference, device and dtype, and the versions of the packages that compute.

    config: with the registry's policy applied. settings: the digest of the training settings.

    None for a run that does not follow a champion, and if a Python function scores a suite, because
    what that depends on is not known.
    """
    if config.continual.start is None or any(task.function for task in config.gate.tasks):
        return None
    registry, name = registry_location(config.registry)
    section = config.registry
    decides = {
        "champion": champion,
        "data": dataset.digest,
        "settings": settings,
        "gate": replace_configured_paths(config.gate_bounds, _hash_file).model_dump(mode="json"),
        "samples": [config.samples, config.training.sample_tokens],
        "ancestors": _list_ancestor_digests(config, champion),
        "rule": asdict(effective_rule(section)),
        "min_improvement": section.min_improvement,
        "require_validation": section.require_validation,
        "reference": read_reference(registry, name) if name_exists(registry, name) else None,
        "computation": describe_computation(config),
        "packages": [installed_version(package) for package in RECORDED_PACKAGES],
    }
    return digest_json(decides)


def _list_ancestor_digests(config: FineTuneConfig, champion: str | None) -> list[object]:
    """Return digests of the stored examples of champion and ancestors; [] if they do not judge."""
    if champion is None or config.gate.max_ancestor_loss_increase is None:
        return []
    replay = seams.load_only(Replay, ANCESTORS_KEY)
    return replay.list_ancestor_digests(*registry_location(config.registry), champion)


def _hash_file(key: str, rule: PathRule, path: str) -> str:
    """Return the SHA-256 of a file that the configuration names, to compare content, not paths."""
    return cached_sha256([Path(path)])[0]


def record_trial(config: FineTuneConfig, judged: JudgedRun, outcome: Outcome, reason: str) -> None:
    """Record in the history that a run from the champion registered no version, and why.

    Nothing is recorded for a run without a `conditions_digest`.
    """
    settings = settings_digest(config, judged.base_fingerprint, judged.folder, judged.dataset)
    conditions = conditions_digest(config, judged.dataset, settings, judged.verdict.rival)
    if conditions is None:
        return
    trials.record_trial(
        *registry_location(config.registry),
        conditions,
        reason,
        outcome=outcome,
        dataset_digest=judged.dataset.digest,
        settings_digest=settings,
        run=judged.folder.path.resolve().name,
        adapter=judged.version,
    )


def settings_digest(
    config: FineTuneConfig, base: str | None, run: RunDirectory, dataset: DatasetReport
) -> str:
    """Return the SHA-256 of every setting that can change the adapter, the base and its tokenizer.

    base: the base model's fingerprint.

    With replay it covers the replayed examples too. A run that finds none to replay has the digest
    of a run without replay. It covers whether the run is rebuilt from the base or goes on from the
    champion, how long a rebuilt one is, and with `training.minutes` the minutes instead.
    """
    settings = settings_that_shape_adapter(config)
    if config.training.minutes is not None:
        del settings["iters"]
    followed = settings.pop("continual")  # the rate of going on, and replay
    earlier = find_earlier_examples(config, run)
    policy = "continue" if earlier is None else earlier.read_choice().policy
    facts = [base, dataset.tokenizer, settings, followed["rate"], policy]
    if earlier is not None and config.training.epochs is None and config.training.minutes is None:
        settings["iters"] = earlier.estimate_iterations(dataset.splits["train"].rows)
    if earlier is not None and (earlier.count() or earlier.find_dropped()):
        replay = followed["replay"] | {"fraction": config.replay_fraction}
        facts += [replay, earlier.content_digest()]
    return digest_json(facts)


def digest_held_out(
    config: FineTuneConfig, dataset: DatasetReport, verdict: Verdict | None = None
) -> str | None:
    """Return the digest of the examples that the gate measures losses on; None without any.

    For a file beside the data set, the digest of the file as it is now or, with a verdict, as the
    gate read it; None if the file is gone.
    """
    split = held_out_split(config.gate.held_out, dataset.splits)
    if split is not None:
        return dataset.splits[split].digest
    if verdict is None:
        return digest_held_out_file(config.gate.held_out)
    return None if verdict.validation is None else verdict.validation.file_sha256


def describe_starting_adapter(config: FineTuneConfig, run: RunDirectory) -> str | None:
    """Return a line that says what a run with `continual.from` started from.

    Returns None for other runs.
    """
    start = read_start(config, run)
    return None if start is None else start.describe(config.registry.name)


def _holding_starting_champion(config: FineTuneConfig) -> AbstractContextManager[str | None]:
    """Yield the champion that the run starts from; no gc removes it during the block.

    Yields None if the run does not follow a champion, or there is none yet.
    """
    if config.continual.start is None or not name_exists(*registry_location(config.registry)):
        return nullcontext()
    return holding_champion(*registry_location(config.registry))
