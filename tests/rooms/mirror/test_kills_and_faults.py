"""Authors and readers of a mirror that are killed, and networks that lose or spoil what they carry.

NESTED_TUNE_MIRROR_FAULTS says how many of each; the default is what `make production-test` waits
for.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from nested_core.errors import NestedTuneError
from nested_core.registry import read_champion, read_verified_version
from nested_core.registry.ledger import read_ledger
from nested_core.registry.mirroring import EVERY_VERSION, open_copy, set_mirror, update_copy
from nested_core.rooms.housekeeping.registry_audit import audit
from nested_core.rooms.mirror import object_storage
from nested_core.rooms.mirror.author import publish
from tests.core.registry.conftest import write_run
from tests.rooms.mirror.conftest import NAME, promote_new
from tests.rooms.mirror.forked_steps import Forker
from tests.rooms.mirror.s3_server import FAULTS, FaultyProxy

COUNT = int(os.environ.get("NESTED_TUNE_MIRROR_FAULTS", "20"))
SECONDS_OF_A_STEP = {"promote": 0.25, "read": 0.08}  # about what one takes that nothing disturbs
pytestmark = pytest.mark.production


@pytest.fixture
def forker(address: str) -> Iterator[Forker]:
    """Processes that promote and read."""
    forker = Forker()
    yield forker
    forker.close()


def require_all_there(registry: Path, address: str) -> None:
    """The mirror is brought up to date, and a reader finds all of it sound."""
    publish(registry / NAME, address)
    copy = open_copy(address)
    update_copy(copy, NAME, EVERY_VERSION)
    assert read_champion(copy, NAME) == read_champion(registry, NAME)
    assert audit(copy, NAME).findings == ()
    assert audit(registry, NAME).findings == ()
    copied, here = (place / NAME / "history.jsonl" for place in (copy, registry))
    assert copied.read_bytes() == here.read_bytes()


def test_killed_authors_and_readers_lose_and_tear_nothing(
    registry, address, forker, tmp_path, monkeypatch
) -> None:
    chance = random.Random(87)
    set_mirror(registry / NAME, address)
    publish(registry / NAME, address)
    killed = {"promote": 0, "read": 0}
    environments = [str(tmp_path / f"cache-{number}") for number in range(3)]
    for seed in range(100, 100 + COUNT):
        for step in ("promote", "read"):
            runs = [str(write_run(tmp_path / f"killed-{seed}", seed))] if step == "promote" else []
            monkeypatch.setenv("NESTED_TUNE_CACHE", chance.choice(environments))
            place = {"registry": str(registry)} if runs else {"address": address}
            code = forker.run(
                chance.uniform(0, SECONDS_OF_A_STEP[step]), step=step, runs=runs, **place
            )
            assert code in (0, -9)
            killed[step] += code == -9
            # Whatever was cut off, a reader gets a champion of the history, whole
            assert forker.run(step="read", address=address) == 0
            copy = open_copy(address)
            champion = read_champion(copy, NAME)
            promoted = {e.version for e in read_ledger(registry / NAME).changes()}
            assert champion in promoted
    assert min(killed.values()) > COUNT // 4, killed
    require_all_there(registry, address)
    print(f"killed: {killed}")


def test_a_network_that_spoils_requests_loses_and_tears_nothing(
    registry, address, proxy: FaultyProxy, server, monkeypatch
) -> None:
    monkeypatch.setattr(object_storage, "REQUEST_SECONDS", 2.0)
    chance = random.Random(87)
    set_mirror(registry / NAME, address)
    publish(registry / NAME, address)
    copy = open_copy(address)
    update_copy(copy, NAME)
    failed = {"promotions": 0, "readings": 0}
    proxy.counts.clear()
    seed = 200
    while sum(n for fault, n in proxy.counts.items() if fault != "none") < COUNT:
        # Most of the faults come one by one, which is got over; some all at once, which is not
        share = chance.choice((0.1, 0.3, 0.9))
        proxy.choose = lambda: chance.choice(FAULTS) if chance.random() < share else "none"  # noqa: B023
        seed += 1
        promoted = promote_new(registry, seed)
        assert read_champion(registry, NAME) == promoted  # a promotion is never lost to its mirror
        before = read_champion(copy, NAME)
        try:
            update_copy(copy, NAME)
        except NestedTuneError:
            failed["readings"] += 1
            assert read_champion(copy, NAME) == before
        champion = read_champion(copy, NAME)
        assert champion is not None
        assert read_verified_version(copy, NAME, champion).version == champion
        failed["promotions"] += champion != promoted
    print(f"faults: {proxy.counts}; of {seed - 200} promotions not followed at once: {failed}")
    proxy.choose = lambda: "none"
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    require_all_there(registry, address)
