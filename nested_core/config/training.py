"""`training`: how the training loop runs, beyond what mlx-lm's own keys say."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from nested_core.config.section import Section, key

Processes = Annotated[PositiveInt, Field(le=64)]

# What a reference run may set here: none of it changes what mlx_lm.lora computes.
KEYS_ALLOWED_IN_REFERENCE_RUN = frozenset(
    {
        "reference",
        "keep_checkpoints",
        "memory_limit_gb",
        "flat_loss_reports",
        "max_nonfinite_steps",
        "min_delta",
        "sample_tokens",
        "processes",  # refused with a message of its own
        "hostfile",  # likewise
    }
)


class TrainingSection(Section):
    """How the training loop runs, beyond what mlx-lm knows."""

    max_grad_norm: NonNegativeFloat = key(0.0, "gradients are clipped to this norm; 0 is off")
    warmup_steps: NonNegativeInt = key(0, "optimizer steps until the full learning rate")
    epochs: PositiveFloat | None = key(
        None, "passes over the data, in place of iters; a flag --iters wins over a file's epochs"
    )
    supervise: Literal["last", "all"] = key("last", "assistant turns to train on, in a chat")
    early_stop_patience: PositiveInt | None = key(
        None, "stop after so many evaluations without improvement"
    )
    min_delta: NonNegativeFloat = key(1e-4, "least fall of the loss that counts as improvement")
    keep_checkpoints: PositiveInt = key(5, "checkpoints kept, with the best and the last always")
    precision: Literal["auto", "float32", "bfloat16"] = key(
        "auto", "dtype of the forward and backward pass"
    )
    memory_limit_gb: PositiveFloat | None = key(None, "GB of the device's memory to stay within")
    max_nonfinite_steps: PositiveInt = key(5, "steps in a row until the run ends as diverged")
    flat_loss_reports: int = key(10, "warn when the loss has not moved for so many reports", ge=2)
    sample_tokens: PositiveInt = key(64, "most tokens of an answer to samples", affects="output")
    processes: Processes = key(1, "processes on this machine that share each batch")
    hostfile: str | None = key(None, "mlx.launch's list of machines, for processes", path="local")
    reference: Literal["mlx_lm"] | None = key(None, "do what mlx_lm.lora does, bit for bit")

    def changed_keys_unknown_to_mlx_lm(self) -> list[str]:
        """The keys that are not at their defaults and that mlx_lm.lora knows nothing of."""
        defaults = TrainingSection()
        return [
            name
            for name in TrainingSection.model_fields
            if name not in KEYS_ALLOWED_IN_REFERENCE_RUN
            and getattr(self, name) != getattr(defaults, name)
        ]
