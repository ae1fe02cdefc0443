"""Ranks, without processes: rows, sums, checksums, what a configuration may ask for."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from nested_core.config.resume import refuse_differences_on_resume
from nested_core.data.batches import BatchRows, make_batch_arrays
from nested_core.data.tokens.tokenized_split import TokenizedSplit
from nested_core.errors import ConfigError, TrainingProcessLost
from nested_core.pipeline.preflight import check_before_start
from nested_core.records.plan import list_rank_counts, read_plan
from nested_core.rooms.ranks import mlx_launch, rank_group
from nested_core.rooms.ranks.mlx_launch import (
    count_ranks,
    find_consecutive_free_ports,
    launch_arguments,
    rank_device,
)
from nested_core.rooms.ranks.rank_group import RankGroup
from nested_core.rooms.ranks.rank_world import (
    RankWorld,
    checksum,
    pack_gradients_for_sum,
    unpack_summed_gradients,
)
from nested_core.storage.run_directory import RunDirectory
from nested_core.training.world import SINGLE_PROCESS_WORLD
from tests.example import example_config
from tests.runs import write_plan_of


def test_the_ranks_rows_are_the_batch_and_none_is_in_two() -> None:
    tokens = np.arange(1, 21, dtype=np.int32)
    mask = tokens % 4 != 1  # of five examples of four tokens, all but the first
    starts, lines = np.arange(0, 21, 4), np.arange(1, 6, dtype=np.int32)
    split = TokenizedSplit(tokens, mask, starts, lines, lines.astype(np.uint64))
    batch = BatchRows(np.array([3, 0, 4, 1, 2], np.int32), width=3)  # one row short of six
    whole = make_batch_arrays(split, batch, 6)
    for rank in range(3):
        part = make_batch_arrays(split, RankWorld(3, rank).own_rows(batch), 2)
        for found, expected in zip(part, whole, strict=True):
            assert found.tolist() == expected[rank::3].tolist()
    assert SINGLE_PROCESS_WORLD.own_rows(batch).rows.tolist() == batch.rows.tolist()


def test_dropout_differs_from_rank_to_rank_and_the_first_rank_draws_as_one_process() -> None:
    seeds = [RankWorld(4, rank).seed_of_step(7, 3) for rank in range(4)]
    assert seeds[0] == 7 * 2**32 + 3 == SINGLE_PROCESS_WORLD.seed_of_step(7, 3)
    assert len(set(seeds)) == 4
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_a_packed_step_comes_back_as_it_was() -> None:
    gradients = {"a": mx.arange(6.0).reshape(2, 3), "b": mx.array([7.0, 8.0], mx.bfloat16)}
    packed = pack_gradients_for_sum(gradients, mx.array(12), mx.array((True, False)))
    assert (packed.dtype, packed.nbytes) == (mx.float32, 4 * (6 + 2 + 3))
    found, weight, votes = unpack_summed_gradients(packed, gradients)
    assert {n: (g.tolist(), g.dtype) for n, g in found.items()} == {
        n: (g.tolist(), g.dtype) for n, g in gradients.items()
    }
    assert (weight.item(), votes.tolist()) == (12.0, [1.0, 0.0])


@given(st.integers(0, 6), st.integers(0, 31), st.sampled_from([mx.float32, mx.bfloat16, mx.uint64]))
def test_a_bit_anywhere_changes_the_checksum(place: int, bit: int, dtype: mx.Dtype) -> None:
    array = mx.arange(7).astype(dtype)
    bits = np.array(array.view(mx.uint8)).copy()
    bits[place * dtype.size + bit % (8 * dtype.size) // 8] ^= 1 << (bit % 8)
    other = mx.array(bits).view(dtype)
    assert checksum(array).item() != checksum(other).item()
    assert checksum(array).item() == checksum(mx.array(array)).item()


def test_two_elements_that_changed_places_change_the_checksum() -> None:
    assert checksum(mx.array([1.0, 2.0])).item() != checksum(mx.array([2.0, 1.0])).item()
    assert checksum(mx.array(3)).dtype == mx.uint32  # of a scalar too


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"processes": 0}, "greater than 0"),
        ({"processes": 3}, "training.processes 3 does not divide it"),
        ({"processes": 2, "hostfile": "hosts.json"}, "give only one"),
    ],
)
def test_a_number_of_ranks_that_cannot_work_is_refused(changes, message) -> None:
    with pytest.raises(ValidationError, match=message):
        example_config(batch_size=4, training=changes)


def test_a_reference_run_is_one_process() -> None:
    training = {"reference": "mlx_lm", "max_grad_norm": 0.0, "processes": 2}
    with pytest.raises(ValidationError, match="training.reference: one process"):
        example_config(training=training, nested={"frequencies": [1]})


def test_a_run_may_be_resumed_on_another_number_of_ranks_or_on_hosts(tmp_path: Path) -> None:
    old = example_config()
    for training in ({"processes": 2}, {"hostfile": "hosts.json"}):
        refuse_differences_on_resume(old, example_config(training=training), tmp_path)


def test_a_plan_says_where_the_number_of_ranks_changed(tmp_path: Path) -> None:
    run, said = RunDirectory(tmp_path), []
    for step, ranks in [(0, 2), (4, 2), (8, 1), (6, 4)]:  # the last after a damaged checkpoint
        write_plan_of(run, rank_counts=list_rank_counts(read_plan(run.plan), step, ranks))
        plan = read_plan(run.plan)
        assert plan is not None
        said.append(plan.describe_rank_counts() or "")
    assert said[:2] == ["", ""]
    assert "has changed: 2 from step 0 on, 1 from step 8 on." in said[2]
    assert "has changed: 2 from step 0 on, 4 from step 6 on." in said[3]


HOSTS = [{"ssh": name, "ips": [f"10.0.0.{i}"]} for i, name in enumerate(["a.example", "b@b"])]


def test_a_hostfile_counts_and_is_handed_to_mlx_launch(tmp_path: Path) -> None:
    path = tmp_path / "hosts.json"
    path.write_text(json.dumps(HOSTS))
    config = example_config(training={"hostfile": str(path)})
    assert count_ranks(config) == 2
    arguments = launch_arguments(config, 2, tmp_path)
    assert arguments[:2] == ["--hostfile", str(path)]
    assert arguments[-2:] == [str(tmp_path.resolve()), "2"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: .*hosts.json is missing"),
        ("{", "cannot be read as a list of hosts: JSONDecodeError"),
        (json.dumps(HOSTS[:1]), "two hosts or more"),
        (json.dumps([HOSTS[0], {"ssh": "-oProxyCommand=touch /tmp/x"}]), "'-oProxyCommand.*no ho"),
        (json.dumps(HOSTS + [{"ssh": "c"}]), "do not divide batch_size 2. Give a multiple of 3"),
    ],
)
def test_a_hostfile_that_cannot_be_used_is_refused_before_anything_is_written(
    tmp_path: Path, content: str | None, message: str
) -> None:
    path = tmp_path / "hosts.json"
    if content is not None:
        path.write_text(content)
    run = RunDirectory(tmp_path / "run")
    with pytest.raises(ConfigError, match=message):
        check_before_start(example_config(training={"hostfile": str(path)}), run)
    assert not run.path.exists()


LOSING_LAUNCHER = """
import sys
print("Current thread 0x00007f1cb31e9b80 (most recent call first):")
print("[WARN] Node with rank 1 exited with code 255", file=sys.stderr)
"""


def test_a_rank_that_is_lost_is_named_with_its_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_group, "LAUNCHER_COMMAND", (sys.executable, "-c", LOSING_LAUNCHER))
    group = RankGroup(2, hosts=["host-a", "host-b"])
    group.run([], dict(os.environ), None)
    with pytest.raises(TrainingProcessLost) as lost:
        group.raise_if_unfinished(tmp_path)
    said = str(lost.value)
    assert said.startswith("Rank 1 of 2 on host-b exited with code 255 (ssh's: it cannot reach")
    assert "Current thread 0x" in said  # what a rank prints there comes on standard output


def test_ranks_on_this_machine_listen_where_nobody_does() -> None:
    arguments = launch_arguments(example_config(training={"processes": 2}), 2, Path("run"))
    port = int(arguments[arguments.index("--starting-port") + 1])
    assert 20000 <= port < 32000
    assert arguments[:4] == ["-n", "2", "--backend", "ring"]


def test_a_port_that_somebody_has_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    free = find_consecutive_free_ports(2)
    with socket.socket() as held:
        held.bind(("127.0.0.1", free + 1))
        monkeypatch.setattr(mlx_launch, "PORTS", [free])
        with pytest.raises(OSError, match="no 2 free ports"):
            find_consecutive_free_ports(2)
        assert find_consecutive_free_ports(1) == free


def test_a_rank_takes_its_device_of_those_that_its_parent_was_given() -> None:
    assert [rank_device({"NESTED_TUNE_DEVICES": "6,4"}, rank) for rank in (0, 1)] == ["6", "4"]
    assert rank_device({}, 1) is None
