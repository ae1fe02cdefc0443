"""The card of an exported folder: what it was made of, and whether it does as its adapter."""

from __future__ import annotations

from pathlib import Path

from nested_core.rooms.export.export_record import RECORD_NAME, ExportRecord
from nested_core.text.document import Document, Facts, Text


def render_export_card(name: str, record: ExportRecord) -> str:
    """Return the card of an exported folder of this name, as Markdown."""
    headline = (
        f"A base model with an adapter in its weights, exported by nested-tune. "
        f"{'Passed' if record.stands else 'Failed'}: {record.describe()}."
    )
    facts = [
        ("adapter", record.version),
        ("base", f"{Path(record.base).name}, {record.base_fingerprint}"),
        ("weights", record.weights),
        ("read by", record.reader),
        ("all figures", RECORD_NAME),
    ]
    remarks = [Text(problem, "bad") for problem in record.problems]
    remarks += [Text(note, "note") for note in record.notes]
    return f"{Document(name, [Text(headline, is_headline=True), *remarks, Facts(facts)])}\n"
