"""What training in several processes cannot be given with."""

from __future__ import annotations

from collections.abc import Iterator

from nested_core.config.schema import ConfigRules, FineTuneConfig


def iterate_problems(config: FineTuneConfig) -> Iterator[str]:
    """Yield conflicts of training in several processes; a hostfile is checked when it is read."""
    training, batch_size = config.training, config.batch_size
    if training.hostfile is not None and training.processes != 1:
        yield "training.processes and training.hostfile: give only one; each host is a rank"
    if batch_size % training.processes:
        yield (
            f"batch_size {batch_size} is the batch of all ranks together: training.processes "
            f"{training.processes} does not divide it"
        )


RULES = ConfigRules(iterate_problems)
