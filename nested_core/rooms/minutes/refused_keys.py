"""The keys with which no steps can be counted for `training.minutes`."""

from __future__ import annotations

from collections.abc import Iterator

from nested_core.config.schema import ConfigRules, FineTuneConfig


def iterate_problems(config: FineTuneConfig) -> Iterator[str]:
    """Yield a message that names the given keys with which no steps can be counted."""
    training, continual = config.training, config.continual
    if training.minutes is None:
        return
    is_given = {
        "continual.replay.fraction": config.replay_fraction > 0,
        f"continual.policy: {continual.policy}": continual.policy != "continue",
        "training.processes": training.processes != 1,
        "training.hostfile": training.hostfile is not None,
    }
    if given := [name for name, is_there in is_given.items() if is_there]:
        yield (
            f"training.minutes: {training.minutes:g} minutes are counted in steps of one process, "
            f"without replay. Give iters, or leave {', '.join(given)} out"
        )


RULES = ConfigRules(iterate_problems)
