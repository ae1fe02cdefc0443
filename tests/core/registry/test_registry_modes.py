"""Version folders are read-only for their owner too; what removes versions still can."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nested_core.errors import DamagedError
from nested_core.registry import rollback
from nested_core.registry.versions import version_folder
from tests.builders.registering import promote, register
from tests.core.registry.conftest import write_run
from tests.left_out import needs_rooms
from tests.registry_care import audit, collect_garbage

ROOT = Path(__file__).resolve().parents[3]
NAME = "capitals"
NOBODY = 65534

# The whole life of a registry, as a user that no mode lets pass.
PROGRAM = """
import os, shutil, sys
from datetime import timedelta
from pathlib import Path
from nested_core.registry import promotion_outcome
from nested_core.registry.versions import version_folder
from nested_core.rooms.housekeeping.garbage_collection import collect_garbage
from nested_core.rooms.housekeeping.registry_audit import audit
from nested_core.seams import read_rooms
from nested_core.storage.atomic import temporary_beside
from tests.builders.registering import promote, register
from tests.core.registry.conftest import write_run

read_rooms()  # imports a module of Python, which the other user may not read
folder, user = Path(sys.argv[1]), int(sys.argv[2])
if os.getuid() == 0:
    os.setgid(user)
    os.setuid(user)
os.umask(0o022)
registry, name = folder / "registry", "capitals"
promotion_outcome.UNPROMOTED_GRACE_TIME = timedelta(0)
versions = []
for seed in (1, 2, 3):
    versions.append(register(write_run(folder / f"run-{seed}", seed), registry, name, {}))
    promote(registry, name, versions[-1], by="ann")
first, _, last = (version_folder(registry, name, version) for version in versions)
for replaced in ("adapters.safetensors", "new"):
    (folder / "planted").write_bytes(b"x")
    try:
        os.replace(folder / "planted", last / replaced)
    except PermissionError:
        print("kept", replaced)
shutil.copytree(last, temporary_beside(last))  # what a kill just before the rename leaves
done = collect_garbage(registry, name, by="ann", keep=0)
print("collected", len(done.collected), len(done.leftovers), first.exists())
shutil.copytree(registry, folder / "backup", symlinks=True)
print("sound", audit(registry, name).findings, audit(folder / "backup", name).findings)
"""


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that another user may work in, too."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o777)
    yield folder
    subprocess.run(["chmod", "-R", "u+rwX", folder], check=True)
    shutil.rmtree(folder)


@needs_rooms("housekeeping")
@pytest.mark.slow("processes of another user")
def test_another_user_replaces_nothing_in_a_version_and_still_collects_and_copies(
    open_folder: Path,
) -> None:
    user = NOBODY if os.getuid() == 0 else os.getuid()
    command = [sys.executable, "-c", PROGRAM, str(open_folder), str(user)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "kept adapters.safetensors",
        "kept new",
        "collected 1 1 False",
        "sound () ()",
    ]


def test_the_owner_and_root_collect_what_is_read_only(tmp_path, no_time_to_decide) -> None:
    registry = tmp_path / "registry"
    first, second, third = (
        register(write_run(tmp_path / f"run-{seed}", seed), registry, NAME, {})
        for seed in (1, 2, 3)
    )
    for version in (first, second, third):
        promote(registry, NAME, version, by="ann")
        mode = version_folder(registry, NAME, version).stat().st_mode
        assert stat.S_IMODE(mode) & 0o222 == 0
    assert collect_garbage(registry, NAME, by="ann", keep=0).collected == (first,)
    assert rollback(registry, NAME, by="ann").outcome == "rolled_back"
    assert audit(registry, NAME).findings == ()


def test_in_a_groups_registry_the_folders_stay_writable_for_the_group(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        run = write_run(tmp_path / "run", 1)
        version = register(run, tmp_path / "registry", NAME, {})
    finally:
        os.umask(before)
    folder = version_folder(tmp_path / "registry", NAME, version)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o775
    assert stat.S_IMODE((folder / "adapters.safetensors").stat().st_mode) == 0o444


def test_a_version_that_is_refused_before_it_is_published_leaves_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 1)
    version = register(run, tmp_path / "registry", NAME, {})
    folder = version_folder(tmp_path / "registry", NAME, version)
    subprocess.run(["chmod", "-R", "u+w", folder], check=True)
    (folder / "gate.json").write_text("{}")
    with pytest.raises(DamagedError):
        register(run, tmp_path / "registry", NAME, {})
    assert sorted(os.listdir(folder.parent)) == [version]
