"""The arms of a sweep: the configuration that each makes, and sweep.json, how far each got.

Points are compared by their losses, so that they vary nothing that a loss is made of.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from nested_core.config.key_properties import iterate_keys
from nested_core.config.loading import lay_over, parse_config
from nested_core.config.schema import FineTuneConfig
from nested_core.errors import ConfigError
from nested_core.storage.json_file import JsonFile
from nested_core.text.loss_format import format_loss

SWEEP_NAME = "sweep.json"
Point = dict[str, JsonValue]
Score = tuple[float, ...]
# What makes settings incomparable beside what a loss is made of: lengths, and examples a step.
OTHER_KEYS_LEFT_OUT = (
    *("iters", "training.epochs", "training.minutes", "steps_per_eval", "registry"),
    *("batch_size", "grad_accumulation_steps"),
)
RANK, SCALE, ALPHA = (f"lora_parameters.{name}" for name in ("rank", "scale", "alpha"))


@dataclass(frozen=True)
class Arm:
    """One setting that is tried.

    point: key -> value, where it differs from the configuration; empty for that itself.
    scores: by the rung's step, the best so far, lower first: the validation loss,
        or the share of wrong answers and the loss; None if it was not finite or training
        diverged.
    """

    point: Point
    scores: dict[int, Score | None] = field(default_factory=dict)

    def describe(self) -> str:
        """Return its settings in words."""
        if not self.point:
            return "the configuration itself"
        return ", ".join(f"{key}={_format(value)}" for key, value in self.point.items())

    def last_score(self) -> tuple[int | None, str]:
        """Return the last rung that it reached, and the best loss or share of right answers."""
        step = max(self.scores, default=None)
        score = None if step is None else self.scores[step]
        if score is None:
            return step, "diverged"
        return step, format_loss(score[0]) if len(score) == 1 else f"{1 - score[0]:.0%} right"


@dataclass(frozen=True)
class SweepRecord:
    """A sweep so far; what it decides follows from this alone, so that it goes on as it began.

    select_by: `loss`, or the suite whose answers choose.
    digest: of the configuration and what was asked for; a resumed sweep has the same.
    rungs: the optimizer steps at which arms are compared; the last one is a whole run.
    arms: the configuration itself first.
    chosen: the number of the chosen arm, once it is known.
    """

    digest: str
    select_by: str
    rungs: tuple[int, ...]
    arms: tuple[Arm, ...]
    chosen: int | None = None

    @property
    def trained(self) -> int:
        """Optimizer steps of all arms so far, up to the last rung of each."""
        return sum(max(arm.scores, default=0) for arm in self.arms)

    def with_score(self, number: int, step: int, score: Score | None) -> SweepRecord:
        """Return the record with an arm's score at a rung."""
        arm = replace(self.arms[number], scores=self.arms[number].scores | {step: score})
        return replace(self, arms=(*self.arms[:number], arm, *self.arms[number + 1 :]))

    def write(self, folder: Path) -> None:
        """Write sweep.json."""
        SWEEP_FILE.write(folder / SWEEP_NAME, self)


SWEEP_FILE = JsonFile(SweepRecord, 2**22)


def _format(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def grid_points(grid: Mapping[str, Sequence[JsonValue]]) -> list[Point]:
    """Return every combination of one value a key, in the order of the keys."""
    combinations = itertools.product(*grid.values())
    return [dict(zip(grid, values, strict=True)) for values in combinations]


def refuse_incomparable_keys(names: Iterable[str], base: FineTuneConfig) -> None:
    """Raise ConfigError for keys whose values make the runs' losses incomparable.

    Also raised for `learning_rate` if `lr_schedule` is set, which replaces it as in mlx_lm.lora.
    """
    names = sorted(names)
    left_out = {key.name for key in iterate_keys(FineTuneConfig) if key.in_loss is not None}
    left_out.update(OTHER_KEYS_LEFT_OUT)
    if base.training.loss is not None:  # it may compare with where a run begins
        left_out |= {"resume_adapter_file", "continual.from"}
    # A section counts as the keys in it, and a key as its section
    parts = [(f"{name}.", f"{key}.") for name in names for key in left_out]
    if bad := {name for name, key in parts if name.startswith(key) or key.startswith(name)}:
        keys = ", ".join(sorted(name.removesuffix(".") for name in bad))
        raise ConfigError(
            f"sweep: the grid varies {keys}. Settings are compared by one loss of the same rows "
            f"and tokens, after as many steps of as many examples, and nothing is registered. Give "
            f"each value a run of its own, and compare what they answer (`nested-tune evaluate`)."
        )
    if "learning_rate" in names and base.lr_schedule is not None:
        raise ConfigError(
            "sweep: lr_schedule has a rate of its own, so that learning_rate would change nothing. "
            "Give training.decay: cosine in its place, or vary lr_schedule."
        )


def settings_of_point(base: FineTuneConfig, point: Point) -> dict[str, Any]:
    """Return the configuration with a point's values in place of its own; ConfigError if invalid.

    A point that changes the rank, and neither scale nor alpha, keeps rank x scale.
    """
    changes: Point = dict(point)
    lora = base.lora_parameters
    if RANK in changes and not {SCALE, ALPHA} & changes.keys():
        changes[ALPHA] = lora.rank * lora.scale
    values = base.model_dump(mode="json")
    if ALPHA in changes:
        values["lora_parameters"].pop("scale")
    values = lay_over(values, changes)
    parse_config(values, source=f"sweep: the point {point}")
    return values
