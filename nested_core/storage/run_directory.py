"""The files of a run directory, and the lock of the process that works on it."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

from nested_core import seams
from nested_core.errors import Advice, ConfigError, DamagedError, go_on_with
from nested_core.storage.addresses import require_no_address
from nested_core.storage.atomic import private_mode
from nested_core.storage.canary_file import CANARY_NAME
from nested_core.storage.lock_file import (
    LockFile,
    OnBusy,
    exclusive_lock_with_holder_id,
    open_lock_held_by_parent,
    read_holder,
    shared_lock,
)
from nested_core.storage.output_places import (
    RUN_CONFIG_NAME,
    RUN_DATASET_NAME,
    RUN_LOCK_NAME,
    RUN_REPORT_NAME,
    RUN_TIERS_NAME,
    TRAINING_EXAMPLES_NAME,
    require_free_place,
)

RUN_DIR_KEY = "--run-dir or run_dir"
DEFAULT_RUNS_FOLDER = Path("runs")  # where runs are kept without --run-dir
DEFAULT_REGISTRY = Path("registry")  # where a name is looked for without --registry
TRIAL_MARK = "trial"
LOCK_ATTEMPTS = 10
LOCK_PAUSE_SECONDS = 0.02

# In the folders of a run, besides what rooms write: an adapter and a checkpoint.
FILES_IN_FOLDERS = re.compile(
    r"(adapter|initial|checkpoints/step-\d{7,})/(adapters\.safetensors|adapter_config\.json)"
    r"|checkpoints/step-\d{7,}/(optimizer\.safetensors|state\.json|MANIFEST\.json)"
)

# The locks that this process works under, by run directory. A lock belongs to a process: whichever
# part of it opens the run directory anew works under the same one.
_LOCKS: dict[Path, LockFile] = {}


@dataclass
class RunDirectory:
    """The paths of all files that a run keeps, and the lock on its folder."""

    path: Path

    def __post_init__(self) -> None:
        """Set the paths of all files of the run."""
        path = self.path

        # What the run was asked to do, and on what.
        self.config = path / RUN_CONFIG_NAME  # the resolved configuration
        self.dataset = path / RUN_DATASET_NAME  # the report of the data set
        self.skipped = path / "skipped.json"  # why nothing was trained on it, if so
        self.replay = path / "replay.json"  # which earlier examples are mixed in, of what
        self.replayed_rows = path / "replay.jsonl"  # these examples
        self.start = path / "start.json"  # whether it goes on from a champion, and why
        self.initial = path / "initial"  # the adapter that training starts from
        self.tiers = path / RUN_TIERS_NAME  # the tier of every tensor

        # What training leaves.
        self.checkpoints = path / "checkpoints"
        self.plan = path / "plan.json"  # how many steps, on what, in how much memory
        self.report_to = path / "report-to.json"  # what services of report_to know the run by
        self.metrics = path / "metrics.jsonl"  # one JSON object a line, a report each
        self.validation_losses = path / "validation-losses.jsonl"  # an example, of each evaluation
        self.adapter = path / "adapter"  # the adapter that the run offers
        self.result = path / "result.json"  # what training ended with; written last
        self.suites = path / "suites.json"  # what gate.tasks asks, as the run found it
        self.answers = path / "answers.jsonl"  # what the models answered to gate.tasks
        self.sample_answers = path / "sample-answers.jsonl"  # of base and adapter, to be read
        self.suspect_rows = path / "suspect-rows.jsonl"  # texts of rows that controls doubt
        self.canary = path / CANARY_NAME  # what a server has to compute with the adapter
        self.gate = path / "gate.json"  # the verdict
        self.gate_losses = path / "gate-losses.jsonl"  # the losses of each held-out example
        self.training_examples = path / TRAINING_EXAMPLES_NAME  # of it and its ancestors
        self.manifest = path / "MANIFEST.json"  # hashes of gate.json and of what it rests on
        self.report = path / RUN_REPORT_NAME  # the page to look at, made of all of these

        # What people did with it.
        self.promoted_to = path / "promoted-to.json"  # registries that config.yaml does not name

        # What other processes see.
        self.stop_request = path / "stop.request"  # who makes this file asks training to stop
        self.lock = path / RUN_LOCK_NAME  # locked while a process works here; has its id

    @property
    def measured(self) -> tuple[Path, ...]:
        """The files beside gate.json that a verdict writes; outdated when training continues."""
        texts = (self.sample_answers, self.suspect_rows)
        return (self.gate_losses, self.answers, *texts, self.canary)

    @property
    def trial_mark(self) -> Path:
        """The file in a folder where steps are tried for their time, and are thrown away.

        Every process that trains there leaves out what only a run that is kept needs.
        """
        return self.path / TRIAL_MARK

    def is_own_file(self, name: str) -> bool:
        """Return whether a run or a room of it writes a file of this name (its path in the run)."""
        files = {path.name for path in vars(self).values()} - {self.path.name}
        is_in_folder = FILES_IN_FOLDERS.fullmatch(name) is not None
        return name in files or is_in_folder or seams.is_file_of_room(name)

    def is_nonempty(self) -> bool:
        """Return whether the directory exists and has any content."""
        return self.path.is_dir() and any(self.path.iterdir())

    def has_run_files(self) -> bool:
        """Return whether a run has begun here; a config.yaml alone is not enough."""
        return any(path.is_file() for path in (self.lock, self.dataset, self.tiers))

    def has_begun_training(self) -> bool:
        """Return whether training was set up here, after all checks of configuration and data."""
        return self.plan.exists() or self.metrics.exists()

    def remove_if_never_began(self, made: Sequence[Path]) -> None:
        """Remove what a run left that was refused before its first step.

        made: the folders that were created for the run, innermost first; they are removed too if
            empty. Nothing is removed if training has begun or another process works here. Call it
            only for a folder that was empty before.
        """
        if not self.path.is_dir():
            return
        with suppress(ConfigError), self.locked():
            if self.has_begun_training():
                return
            for path in self.path.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        for folder in made:
            with suppress(OSError):  # something else is in it
                folder.rmdir()

    def require_begun(self) -> None:
        """Raise ConfigError if no run began here, DamagedError if its config.yaml is no file.

        A run that began has left config.yaml, and one or more of run.lock, dataset.json and
        tiers.json.
        """
        has_config, has_run_files = self.config.is_file(), self.has_run_files()
        if has_config and has_run_files:
            return
        if has_run_files and os.path.lexists(self.config):
            raise DamagedError(
                f"{self.config} is not a file. The run wrote one: bring it back, or move away "
                f"what is there: it is written again where the run goes on with the configuration "
                f"that it began with.",
                advice=go_on_with(self.path),
            )
        missing = "run.lock, dataset.json or tiers.json" if has_config else "config.yaml"
        raise ConfigError(
            f"{self.path} is not a run directory: it has no {missing}. Give the folder that "
            f"`nested-tune train` or `run` printed."
        )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run's lock during the block; a folder that is missing is made, and private.

        Raises ConfigError, naming the process, if another one holds the lock.
        """
        _require_folder(self.path)
        above = next(filter(Path.is_dir, (*self.path.parents, Path())))
        self.path.mkdir(mode=private_mode(above), parents=True, exist_ok=True)
        with exclusive_lock_with_holder_id(self.lock, on_busy=self._refuse_after_retries()) as lock:
            self.stop_request.unlink(missing_ok=True)  # meant for whoever held it before
            key = self.path.resolve()
            _LOCKS[key] = lock
            try:
                yield
            finally:
                _LOCKS.pop(key, None)

    def locked_for_reading(self) -> AbstractContextManager[object]:
        """Keep other processes from writing to the run during the block.

        Other readers may share it.

        Nothing is written; a run without a lock file is read without a lock. Raises ConfigError,
        naming the process, if one works on the run.
        """
        return shared_lock(self.lock, on_busy=self._refuse_after_retries())

    def watch_parents_lock(self) -> None:
        """Make `require_lock` check the lock that the parent process holds on the run."""
        lock = open_lock_held_by_parent(self.lock)
        if lock is not None:
            _LOCKS[self.path.resolve()] = lock

    def require_lock(self) -> None:
        """Raise DamagedError if this process held the run's lock and the lock file is gone.

        Another process may then work here. Call it before each checkpoint, adapter or verdict is
        written.
        """
        lock = _LOCKS.get(self.path.resolve())
        if lock is not None:
            lock.require_still_at_path()

    def is_locked_here(self) -> bool:
        """Return whether this process holds the run's lock."""
        return self.path.resolve() in _LOCKS

    def holder(self) -> int | None:
        """Return the id of the process that holds the run's lock; None if it is free."""
        return read_holder(self.lock)

    def _refuse_after_retries(self) -> OnBusy:
        """Return an `on_busy` that retries briefly, then raises ConfigError.

        The retries outlast a `holder` call, which holds the lock for a moment.
        """
        attempts = iter(range(1, LOCK_ATTEMPTS))

        def on_busy() -> None:
            """Wait a moment, or raise ConfigError after the last attempt."""
            if next(attempts, None) is not None:
                time.sleep(LOCK_PAUSE_SECONDS)
                return
            raise ConfigError(
                f"{self.path} is in use by process {self.holder() or 'unknown'}: two processes may "
                "not work on one run directory. Wait for it, stop it with `nested-tune stop`, or "
                "give another --run-dir."
            )

        return on_busy


def new_run_name(started: datetime | None = None, key: str | None = None) -> str:
    """Return a run's folder name: <UTC time>-<8 hex digits>.

    key: an id to take the digits from; random without one.
    """
    moment = (started or datetime.now(UTC)).astimezone(UTC)
    digits = (key or secrets.token_hex(4)).replace("-", "")[:8]
    return f"{moment:%Y%m%dT%H%M%SZ}-{digits}"


def run_key(flow_run: UUID) -> str:
    """Return the last 8 hex digits of a flow run's id, which end its folder's name.

    The first digits are the time in some versions of UUID.
    """
    return flow_run.hex[-8:]


def find_run_of(flow_run: UUID) -> RunDirectory | None:
    """Return the folder in runs/ that a flow run created; None if there is no such folder."""
    begun = sorted(DEFAULT_RUNS_FOLDER.glob(f"*-{run_key(flow_run)}"))
    return RunDirectory(begun[0]) if begun else None


def open_run(path: str | Path, *, resume: bool = False) -> RunDirectory:
    """Return the run directory at `path`, for a new run or to resume one.

    resume: go on with the run that is there; otherwise the folder must be new or empty.

    Raises ConfigError if a run exists and `resume` is False, or the reverse, and if the path lies
    in a registry, another run's folder or a model's, or is an address, SCHEME://.
    """
    require_no_address(str(path), ConfigError)
    path = Path(path)
    require_free_place(path, RUN_DIR_KEY, own_run=path)
    run = RunDirectory(path)
    if run.is_nonempty() and not resume and (holder := run.holder()) is not None:
        raise ConfigError(
            f"{path} is in use by process {holder}, which trains there now. Wait for it, stop it "
            f"with `nested-tune stop`, or give another --run-dir."
        )
    if run.is_nonempty() and not resume:
        # tiers.json is written as training begins; holder() is the process that works there, and
        # is asked again because one may have begun meanwhile
        if run.config.is_file() and not run.tiers.exists() and run.holder() is None:
            raise ConfigError(
                f"{path} is not empty: a run began there, and ended before it could train:",
                advice=_resume_or_choose_other(
                    "begin it again, also with a corrected configuration"
                ),
            )
        raise ConfigError(
            f"{path} is not empty. A run is never written over:",
            advice=_resume_or_choose_other("continue it"),
        )
    if resume and not run.is_nonempty():
        raise ConfigError(
            f"{path} holds nothing to resume.",
            advice=Advice(
                command="Leave --resume out to start it.",
                page="Leave resume out to start it.",
                python="Leave resume=True out to start it.",
            ),
        )
    if resume and path.is_dir() and not run.has_run_files():
        raise ConfigError(
            f"{path} is not a run directory: it is not empty, and has no run.lock, dataset.json or "
            f"tiers.json as a run leaves them. Nothing there is touched. Give the --run-dir of the "
            f"run to resume."
        )
    _require_folder(path)
    return run


def _resume_or_choose_other(purpose: str) -> Advice:
    """Return the advice for a run directory that is not empty.

    purpose: what resuming does, as a verb phrase.
    """
    python = f"finetune(config, open_run(PATH, resume=True), resume=True) to {purpose}"
    return Advice(
        command=f"add --resume to {purpose}, or give a --run-dir that does not exist yet.",
        page=f"set resume to {purpose}, or give a run_dir that does not exist yet.",
        python=f"call {python}, or give open_run a path that does not exist yet.",
    )


def _require_folder(path: Path) -> None:
    """Raise ConfigError if the path exists and is not a folder."""
    if os.path.lexists(path) and not path.is_dir():
        what = "a file" if path.exists() else "a link that leads nowhere"
        raise ConfigError(f"{path} is {what}; a run needs a directory: give another --run-dir.")
