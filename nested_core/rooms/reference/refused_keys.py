"""What `training.reference: mlx_lm` cannot be given with: keys that mlx_lm.lora does not have."""

from __future__ import annotations

from collections.abc import Iterator

from nested_core.config.schema import ConfigRules, FineTuneConfig
from nested_core.config.sections import (
    MLX_LM_OPTIMIZERS,
    DataPolicy,
    NestedSection,
    TrainingSection,
)

# None of these changes what mlx_lm.lora computes.
ALLOWED_TRAINING_KEYS = frozenset(
    {
        "reference",
        "keep_checkpoints",
        "memory_limit_gb",
        "flat_loss_reports",
        "max_nonfinite_steps",
        "min_delta",
        "sample_tokens",
        "restarts",
        "hang_timeout",
        "processes",  # refused with a message of its own
        "hostfile",  # likewise
    }
)
MLX_LM_FORMATS = ("auto", "chat", "completions", "text", "tools")


def iterate_problems(config: FineTuneConfig) -> Iterator[str]:
    """Yield a message that names the given keys which a reference run cannot have."""
    training = config.training
    if training.reference is None:
        return
    if (training.processes, training.hostfile) != (1, None):
        yield "training.reference: one process; leave training.processes and hostfile out"
    is_changed = {
        f"optimizer {config.optimizer}": config.optimizer not in MLX_LM_OPTIMIZERS,
        "nested": config.nested != NestedSection(),
        "data_policy": config.data_policy != DataPolicy(),
        f"data_format {config.data_format}": config.data_format not in MLX_LM_FORMATS,
        "continual.replay": config.replay_fraction > 0,
        "continual.policy": config.continual.policy != "continue",
    }
    defaults = TrainingSection()
    changed = [
        f"training.{name}"
        for name in TrainingSection.model_fields
        if name not in ALLOWED_TRAINING_KEYS and getattr(training, name) != getattr(defaults, name)
    ]
    changed += [name for name, differs in is_changed.items() if differs]
    if changed:
        yield f"training.reference: mlx_lm.lora knows nothing of {', '.join(changed)}"


RULES = ConfigRules(iterate_problems)
