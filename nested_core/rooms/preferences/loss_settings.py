"""The keyword arguments of each loss on preferences, as `training.loss_config` gives them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from nested_core.config.error_messages import find_problems
from nested_core.config.schema import FineTuneConfig, LossRules
from nested_core.config.section_base import Section, key

Smoothing = Annotated[float, Field(ge=0, lt=0.5)]
Reference = Literal["initial", "base"]


class LossSettings(Section):
    """What all losses have."""

    beta: PositiveFloat = key(0.1, "how little may be moved away from the reference, or its weight")


class DpoSettings(LossSettings):
    """Those of dpo."""

    label_smoothing: Smoothing = key(0.0, "share of pairs expected to be the wrong way round")
    reference: Reference = key("initial", "what likelihoods are compared with")


class SimpoSettings(LossSettings):
    """Those of simpo."""

    beta: PositiveFloat = key(2.0, "factor of the difference of mean log-likelihoods")
    gamma: NonNegativeFloat = key(1.0, "margin that the difference is to exceed")
    label_smoothing: Smoothing = key(0.0, "share of pairs expected to be the wrong way round")


SETTINGS_BY_LOSS: dict[str, type[LossSettings]] = {
    "dpo": DpoSettings,
    "orpo": LossSettings,
    "simpo": SimpoSettings,
}


def read_settings(config: FineTuneConfig) -> LossSettings:
    """Return the arguments of the loss of a configuration that has no problems."""
    loss = str(config.training.loss)
    return SETTINGS_BY_LOSS[loss].model_validate(config.training.loss_config)


def find_reference(config: FineTuneConfig) -> Reference | None:
    """Return the reference of likelihoods in training; None for a loss without one."""
    reference: Reference | None = getattr(read_settings(config), "reference", None)
    return reference


def iterate_problems(config: FineTuneConfig) -> Iterator[str]:
    """Yield a sentence for each key that a loss on preferences does not allow, or not so."""
    loss, arguments = str(config.training.loss), dict(config.training.loss_config)
    settings = SETTINGS_BY_LOSS[loss]
    if "reference" in arguments and "reference" not in settings.model_fields:
        del arguments["reference"]
        yield f"training.loss_config.reference: {loss} compares with no reference. Leave it out"
    problems = find_problems(settings, arguments)
    for problem in problems:
        key = f".{problem.key}" if problem.key else ""
        yield f"training.loss_config{key}: {problem.message}"
    is_base = not problems and getattr(settings(**arguments), "reference", None) == "base"
    if is_base and config.fine_tune_type != "lora":
        yield (
            f"training.loss_config.reference: base needs fine_tune_type: lora, whose adapter can "
            f"be left out; with {config.fine_tune_type} give initial"
        )
    yield from _problems_of_other_keys(config, loss)


def _problems_of_other_keys(config: FineTuneConfig, loss: str) -> Iterator[str]:
    """Yield a sentence for each key outside of `training.loss_config` that contradicts the loss."""
    conflicts: list[tuple[bool, str]] = [
        (config.training.reference is not None, "training.reference: mlx_lm.lora has no such loss"),
        (config.training.supervise != "last", "training.supervise: the last answer is compared"),
        (
            config.data_format not in ("auto", "csv"),
            f"data_format: {config.data_format} are no rows of preferences; leave it at auto",
        ),
        (
            config.nested.strategy == "parameter_importance",
            "nested.strategy: parameter_importance measures the cross-entropy",
        ),
    ]
    yield from (f"{message} (training.loss: {loss})" for is_set, message in conflicts if is_set)


RULES = LossRules(iterate_problems)
