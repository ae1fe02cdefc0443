"""What the state of a flow run says in Prefect's pages: its name, the outcome, and the figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nested_core.config.schema import FineTuneConfig
from nested_core.errors import join_first_values, shorten
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.strict_files import read_json_object
from nested_core.text.foreign_text import escape
from nested_core.text.loss_conclusion import describe_conclusion
from nested_core.text.loss_format import format_change, format_loss, loss_name_for_file

SHOWN_DIGITS = 6
MAX_EXPONENT = 709.0  # of e in a float
MAX_SHOWN_REASONS = 3
MAX_SHOWN_CHARACTERS = 160  # of a reason's own words


def shorten_version(version: str) -> str:
    """The start of a version, as it is shown."""
    return version[:SHOWN_DIGITS]


def describe_loss(run: RunDirectory) -> str:
    """`val loss 3.1 -> 1.4` from gate.json, or `test loss`, or that there was no validation set.

    An inconclusive loss says what would settle it. With a champion that was judged on the same
    examples, its loss: `; champion 670791 1.5`.
    """
    verdict = read_json_object(run.gate)
    losses = verdict["validation"]
    if losses is None:
        return f"no validation set{_describe_broken_answers(verdict)}"
    name = loss_name_for_file(losses["file"]).replace("validation", "val")
    if losses["examples"] == 0:
        return f"{name} not judged, for all held-out examples were trained on"
    change = format_change(losses["loss_before"], losses["loss_after"])
    doubt = ""
    if losses.get("conclusion") == "inconclusive":
        doubt = f", {describe_conclusion(losses)}"
    return f"{name} {change}{doubt}{_describe_broken_answers(verdict)}{_describe_champion(verdict)}"


def _describe_broken_answers(verdict: Mapping[str, Any]) -> str:
    """`, 3 of 3 sample answers are broken` where training broke most of them."""
    samples = verdict.get("samples") or {"broken": 0, "judged": 0}
    broken, judged = samples["broken"], samples["judged"]
    return f", {broken} of {judged} sample answers are broken" if 2 * broken > judged else ""


def describe_test_loss(config: FineTuneConfig, run: RunDirectory, loss: float) -> str:
    """mlx_lm.lora's words for the loss on the test set, then how much of it, and which adapter.

    `Test loss 3.12, Test ppl 22.65 (test.jsonl, all examples, adapter of step 80)`.
    """
    examples = "all examples"
    if config.test_batches >= 0:
        examples = f"at most {config.test_batches} batches of {config.batch_size}"
    file = read_json_object(run.dataset)["splits"]["test"]["file"]
    step = read_json_object(run.gate)["adapter_step"]
    perplexity = math.exp(loss) if loss < MAX_EXPONENT else math.inf
    return (
        f"Test loss {format_loss(loss)}, Test ppl {format_loss(perplexity)} "
        f"({escape(file)}, {examples}, adapter of step {step})"
    )


def describe_rejection(run: RunDirectory) -> str:
    """Each reason of gate.json with its figures, and the champion's loss.

    `rejected: loss_regressed 0.0184 -> 0.0213 on 84 examples; champion 670791 0.0184`, or
    `rejected: tier_unchanged tier 2: MESSAGE`.
    """
    verdict = read_json_object(run.gate)
    reasons = [_describe_reason(r, verdict) for r in verdict["reasons"][:MAX_SHOWN_REASONS]]
    return f"rejected: {'; '.join(reasons)}{_describe_champion(verdict)}"


def _describe_reason(reason: Mapping[str, Any], verdict: Mapping[str, Any]) -> str:
    code, losses = reason["code"], verdict["validation"]
    if code == "loss_regressed" and losses is not None:
        change = format_change(losses["loss_before"], losses["loss_after"])
        return f"{code} {change} on {losses['examples']} examples"
    if code == "forgetting" and verdict["general"] is not None:
        general = verdict["general"]
        change = format_change(general["loss_before"], general["loss_after"])
        return f"{code} {change} on general text"
    tiers = {tensor["name"]: tensor["tier"] for tensor in verdict["tensors"]}
    own = sorted({tiers[name] for name in reason["tensors"] if tiers.get(name) is not None})
    named = f" tier {join_first_values(own, MAX_SHOWN_REASONS)}" if own else ""
    return f"{code}{named}: {escape(shorten(reason['message'], MAX_SHOWN_CHARACTERS))}"


def _describe_champion(verdict: Mapping[str, Any]) -> str:
    champion = verdict.get("champion")
    if champion is None or champion["loss"] is None:
        return ""
    return f"; champion {shorten_version(champion['version'])} {format_loss(champion['loss'])}"
