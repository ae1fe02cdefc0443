"""When the pages of a training are due."""

from __future__ import annotations

from pathlib import Path

from nested_core.storage.run_directory import RunDirectory
from nested_core.training.reports.run_progress import RunProgress
from tasks.training_progress import TrainingPages
from tests.example import example_config


def test_pages_are_due_at_the_first_report_and_not_before(tmp_path: Path) -> None:
    progress = RunProgress(RunDirectory(tmp_path))
    pages = TrainingPages(example_config(), progress)
    assert not pages.is_due()
    progress.records.append({"step": 1, "loss": 2.0})
    assert pages.is_due()
