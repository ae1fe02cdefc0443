"""A fine-tune at work: what its steps share, and what rooms put around them.

`pipeline.finetune` says which steps there are, `Steps` what each does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

from nested_core import seams
from nested_core.config.schema import FineTuneConfig
from nested_core.errors import GateRejected, NestedTuneError
from nested_core.models.session import Session
from nested_core.pipeline.continual import champion_or_none, find_reason_to_skip
from nested_core.pipeline.hooks import Steps
from nested_core.pipeline.preflight import require_room_for_checkpoints
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
from nested_core.records.plan import note_ends
from nested_core.records.result import TrainResult
from nested_core.records.skip import Skip, write_skip
from nested_core.records.verdict import Verdict
from nested_core.registry import Decision
from nested_core.report.run_report import writing_report_at_end
from nested_core.storage.atomic import remove_file
from nested_core.storage.run_directory import RunDirectory


class RunInProgress:
    """A run whose directory is locked.

    Attributes:
        config: the configuration; a room around the run may change its number of iterations.
        run: the run directory.
        steps: the steps, which a caller may have replaced.
        session: what this process keeps loaded from one step to the next.
        train: trains and returns the result; a room around the run may replace it.
    """

    def __init__(self, config: FineTuneConfig, run: RunDirectory, steps: Steps) -> None:
        """Create it for a run whose steps have not begun."""
        self.config = config
        self.run = run
        self.steps = steps
        self.session = Session()
        self.train: Callable[[], TrainResult] = self.train_once

    def begin(self, *, resume: bool) -> None:
        """Write the configuration, or compare it with the recorded one on resume."""
        self.steps.begin(self.config, self.run, resume=resume)
        # The command's parent process restarts this one if it crashes; it then tells how it ended.
        tell_parent(RunInHand(self.run.path, self.config.training.restarts))
        if ends := list_earlier_ends():
            note_ends(self.run.plan, ends)

    def validate(self) -> Skip | None:
        """Validate the data set; return why nothing needs to be trained, or None.

        A run is skipped if it cannot make a champion, because nothing that matters has changed
        since an earlier one.
        """
        remove_file(self.run.skipped)
        self.steps.validate(self.config, self.run)
        if skip := find_reason_to_skip(self.config, self.run):
            write_skip(self.run.skipped, skip)
        return skip

    @contextmanager
    def around_training(self) -> Iterator[None]:
        """Enter what rooms have around loading and training."""
        with ExitStack() as around:
            for room in seams.load_all(AroundRun):
                around.enter_context(room.training(self))
            yield

    def load(self) -> None:
        """Write the initial adapter; ConfigError if the disk is too small for the checkpoints."""
        self.steps.load(self.config, self.run, self.session)
        require_room_for_checkpoints(self.config, self.run)

    def train_once(self) -> TrainResult:
        """Train to the last iteration of the configuration."""
        return self.steps.train(self.config, self.run, self.session)

    def judge(self) -> Verdict:
        """Run the gate, and once more if another version became champion meanwhile.

        The gate compares the adapter with the champion, so the verdict must be about the present
        one. Raises GateRejected for an adapter that did not pass, after recording that in the
        registry.
        """
        champion = self._find_champion()
        try:
            try:
                verdict = self.steps.judge(self.config, self.run, self.session)
                has_moved = self._find_champion() not in (verdict.rival, verdict.trained.digest)
            except (NestedTuneError, OSError):
                # By the former champion; or a gc has taken it while the gate was reading it.
                has_moved = self._find_champion() != champion
                if not has_moved:
                    raise
            if has_moved:
                self.steps.on_message(
                    "the champion changed while the gate was at work: running it once more"
                )
                verdict = self.steps.judge(self.config, self.run, self.session)
        except GateRejected:
            record_rejection(self.config, self.run, self.session)
            raise
        judged = find_judged_run(self.run, self.session)
        if note := describe_changed_held_out(self.config, judged.verdict, judged.dataset):
            self.steps.on_message(note)
        return verdict

    def register(self) -> Decision | None:
        """Register the adapter and promote it, or keep the champion; None without a registry."""
        if self.config.registry.path is None:
            return None
        decision = self.steps.register(self.config, self.run, self.session)
        judged = find_judged_run(self.run, self.session)
        if decision.is_registered and (note := describe_reproduction(self.config, judged)):
            self.steps.on_message(note)
        return decision

    def _find_champion(self) -> str | None:
        """Return the champion of the configured name; None without a champion or a registry."""
        location = self.config.registry.location
        return None if location is None else champion_or_none(*location)


@dataclass(frozen=True)
class AroundRun:
    """What a room does around the steps of a run.

    run: returns a context around all steps. It is called before the run begins, and entered after.
    training: returns a context around loading and training. It is called after validation.
    """

    run: Callable[[RunInProgress], AbstractContextManager[object]] = nullcontext
    training: Callable[[RunInProgress], AbstractContextManager[object]] = nullcontext


@contextmanager
def working_on(
    config: FineTuneConfig, run: RunDirectory, steps: Steps, *, resume: bool
) -> Iterator[RunInProgress]:
    """Lock a run directory and begin the run, with what rooms have around it.

    When the block ends, however it does, the report is written and what was loaded is released.
    """
    work = RunInProgress(config, run, steps)
    with run.locked(), ExitStack() as around:
        contexts = [room.run(work) for room in seams.load_all(AroundRun)]
        work.begin(resume=resume)
        for context in contexts:
            around.enter_context(context)
        with aborting_where_metal_failed(), writing_report_at_end(run), work.session:
            yield work
