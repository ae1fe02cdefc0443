"""A search among settings in the time there is: successive halving, and the winner judged.

All arms train the same schedule, the configuration's own, on as many examples. They are compared at
a quarter, a half and the end of it (fewer arms: fewer rungs); at each the better half goes on from
its checkpoint (Jamieson and Talwalkar, Non-stochastic best arm identification, arXiv 1502.07943).
The configuration itself goes on to the end, so that the winner is compared with it on the examples
of the gate, with its luck counted: as the best of all evaluated steps of all arms.

What is decided follows from sweep.json, which has each arm and how far it got: a stopped sweep goes
on as if it had not been. Arms are compared by their losses, so that they vary nothing that a loss
is made of.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from pydantic import JsonValue

from nested_core import seams
from nested_core.config.key_properties import iterate_keys
from nested_core.config.loading import lay_over, parse_config, render_config
from nested_core.config.schema import FineTuneConfig
from nested_core.data.dataset_loading import load_run_data
from nested_core.errors import (
    ConfigError,
    GateRejected,
    TrainingDiverged,
    TrainingStopped,
    go_on_with,
)
from nested_core.measure.answers.answer_bounds import ScoreChange
from nested_core.measure.losses.chosen_candidate import Candidates, read_candidates
from nested_core.models.base_model import find_model_folder, fingerprint_base_model
from nested_core.models.session import Session
from nested_core.pipeline.hooks import Steps
from nested_core.pipeline.preflight import check_before_start
from nested_core.records.answers import read_answers
from nested_core.records.losses import Contents, read_example_losses
from nested_core.records.metrics import read_metrics
from nested_core.records.paired_difference import PairedDifference
from nested_core.records.run_status import Run
from nested_core.records.verdict import Verdict
from nested_core.records.verdict_file import read_verdict
from nested_core.storage.atomic import digest_json, write_bytes
from nested_core.storage.checkpoint_verification import latest_state
from nested_core.storage.json_file import JsonFile
from nested_core.storage.lock_file import exclusive_lock_with_holder_id
from nested_core.storage.output_places import require_free_place
from nested_core.storage.run_directory import RUN_DIR_KEY, RunDirectory
from nested_core.text.loss_format import format_loss

SWEEP_NAME = "sweep.json"
Point = dict[str, JsonValue]
Score = tuple[float, ...]
# What makes settings incomparable beside what a loss is made of: lengths, and examples a step.
OTHER_KEYS_LEFT_OUT = (
    *("iters", "training.epochs", "training.minutes", "steps_per_eval", "registry"),
    *("batch_size", "grad_accumulation_steps"),
)
RANK, SCALE, ALPHA = (f"lora_parameters.{name}" for name in ("rank", "scale", "alpha"))


@dataclass(frozen=True)
class Arm:
    """One setting that is tried.

    point: key -> value, where it differs from the configuration; empty for that itself.
    scores: by the rung's step, the best so far, lower first: the validation loss,
        or the share of wrong answers and the loss; None if it was not finite or training
        diverged.
    """

    point: Point
    scores: dict[int, Score | None] = field(default_factory=dict)

    def describe(self) -> str:
        """Return its settings in words."""
        if not self.point:
            return "the configuration itself"
        return ", ".join(f"{key}={_format(value)}" for key, value in self.point.items())

    def last_score(self) -> tuple[int | None, str]:
        """Return the last rung that it reached, and the best loss or share of right answers."""
        step = max(self.scores, default=None)
        score = None if step is None else self.scores[step]
        if score is None:
            return step, "diverged"
        return step, format_loss(score[0]) if len(score) == 1 else f"{1 - score[0]:.0%} right"


@dataclass(frozen=True)
class SweepRecord:
    """A sweep so far; what it decides follows from this alone, so that it goes on as it began.

    select_by: `loss`, or the suite whose answers choose.
    digest: of the configuration and what was asked for; a resumed sweep has the same.
    rungs: the optimizer steps at which arms are compared; the last one is a whole run.
    arms: the configuration itself first.
    chosen: the number of the chosen arm, once it is known.
    """

    digest: str
    select_by: str
    rungs: tuple[int, ...]
    arms: tuple[Arm, ...]
    chosen: int | None = None

    @property
    def trained(self) -> int:
        """Optimizer steps of all arms so far, up to the last rung of each."""
        return sum(max(arm.scores, default=0) for arm in self.arms)

    def with_score(self, number: int, step: int, score: Score | None) -> SweepRecord:
        """Return the record with an arm's score at a rung."""
        arm = replace(self.arms[number], scores=self.arms[number].scores | {step: score})
        return replace(self, arms=(*self.arms[:number], arm, *self.arms[number + 1 :]))

    def write(self, folder: Path) -> None:
        """Write sweep.json."""
        SWEEP_FILE.write(folder / SWEEP_NAME, self)


SWEEP_FILE = JsonFile(SweepRecord, 2**22)


def _format(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def grid_points(grid: Mapping[str, Sequence[JsonValue]]) -> list[Point]:
    """Return every combination of one value a key, in the order of the keys."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def refuse_incomparable_keys(names: Iterable[str], base: FineTuneConfig) -> None:
    """Raise ConfigError for keys whose values make the runs' losses incomparable.

    Also raised for `learning_rate` if `lr_schedule` is set, which replaces it as in mlx_lm.lora.
    """
    names = sorted(names)
    left_out = {key.name for key in iterate_keys(FineTuneConfig) if key.in_loss is not None}
    left_out.update(OTHER_KEYS_LEFT_OUT)
    if base.training.loss is not None:  # it may compare with where a run begins
        left_out |= {"resume_adapter_file", "continual.from"}
    # A section counts as the keys in it, and a key as its section
    parts = [(f"{name}.", f"{key}.") for name in names for key in left_out]
    if bad := {name for name, key in parts if name.startswith(key) or key.startswith(name)}:
        keys = ", ".join(sorted(name.removesuffix(".") for name in bad))
        raise ConfigError(
            f"sweep: the grid varies {keys}. Settings are compared by one loss of the same rows "
            f"and tokens, after as many steps of as many examples, and nothing is registered. Give "
            f"each value a run of its own, and compare what they answer (`nested-tune evaluate`)."
        )
    if "learning_rate" in names and base.lr_schedule is not None:
        raise ConfigError(
            "sweep: lr_schedule has a rate of its own, so that learning_rate would change nothing. "
            "Give training.decay: cosine in its place, or vary lr_schedule."
        )


def settings_of_point(base: FineTuneConfig, point: Point) -> dict[str, Any]:
    """Return the configuration with a point's values in place of its own; ConfigError if invalid.

    A point that changes the rank, and neither scale nor alpha, keeps rank x scale.
    """
    changes: Point = dict(point)
    lora = base.lora_parameters
    if RANK in changes and not {SCALE, ALPHA} & changes.keys():
        changes[ALPHA] = lora.rank * lora.scale
    values = base.model_dump(mode="json")
    if ALPHA in changes:
        values["lora_parameters"].pop("scale")
    values = lay_over(values, changes)
    parse_config(values, source=f"sweep: the point {point}")
    return values


MAX_ARMS = 64
MAX_HALVINGS = 3
EVALUATIONS_A_RUNG = 2  # of the first rung
RATE_FACTORS = (0.3, 3.0, 10.0)  # beside the rate itself
SHARE_OF_STEPS = 0.7  # of the time: evaluations, checkpoints and loading take the rest
BEST_NAME = "best.yaml"
LOCK_NAME = "sweep.lock"


@dataclass(frozen=True)
class SweepRequest:
    """What a sweep is asked for.

    over: key -> the values to try; empty tries rates around the configuration's.
    select_by: `loss`, or the suite of gate.tasks whose answers choose.
    minutes, steps: of training, of all arms together; None does not bound them. With `steps` the
        same request gives the same figures.
    """

    over: Mapping[str, Sequence[JsonValue]]
    select_by: str = "loss"
    minutes: float | None = None
    steps: int | None = None


@dataclass(frozen=True)
class SweepResult:
    """What a sweep ended with.

    record: the arms and their scores; `record.chosen` is the winner's number.
    run: the winner's run directory, of which the whole configuration is trained and judged.
    choice: the winner's losses less those of the configuration itself, and among how many
        candidates it was chosen; None if the configuration itself is the winner.
    answers: where answers chose, the share of right ones less that of the configuration itself, on
        the questions that judge.
    is_better: whether it is shown to be better than that: by answers where they chose, else by
        registry.min_improvement at least.
    """

    folder: Path
    record: SweepRecord
    run: RunDirectory
    verdict: Verdict
    choice: SweepChoice | None
    answers: PairedDifference | None
    is_better: bool

    def to_json(self) -> dict[str, Any]:
        """Return the document that `sweep --json` prints: the arms, and how the best compares."""
        choice = self.choice
        difference = None if choice is None else choice.difference
        return {
            "sweep_dir": str(self.folder),
            "run_dir": str(self.run.path),
            **asdict(self.record),
            "steps": self.record.trained,
            "chosen_among": None if choice is None else choice.chosen_among,
            "difference": None if difference is None else difference.to_json(),
            "corrected_interval": None if choice is None else choice.corrected_interval,
            "answers": None if self.answers is None else self.answers.to_json(),
            "better": self.is_better,
            "summary": self.summary(),
        }

    def summary(self) -> str:
        """Return the outcome: how many settings were tried, and whether the best one is better."""
        record = self.record
        chosen = record.arms[record.chosen or 0].describe()
        tried = f"{len(record.arms)} settings tried in {record.trained:,} steps"
        if self.choice is None:
            return f"{tried}: none was better than {chosen}."
        text = f"{tried}: the best is {chosen}."
        difference = self.answers or self.choice.difference
        if difference is None:
            return f"{text} It could not be compared with the configuration itself."
        low, high = difference.low, difference.high
        if self.answers is not None:
            gain = f"{difference.mean:+.1%} of {difference.examples} answers are right"
            interval = f"{low:+.1%} to {high:+.1%}"
        else:
            among = self.choice.chosen_among
            correction = f", corrected for the choice among {among}" if among > 1 else ""
            low, high = self.choice.corrected_interval or (low, high)
            unit = Run(self.run).loss_unit
            gain = f"{difference.mean:+.3g} {unit} on {difference.examples} examples"
            interval = f"{low:+.3g} to {high:+.3g}{correction}"
        word = "better" if self.is_better else "not shown to be better: it may be luck"
        return f"{text} Against the configuration itself {gain} (95 % interval {interval}): {word}."


def sweep(
    config: FineTuneConfig, folder: Path, request: SweepRequest, hooks: Steps | None = None
) -> SweepResult:
    """Try the settings of a request, train the best one to the end, and judge it.

    A sweep in `folder` that was interrupted is continued. Nothing is registered.

    Raises ConfigError for settings that cannot be compared and for too few steps, TrainingStopped
    if a stop was requested, GateRejected if the best setting does not pass.
    """
    hooks = hooks or Steps()
    place = require_free_place(folder, RUN_DIR_KEY)
    if place.exists() and any(place.iterdir()) and not (place / SWEEP_NAME).is_file():
        raise ConfigError(f"{folder} is not empty, and holds no sweep. Give another --run-dir.")
    place.mkdir(parents=True, exist_ok=True)

    def refuse() -> NoReturn:
        """Raise ConfigError: another process works in the folder."""
        raise ConfigError(f"{folder} is in use by another process. Give another --run-dir.")

    lock = exclusive_lock_with_holder_id(place / LOCK_NAME, on_busy=refuse)
    with lock, Session() as session:
        search = _Search(config, place, request, hooks, session)
        try:
            search.begin()
        finally:
            if not (place / SWEEP_NAME).is_file():  # refused: leave no folder behind
                (place / LOCK_NAME).unlink()
                with suppress(OSError):
                    place.rmdir()
        search.run()
        return search.judge()


@dataclass
class _Search:
    """The search in one folder: each arm is a run in it, trained a part at a time."""

    config: FineTuneConfig
    folder: Path
    request: SweepRequest
    hooks: Steps
    session: Session
    record: SweepRecord = field(init=False)

    def begin(self) -> None:
        """Read the record of a sweep that was begun, or plan and write a new one.

        A plan has the arms and the steps at which they are compared. Raises ConfigError for a
        record of another configuration, and for settings that cannot be tried.
        """
        digest = _digest_request(self.config, self.request)
        if (self.folder / SWEEP_NAME).is_file():
            self.record = SWEEP_FILE.read(self.folder / SWEEP_NAME)
            if self.record.digest != digest:
                raise ConfigError(
                    f"{self.folder} holds a sweep of another configuration or request, other data, "
                    f"or another base model or tokenizer. Give what it began with, or another "
                    f"--run-dir."
                )
            return
        arms = [Arm({}), *(Arm(point) for point in _first_points(self.config, self.request))]
        if not 1 < len(arms) <= MAX_ARMS:
            raise ConfigError(
                f"sweep: {len(arms) - 1} settings beside the configuration itself; 1 to "
                f"{MAX_ARMS - 1} can be tried."
            )
        for arm in arms:  # an arm that cannot run is refused before any is trained
            parse_config(self._settings_of(arm), source="sweep")
        check_before_start(self.config, self._run_of(0))
        wanted, budget = self._measure()
        rungs = plan_rungs(len(arms), wanted, budget)
        self.record = SweepRecord(digest, self.request.select_by, rungs, tuple(arms))
        self.record.write(self.folder)
        places = ", ".join(map(str, rungs))
        self.hooks.on_message(f"{len(arms)} settings, compared at steps {places} of {wanted:,}")

    def _measure(self) -> tuple[int, int | None]:
        """Return the steps of a whole run, and the steps that all arms together may take.

        The second is None without a limit. Raises ConfigError without a validation loss.
        """
        minutes, budget = self.request.minutes, self.request.steps
        measures = minutes is not None
        seams.require("planning", "sweep")
        from nested_core.rooms.planning.run_explanation import explain_run

        explained = explain_run(self.config, self.hooks.on_message, measures_speed=measures)
        if not explained.validation_examples or self.config.training.reference is not None:
            raise ConfigError(
                "sweep: settings are chosen by the loss on valid.jsonl, at several steps of a run. "
                "Give a valid split (`nested-tune init --split`), val_batches above 0 or -1, and "
                "leave training.reference out."
            )
        if minutes is not None:
            seams.require("minutes", "--minutes")
            seconds_a_step = explained.measured.seconds_a_step
            by_clock = int(SHARE_OF_STEPS * 60 * minutes / max(seconds_a_step, 1e-4))
            budget = by_clock if budget is None else min(budget, by_clock)
        return explained.steps, budget

    def run(self) -> None:
        """Train all arms to the first rung, the better half to the next, and so on; keep the best.

        The configuration itself is trained to the last rung in any case, and can be the best one.
        """
        remaining = list(range(len(self.record.arms)))
        for step in self.record.rungs:
            for number in sorted({0, *remaining}):
                if step not in self.record.arms[number].scores:
                    self._train_arm(number, step)
            remaining = better_half(self._scores(remaining, step))
        best = better_half(self._scores({0, *remaining}, self.record.rungs[-1]))[0]
        self.record = replace(self.record, chosen=best)
        self.record.write(self.folder)

    def _scores(self, arms: Iterable[int], step: int) -> dict[int, Score]:
        return {number: self.record.arms[number].scores[step] or (math.inf,) for number in arms}

    def _train_arm(self, number: int, step: int) -> None:
        """Train an arm up to a rung, and write its score into the record; None if it diverged."""
        run, config = self._run_of(number), self._config_of(number)
        arm = self.record.arms[number]
        self.hooks.on_message(f"{arm.describe()}: to step {step} of {self.record.rungs[-1]}")
        with run.locked():
            part = _Part(self.hooks, step, is_first=not run.config.exists())
            part.begin(config, run, resume=run.config.exists())
            part.validate(config, run)
            part.load(config, run, self.session)
            score: Score | None = None
            try:
                part.train(config, run, self.session)
                score = _best_score(run, self.request.select_by)
            except TrainingStopped:
                if not part.has_reached_end(run):
                    advice = go_on_with(self.folder)
                    raise TrainingStopped("The sweep was stopped.", advice=advice) from None
                score = _best_score(run, self.request.select_by)
            except TrainingDiverged as error:
                self.hooks.on_message(str(error))
        self.record = self.record.with_score(number, step, score)
        self.record.write(self.folder)

    def judge(self) -> SweepResult:
        """Judge the best arm, and the configuration itself to compare it with; write best.yaml.

        Raises ConfigError if every arm diverged, GateRejected if the best arm does not pass.
        """
        number = self.record.chosen or 0
        if self.record.arms[number].scores[self.record.rungs[-1]] is None:
            raise ConfigError(
                "sweep: every setting diverged or had no finite loss. Begin with a lower "
                "learning_rate."
            )
        best = settings_of_point(self.config, self.record.arms[number].point)
        write_bytes(self.folder / BEST_NAME, render_config(parse_config(best, source="sweep")))
        runs = [self._run_of(arm) for arm in range(len(self.record.arms))]
        run = runs[number]
        choice, answers, is_better = None, None, False
        if number != 0:
            try:
                self._judge_arm(0)
            except GateRejected as error:
                self.hooks.on_message(f"the configuration itself: {error}")
        verdict = self._judge_arm(number)
        if number != 0:
            _, splits = load_run_data(self.config)
            choice = SweepChoice.read(run, runs, splits["valid"].contents)
            is_better = is_shown_better(choice, self.config.registry.min_improvement)
            if self.request.select_by != "loss":
                answers = compare_answers(run, runs, self.request.select_by)
                is_better = answers.is_measurable and answers.low > 0
        return SweepResult(self.folder, self.record, run, verdict, choice, answers, is_better)

    def _judge_arm(self, number: int) -> Verdict:
        run = self._run_of(number)
        with run.locked():
            return self.hooks.judge(self._config_of(number), run, self.session)

    def _run_of(self, number: int) -> RunDirectory:
        return RunDirectory(self.folder / "arms" / f"{number:03d}")

    def _config_of(self, number: int) -> FineTuneConfig:
        """Return the configuration of an arm's run: as long as planned, evaluated at every rung."""
        values = self._settings_of(self.record.arms[number])
        config = parse_config(values, source="sweep")
        iterations = self.record.rungs[-1] * config.grad_accumulation_steps
        between = iterations // _unit(len(self.record.rungs))
        length: Point = {"iters": iterations, "steps_per_eval": between}
        length |= {"training.epochs": None, "training.minutes": None}
        return parse_config(lay_over(values, length), source="sweep")

    def _settings_of(self, arm: Arm) -> dict[str, Any]:
        """Return the values of an arm, which is chosen by what the sweep chooses by."""
        name, asked = self.request.select_by, self.config.training.evaluate_tasks
        values = settings_of_point(self.config, arm.point)
        names = [] if name == "loss" else [name]
        tasks = list(dict.fromkeys([*asked, *names]))
        return lay_over(values, {"training.select_by": name, "training.evaluate_tasks": tasks})


class _Part(Steps):
    """The steps of an arm as far as a rung: training is stopped there, with a checkpoint."""

    def __init__(self, hooks: Steps, step: int, *, is_first: bool) -> None:
        self._hooks = hooks
        self._step = step
        self._is_first = is_first
        self._trainer: Any = None

    def on_message(self, message: str) -> None:
        """Pass on each message about the data once."""
        if self._is_first:
            self._hooks.on_message(message)

    def on_data_progress(self, what: str, done: int, total: int) -> None:
        """Pass it on."""
        self._hooks.on_data_progress(what, done, total)

    def on_training_start(self, trainer: Any) -> None:
        """Have it stop at the rung, once it is evaluated there."""
        self._trainer = trainer
        trainer.stop_after_step = self._step
        self._hooks.on_training_start(trainer)

    def on_step(self, step: int, steps: int) -> None:
        """Pass it on."""
        self._hooks.on_step(step, steps)

    def has_reached_end(self, run: RunDirectory) -> bool:
        """Return whether it stopped at the rung, evaluated, and nobody asked for it."""
        state = latest_state(run.checkpoints)
        is_there = state.get("step", 0) >= self._step and state.get("observed", False)
        return is_there and not self._trainer.stop_requested


def plan_rungs(arms: int, wanted: int, budget: int | None) -> tuple[int, ...]:
    """Return the rungs: the steps at which arms are compared; the last is the length of a run.

    After each rung the better half of the arms is trained on. The length is rounded down, so that
    there is an evaluation at each rung.

    arms: the number of arms.
    wanted: the steps of a whole run, if the budget allows them.
    budget: the steps of all arms together; None is no limit.

    Raises ConfigError if no step is left.
    """
    halvings = min(MAX_HALVINGS, math.ceil(math.log2(arms)))
    unit = _unit(halvings + 1)
    steps = wanted
    if budget is not None:
        whole = tuple(unit * 2**power for power in range(halvings + 1))
        steps = min(wanted, int(budget / (count_steps(arms, whole) / whole[-1])))
    steps = steps // unit * unit
    if steps == 0:
        raise ConfigError(
            f"sweep: {arms} settings need runs of {unit} steps or more, and there are "
            f"{wanted if budget is None else min(wanted, budget)} in all. Give more --minutes or "
            f"--steps, a longer run, or fewer settings."
        )
    return tuple(steps // 2 ** (halvings - power) for power in range(halvings + 1))


def count_steps(arms: int, rungs: Sequence[int]) -> int:
    """Count the optimizer steps of a round: the arms of each rung, and the file's setting."""
    total, before, alive = 0, 0, arms
    for step in rungs:
        total += (alive if alive == arms else alive + 1) * (step - before)
        before, alive = step, math.ceil(alive / 2)
    return total


def compare_answers(
    chosen: RunDirectory, runs: Sequence[RunDirectory], suite: str
) -> PairedDifference:
    """Compare the chosen run's answers to a suite with the first run's, question by question.

    If the run was chosen by the same questions, the interval is corrected for the choice among all
    evaluated steps of all runs.
    """
    of_first, of_chosen = (
        {
            record.line: record
            for record in read_answers(run.answers)
            if record.task == suite and record.model == "candidate"
        }
        for run in (runs[0], chosen)
    )
    lines = sorted(of_first.keys() & of_chosen.keys())
    before, after = ([answers[line] for line in lines] for answers in (of_first, of_chosen))
    if any(record.chosen_among > 1 for record in after):
        count = sum(read_candidates(run.validation_losses).count for run in runs)
        after = [replace(record, chosen_among=count) for record in after]
    return ScoreChange.compare(before, after).difference


def better_half(scores: Mapping[int, Score]) -> list[int]:
    """Return the half of the arms that goes on, rounded up, best first; of equals the first."""
    ranked = sorted(scores, key=lambda number: (scores[number], number))
    return ranked[: math.ceil(len(ranked) / 2)]


def is_shown_better(choice: SweepChoice, least: float) -> bool:
    """Return whether the winner's losses are lower beyond chance and luck, and by `least` nats."""
    difference = choice.difference
    if difference is None or difference.mean > -least:
        return False
    if choice.chosen_among == 1:
        return difference.is_measurable and difference.high < 0
    return choice.corrected_interval is not None and choice.corrected_interval[1] < 0


def _unit(rungs: int) -> int:
    """Return the evaluations of a run, of which EVALUATIONS_A_RUNG are before the first rung."""
    return int(EVALUATIONS_A_RUNG * 2 ** (rungs - 1))


def _first_points(config: FineTuneConfig, request: SweepRequest) -> list[Point]:
    """Return the points that were asked for, or rates around the configuration's."""
    grid = dict(request.over)
    if not grid:
        grid = {"learning_rate": [config.learning_rate * factor for factor in RATE_FACTORS]}
    refuse_incomparable_keys(grid, config)
    unchanged = parse_config(settings_of_point(config, {}), source="sweep")
    points = grid_points(grid)
    return [p for p in points if parse_config(settings_of_point(config, p), source="") != unchanged]


def _digest_request(config: FineTuneConfig, request: SweepRequest) -> str:
    """Digest what a sweep's arms are made of, to be compared with one another (SHA-256)."""
    dataset, _ = load_run_data(config)
    asked = [
        config.model_dump(mode="json"),
        asdict(request) | {"over": dict(request.over)},
        fingerprint_base_model(find_model_folder(config.model)),
        dataset.tokenizer,
        dataset.digest,
    ]
    return digest_json(asked)


def _best_score(run: RunDirectory, select_by: str) -> Score | None:
    """Return the score of a run's best evaluation; lower is better; None if no loss was finite.

    While a tier has not been updated there is no best one yet: the last one counts.
    """
    state = latest_state(run.checkpoints)
    loss, wrong = state.get("best_val_loss"), state["best_wrong"]
    if loss is None:
        last = [record for record in read_metrics(run.metrics) if "val_loss" in record][-1]
        loss = last["val_loss"]
        wrong = 1 - last.get("tasks", {}).get(select_by, {}).get("right", 0.0)
    if loss is None:
        return None
    return (loss,) if select_by == "loss" else (wrong, loss)


def join_candidates(several: Sequence[Candidates]) -> Candidates:
    """Return the candidates of all runs of a sweep as one family, which read the same examples."""
    count, first = sum(own.count for own in several), several[0]
    losses = [
        own.losses
        for own in several
        if own.losses is not None and np.array_equal(own.contents, first.contents)  # type: ignore[arg-type]
    ]
    if len(losses) < len(several):
        return Candidates(count)
    return Candidates(count, first.contents, np.concatenate(losses))


@dataclass(frozen=True)
class SweepChoice:
    """The run that a sweep chose, and among how many candidates its examples chose it.

    chosen_among: the evaluated steps of all its runs; 1 where the gate's examples chose nothing.
    corrected_interval: the 95 % interval of its loss less that of the first run, the configuration
        itself, which holds for the best of so many; None for one alone, and without losses to
        compare.
    difference: what the interval is of, and its own; None without losses to compare.
    """

    chosen_among: int
    corrected_interval: tuple[float, float] | None
    difference: PairedDifference | None = None

    @classmethod
    def read(
        cls, chosen: RunDirectory, runs: Sequence[RunDirectory], selecting: Contents
    ) -> SweepChoice:
        """Compare the chosen run with the first one by their losses on held-out examples.

        The interval is corrected for the choice among all evaluated steps of all runs, unless the
        examples are others than those that the choice was made by.

        runs: all runs, the chosen one among them.
        selecting: the digests of the examples that the arms were evaluated on, uint64 (n,).
        """
        if read_verdict(chosen.gate).validation is None:
            return cls(1, None)
        judged = read_example_losses(chosen.gate_losses).counted()
        # The first run's losses on the same examples; NaN for one that it has not
        losses = read_example_losses(runs[0].gate_losses)
        by_line = dict(zip(losses.lines.tolist(), losses.after.tolist(), strict=True))
        first = np.array([by_line.get(line, np.nan) for line in judged.lines.tolist()], np.float64)
        change = judged.compare_trained_with(first)
        if judged.contents is not None and not np.isin(judged.contents, selecting).any():
            return cls(1, None, change)
        family = join_candidates([_read_candidates_of_run(run) for run in runs])
        interval = None if change is None else family.corrected_interval(judged, first, change)
        return cls(family.count, interval, change)


def _read_candidates_of_run(run: RunDirectory) -> Candidates:
    """Read its evaluated steps; of a run that offers its last step, the one that was judged."""
    candidates = read_candidates(run.validation_losses)
    if candidates.losses is not None or candidates.count > 1 or not run.gate_losses.is_file():
        return candidates
    losses = read_example_losses(run.gate_losses)
    return Candidates(1, losses.contents, losses.after[None])
