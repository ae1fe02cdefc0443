"""The learning rate that `init` writes, and how a configured one compares with the best ones.

With Adam, lora_b's first steps move the output in proportion to rank x scale x rate. In a published
sweep of 35 models (tinker-cookbook, results/sft_sweep.md: Tulu 3, batch 128, alpha 32) the best
rate of 34 gives a product of 0.01 to 0.03; its lowest rate, 4e-5, gives 0.0013, and 3e-3, at which
72 runs diverged, 0.096. mlx_lm.lora's defaults (8 x 20 x 1e-5) give 0.0016.
"""

from __future__ import annotations

from nested_core.config.schema import FineTuneConfig
from nested_core.errors import ConfigError
from nested_core.pipeline.preflight import StartRules

BEST_PRODUCTS = (0.01, 0.03)
USABLE_PRODUCTS = (0.003, 0.05)
USUAL_PRODUCT = 0.016  # best for models of 2M, 22M and 85M parameters (benchmarks/README.md)
ADAM_OPTIMIZERS = ("adam", "adamw")


def describe_learning_rate(config: FineTuneConfig, share: float = 1.0) -> str | None:
    """Return a sentence that compares rank x scale x rate with the best of a published sweep.

    None unless the run is LoRA with Adam and cross-entropy, as the sweep was. A schedule counts
    with its highest rate.

    share: the factor on the configured rate that the run is trained with.
    """
    is_known = config.fine_tune_type != "full" and config.training.loss is None
    if not is_known or config.optimizer not in ADAM_OPTIMIZERS:
        return None
    product = _product(config) * share
    low, high = BEST_PRODUCTS
    text = (
        f"rank x scale x rate is {product:.2g}; {low:g} to {high:g} was best for 34 of the 35 "
        f"models of a published sweep (sft_sweep.md of tinker-cookbook)"
    )
    if low <= product <= high:
        return text
    if share != 1.0:
        usual = min(1.0, USUAL_PRODUCT / _product(config))
        return f"{text}: try continual.rate: {float(f'{usual:.0e}'):g}"
    rate = USUAL_PRODUCT / (config.lora_parameters.rank * config.lora_parameters.scale)
    return f"{text}: try --learning-rate {float(f'{rate:.0e}'):g}"


def warn_of_learning_rate(config: FineTuneConfig) -> list[str]:
    """Return a warning if the learning rate is so far from the best ones that a run suffers."""
    text = describe_learning_rate(config)
    if text is None or USABLE_PRODUCTS[0] <= _product(config) <= USABLE_PRODUCTS[1]:
        return []
    return [f"learning rate: {text}"]


def require_usable_rate(config: FineTuneConfig) -> None:
    """Raise ConfigError if a run would continue the champion at a rate at which adapters diverge.

    `continual.allow_high_rate: true` allows it.
    """
    product = _product(config) * config.continual.rate
    is_known = describe_learning_rate(config) is not None
    if is_known and product > USABLE_PRODUCTS[1] and not config.continual.allow_high_rate:
        raise ConfigError(
            f"continual.rate: going on from the champion at {config.continual.rate:g} of the "
            f"learning rate, rank x scale x rate is {product:.2g}, and above "
            f"{USABLE_PRODUCTS[1]:g} trained adapters diverge. Lower continual.rate or "
            f"learning_rate, or set continual.allow_high_rate: true."
        )


def _product(config: FineTuneConfig) -> float:
    """Return rank x scale x the highest learning rate."""
    rate = config.learning_rate
    if config.lr_schedule is not None:  # the second argument of linear_schedule is its end
        count = 2 if config.lr_schedule.name == "linear_schedule" else 1
        rate = max(config.lr_schedule.arguments[:count])
    return config.lora_parameters.rank * config.lora_parameters.scale * rate


RULES = StartRules(warn_of_learning_rate, require_usable_rate)
