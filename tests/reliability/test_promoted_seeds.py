"""What `promote: better` promotes is better on fresh data: 50 pairs of seeds of one configuration.

Each pair has a draw of its own: few examples to train both on, held-out ones to compare them on,
and 2,000 fresh ones, all of one distribution.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random

import pytest

from nested_core.config.schema import FineTuneConfig
from nested_core.data.dataset_loading import load_run_data
from nested_core.measure.losses.held_out_loss import LoadedBase
from nested_core.pipeline.finetune import finetune
from nested_core.records.paired_difference import PairedDifference, compare_pairs
from nested_core.records.verdict import ChampionLoss
from nested_core.storage.adapter import read_adapter
from nested_core.storage.run_directory import RunDirectory
from tests.example import example_config
from tests.reliability.sentences import draw_examples, write_data

PAIRS = 50
FEWEST_PROMOTED = 10  # of fewer no share could be told
SHARE_BETTER = 0.95
TRAIN, VALID, HELD_OUT, FRESH = 24, 8, 200, 2_000


@dataclass(frozen=True)
class SeedPair:
    """A champion and a candidate of two seeds: what the gate measured, and what was decided.

    champion, candidate: their adapter folders.
    decision: "promoted", or why the candidate was not.
    """

    champion: Path
    candidate: Path
    measured: ChampionLoss
    decision: str
    fresh_data: Path

    @property
    def is_promoted(self) -> bool:
        """Whether the candidate took the champion's place."""
        return self.decision == "promoted"


def draw_data(folder: Path, seed: int) -> tuple[Path, Path]:
    """Two data folders of one draw: with held-out examples as the test set, and with fresh ones."""
    lines = iter(draw_examples(Random(seed), TRAIN + VALID + HELD_OUT + FRESH))
    train, valid, held_out = (list(islice(lines, count)) for count in (TRAIN, VALID, HELD_OUT))
    splits = {"train": train, "valid": valid}
    return (
        write_data(folder / "data", splits | {"test": held_out}),
        write_data(folder / "fresh", splits | {"test": list(lines)}),
    )


def configure(folder: Path, data: Path, seed: int) -> FineTuneConfig:
    """A short training on few examples, so that seeds make a difference."""
    registry = {"path": str(folder / "registry"), "name": "sentences", "promote": "better"}
    return example_config(
        data=str(data), seed=seed, iters=24, batch_size=4, steps_per_eval=24, registry=registry
    )


def promote_seed_over_seed(folder: Path, pair: int) -> SeedPair:
    """Train two seeds on the pair's own draw; the first is champion, the second is selected."""
    data, fresh_data = draw_data(folder, pair)
    runs = [RunDirectory(folder / name) for name in ("champion", "candidate")]
    for run, seed in zip(runs, (2 * pair, 2 * pair + 1), strict=True):
        run.path.mkdir()
        done = finetune(configure(folder, data, seed), run)
    assert done.promotion is not None
    assert done.verdict is not None
    assert done.verdict.champion is not None
    assert done.verdict.champion.version == read_adapter(runs[0].adapter).digest()
    assert done.verdict.champion.examples == HELD_OUT
    return SeedPair(
        runs[0].adapter, runs[1].adapter, done.verdict.champion, done.promotion, fresh_data
    )


def compare_on_fresh_data(base: LoadedBase, pair: SeedPair) -> PairedDifference:
    """Candidate minus champion on 2,000 fresh examples, in nats/token."""
    config = base.config.model_copy(update={"data": str(pair.fresh_data)})
    split = load_run_data(config)[1]["test"]
    assert len(split) == FRESH
    (champion, tokens), (candidate, _) = base.example_loss_sums(
        (pair.champion, pair.candidate), split
    )
    return compare_pairs(champion / tokens, candidate / tokens, tokens)


@pytest.mark.reliability
@pytest.mark.timeout(7200)
def test_what_better_promotes_is_better_on_fresh_examples(tmp_path, capsys) -> None:
    pairs = [promote_seed_over_seed(tmp_path / f"pair-{pair}", pair) for pair in range(PAIRS)]
    promoted = [pair for pair in pairs if pair.is_promoted]
    base = LoadedBase.load(configure(tmp_path, tmp_path, 0).model_copy(update={"batch_size": 64}))
    fresh = list(map(partial(compare_on_fresh_data, base), promoted))
    better = sum(difference.mean < 0 for difference in fresh)
    with capsys.disabled():
        print(f"\n{len(promoted)} of {PAIRS} pairs promoted, {better} of them better on {FRESH:,}")
        for pair, difference in zip(promoted, fresh, strict=True):
            interval = f"{difference.low:+.4f} to {difference.high:+.4f}"
            print(
                f"  held-out {pair.measured.difference:+.4f}, fresh {difference.mean:+.4f} "
                f"({interval})"
            )
    assert len(promoted) >= FEWEST_PROMOTED
    assert better >= SHARE_BETTER * len(promoted)
