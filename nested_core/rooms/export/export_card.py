"""The card of an exported model: what it was made of, and whether it does as its adapter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from nested_core.rooms.export.export_record import ExportRecord
from nested_core.text.document import Document, Facts, Section, Text
from nested_core.text.loss_format import format_difference


def render_export_card(name: str, record: ExportRecord) -> str:
    """The card as markdown; `name` is the artefact's."""
    verdict = "Passed" if record.stands else "Failed"
    problems = [Text(problem, "bad") for problem in record.problems]
    notes = [Text(note, "note") for note in record.notes]
    document = Document(
        name,
        [
            Text(
                f"A base model with an adapter in its weights, exported by nested-tune. {verdict}: "
                f"{record.describe()}.",
                is_headline=True,
            ),
            *problems,
            *notes,
            Section("What was compared", [Facts(list(_list_comparisons(record)))]),
            Section("What it was made of", [Facts(list(_list_sources(record)))]),
        ],
    )
    return f"{document}\n"


def _list_comparisons(record: ExportRecord) -> Iterator[tuple[str, object]]:
    logits = record.logits
    yield "read by", record.reader
    yield "texts with equal token ids", record.texts
    yield "prompts with compared logits", logits.prompts
    yield "distance of logits", f"{logits.distance:.2g}, at most {logits.bound:g}"
    yield "the adapter's change of logits", f"{logits.carried:.0%} is there"
    gain = record.gain
    if gain is not None:
        if gain.share is not None:
            yield "gain on held-out rows", f"{gain.share:.1%} is kept"
        lost = format_difference(gain.exported - gain.adapter)
        allowed = f"at most {gain.allowed:.2g} beyond chance"
        yield f"{gain.unit} lost there", f"{lost} ({gain.describe_interval()}), {allowed}"
        yield "held-out rows", f"{gain.rows} of {Path(gain.file).name}"


def _list_sources(record: ExportRecord) -> Iterator[tuple[str, object]]:
    yield "adapter", record.version
    if record.step is not None:
        yield "optimizer step of the adapter", record.step
    yield "base", f"{Path(record.base).name}, {record.base_fingerprint}"
    yield "weights", record.weights
    if record.quantized_base is not None:
        yield "the base's quantization", record.quantized_base
    yield "tokenizer", record.tokenizer
    yield "chat template", record.chat_template or "none"
    yield from sorted(record.packages.items())
