"""What the state of a flow run says in Prefect's pages: the outcome with its figures."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from nested_core.config.schema import FineTuneConfig
from nested_core.errors import join_first_values, shorten
from nested_core.records.dataset import read_dataset_record
from nested_core.storage.run_directory import RunDirectory
from nested_core.text.digest_format import shorten_digest
from nested_core.text.foreign_text import escape
from nested_core.text.loss_format import format_change, format_loss, loss_name_for_file

if TYPE_CHECKING:
    from nested_core.records.verdict import Reason, Verdict

MAX_EXPONENT = 709.0  # of e in a float
MAX_SHOWN_REASONS = 3
MAX_SHOWN_CHARACTERS = 160  # of a reason's own words


def describe_loss(verdict: Verdict) -> str:
    """`val loss 3.1 -> 1.4`, or `test loss`, or that there was no validation set.

    An inconclusive loss says what would settle it. With a champion that was judged on the same
    examples, its loss: `; champion 670791670791 1.5`.
    """
    losses, samples = verdict.validation, verdict.samples
    broken = ""
    if samples is not None and samples.are_broken:
        broken = f", {samples.broken} of {samples.judged} sample answers are broken"
    if losses is None:
        return f"no validation set{broken}"
    name = loss_name_for_file(losses.file).replace("validation", "val")
    if losses.examples == 0:
        return f"{name} not judged, for all held-out examples were trained on"
    change = format_change(losses.loss_before, losses.loss_after)
    doubt = f", {losses.describe_conclusion()}" if losses.conclusion == "inconclusive" else ""
    return f"{name} {change}{doubt}{broken}{_describe_champion(verdict)}"


def describe_test_loss(
    config: FineTuneConfig, run: RunDirectory, verdict: Verdict, loss: float
) -> str:
    """mlx_lm.lora's words for the loss on the test set, then how much of it, and which adapter.

    `Test loss 3.12, Test ppl 22.65 (test.jsonl, all examples, adapter of step 80)`.
    """
    examples = "all examples"
    if config.test_batches >= 0:
        examples = f"at most {config.test_batches} batches of {config.batch_size}"
    file = read_dataset_record(run.dataset).splits["test"].file
    perplexity = math.exp(loss) if loss < MAX_EXPONENT else math.inf
    return (
        f"Test loss {format_loss(loss)}, Test ppl {format_loss(perplexity)} "
        f"({escape(file)}, {examples}, adapter of step {verdict.adapter_step})"
    )


def describe_rejection(verdict: Verdict) -> str:
    """Each reason with its figures, and the champion's loss.

    `rejected: loss_regressed 0.0184 -> 0.0213 on 84 examples; champion 670791670791 0.0184`, or
    `rejected: tier_unchanged tier 2: MESSAGE`.
    """
    reasons = [_describe_reason(r, verdict) for r in verdict.reasons[:MAX_SHOWN_REASONS]]
    return f"rejected: {'; '.join(reasons)}{_describe_champion(verdict)}"


def _describe_reason(reason: Reason, verdict: Verdict) -> str:
    losses, general = verdict.validation, verdict.general
    if reason.code == "loss_regressed" and losses is not None:
        change = format_change(losses.loss_before, losses.loss_after)
        return f"{reason.code} {change} on {losses.examples} examples"
    if reason.code == "forgetting" and general is not None:
        change = format_change(general.loss_before, general.loss_after)
        return f"{reason.code} {change} on general text"
    own = {t.tier for t in verdict.tensors if t.tier is not None and t.name in reason.tensors}
    named = f" tier {join_first_values(sorted(own), MAX_SHOWN_REASONS)}" if own else ""
    return f"{reason.code}{named}: {escape(shorten(reason.message, MAX_SHOWN_CHARACTERS))}"


def _describe_champion(verdict: Verdict) -> str:
    champion = verdict.champion
    if champion is None or champion.loss is None:
        return ""
    return f"; champion {shorten_digest(champion.version)} {format_loss(champion.loss)}"
