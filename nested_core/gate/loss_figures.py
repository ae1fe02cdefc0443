"""The figures of a verdict that come from the losses of each example."""

from __future__ import annotations

from typing import Any

from nested_core.config.sections import GateSection
from nested_core.gate.chosen_candidate import Candidates
from nested_core.gate.example_losses import ExampleLosses, Vector
from nested_core.gate.harmed_examples import HarmedExamples
from nested_core.records.verdict import ChampionLoss, Drift, Validation
from nested_core.storage.atomic import finite_or_none
from nested_core.text.loss_conclusion import conclude, count_examples_needed, margin_of_loss


def summarise_losses(
    losses: ExampleLosses,
    *,
    selected_on_same_data: bool,
    has_one_answer: bool = False,
    bounds: GateSection | None = None,
    candidates: Candidates | None = None,
) -> Validation:
    """The figures of the losses of each example."""
    bounds = bounds or GateSection()
    counted = losses.counted()
    figures = compare_losses(
        counted, counted.before, bounds, bounds.max_val_loss_increase, candidates
    )
    harm = HarmedExamples.find(counted, figures["margin"] or 0.0)
    return Validation(
        loss_before=finite_or_none(counted.mean(counted.before)),
        loss_after=finite_or_none(counted.mean(counted.after)),
        selected_on_same_data=selected_on_same_data,
        file=losses.file,
        examples=len(counted),
        left_out=len(losses) - len(counted),
        losses_sha256=losses.sha256(),
        has_one_answer=has_one_answer,
        chosen_among=1 if candidates is None else candidates.count,
        few_prompts=counted.few_clusters(),
        harmed=None if harm is None else harm.harmed,
        helped=None if harm is None else harm.helped,
        **figures,
    )


def summarise_drift(losses: ExampleLosses) -> Drift | None:
    """The figures of the divergences of each example; None if none were measured."""
    counted = losses.counted()
    if len(counted):  # where nothing else is left, it is drift on what was trained on, too
        losses = counted
    drift = losses.drift
    if drift is None:
        return None
    base = losses.base_drift
    return Drift(
        kl_initial=finite_or_none(losses.mean(drift)),
        kl_base=None if base is None else finite_or_none(losses.mean(base)),
        tokens=int(losses.tokens.sum()),
    )


def summarise_champion(
    version: str,
    losses: ExampleLosses,
    bounds: GateSection | None = None,
    candidates: Candidates | None = None,
) -> ChampionLoss:
    """The figures of losses that hold the champion's, NaN for the examples left out."""
    bounds = bounds or GateSection()
    shared = losses.examples_with_champion_loss()
    champion = shared.champion
    if champion is None or not len(shared):
        return ChampionLoss(version, left_out=len(losses))
    return ChampionLoss(
        version,
        loss=finite_or_none(shared.mean(champion)),
        examples=len(shared),
        left_out=len(losses) - len(shared),
        **compare_losses(shared, champion, bounds, bounds.max_val_loss_increase, candidates),
    )


def compare_losses(
    losses: ExampleLosses,
    other: Vector,
    bounds: GateSection,
    increase: float,
    candidates: Candidates | None = None,
) -> dict[str, Any]:
    """The paired difference of the trained adapter's losses from others, and what it shows.

    `increase` is the relative bound that the margin comes from. All values are None where there is
    no example, or a loss is not finite.
    """
    compared = losses.compare_trained_with(other)
    if compared is None:
        names = (
            *("difference", "standard_error", "interval", "smallest_visible", "conclusion"),
            *("margin", "one_sided_high", "examples_needed", "clusters", "corrected_interval"),
        )
        return dict.fromkeys(names)
    figures = compared.to_json()
    interval = None if figures["interval"] is None else (compared.low, compared.high)
    one_sided_high = compared.one_sided_high if compared.is_measurable else None
    loss_before = losses.mean(other)
    margin = margin_of_loss(increase, loss_before, bounds.noise)
    conclusion = conclude(
        compared.mean,
        interval,
        one_sided_high,
        margin=margin,
        loss_before=loss_before,
        noise=bounds.noise,
    )
    needed = None
    if conclusion == "inconclusive":
        needed = count_examples_needed(
            compared.mean, compared.standard_error, compared.examples, margin
        )
    corrected = None
    if candidates is not None:
        corrected = candidates.corrected_interval(losses, other, compared)
    return figures | {
        "interval": interval,
        "smallest_visible": compared.smallest_visible if compared.is_measurable else None,
        "conclusion": conclusion,
        "margin": margin,
        "one_sided_high": one_sided_high,
        "examples_needed": needed,
        "clusters": compared.examples,
        "corrected_interval": corrected,
    }
