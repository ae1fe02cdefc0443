"""The block `preferences` of gate.json in words: rows of the table of checks, and notes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nested_core.records.verdict import CheckRow, Verdict, VerdictBlock
from nested_core.records.verdict_table import make_check, reasons_of
from nested_core.text.loss_format import format_difference


def _list_rows(block: Mapping[str, Any], verdict: Verdict) -> Iterator[CheckRow]:
    """Yield the rows of the verdict's table: margin, accuracy, likelihoods and divergence."""
    if not block["examples"]:
        return
    reasons = reasons_of(verdict, "preference_not_learnt")
    yield make_check(
        f"preference ({block['loss']}), {block['examples']} examples: margin",
        reasons,
        block["conclusion"],
        before=_format(block["margin_before"]),
        after=_format(block["margin_after"]),
        difference=format_difference(block["margin_growth"], block["margin_interval"]),
        bound="grows, beyond chance",
    )
    yield CheckRow(
        "chosen answers likelier than rejected ones",
        before=f"{block['accuracy_before']:.1%}",
        after=f"{block['accuracy_after']:.1%}",
        difference=format_difference(block["accuracy_difference"], block["accuracy_interval"]),
        verdict=None,
    )
    bound = verdict.bound("max_chosen_fall")
    yield make_check(
        "likelihood of chosen answers, nats/token",
        reasons,
        "fell" if block["chosen_fell"] else None,
        difference=format_difference(block["chosen_change"], block["chosen_change_interval"]),
        bound=None if bound is None else f"falls by at most {bound:g}",
    )
    for name in ("chosen", "rejected"):
        before, after = block[f"{name}_before"], block[f"{name}_after"]
        yield CheckRow(
            f"log-likelihood of {name} answers, nats an answer",
            before=_format(before),
            after=_format(after),
            difference=f"{after - before:+.3g}",
            verdict=None,
        )
    kl = _format(block["kl_initial"])
    yield CheckRow("divergence from the start, answers, nats/token", after=kl, verdict=None)


def _list_notes(block: Mapping[str, Any], verdict: Verdict) -> Iterator[str]:  # noqa: ARG001
    """Yield notes on chosen answers that became less likely, or too few examples."""
    if not block["examples"]:
        yield (
            "whether the preference was learnt was not measured: there is no held-out pair, or "
            "all were trained on"
        )
        return
    if block["chosen_fell"]:
        yield (
            f"chosen answers became less likely themselves: {block['chosen_before']:.4g} -> "
            f"{block['chosen_after']:.4g} nats an answer. A larger beta, orpo, or fewer passes "
            f"keep them (docs/preferences.md#answers-that-collapse)"
        )
    if block["margin_interval"] is None:
        yield (
            f"{block['clusters']} independent held-out examples are too few to show that the "
            f"preference was learnt"
        )


SHOWN = VerdictBlock("preferences", _list_rows, _list_notes)


def _format(value: float) -> str:
    return f"{value:.4g}"
