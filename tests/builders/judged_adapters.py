"""Adapters with a verdict that a test wrote, as a registry takes them; no model is asked."""

from __future__ import annotations

from pathlib import Path

from nested_core.records.verdict import JudgedAdapter, Verdict
from nested_core.records.verdict_file import write_verdict
from nested_core.storage.adapter import ADAPTER_FILES, read_adapter
from nested_core.storage.manifest import describe_file


def pass_by_hand(folder: Path, initial: str = "0" * 64) -> Path:
    """Write gate.json and its manifest for the adapter in folder/adapter: passed."""
    trained = JudgedAdapter("adapter", read_adapter(folder / "adapter").digest())
    verdict = Verdict((), 8, JudgedAdapter("initial", initial), trained, ())
    files = {f"adapter/{name}": describe_file(folder / "adapter" / name) for name in ADAPTER_FILES}
    write_verdict(folder, verdict, files)
    return folder
