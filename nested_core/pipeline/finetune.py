"""A fine-tune from data to champion: the sequence of steps, once for everybody who runs it.

`nested-tune train` calls it with messages for the terminal, the Prefect flow with its tasks in
place of the steps, and a notebook as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nested_core.config.schema import FineTuneConfig
from nested_core.errors import GateRejected, NestedTuneError
from nested_core.gate.verdict import Verdict
from nested_core.pipeline import steps
from nested_core.pipeline.continual import (
    champion_or_none,
    champion_trained_alike,
    describe_starting_adapter,
    describe_unbeaten_champion,
    find_unbeaten_champion,
)
from nested_core.pipeline.preflight import check_before_start, require_room_for_checkpoints
from nested_core.pipeline.publishing import (
    describe_reproduction,
    record_rejection,
    register_run,
)
from nested_core.pipeline.steps import TrainResult
from nested_core.registry.policy import hold_to_policy
from nested_core.registry.promotion_policy import (
    effective_rule,
    promote_by_policy,
    registry_location,
)
from nested_core.report.run_page import read_report, writing_report_at_end
from nested_core.storage.run_directory import RunDirectory
from nested_core.training.reporting_services import attaching_verdict_at_end


@dataclass(frozen=True)
class FinetuneResult:
    """What a fine-tune that was not stopped or rejected ended with.

    run: the run directory; its `adapter` is the folder of the judged adapter.
    unchanged_since: the champion that was trained on the same data with the same settings; then
        nothing was trained, and the fields below are None.
    verdict: the gate's, which passed; it is in gate.json too.
    training: what training ended with; it is in result.json too.
    test_loss: mean loss a token of test.jsonl in nats, where `test` asks for it.
    version: the version in the registry, where one is configured.
    kept_champion: the champion that the run started from, and is no better than: then nothing was
        registered.
    promotion: "promoted", or why the version was not; None where it is not to be promoted.
    must_be_better: whether run or registry promote only what is better than the champion.
    """

    run: RunDirectory
    unchanged_since: str | None = None
    verdict: Verdict | None = None
    training: TrainResult | None = None
    test_loss: float | None = None
    version: str | None = None
    kept_champion: str | None = None
    promotion: str | None = None
    must_be_better: bool = False

    def _repr_html_(self) -> str:
        return read_report(self.run.path)._repr_html_()


class Hooks:
    """What a caller of `finetune` can override: what it is told, and how each step is run."""

    def on_message(self, message: str) -> None:
        """Called with a line for a person: warnings about the data, what training starts from."""

    def on_data_progress(self, what: str, done: int, total: int) -> None:
        """Called while the data is read and tokenised: `done` of `total` parts of `what`."""

    def on_training_start(self, trainer: Any) -> None:
        """Called with the trainer, or the group of processes, before its first step.

        `trainer.stop_training()` stops it gracefully, from any thread.
        """

    def begin(self, config: FineTuneConfig, run: RunDirectory, *, resume: bool) -> None:
        """Write or compare the run's configuration."""
        steps.write_run_config(config, run, resume=resume)

    def validate(self, config: FineTuneConfig, run: RunDirectory) -> None:
        """Judge the data set; DatasetError where it has an error."""
        report = steps.validate(config, run, self.on_data_progress)
        if warnings := report.describe_warnings():
            self.on_message(f"{warnings} (all: {run.dataset})")

    def load(self, config: FineTuneConfig, run: RunDirectory) -> None:
        """Write the initial adapter and the tier of each tensor."""
        steps.write_initial_adapter_and_tiers(config, run, on_wait=self.on_message)
        if note := describe_starting_adapter(config, run):
            self.on_message(note)

    def train(self, config: FineTuneConfig, run: RunDirectory) -> TrainResult:
        """Train to the end; TrainingStopped where somebody asked to stop."""
        return steps.train(config, run, on_start=self.on_training_start, on_wait=self.on_message)

    def judge(self, config: FineTuneConfig, run: RunDirectory) -> Verdict:
        """Judge the adapter; GateRejected where it does not pass."""
        return steps.judge(config, run, on_wait=self.on_message)

    def measure_test(self, config: FineTuneConfig, run: RunDirectory) -> float:
        """The loss of the judged adapter on test.jsonl."""
        return steps.measure_test(config, run, on_wait=self.on_message)

    def register(self, config: FineTuneConfig, run: RunDirectory, champion: str | None) -> str:
        """Add the adapter to the registry; return its version."""
        return register_run(config, run, champion)

    def promote(self, config: FineTuneConfig, version: str, champion: str | None) -> str:
        """Promote the version as `registry.promote` says; return what became of it."""
        done = promote_by_policy(config.registry, version, champion)
        return done if isinstance(done, str) else done.outcome


def finetune(
    config: FineTuneConfig,
    run: RunDirectory,
    hooks: Hooks | None = None,
    *,
    resume: bool = False,
) -> FinetuneResult:
    """Validate, load, train and judge; register and promote where a registry is configured.

    `config` is what `load_config` gives, `run` what `open_run` gives; `hooks` are told what
    happens, and may run the steps otherwise. What could fail at the end is tried before the run
    directory is made, and the disk's room before the first step. Where the policy of the registry's
    name is stricter than `config`, it counts, and `hooks` are told so before anything else.
    Holds the run directory's lock.
    `resume` goes on with what is there. Raises what the steps raise: ConfigError, DatasetError,
    TrainingStopped, TrainingDiverged, GateRejected, DamagedError; each leaves a run directory that
    can be resumed or is complete, and report.html in it to look at.
    """
    hooks = hooks or Hooks()
    config, tightening = hold_to_policy(config)
    for sentence in tightening:
        hooks.on_message(sentence)
    check_before_start(config, run)
    with run.locked():
        hooks.begin(config, run, resume=resume)
        with attaching_verdict_at_end(config, run), writing_report_at_end(run):
            return _finetune_locked(config, run, hooks)


def _finetune_locked(config: FineTuneConfig, run: RunDirectory, hooks: Hooks) -> FinetuneResult:
    hooks.validate(config, run)
    unchanged = champion_trained_alike(config, run)
    if unchanged is not None:
        return FinetuneResult(run, unchanged_since=unchanged)
    hooks.load(config, run)
    require_room_for_checkpoints(config, run)
    training = hooks.train(config, run)
    verdict = _judge(config, run, hooks)
    test_loss = hooks.measure_test(config, run) if config.test else None
    version = None
    promotion = None
    kept = None
    must_be_better = False
    if config.registry.path is not None:
        must_be_better = effective_rule(config.registry).must_be_better
        if must_be_better:
            kept = find_unbeaten_champion(config, run, verdict)
        if kept is not None:
            promotion = describe_unbeaten_champion(verdict, kept)
        else:
            version, promotion = _publish(config, run, verdict, hooks)
    return FinetuneResult(
        run,
        verdict=verdict,
        training=training,
        test_loss=test_loss,
        version=version,
        kept_champion=kept,
        promotion=promotion,
        must_be_better=must_be_better,
    )


def _judge(config: FineTuneConfig, run: RunDirectory, hooks: Hooks) -> Verdict:
    """Judge, and once more where another version became champion meanwhile.

    A verdict that rejects what is registered already is kept beside the version: it counts.
    """
    champion = _current_champion(config)
    try:
        try:
            verdict = hooks.judge(config, run)
            has_moved = _current_champion(config) not in (verdict.rival, verdict.trained.digest)
        except (NestedTuneError, OSError) as error:
            # A gc may have taken the former champion while the gate was reading it.
            has_moved = _current_champion(config) != champion
            if isinstance(error, GateRejected) or not has_moved:
                raise
        if has_moved:
            hooks.on_message("the champion changed while the gate was at work: judging once more")
            verdict = hooks.judge(config, run)
    except GateRejected:
        record_rejection(config, run)
        raise
    return verdict


def _current_champion(config: FineTuneConfig) -> str | None:
    """The champion of the configured name; None without one or without a registry."""
    if config.registry.path is None:
        return None
    return champion_or_none(*registry_location(config.registry))


def _publish(
    config: FineTuneConfig, run: RunDirectory, verdict: Verdict, hooks: Hooks
) -> tuple[str, str | None]:
    """Register, and promote where a policy asks for it; the version, and what became of it."""
    version = hooks.register(config, run, verdict.rival)
    if note := describe_reproduction(config, run, version):
        hooks.on_message(note)
    if effective_rule(config.registry).is_never and version != _current_champion(config):
        return version, None
    return version, hooks.promote(config, version, verdict.rival)
