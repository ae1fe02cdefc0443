"""What the state of a fine-tune's flow run says: the result, in one short line."""

from __future__ import annotations

from nested_core.registry.gate_file import name_loss
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.strict_files import read_json_object

SHOWN_DIGITS = 6
SHOWN_REASONS = 3


def shorten_version(version: str) -> str:
    """The start of a version, as it is shown."""
    return version[:SHOWN_DIGITS]


def describe_loss(run: RunDirectory) -> str:
    """`val loss 3.1 -> 1.4` from gate.json, or `test loss`, or that there was no validation set."""
    losses = read_json_object(run.gate)["validation"]
    if losses is None:
        return "no validation set"
    name = name_loss(losses["file"]).replace("validation", "val")
    return f"{name} {losses['loss_before']:.3g} -> {losses['loss_after']:.3g}"


def describe_rejection(run: RunDirectory) -> str:
    """`rejected: tier_unchanged tier 2` from gate.json: each code, and the tiers it is about."""
    verdict = read_json_object(run.gate)
    tiers = {tensor["name"]: tensor["tier"] for tensor in verdict["tensors"]}
    parts = []
    for reason in verdict["reasons"][:SHOWN_REASONS]:
        own = sorted({tiers[name] for name in reason["tensors"] if tiers.get(name) is not None})
        named = f" tier {', '.join(map(str, own))}" if own else ""
        parts.append(f"{reason['code']}{named}")
    return f"rejected: {'; '.join(parts)}"
