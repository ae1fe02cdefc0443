"""The points of a sweep: combinations of values, and the configuration that each of them makes.

Points are compared after equal data: another batch_size changes how many batches a run has.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import JsonValue

from nested_core.config.loading import lay_over, parse_config
from nested_core.config.schema import FineTuneConfig
from nested_core.errors import ConfigError

Point = dict[str, JsonValue]
# Keys that change which tokens or examples a loss is of, so that losses cannot be compared.
KEYS_OF_THE_LOSS = (
    *("mask_prompt", "max_seq_length", "data", "hf_dataset", "data_policy", "val_batches"),
    *("training.supervise", "training.reference", "gate.held_out"),
)
LENGTH_KEYS = frozenset(("iters", "training.epochs", "steps_per_eval"))
RANK, SCALE, ALPHA = (f"lora_parameters.{name}" for name in ("rank", "scale", "alpha"))


def grid_points(grid: Mapping[str, Sequence[JsonValue]]) -> list[Point]:
    """Every combination of one value a key; keys by name, for a database keeps no order of them."""
    keys = sorted(grid)
    combinations = itertools.product(*(grid[key] for key in keys))
    return [dict(zip(keys, values, strict=True)) for values in combinations]


def refuse_incomparable_keys(keys: Iterable[str], base: FineTuneConfig) -> None:
    """Raise ConfigError for a key under which the runs' losses are of different things.

    And for the learning rate where a schedule decides in its place, as in mlx_lm.lora.
    """
    keys = sorted(keys)
    bad = [
        key
        for key in keys
        if key.partition(".")[0] in ("registry", *KEYS_OF_THE_LOSS) or key in KEYS_OF_THE_LOSS
    ]
    if bad:
        raise ConfigError(
            f"sweep: the grid varies {', '.join(bad)}. A sweep compares losses on the same tokens "
            f"of the same examples, and registers in one place. Give each value a sweep of its own."
        )
    if "learning_rate" in keys and base.lr_schedule is not None:
        raise ConfigError(
            "sweep: lr_schedule has a rate of its own, so that learning_rate would change nothing. "
            "Give training.decay: cosine in its place, or vary lr_schedule."
        )


def settings_of_point(base: FineTuneConfig, point: Point) -> dict[str, Any]:
    """The values of a point's configuration; an error if it cannot run.

    A point that varies the rank alone keeps rank x scale, as `alpha` does in a file. One that
    varies batch_size alone keeps the number of examples that it trains on, and after how many it is
    evaluated.
    """
    given: Point = dict(point)
    lora = base.lora_parameters
    if RANK in given and not {SCALE, ALPHA} & given.keys():
        given[ALPHA] = lora.rank * lora.scale
    if "batch_size" in given and not LENGTH_KEYS & given.keys():
        given |= _scale_lengths(base, given["batch_size"])
    values = base.model_dump(mode="json")
    if ALPHA in given:
        values["lora_parameters"].pop("scale")
    values = lay_over(values, given)
    parse_config(values, source=f"sweep: the point {point}")
    return values


def _scale_lengths(base: FineTuneConfig, batch_size: JsonValue) -> Point:
    """The lengths that are counted in batches, so that they hold as many examples as the base's."""
    if not isinstance(batch_size, int) or batch_size < 1:
        return {}  # which is refused as such
    keys = ("iters", "steps_per_eval") if base.training.epochs is None else ("steps_per_eval",)
    counts = {key: getattr(base, key) for key in keys}
    return {
        key: math.ceil(count * base.batch_size / batch_size)
        for key, count in counts.items()
        if isinstance(count, int)
    }


def step_examples(config: FineTuneConfig) -> int:
    """The examples of an optimizer step."""
    return config.batch_size * config.grad_accumulation_steps
