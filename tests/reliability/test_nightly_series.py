"""A nightly series whose training and held-out data are new every night.

Each candidate goes on from the champion, is compared with it on the candidate's own held-out
examples, and takes its place if it is better beyond noise; else the message has the figures. A
candidate whose loss did not fall is not registered.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from random import Random

import numpy as np
import pytest

from nested_core.config.schema import FineTuneConfig
from nested_core.measure.losses.held_out_loss import (
    LoadedBase,
    choose_held_out_examples,
    read_nonempty_splits,
)
from nested_core.pipeline.continual import digest_held_out
from nested_core.pipeline.finetune import FinetuneResult, finetune
from nested_core.records.dataset import read_dataset_record
from nested_core.records.losses import ExampleLosses, read_example_losses
from nested_core.records.verdict import ChampionLoss
from nested_core.registry import read_champion, read_champion_changes
from nested_core.registry.versions import read_provenance, version_folder
from nested_core.storage.run_directory import RunDirectory
from tests.example import example_config
from tests.reliability.sentences import draw_examples, write_data

NAME = "sentences"
TRAIN, VALID, HELD_OUT = 16, 4, 60
NIGHTS = 5
FIGURE = r"[-+]?\d[\d.e-]*"
REPEATED_NIGHT = 3  # this one's held-out examples are in part those that night 1 was trained on
REPEATED = 9


@dataclass(frozen=True)
class Night:
    """What one night's run left: its result, and the champion before and after it."""

    config: FineTuneConfig
    result: FinetuneResult
    before: str | None
    after: str | None

    @property
    def losses(self) -> ExampleLosses:
        """Of each held-out example, from the run folder."""
        return read_example_losses(self.result.run.gate_losses)

    @property
    def compared(self) -> ChampionLoss | None:
        """The comparison with the champion, from the verdict."""
        assert self.result.verdict is not None
        return self.result.verdict.champion


def run_nights(folder: Path, nights: int) -> Iterator[Night]:
    """Night after night through the whole pipeline, under one configuration but for the data."""
    registry = folder / "registry"
    lines = iter(draw_examples(Random(20261122), nights * (TRAIN + VALID + HELD_OUT)))
    drawn = [[next(lines) for _ in range(TRAIN + VALID + HELD_OUT)] for _ in range(nights)]
    for night, examples in enumerate(drawn):
        held_out = examples[TRAIN + VALID :]
        if night == REPEATED_NIGHT:
            held_out[:REPEATED] = drawn[0][:REPEATED]
        splits = {"train": examples[:TRAIN], "valid": examples[TRAIN : TRAIN + VALID]}
        data = write_data(folder / f"data-{night}", splits | {"test": held_out})
        config = example_config(
            data=str(data),
            iters=8,
            steps_per_eval=8,
            learning_rate=5e-4,
            # As the nights of benchmarks/nights.md: at the whole rate, and without replay
            continual={"from": "champion", "rate": 1.0, "replay": {"fraction": 0.0}},
            registry={"path": str(registry), "name": NAME, "promote": "better"},
        )
        before = read_champion(registry, NAME) if night else None
        run = RunDirectory(folder / f"run-{night}")
        run.path.mkdir()
        result = finetune(config, run)
        yield Night(config, result, before, read_champion(registry, NAME))


def require_right_comparison(night: Night, compared: ChampionLoss) -> None:
    """The champion of that moment, on the candidate's examples, with the interval they give."""
    config, run = night.config, night.result.run
    assert compared.version == night.before
    assert compared.not_compared is None
    splits = read_nonempty_splits(config, run)
    held_out = choose_held_out_examples(splits)
    assert held_out is not None
    assert (held_out.file, len(held_out.split)) == ("test.jsonl", HELD_OUT)
    assert night.losses.lines.tolist() == held_out.split.lines.tolist()
    assert compared.examples + (compared.left_out or 0) == HELD_OUT

    path, name = str(config.registry.path), str(config.registry.name)
    champion = version_folder(Path(path), name, compared.version)
    ((sums, tokens),) = LoadedBase.load(config).example_loss_sums([champion], held_out.split)
    shared = night.losses.examples_with_champion_loss()
    is_shared = np.isin(held_out.split.lines, shared.lines)
    assert shared.champion is not None
    np.testing.assert_allclose(shared.champion, (sums / tokens)[is_shared], rtol=1e-5)

    assert compared.interval is not None
    weights, differences = shared.tokens, shared.after - shared.champion
    assert compared.difference == pytest.approx(np.average(differences, weights=weights))
    if np.ptp(weights) == 0:  # then scipy has the same question
        stats = import_module("scipy.stats")  # it takes two seconds
        quantile = stats.t.ppf(0.975, len(shared) - 1) * np.sqrt(len(shared) / (len(shared) - 1))
        level = 1 - 2 * stats.norm.sf(quantile)
        expected = stats.bootstrap(
            (differences,), np.mean, method="percentile", confidence_level=level, rng=0
        ).confidence_interval
        assert compared.interval == pytest.approx(
            tuple(expected), abs=0.1 * (expected[1] - expected[0])
        )


def is_lower(night: Night) -> bool:
    """Whether the mean held-out loss fell over the night; only then is its adapter registered."""
    losses = night.losses
    return bool(np.average(losses.after - losses.before, weights=losses.tokens) < 0)


def require_kept_champion(night: Night) -> None:
    """Nothing is registered where the loss did not fall; the sentence has it before and after."""
    assert night.result.version is None
    assert night.after == night.before is not None
    found = re.fullmatch(
        rf"kept the champion {night.before[:12]}: loss ({FIGURE}) -> ({FIGURE}) on test.jsonl, "
        rf"{HELD_OUT} examples, not better, and within the threshold",
        str(night.result.promotion),
    )
    assert found is not None, night.result.promotion
    losses = night.losses
    expected = [np.average(of, weights=losses.tokens) for of in (losses.before, losses.after)]
    assert [float(figure) for figure in found.groups()] == pytest.approx(expected, abs=0.001)


def require_right_decision(night: Night, compared: ChampionLoss) -> None:
    """Promoted if shown to be better, and by 0.005; else the champion stays, with the figures."""
    decision = night.result.promotion
    assert decision is not None
    assert compared.interval is not None
    assert compared.difference is not None
    if compared.interval[1] < 0 and compared.difference < -0.005:
        assert (decision, night.after) == ("promoted", night.result.version)
        return
    assert night.after == night.before != night.result.version
    assert compared.loss is not None
    if compared.interval[1] < 0:
        least = "registry.min_improvement asks for more than 0.005"
        assert decision.endswith(f"lower, by {-compared.difference:.2g}, and {least}")
        return
    found = re.fullmatch(
        rf"test loss ({FIGURE}) is not better by more than 0.005 than the champion's ({FIGURE}), "
        rf"or not significantly "
        rf"\(test.jsonl, {compared.examples} examples[^)]*\): ({FIGURE}) with a 95 % interval of "
        rf"({FIGURE}) to ({FIGURE}); these examples reliably detect changes of "
        rf"({FIGURE}) nats/token or more \(80 % power\)",
        decision,
    )
    assert found is not None, decision
    expected = (
        compared.loss + compared.difference,
        compared.loss,
        compared.difference,
        *compared.interval,
        None if compared.smallest_visible is None else 1.43 * compared.smallest_visible,
    )
    assert [float(figure) for figure in found.groups()] == pytest.approx(expected, rel=0.06)


def print_night(number: int, night: Night) -> None:
    compared = night.compared
    word = "no champion yet"
    if compared is not None:
        word = (
            f"{compared.examples} of {HELD_OUT} examples: {compared.loss:.4f} "
            f"{compared.difference:+.4f}, {compared.interval}"
        )
    print(f"night {number + 1}: {word}: {night.result.promotion}")


@pytest.mark.slow("trains and judges a run for each night")
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("nights", [2, pytest.param(NIGHTS, marks=pytest.mark.reliability)])
def test_each_night_is_compared_with_the_champion_on_its_own_examples(
    tmp_path: Path, nights: int, capsys: pytest.CaptureFixture[str]
) -> None:
    registry = tmp_path / "registry"
    promoted, validation_digests = [], set()
    for number, night in enumerate(run_nights(tmp_path, nights)):
        with capsys.disabled():
            print_night(number, night)
        version, compared = night.result.version, night.compared
        if compared is None:
            assert number == 0
            assert (night.before, night.result.promotion) == (None, "promoted")
        else:
            require_right_comparison(night, compared)
            assert compared.left_out == (REPEATED if number == REPEATED_NIGHT else 0)
            if is_lower(night):
                require_right_decision(night, compared)
            else:
                require_kept_champion(night)
        digest = digest_held_out(night.config, read_dataset_record(night.result.run.dataset))
        validation_digests.add(digest)
        assert (version is not None) == is_lower(night)
        if version is not None:
            recorded = read_provenance(version_folder(registry, NAME, version))
            assert recorded["champion_at_gate"] == night.before
            assert recorded["parent"] == night.before
            assert recorded["validation_digest"] == digest
        gate = json.loads(night.result.run.gate.read_bytes())
        assert (gate["champion"] or {}).get("version") == night.before
        if night.result.promotion == "promoted":
            promoted.append(version)
    assert len(validation_digests) == nights
    assert [change.version for change in read_champion_changes(registry, NAME)] == promoted
    assert read_champion(registry, NAME) == promoted[-1]
    if nights == NIGHTS:
        assert 2 <= len(promoted) < NIGHTS, "both decisions are to be seen"
