"""Nights of preferences: pairs are replayed, and `base` is the reference of a run that goes on."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest

from nested_core.config.loading import parse_config
from nested_core.config.schema import FineTuneConfig
from nested_core.errors import ConfigError
from nested_core.pipeline.finetune import FinetuneResult, finetune
from nested_core.records.metrics import read_metrics
from nested_core.records.verdict import Verdict
from nested_core.rooms.preferences.reference_likelihoods import (
    ReferenceLikelihoods,
    find_likelihoods_file,
    read_likelihoods,
)
from nested_core.rooms.replay.replay_record import read_replay
from nested_core.storage.adapter import read_adapter
from nested_core.storage.run_directory import open_run
from tests.rooms.preferences.pair_data import list_pairs, make_values, write_rows

pytestmark = pytest.mark.slow("trains and judges three nights")
TONIGHT = 24  # rows of the first night; the second has 16 others
REPLAYED = 16  # of 8 batches of 8 a quarter


@dataclass(frozen=True)
class Night:
    """A night that was trained, judged and registered."""

    result: FinetuneResult

    @property
    def verdict(self) -> Verdict:
        assert self.result.verdict is not None
        return self.result.verdict

    @property
    def first_loss(self) -> float:
        records = read_metrics(self.result.run.metrics)
        return float(next(record["val_loss"] for record in records if "val_loss" in record))

    @property
    def likelihoods(self) -> ReferenceLikelihoods:
        kept = read_likelihoods(find_likelihoods_file(self.result.run))
        assert kept is not None
        return kept


def make_night(registry: Path, data: Path, reference: str, **changes: Any) -> FineTuneConfig:
    values = make_values(
        data,
        "dpo",
        iters=8,
        steps_per_eval=4,
        save_every=8,
        learning_rate=3e-4,
        registry={"path": str(registry), "name": "short", "promote": "always"},
        continual={"from": "champion", "replay": {"fraction": 0.25}},
    )
    values["training"] |= {"loss_config": {"reference": reference}, "sample_tokens": 1}
    return parse_config(values | changes, source="night.yaml")


def run_night(folder: Path, name: str, config: FineTuneConfig) -> Night:
    return Night(finetune(config, open_run(folder / name), progress=False))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of two nights: other pairs to train on, and other held-out ones."""
    made = tmp_path_factory.mktemp("nights")
    train, valid = list_pairs("train")[:40], list_pairs("valid")
    write_rows(made / "first-data", {"train": train[:TONIGHT], "valid": valid[:5]})
    write_rows(made / "second-data", {"train": train[TONIGHT:], "valid": valid[5:10]})
    return made


@pytest.fixture(scope="module")
def first(folder: Path) -> Night:
    return run_night(
        folder, "first", make_night(folder / "registry", folder / "first-data", "initial")
    )


@pytest.fixture(scope="module", params=["base", "initial"])
def second(folder: Path, first: Night, request: pytest.FixtureRequest) -> Night:
    """The night after it, which goes on from its champion with either reference."""
    assert first.verdict.has_passed
    registry = copytree(folder / "registry", folder / request.param, symlinks=True)
    config = make_night(registry, folder / "second-data", request.param)
    return run_night(folder, f"second-{request.param}", config)


def test_earlier_pairs_are_replayed_and_the_reference_knows_them(second: Night) -> None:
    run = second.result.run
    assert read_replay(run.replay).examples == REPLAYED
    rows = [json.loads(line) for line in run.replayed_rows.read_text().splitlines()]
    assert len(rows) == REPLAYED
    assert all({"chosen", "rejected"} <= row.keys() for row in rows)
    assert len(second.likelihoods.by_conversation) == 2 * (16 + REPLAYED + 5)


def test_the_reference_of_a_run_that_goes_on_is_the_one_that_is_named(
    second: Night, first: Night
) -> None:
    assert second.result.run.initial != first.result.run.initial
    started = read_adapter(second.result.run.initial).digest()
    assert started == first.verdict.trained.digest
    assert second.verdict.blocks["preferences"]["reference_error"] < 1e-3
    own, before = second.likelihoods.by_conversation, first.likelihoods.by_conversation
    shared = sorted(own.keys() & before.keys())
    assert len(shared) == 2 * REPLAYED
    apart = max(abs(own[digest] - before[digest]) for digest in shared)
    if second.likelihoods.reference == "base":  # the first night began from the base itself
        assert apart < 1e-3
        assert second.first_loss < math.log(2) - 0.01  # the champion learnt it already
    else:
        assert apart > 0.1
        assert second.first_loss == pytest.approx(math.log(2), abs=1e-4)


def test_the_champion_is_compared_on_both_nights_pairs(second: Night) -> None:
    champion = second.verdict.champion
    assert champion is not None
    assert (champion.examples, champion.unit) == (5, "nats/example")
    (ancestor,) = second.verdict.ancestors
    assert (ancestor.examples, ancestor.unit, ancestor.not_compared) == (5, "nats/example", None)


def test_rows_of_a_night_with_another_loss_are_refused_not_left_out(
    folder: Path, first: Night, tmp_path: Path
) -> None:
    assert first.verdict.has_passed
    rows = [
        {"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in list_pairs("train")
    ]
    data = write_rows(tmp_path / "data", {"train": rows[:24], "valid": rows[24:30]})
    registry = copytree(folder / "registry", tmp_path / "registry", symlinks=True)
    config = make_night(registry, data, "initial", training={"sample_tokens": 1})
    with pytest.raises(ConfigError) as refused:
        run_night(tmp_path, "answers", config)
    said = str(refused.value)
    assert said.startswith("continual.replay: earlier nights had another training.loss than null")
    assert "cannot be replayed (chosen and rejected are preference pairs: " in said
    assert "Set continual.replay.fraction: 0" in said
    assert refused.value.exit_code == 2
