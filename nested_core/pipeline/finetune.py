"""A fine-tune from data to champion: the sequence of steps.

`nested-tune train` calls it with messages for the terminal, the Prefect flow with its tasks in
place of the steps, and a notebook as it is.
"""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from nested_core import seams
from nested_core.config.resume import read_run_config
from nested_core.config.schema import FineTuneConfig
from nested_core.errors import ConfigError, GateRejected, NestedTuneError
from nested_core.models.session import Session
from nested_core.pipeline.continual import (
    champion_or_none,
    find_kept_champion,
    find_reason_to_skip,
    record_trial,
)
from nested_core.pipeline.hooks import ShownProgress, Steps, can_show_progress
from nested_core.pipeline.preflight import check_before_start, require_room_for_checkpoints
from nested_core.pipeline.processes import load_services
from nested_core.pipeline.publishing import (
    describe_changed_held_out,
    describe_reproduction,
    find_judged_run,
    record_rejection,
)
from nested_core.process.command_parent import (
    RunInHand,
    aborting_where_metal_failed,
    list_earlier_ends,
    tell_parent,
)
from nested_core.records.outcome_names import Outcome
from nested_core.records.plan import note_ends
from nested_core.records.result import TrainResult
from nested_core.records.skip import Skip, write_skip
from nested_core.records.verdict import Verdict
from nested_core.registry import Decision
from nested_core.registry.policy import apply_policy
from nested_core.registry.promotion_policy import effective_rule
from nested_core.report.outcome import describe_kept_champion
from nested_core.report.run_report import read_report, writing_report_at_end
from nested_core.storage.atomic import remove_file
from nested_core.storage.run_directory import RunDirectory


@dataclass(frozen=True, repr=False)
class FinetuneResult:
    """The result of a fine-tune that was neither stopped nor rejected.

    run: the run directory; its `adapter` is the folder of the judged adapter.
    skipped: why nothing was trained; then the fields below are None.
    verdict: the gate's verdict, as in gate.json.
    training: what training ended with, as in result.json.
    test_loss: the mean loss on test.jsonl in nats/token; None unless `test` is set.
    version: the version in the registry; None if nothing was registered.
    kept_champion: the champion, if the new adapter is not better, so that nothing was registered.
    decision: what was decided about the version; None without a registry.
    must_be_better: whether run or registry promote only what is better than the champion.
    """

    run: RunDirectory
    skipped: Skip | None = None
    verdict: Verdict | None = None
    training: TrainResult | None = None
    test_loss: float | None = None
    version: str | None = None
    kept_champion: str | None = None
    decision: Decision | None = None
    must_be_better: bool = False

    @property
    def promotion(self) -> str | None:
        """ "promoted", or why the version was not promoted; None if it was only registered."""
        if self.decision is None or self.decision.outcome == "registered":
            return None
        return self.decision.sentence

    def __repr__(self) -> str:
        """Show the run and its verdict, or why it was skipped."""
        if self.skipped is not None:
            return f"FinetuneResult({self.run.path}, {self.skipped.outcome}: {self.skipped.reason})"
        summary = None if self.verdict is None else self.verdict.summary()
        return f"FinetuneResult({self.run.path}, {summary})"

    def _repr_html_(self) -> str:
        """Return the run's page as HTML for a notebook's cell."""
        return read_report(self.run.path)._repr_html_()

    def ask(self, prompt: str, *, max_tokens: int = 256, temperature: float = 0.0) -> str:
        """Generate the trained adapter's answer to a user's message.

        max_tokens: the answer ends after this number of tokens at the latest.
        temperature: sampling temperature; 0 always takes the likeliest token.

        The base model is loaded at the first call and stays in memory with this object. Raises
        ConfigError if nothing was trained, if the model cannot see the whole prompt, or if the room
        chat is not installed.
        """
        ask = self._loaded.ask
        return str(ask("adapter", prompt, max_tokens=max_tokens, temperature=temperature))

    @cached_property
    def _loaded(self) -> Any:
        """The base model with the adapter, loaded at first use."""
        if not self.run.adapter.is_dir():
            raise ConfigError(f"{self.run.path} has no adapter to ask: nothing was trained.")
        config = read_run_config(self.run)
        trusts = config.trust_remote_code
        adapters = {"adapter": self.run.adapter}
        side_by_side = seams.load_only("side_by_side", "ask")
        return side_by_side(adapters, model=config.model, trust_remote_code=trusts)


def finetune(
    config: FineTuneConfig,
    run: RunDirectory,
    hooks: Steps | None = None,
    *,
    resume: bool = False,
    progress: bool = True,
) -> FinetuneResult:
    """Validate, load, train and judge; register and promote if a registry is configured.

    config: from `load_config`.
    run: from `open_run`.
    hooks: replaces steps and receives progress. None shows a progress line in a terminal or a
        notebook, unless `progress` is false.
    resume: continue a run that was stopped, or judge a finished one again.

    If the policy of the registry's name is stricter than `config`, it counts. Raises ConfigError,
    DatasetError, TrainingStopped, TrainingDiverged, GateRejected or DamagedError. Each leaves a run
    directory that can be resumed or is complete, with its report.html.
    """
    if hooks is None:
        hooks = ShownProgress() if progress and can_show_progress() else Steps()
    config, tightening = apply_policy(config)
    for sentence in tightening:
        hooks.on_message(sentence)
    for warn_of_learning_rate in seams.load_all("rate_warning"):
        if warning := warn_of_learning_rate(config):
            hooks.on_message(warning)
    check_before_start(config, run)
    timing: Any = nullcontext()
    services = load_services(config)
    attaching = nullcontext() if services is None else services.attaching_verdict_at_end(run)
    if config.training.minutes is not None:
        timing = seams.load_only("timed_training", "training.minutes")(config, run, hooks)
    with run.locked(), timing as timed:
        config = config if timed is None else timed.config
        hooks.begin(config, run, resume=resume)
        # The command's parent process restarts this one if it crashes; it then tells how it ended.
        tell_parent(RunInHand(run.path, config.training.restarts))
        if ends := list_earlier_ends():
            note_ends(run.plan, ends)
        with (
            aborting_where_metal_failed(),
            attaching,
            writing_report_at_end(run),
            Session() as session,
        ):
            return _finetune_locked(config, run, hooks, session, timed)


def _finetune_locked(
    config: FineTuneConfig, run: RunDirectory, hooks: Steps, session: Session, timed: Any
) -> FinetuneResult:
    """Run the steps in a locked run directory, and register the adapter or keep the champion.

    The champion is the version that the registry has in use. Without a registry the run ends with
    the gate's verdict. A run that cannot make a champion, because nothing has changed since an
    earlier one, is skipped before it trains.

    hooks: the steps of a run, which a caller may replace.
    session: what this process keeps loaded between the steps.
    timed: trains for `training.minutes` and chooses the number of steps; None without that key.
    """
    remove_file(run.skipped)
    hooks.validate(config, run)
    skip = find_reason_to_skip(config, run)
    if skip is not None:
        write_skip(run.skipped, skip)
        return FinetuneResult(run, skipped=skip)
    with ExitStack() as around:
        for entering in seams.load_all("around_training"):  # what optional parts add
            around.enter_context(entering(config, run, hooks.on_message, session))
        hooks.load(config, run, session)
        require_room_for_checkpoints(config, run)
        training = hooks.train(config, run, session) if timed is None else timed.train(session)
        config = config if timed is None else timed.config  # it says how many steps there are
    verdict = _judge(config, run, hooks, session)
    test_loss = hooks.measure_test(config, run, session) if config.test else None
    decision = None
    kept = None
    must_be_better = False
    if config.registry.path is not None:
        must_be_better = effective_rule(config.registry).must_be_better
        # An adapter that is not better is recorded as a trial, and not registered
        kept = find_kept_champion(config, run, verdict) if must_be_better else None
        if kept is not None:
            reason = describe_kept_champion(verdict, kept)
            decision = Decision("refused", verdict.trained.digest, kept, reason)
            judged = find_judged_run(run, session)
            record_trial(config, judged, Outcome.KEPT_CHAMPION, reason)
        else:
            decision = _publish(config, run, session, hooks)
    return FinetuneResult(
        run,
        verdict=verdict,
        training=training,
        test_loss=test_loss,
        version=None if decision is None or kept is not None else decision.version,
        kept_champion=kept,
        decision=decision,
        must_be_better=must_be_better,
    )


def _judge(config: FineTuneConfig, run: RunDirectory, hooks: Steps, session: Session) -> Verdict:
    """Run the gate, and once more if another version became champion meanwhile.

    The gate compares the adapter with the champion, so the verdict must be about the present one.
    Raises GateRejected for an adapter that did not pass, after recording that in the registry.
    """
    champion = _current_champion(config)
    try:
        try:
            verdict = hooks.judge(config, run, session)
            has_moved = _current_champion(config) not in (verdict.rival, verdict.trained.digest)
        except (NestedTuneError, OSError) as error:
            # A gc may have taken the former champion while the gate was reading it.
            has_moved = _current_champion(config) != champion
            if isinstance(error, GateRejected) or not has_moved:
                raise
        if has_moved:
            hooks.on_message(
                "the champion changed while the gate was at work: running it once more"
            )
            verdict = hooks.judge(config, run, session)
    except GateRejected:
        record_rejection(config, run, session)
        raise
    judged = find_judged_run(run, session)
    if note := describe_changed_held_out(config, judged.verdict, judged.dataset):
        hooks.on_message(note)
    return verdict


def _current_champion(config: FineTuneConfig) -> str | None:
    """Return the champion of the configured name; None without a champion or a registry."""
    location = config.registry.location
    return None if location is None else champion_or_none(*location)


def _publish(config: FineTuneConfig, run: RunDirectory, session: Session, hooks: Steps) -> Decision:
    """Register the adapter, and promote it if the policy allows; return the decision."""
    decision = hooks.register(config, run, session)
    if note := describe_reproduction(config, find_judged_run(run, session)):
        hooks.on_message(note)
    return decision
