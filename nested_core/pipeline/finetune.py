"""A fine-tune from data to champion: the sequence of steps, and what each leaves on disk.

- begin: config.yaml, or on resume a comparison with it.
- validate: dataset.json, the report on the data; skipped.json, if nothing is to be trained on it.
  replay.json and replay.jsonl, the examples of earlier versions that are trained on too.
- load: initial/, the adapter that training starts from, and tiers.json; start.json, whether that
  is the champion's adapter, if `continual.from` is set.
- train: checkpoints/ and metrics.jsonl; at its end adapter/, then result.json.
- judge, the gate: gate.json, the verdict on the bytes of initial/ and adapter/; gate-losses.jsonl.
- measure_test, if `test` is set: the loss on test.jsonl, which is returned and not written.
- register: a version in the registry and a line in its history. Where the policy allows it, the
  version is promoted: it becomes the champion.

`nested-tune train` calls it with messages for the terminal, the Prefect flow with a task in place
of each step, and a notebook as it is. The steps are functions of pipeline/steps.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from nested_core import seams
from nested_core.config.resume import read_run_config
from nested_core.config.schema import FineTuneConfig
from nested_core.errors import ConfigError
from nested_core.measure.losses.loss_on_test_set import LossOnTestSet
from nested_core.pipeline.hooks import ShownProgress, Steps, can_show_progress
from nested_core.pipeline.preflight import StartRules, check_before_start
from nested_core.pipeline.run_in_progress import working_on
from nested_core.records.result import TrainResult
from nested_core.records.skip import Skip
from nested_core.records.verdict import Verdict
from nested_core.registry import Decision
from nested_core.registry.policy import apply_policy
from nested_core.report.run_report import read_report
from nested_core.storage.run_directory import RunDirectory


class Answering(Protocol):
    """A base model with adapters, loaded."""

    def ask(self, name: str, prompt: str, *, max_tokens: int, temperature: float) -> str:
        """Return the answer of the adapter of this name."""


class LoadToAsk(Protocol):
    """A function that loads a base with adapters, to ask them prompts."""

    def __call__(
        self, adapters: Mapping[str, Path], *, model: str | None, trust_remote_code: bool
    ) -> Answering:
        """Load the adapters in these folders; `model` is the base, None the one they name."""


@dataclass(frozen=True)
class Chat:
    """A room's answers of adapters to prompts."""

    load: LoadToAsk


@dataclass(frozen=True, repr=False)
class FinetuneResult:
    """The result of a fine-tune that was neither stopped nor rejected.

    run: the run directory; its `adapter` is the folder of the judged adapter.
    skipped: why nothing was trained; then the fields below are None.
    verdict: the gate's verdict, as in gate.json.
    training: what training ended with, as in result.json.
    test_loss: the loss on test.jsonl, its `mean` in nats/token; None unless `test` is set.
    decision: what was decided about the version; None without a registry.
    """

    run: RunDirectory
    skipped: Skip | None = None
    verdict: Verdict | None = None
    training: TrainResult | None = None
    test_loss: LossOnTestSet | None = None
    decision: Decision | None = None

    @property
    def version(self) -> str | None:
        """The version in the registry; None if nothing was registered."""
        return self.decision.version if self.decision and self.decision.is_registered else None

    @property
    def kept_champion(self) -> str | None:
        """The champion, where the adapter is not better than it and was therefore not registered.

        None if the adapter was registered, and without a registry.
        """
        if self.decision is None or self.decision.is_registered:
            return None
        return self.decision.previous

    @property
    def promotion(self) -> str | None:
        """A sentence: the version was promoted, or why not; None if no promotion was tried."""
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
        return self._loaded.ask("adapter", prompt, max_tokens=max_tokens, temperature=temperature)

    @cached_property
    def _loaded(self) -> Answering:
        """The base model with the adapter, loaded at first use."""
        if not self.run.adapter.is_dir():
            raise ConfigError(f"{self.run.path} has no adapter to ask: nothing was trained.")
        config = read_run_config(self.run)
        trusts = config.trust_remote_code
        adapters = {"adapter": self.run.adapter}
        load = seams.load_only(Chat, "ask").load
        return load(adapters, model=config.model, trust_remote_code=trusts)


def finetune(
    config: FineTuneConfig,
    run: RunDirectory,
    hooks: Steps | None = None,
    *,
    resume: bool = False,
    progress: bool = True,
) -> FinetuneResult:
    """Validate, load, train, judge and measure the test set; register and promote the version.

    Nothing is registered without a registry, or where the registry decides against it.

    config: from `load_config`.
    run: from `open_run`.
    hooks: replaces steps and receives progress. None shows a progress line in a terminal or a
        notebook, unless `progress` is false.
    resume: continue a run that was stopped, or judge a finished one again.

    If the policy of the registry's name is stricter than `config`, it counts. Raises ConfigError,
    DatasetError, TrainingStopped, TrainingDiverged, GateRejected or DamagedError. Whatever ends a
    run that has begun, its directory can be resumed or is complete, and has report.html.
    """
    if hooks is None:
        hooks = ShownProgress() if progress and can_show_progress() else Steps()
    config, tightening = apply_policy(config)
    warnings = [sentence for rules in seams.load_all(StartRules) for sentence in rules.warn(config)]
    for sentence in (*tightening, *warnings):
        hooks.on_message(sentence)
    check_before_start(config, run)
    with working_on(config, run, hooks, resume=resume) as work:
        if (skip := work.validate()) is not None:
            return FinetuneResult(run, skipped=skip)
        with work.around_training():
            work.load()
            training = work.train()
        verdict = work.judge()
        test_loss = hooks.measure_test(work.config, run, work.session) if work.config.test else None
        decision = work.register()
        return FinetuneResult(
            run, verdict=verdict, training=training, test_loss=test_loss, decision=decision
        )
