"""Assign each trainable parameter to a tier, and tell when a tier is due.

Tier 0 is the fastest. Whole layers stay together under `layer_depth` and `parameter_importance`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nested_core.errors import ChildFailed, ConfigError
from nested_core.process.cell import BASE_BYTES, CLOCK_FACTOR, Allowance, Cell
from nested_core.process.child import Limits

if TYPE_CHECKING:
    from nested_core.config.sections import Assignment, NestedSection

SEARCH_SECONDS = 5  # of processor time, for all patterns
LAYER_INDEX_PATTERN = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(frozen=True)
class TierMap:
    """The tier of every trainable parameter, and the frequency of every tier.

    frequencies: optimizer steps between two updates of each tier, fastest tier first.
    tensors: the tier's number for each dotted parameter name.
    """

    frequencies: tuple[int, ...]
    tensors: dict[str, int]

    def names(self, tier: int) -> frozenset[str]:
        """Return the names of the parameters in one tier."""
        return frozenset(name for name, owner in self.tensors.items() if owner == tier)

    def due(self, step: int) -> tuple[int, ...]:
        """Return the tiers that are updated at optimizer step `step`, counted from 1."""
        return tuple(i for i, every in enumerate(self.frequencies) if step % every == 0)


def count_expected_updates(step: int, frequency: int, flush_steps: Sequence[int] = ()) -> int:
    """Return how many updates a tier should have after `step` optimizer steps.

    It is floor(step / frequency), plus one for each flush that applied an open chunk of gradients.
    """
    return step // frequency + sum(1 for at in flush_steps if at <= step and at % frequency)


def assign_tiers(
    names: Iterable[str], settings: NestedSection, importance: Mapping[str, float] | None = None
) -> TierMap:
    """Assign every trainable parameter to a tier, by the configured strategy.

    names: dotted, as in mlx's trees.
    settings: the configuration's section `nested`.
    importance: each parameter's mean squared gradient norm, for `parameter_importance`.

    Raises ConfigError if a tier would be empty or a pattern matches nothing. Warns, by name, of
    parameters that no rule covers and that go to the slowest tier.
    """
    ordered = sorted(names, key=_natural_sort_key)
    if not ordered:
        raise ConfigError("No parameter is trainable: there is nothing to give a tier.")
    count = len(settings.frequencies)
    if settings.strategy == "manual":
        tensors = _assign_by_name_pattern(ordered, settings.assignments)
    else:
        ranked_layers = _rank_layers(ordered, settings, importance or {})
        tensors = _assign_by_layer_ranking(ordered, ranked_layers, count)
    _assign_parameters_outside_layers(ordered, tensors, slowest=count - 1)
    if empty := sorted({*range(count)} - {*tensors.values()}):
        raise ConfigError(
            f"Tier {empty[0]} of {count} would hold no parameter. Every tier needs at least one: "
            f"give it a pattern in nested.assignments, or fewer nested.frequencies."
        )
    return TierMap(settings.frequencies, {name: tensors[name] for name in ordered})


def refuse_tiers_never_due(frequencies: Sequence[int], steps: int) -> None:
    """Raise ConfigError if a tier has no update within `steps` optimizer steps."""
    for tier, frequency in enumerate(frequencies):
        if frequency > steps:
            raise ConfigError(
                f"Tier {tier} updates every {frequency} optimizer steps, but the run has only "
                f"{steps} (iterations / grad_accumulation_steps): it would never be trained. "
                f"Raise iters or lower nested.frequencies."
            )


def _natural_sort_key(name: str) -> tuple[tuple[int, str], ...]:
    """Return a sort key that orders numbers within names by value."""
    parts = re.split(r"(\d+)", name)
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in parts)


def _layer_number(name: str) -> int | None:
    """Return the layer number in a parameter's name; None outside of layers."""
    match = LAYER_INDEX_PATTERN.search(name)
    return int(match.group(1)) if match else None


def _rank_layers(
    names: Sequence[str], settings: NestedSection, importance: Mapping[str, float]
) -> list[int]:
    """Return the layers, those for tier 0 first: by importance, or from one end of the model."""
    layers = sorted({layer for name in names if (layer := _layer_number(name)) is not None})
    if settings.strategy != "parameter_importance":
        return layers if settings.fast == "shallow" else layers[::-1]
    totals = dict.fromkeys(layers, 0.0)
    for name in names:
        if (layer := _layer_number(name)) is not None:
            totals[layer] += importance[name]
    return sorted(layers, key=lambda layer: (-totals[layer], layer))


def _assign_by_layer_ranking(
    names: Sequence[str], ranked_layers: Sequence[int], tiers: int
) -> dict[str, int]:
    """Cut a ranking of layers into `tiers` groups of nearly equal size, tier 0 first.

    Returns the tier of each parameter in a layer. Raises ConfigError if there are fewer layers than
    tiers, except for one tier.
    """
    if 1 < tiers > len(ranked_layers):
        raise ConfigError(
            f"{tiers} tiers need at least {tiers} layers that carry trainable parameters; there "
            f"are {len(ranked_layers)}. Raise num_layers or give fewer nested.frequencies."
        )
    size = len(ranked_layers)
    tier_of = {layer: rank * tiers // size for rank, layer in enumerate(ranked_layers)}
    placed = ((name, _layer_number(name)) for name in names)
    return {name: tier_of[layer] for name, layer in placed if layer is not None}


def _assign_by_name_pattern(names: Sequence[str], rules: Sequence[Assignment]) -> dict[str, int]:
    """Assign each parameter by the first rule whose pattern is found in its name.

    A process with limits searches, for a pattern can take for ever.

    Raises ConfigError if a pattern matches no parameter, or takes too long.
    """
    allowance = Allowance(BASE_BYTES, SEARCH_SECONDS, CLOCK_FACTOR * SEARCH_SECONDS)
    limits = Limits(processor_seconds=SEARCH_SECONDS)
    with Cell(f"{__name__}:search_names", allowance, limits=limits) as cell:
        try:
            matched = cell.ask([names, [rule.match for rule in rules]])
        except ChildFailed as error:
            raise ConfigError(
                f"nested.assignments: the search for the patterns in {len(names)} parameter names "
                f"was ended: {error}. Write patterns without a repetition in a repetition."
            ) from None
    for rule, found in zip(rules, matched, strict=True):
        if not found:
            raise ConfigError(
                f"nested.assignments: the pattern {rule.match!r} matched no trainable parameter. "
                f"Names look like {names[0]!r}."
            )
    tiers: dict[str, int] = {}
    for rule, found in zip(reversed(rules), reversed(matched), strict=True):
        tiers.update(dict.fromkeys(found, rule.tier))  # of an earlier rule in place of a later one
    return {name: tiers[name] for name in names if name in tiers}


def search_names(request: tuple[list[str], list[str]]) -> list[list[str]]:
    """Return, in a cell, the names in which each pattern is found; `request` is names, patterns."""
    names, patterns = request
    return [[name for name in names if re.search(pattern, name)] for pattern in patterns]


def _assign_parameters_outside_layers(
    names: Sequence[str], tensors: dict[str, int], *, slowest: int
) -> None:
    """Assign parameters without a tier to the slowest tier, in place, with a warning."""
    orphans = [name for name in names if name not in tensors]
    if not orphans:
        return
    tensors.update(dict.fromkeys(orphans, slowest))
    if slowest > 0:
        warnings.warn(
            f"{len(orphans)} trainable parameters have no tier and go to the slowest, tier "
            f"{slowest}: {', '.join(orphans[:8])}{' ...' if len(orphans) > 8 else ''}",
            stacklevel=3,
        )
