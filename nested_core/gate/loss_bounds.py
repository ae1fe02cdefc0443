"""Losses and drift, from the initial to the trained adapter, against the bounds of the gate.

Whether a loss is worse is decided by `conclude` in `text.loss_conclusion`.
"""

from __future__ import annotations

from nested_core.config.sections import GateSection
from nested_core.gate.example_losses import ExampleLosses
from nested_core.gate.harmed_examples import HarmedExamples, describe_harmed
from nested_core.records.verdict import Drift, GeneralLoss, Reason, Validation, describe_examples
from nested_core.text.loss_format import format_change, format_difference, format_interval


def loss_reasons(validation: Validation, bounds: GateSection) -> list[Reason]:
    """The reason for a held-out loss that is worse beyond its bound."""
    if validation.conclusion != "worse":
        return []
    losses = format_change(validation.loss_before, validation.loss_after)
    message = (
        f"loss {losses} on {describe_examples(validation)}{describe_noise(validation)}; "
        f"gate.max_val_loss_increase is {bounds.max_val_loss_increase:g}"
    )
    return [Reason("loss_regressed", message)]


def general_loss_reasons(general: GeneralLoss, bounds: GateSection) -> list[Reason]:
    """The reason for a loss on general text that is not finite, or worse beyond its bound."""
    if reasons := non_finite_loss_reasons(general, "loss on general text"):
        return reasons
    if general.conclusion != "worse":
        return []
    losses = format_change(general.loss_before, general.loss_after)
    message = (
        f"loss on general text {losses}{describe_noise(general)}; "
        f"gate.max_general_loss_increase is {bounds.max_general_loss_increase:g}"
    )
    return [Reason("forgetting", message)]


def harm_reasons(
    losses: ExampleLosses, validation: Validation, bounds: GateSection
) -> list[Reason]:
    """The reason for examples that lost much while hardly any won as much.

    None where the loss as a whole is better (what was lost is then listed, and refuses nothing),
    and under `gate.noise: none`, which looks at the mean alone.
    """
    found = HarmedExamples.find(losses.counted(), validation.margin or 0.0)
    if found is None or validation.conclusion == "better" or bounds.noise == "none":
        return []
    share = bounds.max_harmed_share
    if not found.is_beyond_chance(share):
        return []
    message = f"{describe_harmed(found, losses.file)}; gate.max_harmed_share is {share:g}"
    return [Reason("examples_harmed", message)]


def drift_reasons(drift: Drift | None, data: str, bounds: GateSection) -> list[Reason]:
    """The reason for predictions that moved beyond `max_kl` on the held-out `data`."""
    if drift is None or bounds.max_kl is None or drift.is_within(bounds.max_kl):
        return []
    moved = "not finite" if drift.kl_initial is None else f"{drift.kl_initial:.4g} nats a token"
    message = (
        f"the predictions moved by {moved} from those that training began from, in mean KL "
        f"divergence on {data}, {drift.tokens} tokens; gate.max_kl is {bounds.max_kl:g}"
    )
    return [Reason("drift", message)]


def non_finite_loss_reasons(losses: Validation | GeneralLoss, what: str) -> list[Reason]:
    """The reason for a loss that is not finite; the initial adapter's own is told as such."""
    if losses.loss_before is None:
        message = f"{what} with the initial adapter is not finite already; training is not to blame"
        return [Reason("non_finite", message)]
    if losses.loss_after is None:
        message = f"{what} {format_change(losses.loss_before, None)} with the trained adapter"
        return [Reason("non_finite", message)]
    return []


def describe_noise(losses: Validation | GeneralLoss) -> str:
    """The paired difference and what it says, after the losses; nothing if there is none."""
    if losses.difference is None:
        return ""
    difference = format_difference(losses.difference)
    if losses.interval is None:
        return f", {difference}; so few examples can show no difference"
    margin = "" if losses.margin is None else f" and a margin of {losses.margin:.2g}"
    interval = format_interval(losses.interval)
    return f", {difference} with a 95 % interval of {interval}{margin}"
