"""Several promoters and readers at once: one champion, one ordered history, no torn view."""

from __future__ import annotations

import fcntl
import os
import signal
import time
from contextlib import suppress

import pytest

from nested_core.errors import ConfigError, DamagedError
from nested_core.registry import history, list_versions, read_champion
from nested_core.registry.folders import exclusive_folder_lock
from nested_core.storage.adapter import read_adapter
from nested_core.storage.output_places import REGISTRY_LOCK_NAME
from tests.builders.registering import promote, register
from tests.core.registry.faults import in_processes
from tests.core.registry.states import NAME, assert_settled
from tests.left_out import needs_rooms
from tests.registry_care import audit, collect_garbage, module_of

# The children of these forks only touch files; that the parent has threads does not matter.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
    pytest.mark.slow("races processes"),
]


def test_holder_of_the_lock_who_is_killed_blocks_nobody(three, registry):
    ready, holder = os.pipe(), os.fork()
    if holder == 0:
        descriptor = os.open(registry / NAME / ".lock", os.O_RDWR)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.write(ready[1], b"1")
        signal.pause()
    os.read(ready[0], 1)
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    assert promote(registry, NAME, three[2], by="ann").outcome == "promoted"


def test_of_many_who_expect_the_same_champion_exactly_one_wins(three, registry, tmp_path):
    def work(index: int) -> None:
        result = promote(
            registry, NAME, three[2 * (index % 2)], by=str(index), expected_champion=three[1]
        )
        (tmp_path / f"outcome-{index}").write_text(result.outcome)

    in_processes(8, work)
    outcomes = [path.read_text() for path in tmp_path.glob("outcome-*")]
    assert outcomes.count("promoted") == 1
    assert set(outcomes) <= {"promoted", "superseded", "already_champion"}
    assert len(history(registry, NAME)) == 3


@pytest.mark.parametrize("count", [40, pytest.param(200, marks=pytest.mark.reliability)])
def test_four_processes_promoting_many_versions_at_once_lose_none(
    make_run, registry, capsys, count
):
    runs = [make_run(seed) for seed in range(count)]
    digests = [read_adapter(run / "adapter").digest() for run in runs]

    def work(index: int) -> None:
        for run in runs[index::4]:
            promote(registry, NAME, register(run, registry, NAME, {}), by=f"process {index}")

    started = time.perf_counter()
    in_processes(4, work)
    seconds = time.perf_counter() - started
    lines = history(registry, NAME)
    assert sorted(line["version"] for line in lines) == list_versions(registry, NAME)
    assert list_versions(registry, NAME) == sorted(digests)
    assert [line["previous"] for line in lines] == [None, *(li["version"] for li in lines[:-1])]
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)
    for index in range(4):  # what one process did stands in the order in which it did it
        own = [li["version"] for li in lines if li["by"] == f"process {index}"]
        assert own == digests[index::4]
    assert read_champion(registry, NAME) == lines[-1]["version"]
    assert_settled(registry)
    with capsys.disabled():
        print(f"\n{count} versions registered and promoted by 4 processes in {seconds:.1f} s")


@needs_rooms("housekeeping")
@pytest.mark.slow("threads that promote and read")
@pytest.mark.usefixtures("no_time_to_decide")
def test_gc_beside_promoters_and_readers_leaves_a_sound_registry_at_every_moment(
    make_run, registry
):
    runs = [make_run(seed) for seed in range(5)]
    versions = [register(run, registry, NAME, {}) for run in runs]
    for version in versions:
        promote(registry, NAME, version, by="ann")

    def work(index: int) -> None:
        for turn in range(40):
            if index == 0:
                version = register(runs[turn % 5], registry, NAME, {})
                with suppress(ConfigError):  # collected before it was promoted
                    promote(registry, NAME, version, by="ann")
            elif index == 1:
                collect_garbage(registry, NAME, by="gc", keep=0)
            else:
                assert audit(registry, NAME).findings == ()
                assert read_champion(registry, NAME) in versions
                assert "unfinished" not in history(registry, NAME)[-1]

    in_processes(3, work)
    collect_garbage(registry, NAME, by="gc", keep=0)
    assert len(list_versions(registry, NAME)) == 2
    assert_settled(registry)


@pytest.mark.parametrize("damage", [DamagedError("5 bytes are missing"), FileNotFoundError()])
def test_damage_after_the_lock_was_removed_is_told_as_the_lock(three, registry, damage) -> None:
    def change(*, removes_lock: bool) -> None:
        with exclusive_folder_lock(registry / NAME):
            if removes_lock:
                (registry / NAME / REGISTRY_LOCK_NAME).unlink()
            raise damage

    with pytest.raises(type(damage)) as caught:
        change(removes_lock=False)
    assert caught.value is damage
    with pytest.raises(DamagedError, match=r"\.lock was removed or replaced"):
        change(removes_lock=True)


@pytest.mark.parametrize("is_below", [True, False])
def test_a_file_of_the_registry_that_goes_away_is_another_writer(three, registry, is_below) -> None:
    folder = registry / NAME
    gone = (folder if is_below else registry.parent / "run") / "adapter_config.json"
    with (
        pytest.raises(DamagedError if is_below else FileNotFoundError) as caught,
        exclusive_folder_lock(folder),
    ):
        raise FileNotFoundError(2, "No such file or directory", str(gone))
    assert not is_below or f"{gone} went away while" in str(caught.value)


@pytest.mark.parametrize("is_removed", [True, False])
def test_an_audit_that_a_writer_could_disturb_proves_nothing(
    three, registry, monkeypatch, is_removed
) -> None:
    record = registry / NAME / "champion.json"
    record.chmod(0o644)
    record.write_text("{}")
    read = module_of("registry_audit")._read_link_and_ledger

    def disturbed(folder):
        if is_removed:
            (folder / REGISTRY_LOCK_NAME).unlink(missing_ok=True)
        return read(folder)

    monkeypatch.setattr(module_of("registry_audit"), "_read_link_and_ledger", disturbed)
    if is_removed:
        with pytest.raises(DamagedError, match=r"\.lock was removed or replaced"):
            audit(registry, NAME)
    else:
        assert audit(registry, NAME).findings != ()
