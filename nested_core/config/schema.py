"""What a fine-tune is configured by: the keys of `mlx_lm.lora`, and our own in sections.

Unknown keys are refused with the nearest known one; every problem is reported, not just the first.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from pydantic import NonNegativeFloat as Share

from nested_core.config.base import Section
from nested_core.config.data import DataPolicy, HubDatasets
from nested_core.config.gate import GateSection
from nested_core.config.lora import LoraParameters
from nested_core.config.registry import ContinualSection, RegistrySection
from nested_core.config.rules import agreement_problems, refuse, tier_problems


class LearningRateSchedule(Section):
    """mlx-lm's `lr_schedule`: a schedule of `mlx.optimizers` by name, with its own warm-up."""

    name: Literal["linear_schedule", "exponential_decay", "step_decay", "cosine_decay"]
    arguments: Annotated[tuple[float, ...], Field(min_length=1)]
    warmup: Annotated[int, Field(ge=0)] = 0
    warmup_init: float = 0.0


class Assignment(Section):
    """One rule of the manual strategy: names that match the pattern go to the tier."""

    match: str
    tier: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _pattern_compiles(self) -> Self:
        try:
            re.compile(self.match)
        except re.error as error:
            raise ValueError(f"{self.match!r} is not a regular expression: {error}") from error
        return self


class NestedSection(Section):
    """Tiers of parameters and the clocks they are updated on."""

    frequencies: Annotated[tuple[PositiveInt, ...], Field(min_length=1, max_length=8)] = (1,)
    strategy: Literal["layer_depth", "parameter_importance", "manual"] = "layer_depth"
    fast: Literal["shallow", "deep"] = "shallow"
    slow_gradients: Literal["skip", "accumulate"] = "skip"
    accumulate: Literal["mean", "sum"] = "mean"
    learning_rate_scale: tuple[Share, ...] | None = None
    weight_decay: tuple[Share, ...] | None = None
    assignments: tuple[Assignment, ...] = ()
    probe_batches: PositiveInt = 8

    @model_validator(mode="after")
    def _tiers_agree(self) -> Self:
        refuse(tier_problems(self))
        return self


class TrainingSection(Section):
    """How the loop runs, beyond what mlx-lm knows."""

    max_grad_norm: Share = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    epochs: PositiveFloat | None = None
    supervise: Literal["last", "all"] = "last"
    early_stop_patience: PositiveInt | None = None
    min_delta: Share = 1e-4
    keep_checkpoints: PositiveInt = 5
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    memory_limit_gb: PositiveFloat | None = None
    max_nonfinite_steps: PositiveInt = 5
    flat_loss_reports: Annotated[int, Field(ge=2)] = 10
    processes: Annotated[PositiveInt, Field(le=64)] = 1
    hostfile: str | None = None
    reference: Literal["mlx_lm"] | None = None


class FineTuneConfig(Section):
    """A whole fine-tune. The top level is mlx-lm's, with mlx-lm's defaults and meanings.

    `adapter_path` alone differs: a run keeps its adapter in its own directory, and copies it to
    `adapter_path` only where one is given. `train` is implied by the command.
    """

    model: str = "Qwen/Qwen3-0.6b"
    train: bool = True
    fine_tune_type: Literal["lora", "dora", "full"] = "lora"
    optimizer: Literal["adam", "adamw", "muon", "sgd", "adafactor"] = "adam"
    optimizer_config: dict[str, dict[str, Any]] = Field(default_factory=dict)
    data: str = "mlx-community/WikiSQL"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    num_layers: Annotated[int, Field(ge=-1)] = 16
    batch_size: Annotated[PositiveInt, Field(lt=2**31)] = 4
    iters: PositiveInt = 1000
    val_batches: Annotated[int, Field(ge=-1)] = 25
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    steps_per_report: PositiveInt = 10
    steps_per_eval: PositiveInt = 200
    resume_adapter_file: str | None = None
    adapter_path: str | None = None
    save_every: PositiveInt = 100
    test: bool = False
    test_batches: Annotated[int, Field(ge=-1)] = 500
    max_seq_length: Annotated[int, Field(ge=2, lt=2**31)] = 2048
    grad_checkpoint: bool = False
    grad_accumulation_steps: PositiveInt = 1
    clear_cache_threshold: Annotated[int, Field(ge=0)] = 0
    lr_schedule: LearningRateSchedule | None = None
    lora_parameters: LoraParameters = LoraParameters()
    mask_prompt: bool = False
    report_to: str | None = None
    project_name: str | None = None
    trust_remote_code: bool = False
    prompt_feature: str = "prompt"
    completion_feature: str = "completion"
    text_feature: str = "text"
    chat_feature: str = "messages"
    hf_dataset: HubDatasets = ()
    nested: NestedSection = NestedSection()
    training: TrainingSection = TrainingSection()
    data_policy: DataPolicy = DataPolicy()
    gate: GateSection = GateSection()
    registry: RegistrySection = RegistrySection()
    continual: ContinualSection = ContinualSection()

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        refuse(agreement_problems(self))
        return self

    @property
    def has_masters(self) -> bool:
        """Whether trained weights are held in float32 while the model keeps its own dtype."""
        return self.fine_tune_type == "full" and self.training.reference is None

    @property
    def optimizer_arguments(self) -> dict[str, Any]:
        """The keyword arguments given for the chosen optimizer."""
        return self.optimizer_config.get(self.optimizer, {})
