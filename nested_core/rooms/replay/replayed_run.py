"""The earlier examples of one run: chosen before training, and read back by what comes after.

They are in replay.json and replay.jsonl of the run directory, which are all that a run needs that
goes on: it reads its sources no more.

With `continual.policy: auto` a run is rebuilt from the base while one on all that the lineage was
trained on is forecast to fit into `continual.window`, and goes on from the champion when it does
not.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from hashlib import sha256
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from nested_core import seams
from nested_core.config.schema import FineTuneConfig
from nested_core.data.batches import BatchOrder
from nested_core.data.earlier_examples import MixedExamples, Replay
from nested_core.data.tokens.tokenized_split import TokenizedSplit
from nested_core.errors import ConfigError, DamagedError, DatasetError
from nested_core.models.session import Session
from nested_core.pipeline import steps
from nested_core.records.start import CONFIGURED, Choice
from nested_core.rooms.replay.ancestor_examples import list_ancestor_digests
from nested_core.rooms.replay.replay_record import ReplayRecord, read_replay
from nested_core.rooms.replay.replay_sources import read_champions_lineage, read_files
from nested_core.rooms.replay.replayed_batches import (
    JoinedSplits,
    ReplayedBatchOrder,
    choose_rows,
    count_replayed,
    draw_rows,
)
from nested_core.rooms.replay.replayed_examples import read_new_data, sort_out_examples
from nested_core.storage.atomic import write_bytes, write_json
from nested_core.storage.run_directory import RunDirectory, open_run
from nested_core.storage.untrusted_files import regular_sha256
from nested_core.text.digest_format import shorten_digest

POLICY_KEY = "continual.policy: auto"


def decide(config: FineTuneConfig, champion: str | None, new: int, earlier: int) -> Choice:
    """Return whether a run under the policy `rebuild` or `auto` starts from base or champion.

    For `auto` a few steps are trained to forecast how long rebuilding takes, unless there is no
    earlier data; without it, a run is the same as a rebuilt one.

    Args:
        config: the run's configuration.
        champion: the version that the run follows; None before the first.
        new: the number of the run's own rows.
        earlier: the number of earlier rows, of the lineage, that it could be trained on too.

    Raises:
        ConfigError: for `auto` where the room minutes is not installed.
    """
    if config.continual.policy == "rebuild":
        return Choice("rebuild", "continual.policy is rebuild")
    if champion is None or not earlier:
        return Choice("rebuild", "there are no earlier rows beside tonight's")
    try:
        measured = measure_rebuilding(config)
    except DatasetError:  # validating the run will find the same errors, and report them
        return Choice("rebuild", "the data has errors")
    return decide_by_forecast(config, new, earlier, measured)


def decide_by_forecast(config: FineTuneConfig, new: int, earlier: int, measured: Any) -> Choice:
    """Return the choice of `auto`: rebuild if a run on all rows fits into the window of time.

    new, earlier: numbers of rows, as in `decide`.
    measured: the forecast of a run on all rows, a MeasuredRun of the room minutes.
    """
    window, limit = config.continual.window_seconds, config.continual.window
    rows = new + earlier
    not_training = measured.seconds - measured.training_seconds
    training = measured.training_seconds / rows * new / (1 - config.replay_fraction)
    if config.training.epochs is None:  # `iters` steps, however few rows are new
        training = measured.seconds_a_step * config.iters / config.grad_accumulation_steps
    seconds = {"rebuild": measured.seconds, "continue": not_training + training}
    if measured.seconds <= window:
        return Choice("rebuild", f"all {rows:,} rows fit into the window of {limit}", seconds)
    return Choice("continue", f"all {rows:,} rows do not fit into the window of {limit}", seconds)


def measure_rebuilding(config: FineTuneConfig) -> Any:
    """Return the forecast (a MeasuredRun, as for `explain`) of a run rebuilt on all rows.

    The run directory is temporary. Raises ConfigError without the room minutes, DatasetError.
    """
    seams.require("minutes", POLICY_KEY)
    from nested_core.rooms.minutes.forecast import measure_run

    rebuilding = config.continual.model_copy(update={"policy": "rebuild"})
    config = config.model_copy(update={"continual": rebuilding})
    with tempfile.TemporaryDirectory(prefix="nested-tune-") as folder, Session() as session:
        run = open_run(Path(folder) / "run", resume=False)
        with run.locked():
            steps.write_run_config(config, run, resume=False)
            steps.validate(config, run)
            steps.write_initial_adapter_and_tiers(config, run, session=session)
            return measure_run(config, run, session, None)[1]


MOST_PASSES = 20  # over the training data; more hardly help


class ReplayOfRun:
    """What a run replays: EarlierExamples (nested_core/data/earlier_examples.py)."""

    def __init__(self, config: FineTuneConfig, run: RunDirectory) -> None:
        self._config = config
        self._run = run

    @property
    def _record(self) -> ReplayRecord:
        return read_replay(self._run.replay)

    def choose(self) -> Mapping[str, str]:
        """Choose the earlier examples that the run trains on, and whether to rebuild or continue.

        Writes both to replay.json and replay.jsonl. Returns the digests of the splits that the
        choice was made for. Raises ConfigError if a source is missing or
        has changed under `replay.missing: error`, and for `policy: auto` without the room minutes.
        """
        config, run, replay = self._config, self._run, self._config.continual.replay
        new = read_new_data(config)
        lineage = read_champions_lineage(config)
        earlier = lineage.data if replay.is_lineage else read_files(config)
        found, dropped = sort_out_examples(new, earlier, max_generations=replay.max_generations)
        choice, sizes = CONFIGURED, [len(source.fresh) for source in found]
        if config.continual.policy != "continue":
            choice = decide(config, lineage.champion, len(new.train), sum(sizes))
        rows = [np.arange(size) for size in sizes]
        if choice.policy == "continue":
            batches = self.estimate_batches_of_replay(len(new.train))
            draws = int(batches * config.batch_size * config.replay_fraction)
            rows = choose_rows(sizes, draws, replay.weighting, config.seed)
        chosen = [source.choose(own) for source, own in zip(found, rows, strict=True)]
        content = b"".join(line for _, lines in chosen for line in lines)
        record = ReplayRecord(
            choice=choice,
            fraction=config.replay_fraction,
            fraction_is_default=replay.fraction is None,
            weighting=replay.weighting,
            start=lineage.champion,
            removed=lineage.removed,
            removal_is_recorded=lineage.is_recorded,
            rows_of_first=lineage.rows_of_first or len(new.train),
            sources=tuple(source for source, _ in chosen),
            rows_sha256=sha256(content).hexdigest(),
            dropped=tuple(content.hex() for content in dropped),
        )
        if replay.missing == "error" and (problems := record.problems()):
            raise ConfigError(
                "continual.replay: not all earlier data is there, and replay.missing is error:\n"
                + "\n".join(f"  {problem}" for problem in problems)
                + "\nBring it back, name other sources, or let missing be warn: the run goes on "
                "with the rest then."
            )
        reason = f"{choice.reason}{record.name_what_is_missing()}"
        record = record.model_copy(update={"choice": replace(choice, reason=reason)})
        write_bytes(run.replayed_rows, content)
        write_json(run.replay, record.model_dump(mode="json"))
        return new.splits

    def read_choice(self) -> Choice:
        """Whether the run goes on from the champion or is rebuilt, and why."""
        return self._record.choice

    def describe(self) -> list[str]:
        """Sentences on what the run replays."""
        sentences = list(self._record.describe())
        config, record = self._config, self._record
        # A rebuilt run uses each row as often as the first night would now
        passes = config.training.epochs or config.iters * config.batch_size / record.rows_of_first
        if record.is_rebuilt and passes > MOST_PASSES:
            sentences.append(
                f"rebuilding: {passes:.3g} passes over all rows; more than {MOST_PASSES} hardly "
                f"help"
            )
        return sentences

    def require_same_start(self, champion: str | None) -> None:
        """Raise ConfigError if the examples were chosen for another champion than this version."""
        if not self._config.continual.replay.is_lineage:
            return
        chosen_for = self._record.start
        if champion != chosen_for:
            before, now = (
                f"version {shorten_digest(version)}" if version else "none"
                for version in (chosen_for, champion)
            )
            raise ConfigError(
                f"continual.replay: {self._config.registry.name} got another champion while the "
                f"data was read: {before} before, {now} now. Start the run again with --resume: "
                f"it begins from today's."
            )

    def require_rows(self) -> None:
        """Raise DamagedError where replay.json or replay.jsonl is missing or altered."""
        rows = self._run.replayed_rows
        if regular_sha256(rows) != self._record.rows_sha256:
            raise DamagedError(
                f"{rows} has changed since the examples were chosen. Bring back what was there, or "
                f"start a new run."
            )

    def find_dropped(self) -> tuple[str, ...]:
        """SHA-256 of the new training examples that earlier data holds out."""
        return self._record.dropped

    def count(self) -> int:
        """How many examples are replayed."""
        return self._record.examples

    def content_digest(self) -> str:
        """SHA-256 over the examples that are replayed and those that are dropped."""
        return self._record.content_digest

    def make_provenance(self, tokens: int) -> dict[str, Any]:
        """What provenance.json says of replay; `tokens` of replayed examples were trained on."""
        record = self._record
        return {
            "fraction": record.fraction,
            "examples": record.examples,
            "tokens": tokens,
            "sources": [source.model_dump(mode="json") for source in record.sources],
        }

    def estimate_iterations(self, rows: int) -> int:
        """About how many batches the run takes that has so many training examples of its own."""
        if self._record.is_rebuilt:
            return self._count_rebuilt_batches(rows + self.count())
        return self.estimate_batches_of_replay(rows)

    def estimate_batches_of_replay(self, rows: int) -> int:
        """The same where earlier examples are replayed."""
        of_epoch = rows + count_replayed(rows, self._config.replay_fraction)
        return self._count_batches(of_epoch, self._config.iters)

    def _count_rebuilt_batches(self, rows: int) -> int:
        """Batches of a rebuilt run on so many rows."""
        iterations = round(self._config.iters * rows / self._record.rows_of_first)
        return self._count_batches(rows, max(1, iterations))

    def _count_batches(self, rows: int, iterations: int) -> int:
        """Batches of all epochs of so many rows; `iterations` where no epochs are configured."""
        epochs, size = self._config.training.epochs, self._config.batch_size
        return iterations if epochs is None else ceil(epochs * ceil(rows / size))

    def mix(self, new: TokenizedSplit, earlier: TokenizedSplit) -> MixedExamples:
        """Return the batches of a run on new examples and earlier ones (replay.jsonl), tokenised.

        A rebuilt run shuffles both together; another one has a share of earlier rows in each epoch.
        """
        config, record = self._config, self._record
        joined = JoinedSplits(new, earlier)
        shape = config.model_dump(include={"batch_size", "seed", "max_seq_length"})
        if record.is_rebuilt:
            lengths = np.concatenate([new.lengths, earlier.lengths])
            batches = self._count_rebuilt_batches(len(lengths))
            return MixedExamples(joined, BatchOrder(lengths, **shape), batches)
        ends = np.cumsum([source.examples for source in record.sources])
        draw = partial(
            draw_rows,
            np.searchsorted(ends, earlier.lines, "left"),
            [source.fresh for source in record.sources],
            weighting=record.weighting,
            seed=config.seed,
        )
        plan = ReplayedBatchOrder(new.lengths, earlier.lengths, record.fraction, draw, **shape)
        return MixedExamples(joined, plan, self.estimate_batches_of_replay(len(new)))


REPLAY = Replay(ReplayOfRun, list_ancestor_digests)
