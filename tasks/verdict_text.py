"""The figures of a verdict in words: the losses with their examples, the champion's, each suite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nested_core.gate.verdict import Drift
from nested_core.text.digest_format import shorten_digest
from nested_core.text.loss_conclusion import describe_conclusion
from nested_core.text.loss_format import format_difference, format_interval, format_loss


def describe_losses(verdict: Mapping[str, Any]) -> str:
    """`0.0184 before training, 0.0213 after, adapter of step 80 (valid.jsonl, 84 examples)`."""
    losses = verdict["validation"]
    before, after = format_loss(losses["loss_before"]), format_loss(losses["loss_after"])
    text = f"{before} before training, {after} after, adapter of step {verdict['adapter_step']}"
    if losses.get("file") is None:  # of an earlier release
        return text
    conclusion = describe_conclusion(losses)
    shown = "" if conclusion is None else f"; {conclusion}"
    if losses["examples"] == 0:
        shown = f"; not judged: all {losses['left_out']} are ones that an adapter was trained on"
    return f"{text} ({losses['file']}, {losses['examples']} examples){shown}"


def describe_champion_loss(champion: Mapping[str, Any]) -> str:
    """The champion's loss on the same examples and the candidate's difference, or why not."""
    version = shorten_digest(champion["version"])
    if champion["not_compared"] is not None:
        return f"Champion {version}: not compared; {champion['not_compared']}."
    if champion["loss"] is None or champion["difference"] is None:
        return f"Champion {version}: no loss on examples that neither was trained on."
    return (
        f"Champion {version}: loss {format_loss(champion['loss'])} on the same examples; "
        f"difference {format_difference(champion['difference'])}, "
        f"{_describe_direction(champion)}."
    )


def _describe_direction(champion: Mapping[str, Any]) -> str:
    """The word for the candidate's loss beside the champion's, and the interval."""
    difference, interval = champion["difference"], champion["interval"]
    word = describe_conclusion(champion)
    if word is None:  # of an earlier release
        low, high = interval or (difference, difference)
        word = "worse" if low > 0 else "better" if high < 0 else "within noise"
    if interval is None or champion.get("conclusion") == "inconclusive":
        return word
    return f"{word} (95 % interval {format_interval(interval)})"


def describe_drift(drift: Mapping[str, Any]) -> str:
    """`The predictions moved by 0.42 nats a token from those of the adapter ...`."""
    text = Drift(**drift).describe()
    return f"{text[0].upper()}{text[1:]}"


def describe_suite(task: Mapping[str, Any]) -> str:
    """`capitals: 0 of 15 right before, 14 of 15 after`."""
    questions = task["questions"]
    earlier = task["base"] if task["parent"] is None else task["parent"]
    before, after = (f"{round(share * questions, 2):g}" for share in (earlier, task["candidate"]))
    text = f"{task['name']}: {before} of {questions} right before, {after} of {questions} after"
    if task.get("champion") is not None:
        text += f", champion {round(task['champion'] * questions, 2):g} of {questions}"
    return text if task["verdict"] == "passed" else f"{text} (failed)"
