"""`nested-tune forget`, `audit` and `gc`: what they show, write and refuse."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nested_core.registry import history
from tests.builders.registering import promote, register
from tests.core.registry.conftest import write_run
from tests.flows.conftest import called

NAME = "capitals"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A registry with a champion and the version before it."""
    for seed in (1, 2):
        run = write_run(tmp_path / f"run-{seed}", seed)
        promote(
            tmp_path / "registry", NAME, register(run, tmp_path / "registry", NAME, {}), by="ann"
        )
    return tmp_path


def test_a_lost_version_is_forgotten(folder: Path) -> None:
    lost = str(history(folder / "registry", NAME)[0]["version"])
    place = folder / "registry" / NAME / "versions" / lost
    place.chmod(0o755)
    shutil.rmtree(place)
    told = called("audit", NAME, cwd=folder)
    assert told.code == 6
    assert f"nested-tune forget {NAME} {lost[:12]}" in " ".join(told.stdout.split())
    done = called("forget", NAME, lost[:8], "--by", "ann", "--reason", "disk", cwd=folder)
    assert (done.code, done.stdout) == (0, f"forgotten: {lost[:12]}\n")
    audited = called("audit", NAME, cwd=folder)
    assert (audited.code, audited.stdout.split(",")[0]) == (0, "1 version")


def test_a_version_that_is_whole_is_not_forgotten(folder: Path) -> None:
    whole = str(history(folder / "registry", NAME)[0]["version"])
    done = called("forget", NAME, whole, "--by", "ann", "--reason", "x", cwd=folder)
    assert done.code == 2
    assert "is whole" in done.stderr


def test_a_link_that_was_moved_by_hand_is_told_by_audit(folder: Path) -> None:
    first = str(history(folder / "registry", NAME)[0]["version"])
    link = folder / "registry" / NAME / "champion"
    link.unlink()
    link.symlink_to(f"versions/{first}")
    assert called("gc", NAME, cwd=folder).code == 0
    done = called("audit", NAME, cwd=folder)
    assert done.code == 0
    assert "note: history, line 5: the champion link was moved by hand" in done.stdout
