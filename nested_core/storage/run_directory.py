"""The names in a run directory, and the lock that a training process holds on it."""

from __future__ import annotations

import fcntl
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from nested_core.errors import ConfigError

RUNS = Path("runs")  # where a run is kept that is given no folder of its own
LOCK_ATTEMPTS, LOCK_PAUSE_SECONDS = 10, 0.02


@dataclass(frozen=True)
class RunDirectory:
    """One run, one folder, the whole truth: every path in it has its name here."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def dataset(self) -> Path:
        """The dataset report."""
        return self.path / "dataset.json"

    @property
    def initial(self) -> Path:
        """The adapter as training found it."""
        return self.path / "initial"

    @property
    def tiers(self) -> Path:
        """The tier of every tensor."""
        return self.path / "tiers.json"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """One JSON object a line, a report each."""
        return self.path / "metrics.jsonl"

    @property
    def adapter(self) -> Path:
        """The adapter that the run offers."""
        return self.path / "adapter"

    @property
    def result(self) -> Path:
        """What training ended with; written last."""
        return self.path / "result.json"

    @property
    def gate(self) -> Path:
        """The verdict."""
        return self.path / "gate.json"

    @property
    def stop_request(self) -> Path:
        """Another process asks training to stop by making this file."""
        return self.path / "stop.request"

    @property
    def lock(self) -> Path:
        """Held while a process works here; it holds that process's id."""
        return self.path / "run.lock"

    def is_begun(self) -> bool:
        """Whether anything is in the directory yet."""
        return self.path.is_dir() and any(self.path.iterdir())

    def is_marked(self) -> bool:
        """Whether a run left its mark here; a config.yaml alone may be anybody's."""
        return any(mark.is_file() for mark in (self.lock, self.dataset, self.tiers))

    def require_begun(self) -> None:
        """Raise ConfigError where this is no run directory."""
        if not self.config.is_file() or not self.is_marked():
            lacks = (
                "run.lock, dataset.json or tiers.json" if self.config.is_file() else "config.yaml"
            )
            raise ConfigError(
                f"{self.path} is not a run directory: it has no {lacks}. Give the folder that "
                f"`nested-tune train` or `run` printed."
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run's lock; ConfigError names the process that holds it already."""
        _require_folder(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._acquire(descriptor)
            self.stop_request.unlink(missing_ok=True)  # meant for whoever held it before
            os.ftruncate(descriptor, 0)
            os.write(descriptor, str(os.getpid()).encode())
            yield
        finally:
            os.close(descriptor)

    def _acquire(self, descriptor: int) -> None:
        """Take the lock; whoever only looks at it (`holder`) is gone within a few tries."""
        for attempt in range(LOCK_ATTEMPTS):
            try:
                return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(LOCK_PAUSE_SECONDS if attempt < LOCK_ATTEMPTS - 1 else 0)
        holder = self.lock.read_text() or "unknown"
        raise ConfigError(
            f"{self.path} is in use by process {holder}: two processes may not work on one run "
            f"directory. Wait for it, stop it with `nested-tune stop`, or give another --run-dir."
        )

    def holder(self) -> int | None:
        """The process that holds the lock now, or None; several may look at once."""
        try:
            descriptor = os.open(self.lock, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return int(self.lock.read_text() or 0)
        finally:
            os.close(descriptor)
        return None


def new_run_name(started: datetime | None = None, key: str | None = None) -> str:
    """<UTC time>-<8 hex digits>; the digits come from `key` where a run has an id of its own."""
    moment = (started or datetime.now(UTC)).astimezone(UTC)
    digits = (key or secrets.token_hex(4)).replace("-", "")[:8]
    return f"{moment:%Y%m%dT%H%M%SZ}-{digits}"


def open_run(path: Path, *, resume: bool) -> RunDirectory:
    """The run directory at `path`, new or to be resumed; ConfigError where that is not so."""
    run = RunDirectory(path)
    if run.is_begun() and not resume:
        raise ConfigError(
            f"{path} is not empty. A run is never written over: add --resume to go on with it, or "
            f"give a --run-dir that does not exist yet."
        )
    if resume and not run.is_begun():
        raise ConfigError(f"{path} holds nothing to resume. Leave --resume out to start it.")
    if resume and path.is_dir() and not run.is_marked():
        raise ConfigError(
            f"{path} is not a run directory: it is not empty, and has no run.lock, dataset.json or "
            f"tiers.json as a run leaves them. Nothing there is touched; give the --run-dir of the "
            f"run that is to go on."
        )
    _require_folder(path)
    return run


def _require_folder(path: Path) -> None:
    if os.path.lexists(path) and not path.is_dir():
        is_astray = path.is_symlink() and not path.exists()
        what = "a link that leads nowhere" if is_astray else "a file"
        raise ConfigError(f"{path} is {what}; a run needs a directory: give another --run-dir.")
