"""Every damage of a registry is named with a way out, and whoever follows it has a sound registry.

Each case breaks a registry, reads what a command says, does that, and audits. The ways out are read
from the message itself: commands between backticks, and paths to remove.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nested_core.errors import ConfigError, DamagedError
from nested_core.registry import check_champion, history, read_champion, rollback
from nested_core.storage import kept_hashes
from nested_core.storage.lock_file import LockFile
from nested_core.storage.untrusted_files import regular_sha256
from tests.builders.registering import promote, register_and_promote
from tests.core.registry.conftest import MakeRun, write_run
from tests.core.registry.states import NAME, restore_from
from tests.registry_care import audit, collect_garbage, forget


@dataclass
class World:
    """A registry with champion B after A, C beside them, their runs, and a backup."""

    folder: Path
    registry: Path
    first: str
    champion: str
    other: str

    @property
    def name_folder(self) -> Path:
        return self.registry / NAME

    def version(self, version: str) -> Path:
        return self.name_folder / "versions" / version

    def run_of(self, version: str) -> Path:
        numbers = {self.first: 1, self.champion: 2, self.other: 3}
        return self.folder / f"run-{numbers[version]}"

    def restore_backup(self, path: Path) -> None:
        """Put one file or folder back as it is in the backup."""
        restore_from(self.folder / "backup" / path.relative_to(self.registry), path)


@pytest.fixture
def world(tmp_path: Path, registry: Path, three: tuple[str, str, str]) -> World:
    shutil.copytree(registry, tmp_path / "backup", symlinks=True)
    return World(tmp_path, registry, *three)


def loosen(path: Path) -> None:
    """Give the owner the right to write, as a person would before an edit."""
    for each in (path.parent, path):
        each.chmod(each.stat().st_mode | 0o200)


def edit_weights(world: World, version: str) -> None:
    path = world.version(version) / "adapters.safetensors"
    loosen(path)
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def remove_version(world: World, version: str) -> None:
    world.version(version).chmod(0o755)
    shutil.rmtree(world.version(version))


def move_link(world: World, target: str) -> None:
    (world.name_folder / "champion").unlink()
    (world.name_folder / "champion").symlink_to(f"versions/{target}")


def follow(world: World, advice: str, which: str) -> None:
    """Do what a message advises, of its alternatives the one that begins with `which`."""
    commands = re.findall(r"`(nested-tune [^`]+|ln [^`]+)`", advice)
    command = next(c for c in commands if c.split()[:2] == which.split()[:2])
    words = shlex.split(command)
    if words[0] == "ln":
        link = Path(words[3])
        link.unlink(missing_ok=True)
        link.symlink_to(words[2])
        return
    options = dict(zip(words[:-1], words[1:], strict=True))
    assert Path(options.get("--registry", world.registry)) == world.registry
    if words[1] == "promote":
        version = re.search(r"versions/([0-9a-f]{64})", advice)
        assert version is not None
        run = world.run_of(version[1])
        register_and_promote(run, world.registry, options["--name"], {}, by="ann")
    elif words[1] == "forget":
        forget(world.registry, words[2], words[3], by="ann", reason="lost")
    else:
        assert words[1] == "rollback"
        rollback(world.registry, words[2], to=world.first, by="ann")


def told(world: World, act: Callable[[], Any] | None = None) -> str:
    """What a command says of the damage."""
    with pytest.raises(DamagedError) as caught:
        (act or (lambda: check_champion(world.registry, NAME)))()
    assert len(str(caught.value).splitlines()) <= 14
    assert not audit(world.registry, NAME).is_sound
    return str(caught.value)


def assert_sound(world: World, champion: str | None) -> None:
    report = audit(world.registry, NAME)
    assert report.findings == ()
    assert report.champion == champion
    check_champion(world.registry, NAME)
    last = history(world.registry, NAME)[-1]
    assert {"version", "previous"} <= last.keys()


@pytest.mark.parametrize("breaking", [edit_weights, remove_version])
@pytest.mark.parametrize("way", ["backup", "nested-tune promote", "nested-tune forget"])
def test_a_champion_that_is_damaged_or_lost_is_repaired_as_it_is_said(world, breaking, way) -> None:
    breaking(world, world.champion)
    advice = told(world)
    if way == "backup":
        world.version(world.champion).parent.chmod(0o755)
        world.restore_backup(world.version(world.champion))
    elif way == "nested-tune promote":
        if world.version(world.champion).exists():  # "or remove it and give ..."
            remove_version(world, world.champion)
        follow(world, advice, way)
        assert history(world.registry, NAME)[-1]["action"] == "restored"
    else:
        with pytest.raises(ConfigError, match="is the champion of capitals") as refused:
            follow(world, advice, way)
        follow(world, str(refused.value), "nested-tune rollback")
        follow(world, advice, way)
        line = history(world.registry, NAME)[-1]
        assert (line["action"], line["version"], line["reason"]) == (
            "forgotten",
            world.champion,
            "lost",
        )
        assert not world.version(world.champion).exists()
    assert_sound(world, world.first if way == "nested-tune forget" else world.champion)


@pytest.mark.parametrize("breaking", [edit_weights, remove_version])
@pytest.mark.parametrize("way", ["nested-tune promote", "nested-tune forget"])
def test_a_former_champion_that_is_damaged_or_lost_is_repaired_as_the_audit_says(
    world: World, breaking: Callable[[World, str], None], way: str
) -> None:
    breaking(world, world.first)
    (finding,) = audit(world.registry, NAME).findings
    assert finding.advice is not None
    assert check_champion(world.registry, NAME) == world.champion
    if way == "nested-tune promote" and world.version(world.first).exists():
        remove_version(world, world.first)
    follow(world, finding.advice, way)
    assert_sound(world, world.first if way == "nested-tune promote" else world.champion)


def test_a_version_that_was_never_champion_is_repaired_by_registering_it_again(world) -> None:
    edit_weights(world, world.other)
    (finding,) = audit(world.registry, NAME).findings
    remove_version(world, world.other)
    follow(world, str(finding.advice), "nested-tune promote")
    assert_sound(world, world.other)


def test_a_rollback_passes_over_what_was_forgotten_and_restored(world: World) -> None:
    promote(world.registry, NAME, world.other, by="ann")
    remove_version(world, world.champion)
    forget(world.registry, NAME, world.champion, by="ann", reason="disk")
    assert rollback(world.registry, NAME, by="ann").version == world.first
    assert_sound(world, world.first)


@pytest.mark.parametrize("act", [check_champion, read_champion])
def test_a_link_to_no_version_is_refused_and_never_settled(world, act) -> None:
    move_link(world, "0" * 64)
    before = (world.name_folder / "history.jsonl").read_bytes()
    advice = told(world, lambda: act(world.registry, NAME))
    for command in (
        lambda: rollback(world.registry, NAME, by="ann"),
        lambda: promote(world.registry, NAME, world.other, by="ann"),
        lambda: collect_garbage(world.registry, NAME, by="ann"),
    ):
        with pytest.raises(DamagedError, match="no version of capitals"):
            command()
    assert (world.name_folder / "history.jsonl").read_bytes() == before
    follow(world, advice, "ln -sfn")
    assert_sound(world, world.champion)


def test_a_link_moved_by_hand_is_verified_recorded_and_told_from_then_on(world: World) -> None:
    move_link(world, world.other)
    assert not audit(world.registry, NAME).is_sound
    collect_garbage(world.registry, NAME, by="ann", keep=10)
    line = history(world.registry, NAME)[-1]
    manifest = json.loads((world.version(world.other) / "MANIFEST.json").read_bytes())
    assert (line["action"], line["version"], line["previous"], line["manifest"]) == (
        "moved",
        world.other,
        world.champion,
        manifest["digest"],
    )
    assert_sound(world, world.other)
    (note,) = audit(world.registry, NAME).notes
    assert "moved by hand" in note
    assert rollback(world.registry, NAME, by="ann").version == world.champion
    assert rollback(world.registry, NAME, by="ann").version == world.first
    assert audit(world.registry, NAME).notes == (note,)


def test_a_link_moved_back_by_hand_is_no_change_cut_short(world: World) -> None:
    move_link(world, world.first)
    assert check_champion(world.registry, NAME) == world.first
    assert history(world.registry, NAME)[-1]["action"] == "moved"
    assert rollback(world.registry, NAME, by="ann").version == world.champion
    assert_sound(world, world.champion)


def test_a_link_moved_by_hand_to_a_damaged_version_is_refused(world: World) -> None:
    edit_weights(world, world.other)
    move_link(world, world.other)
    advice = told(world)
    assert "is not what was registered" in advice
    remove_version(world, world.other)
    follow(world, told(world), "ln -sfn")
    (finding,) = audit(world.registry, NAME).findings
    follow(world, str(finding.advice), "nested-tune forget")
    assert_sound(world, world.champion)


@pytest.mark.parametrize("thing", ["file", "directory", "elsewhere", "removed"])
def test_what_is_no_link_is_removed_and_a_version_promoted_again(world: World, thing: str) -> None:
    link = world.name_folder / "champion"
    link.unlink()
    if thing == "file":
        link.write_text("x")
    elif thing == "directory":
        shutil.copytree(world.version(world.champion), link)
    elif thing == "elsewhere":
        link.symlink_to("/tmp")
    if thing != "removed":
        assert "Remove it and promote a version again" in told(world)
        shutil.rmtree(link) if thing == "directory" else link.unlink()
    assert rollback(world.registry, NAME, by="ann").version == world.champion
    assert_sound(world, world.champion)


@pytest.mark.parametrize("thing", ["link", "directory"])
def test_what_is_no_lock_file_is_removed_and_made_again(world: World, thing: str) -> None:
    lock = world.name_folder / ".lock"
    lock.unlink()
    if thing == "link":
        lock.symlink_to(world.folder / "elsewhere")
    else:
        lock.mkdir()
    with pytest.raises(DamagedError, match="Remove it: a lock's file holds nothing"):
        rollback(world.registry, NAME, by="ann")
    lock.unlink() if thing == "link" else lock.rmdir()
    assert rollback(world.registry, NAME, by="ann").version == world.first
    assert_sound(world, world.first)


def test_a_lock_removed_while_it_is_held_ends_the_command_that_runs_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cleaner of old files takes the lock's file away between the check and the change."""

    check = LockFile.require_still_at_path

    def clean_and_check(lock: LockFile) -> None:
        lock.path.unlink(missing_ok=True)
        check(lock)

    with monkeypatch.context() as cleaner:
        cleaner.setattr(LockFile, "require_still_at_path", clean_and_check)
        with pytest.raises(DamagedError, match="then run the command again"):
            rollback(world.registry, NAME, by="ann")
    assert_sound(world, world.champion)
    assert rollback(world.registry, NAME, by="ann").version == world.first
    assert_sound(world, world.first)


@pytest.mark.parametrize("damage", ["missing", "directory", "of another day", "torn"])
def test_champion_json_is_mended_by_the_one_field_that_the_message_has(world, damage) -> None:
    record = world.name_folder / "champion.json"
    before = record.read_bytes()
    record.unlink()
    if damage == "directory":
        record.mkdir()
        assert "remove champion.json and write" in told(world)
        record.rmdir()
    elif damage == "of another day":
        record.write_bytes(
            re.sub(rb'"last_line_sha256": "\w+"', b'"last_line_sha256": "0"', before)
        )
    elif damage == "torn":
        record.write_bytes(before[:30])
    field = re.search(r"write (\{.*\}) into champion.json", told(world))
    assert field is not None
    record.write_text(field[1])
    collect_garbage(world.registry, NAME, by="ann", keep=10)
    assert_sound(world, world.champion)


def test_a_history_that_is_lost_is_begun_anew_as_the_message_says(world: World) -> None:
    (world.name_folder / "history.jsonl").unlink()
    assert "remove the link and champion.json and promote the version again" in told(world)
    for name in ("champion", "champion.json"):
        (world.name_folder / name).unlink()
    promote(world.registry, NAME, world.champion, by="ann")
    assert_sound(world, world.champion)


@pytest.mark.parametrize("damage", ["edited", "line removed", "link", "no line"])
def test_a_history_that_was_edited_is_restored_from_a_backup(world: World, damage: str) -> None:
    path = world.name_folder / "history.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    if damage == "edited":
        path.write_bytes(b"".join([*lines[:3], lines[3].replace(b"ann", b"bob"), *lines[4:]]))
    elif damage == "line removed":
        path.write_bytes(b"".join(lines[1:]))
    elif damage == "no line":
        path.write_bytes(b"".join([b"{}\n", *lines[1:]]))
    else:
        path.rename(path.with_name("elsewhere"))
        path.symlink_to("elsewhere")
        assert "Replace it by the file that it leads to" in told(world)
        os.replace(path.with_name("elsewhere"), path)
        assert_sound(world, world.champion)
        return
    assert "restore the file from a backup" in told(world).lower()
    world.restore_backup(path)
    assert_sound(world, world.champion)


def test_what_is_whole_is_not_forgotten(world: World) -> None:
    with pytest.raises(ConfigError, match="is whole"):
        forget(world.registry, NAME, world.first, by="ann", reason="x")
    with pytest.raises(ConfigError, match="cannot be empty"):
        forget(world.registry, NAME, world.first, by="ann", reason=" ")


def test_a_champion_replaced_through_its_link_is_found_by_the_hourly_check(
    world: World, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that saves an adapter there writes a new file under the old name."""
    assert check_champion(world.registry, NAME) == world.champion
    place = world.version(world.champion)
    place.chmod(0o755)
    weights = make_run(7) / "adapter" / "adapters.safetensors"
    shutil.copyfile(weights, world.folder / "new")
    os.replace(world.folder / "new", place / "adapters.safetensors")
    assert "adapters.safetensors: has changed" in told(world)


def test_the_hourly_check_reads_no_bytes_of_files_that_are_the_same(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NESTED_TUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kept_hashes, "MIN_FILE_AGE_TO_KEEP_HASH", -1.0)
    hashed: list[Path] = []

    def count(path: Path, **options: Any) -> str:
        hashed.append(path)
        return regular_sha256(path, **options)

    monkeypatch.setattr(kept_hashes, "regular_sha256", count)
    files = len([*(world.registry / NAME / "champion").iterdir()]) - 1  # all but the manifest
    check_champion(world.registry, NAME)
    assert len(hashed) == files
    check_champion(world.registry, NAME)
    assert len(hashed) == files
    for entry in (tmp_path / "cache" / "hashes").iterdir():
        old = entry.stat().st_mtime - 25 * 3600
        os.utime(entry, (old, old))
    check_champion(world.registry, NAME)
    assert len(hashed) == 2 * files


def test_a_champion_without_another_version_or_run_is_forgotten_by_taking_the_link_away(
    tmp_path: Path, registry: Path
) -> None:
    run = write_run(tmp_path / "run-1", 1)
    version = register_and_promote(run, registry, NAME, {}, by="ann").version
    world = World(tmp_path, registry, version, version, version)
    remove_version(world, version)
    with pytest.raises(ConfigError, match=r"remove .*champion\)"):
        forget(registry, NAME, version, by="ann", reason="lost")
    (registry / NAME / "champion").unlink()
    forget(registry, NAME, version, by="ann", reason="lost")
    assert_sound(world, None)
