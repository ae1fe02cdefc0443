"""The runs of a folder, a row each; one that is damaged says so in its row."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nested_core.config.resume import read_run_config
from nested_core.errors import ConfigError, NestedTuneError
from nested_core.report.run_start import count_steps, read_start_time
from nested_core.report.run_status import read_status
from nested_core.storage.run_directory import RunDirectory
from nested_core.text.duration_format import format_age


@dataclass(frozen=True)
class ListedRun:
    """A run as the list shows it; losses are None until there is one.

    state: as in `status`, or "damaged"; then `problem` says what is wrong.
    started: ISO 8601, UTC.
    conclusion: the gate's word for the held-out loss: better, no_worse, inconclusive or worse.
    """

    path: str
    state: str
    step: int | None
    steps: int | None
    train_loss: float | None
    val_loss: float | None
    verdict: str | None
    started: str
    problem: str | None = None
    conclusion: str | None = None

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return Path(self.path).resolve().name

    def describe_verdict(self) -> str | None:
        """What is wrong with a damaged run, else what the gate said: `passed, inconclusive`."""
        if self.verdict == "passed" and self.conclusion == "inconclusive":
            return "passed, inconclusive"
        return self.problem or self.verdict

    def describe_age(self, now: datetime | None = None) -> str:
        """How long ago the run began: `3 min`, `5 h`, `12 days`."""
        passed = (now or datetime.now(UTC)) - datetime.fromisoformat(self.started)
        return format_age(passed.total_seconds())


def list_runs(folder: Path) -> list[ListedRun]:
    """The runs in a folder, and the folder itself where it is one, newest first.

    Folders that no run has begun in are passed over. ConfigError where there is no such folder.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"{folder.absolute()} is not a folder. Give the one that holds your runs; without "
            f"--run-dir they go to runs/ in the folder that the command is given in."
        )
    candidates = [folder, *(path for path in folder.iterdir() if path.is_dir())]
    runs = [RunDirectory(path) for path in candidates]
    rows = [_read_listed_run(run) for run in runs if run.has_run_files()]
    return sorted(rows, key=lambda row: row.started, reverse=True)


def _read_listed_run(run: RunDirectory) -> ListedRun:
    started = read_start_time(run).isoformat(timespec="seconds")
    try:
        config = read_run_config(run)
        status: dict[str, Any] = read_status(run)
    except (NestedTuneError, OSError) as error:
        path = str(run.path)
        return ListedRun(path, "damaged", None, None, None, None, None, started, str(error))
    return ListedRun(
        path=str(run.path),
        state=status["state"],
        step=status["step"],
        steps=count_steps(run, config),
        train_loss=status["current_train_loss"],
        val_loss=status["current_val_loss"],
        verdict=status["verdict"],
        started=started,
        conclusion=status["conclusion"],
    )
