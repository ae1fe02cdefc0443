"""The card of an exported model: what it was made of, and whether it does as its adapter."""

from __future__ import annotations

from pathlib import Path

from nested_core.rooms.export.export_record import ExportRecord
from nested_core.text.document import Document, Facts, Section, Text
from nested_core.text.loss_format import format_difference


def render_export_card(name: str, record: ExportRecord) -> str:
    """Render the card as markdown; `name` is the artefact's."""
    logits, gain = record.logits, record.gain
    facts: dict[str, object] = {
        "adapter": record.version,
        "optimizer step of the adapter": record.step,
        "base": f"{Path(record.base).name}, {record.base_fingerprint}",
        "weights": record.weights,
        "the base's quantization": record.quantized_base,
        "tokenizer": record.tokenizer,
        "chat template": record.chat_template or "none",
        "read by": record.reader,
        "texts with equal token ids": record.texts,
        "prompts with compared logits": logits.prompts,
        "distance of logits": f"{logits.distance:.2g}, at most {logits.bound:g}",
        "the adapter's change of logits": f"{logits.carried:.0%} is there",
    }
    if gain is not None:
        lost = format_difference(gain.exported - gain.adapter)
        allowed = f"at most {gain.allowed:.2g} beyond chance"
        facts["held-out rows"] = f"{gain.rows} of {Path(gain.file).name}"
        facts["gain kept there"] = None if gain.share is None else f"{gain.share:.1%}"
        facts[f"{gain.unit} lost there"] = f"{lost} ({gain.describe_interval()}), {allowed}"
    known = [
        (what, value) for what, value in (facts | record.packages).items() if value is not None
    ]
    headline = (
        f"A base model with an adapter in its weights, exported by nested-tune. "
        f"{'Passed' if record.stands else 'Failed'}: {record.describe()}."
    )
    document = Document(
        name,
        [
            Text(headline, is_headline=True),
            *(Text(problem, "bad") for problem in record.problems),
            *(Text(note, "note") for note in record.notes),
            Section("What was compared", [Facts(known)]),
        ],
    )
    return f"{document}\n"
