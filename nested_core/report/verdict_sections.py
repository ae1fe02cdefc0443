"""What the gate measured, as sections of a page: losses in pairs, change by module, updates."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nested_core.config.sections import SPLITS_BY_HELD_OUT_CHOICE
from nested_core.errors import DamagedError
from nested_core.records.answers import BROKEN_WORDS, BrokenHow, shown_answer
from nested_core.records.losses import ExampleLosses
from nested_core.records.run import Run
from nested_core.records.verdict import (
    ChampionLoss,
    TensorChange,
    Validation,
    Verdict,
    describe_examples,
)
from nested_core.storage.strict_files import open_regular
from nested_core.text.digest_format import shorten_digest
from nested_core.text.html_markup import (
    Html,
    element,
    escaped_html,
    join,
    paragraph,
    scrolling,
    section,
    table,
    table_caption,
    truncated_text,
)
from nested_core.text.loss_format import format_difference, format_interval, format_loss
from nested_core.training.reports.sample_prompts import SampleTable

MAX_WORST_EXAMPLES = 5
MAX_SHOWN_QUESTIONS = 12
MAX_DATA_BYTES = 64 * 1024 * 1024  # of a file of data that examples are read from
MAX_LINE_BYTES = 64 * 1024
MAX_HEAT_OPACITY = 0.55  # share of the colour behind the largest change: text on it stays legible
_LAYER_NAME_PATTERN = re.compile(r"^(.*?\blayers\.)(\d+)\.(.+)$")


def _describe_interval(interval: Sequence[float] | None) -> str:
    """`95 % interval -0.31 to -0.12`, or that there are too few examples for one."""
    if interval is None:
        return "too few examples for an interval"
    return f"95 % interval {format_interval(interval)}"


def decisive_numbers(verdict: Verdict) -> Iterator[tuple[str, object, str]]:
    """The numbers that the verdict rests on: name, value, explanation."""
    losses = verdict.validation
    if losses is not None:
        where = describe_examples(losses)
        yield "Loss before", losses.loss_before, f"nats a token, {where}"
        yield "Loss after", losses.loss_after, f"step {verdict.adapter_step or 0:,}, same examples"
        if losses.difference is not None:
            note = _describe_interval(losses.interval)
            if losses.corrected_interval is not None:
                note += f", not corrected for the choice among {losses.chosen_among}"
            yield "Difference", format_difference(losses.difference), f"after minus before, {note}"
        if losses.conclusion is not None:
            yield "Conclusion", losses.conclusion.replace("_", " "), _describe_margin(losses)
    champion = verdict.champion
    if champion is not None and champion.difference is not None:
        note = _describe_interval(champion.interval)
        name = "Against the champion"
        yield name, format_difference(champion.difference), f"candidate minus champion, {note}"
    if verdict.drift is not None:
        yield "Drift", format_loss(verdict.drift.kl_initial), _describe_drift_bound(verdict)
    for task in verdict.tasks:
        value = f"{task.candidate * task.questions:g} of {task.questions}"
        yield f"Right answers, {task.name}", value, f"{task.before * task.questions:g} before"
    changed = sum(tensor.changed for tensor in verdict.tensors)
    yield "Tensors changed", f"{changed} of {len(verdict.tensors)}", "compared byte by byte"
    if verdict.tiers:
        applied = sum(tier.applied_updates for tier in verdict.tiers)
        expected = sum(tier.expected_updates for tier in verdict.tiers)
        yield "Updates applied", f"{applied:,} of {expected:,}", "over all tiers"


def _describe_margin(losses: Validation) -> str:
    """What the word rests on: the margin, and how many examples would settle it."""
    margin = f"margin {losses.margin or 0:.2g} nats a token"
    if losses.conclusion == "inconclusive" and losses.examples_needed is not None:
        return f"{margin}; some {losses.examples_needed:,} examples would tell"
    return margin


def _describe_drift_bound(verdict: Verdict) -> str:
    """The unit of the drift and its bound, `gate.max_kl`, where there is one."""
    bound = (verdict.thresholds or {}).get("max_kl")
    allowed = "no bound" if bound is None else f"at most {bound:.4g} allowed"
    return f"KL from the initial adapter, nats a token; {allowed}"


def paired_losses_section(record: Run) -> Html:
    """The candidate against what it started from and the champion, on the same examples."""
    verdict = record.verdict
    if verdict is None or verdict.validation is None:
        why = "No held-out example was compared: "
        reason = (
            "the run is not judged yet."
            if verdict is None
            else "there is no validation set and no test.jsonl, so that quality was not measured."
        )
        return section("pairs", "Against champion and parent", paragraph(why, reason))
    columns = [
        "candidate against",
        "its loss",
        "candidate",
        "difference",
        "95 % interval",
        "smallest visible",
        "examples",
        "conclusion",
    ]
    rows = [_parent_row(verdict.validation)]
    if verdict.champion is not None:
        rows.append(_champion_row(verdict.champion))
    caption = "Mean losses in nats a token; a difference below 0 is better"
    notes = [paragraph(_describe_checkpoint_selection(verdict.validation), class_="note")]
    if verdict.drift is not None:
        notes.append(paragraph(f"Drift: {verdict.drift.describe()}."))
    if verdict.champion is None:
        notes.append(paragraph("There was no champion when the run was judged.", class_="note"))
    elif verdict.champion.not_compared is not None:
        notes.append(paragraph("Not compared with the champion: ", verdict.champion.not_compared))
    worst = Html("") if record.losses is None else _worst_examples(record, record.losses)
    heading = "Against champion and parent"
    return section("pairs", heading, table(caption, columns, rows), *notes, worst)


def _parent_row(losses: Validation) -> tuple[object, ...]:
    return (
        "parent (the adapter it started from)",
        losses.loss_before,
        losses.loss_after,
        losses.difference,
        _interval_cell(losses.interval),
        losses.smallest_visible,
        losses.examples,
        _conclusion_cell(losses.conclusion),
    )


def _champion_row(champion: ChampionLoss) -> tuple[object, ...]:
    both = (champion.loss, champion.difference)
    candidate = None if None in both else sum(value for value in both if value is not None)
    return (
        f"champion {shorten_digest(champion.version)}",
        champion.loss,
        candidate,
        champion.difference,
        _interval_cell(champion.interval),
        champion.smallest_visible,
        champion.examples,
        _conclusion_cell(champion.conclusion),
    )


def _interval_cell(interval: Sequence[float] | None) -> str | None:
    return None if interval is None else format_interval(interval)


def _conclusion_cell(conclusion: str | None) -> str | None:
    return None if conclusion is None else conclusion.replace("_", " ")


def _describe_checkpoint_selection(losses: Validation) -> str:
    if losses.chosen_among > 1:
        corrected = ""
        if losses.corrected_interval is not None:
            interval = format_interval(losses.corrected_interval)
            corrected = f" Corrected for that choice, the 95 % interval is {interval}."
        return (
            f"{losses.file} also chose the step that is offered, among {losses.chosen_among}, so "
            f"that the loss after is a little better than on data that nothing was chosen on; a "
            f"test.jsonl would be that.{corrected}"
        )
    return f"{losses.file} had no part in choosing the step that is offered."


def _worst_examples(record: Run, losses: ExampleLosses) -> Html:
    """The examples that the candidate lost most on, with their text as the file has it now."""
    losses = losses.counted()
    differences = losses.after - losses.before
    comparable = np.isfinite(differences)
    improved = int((differences[comparable] < 0).sum())
    order = np.argsort(-np.where(comparable, differences, np.inf), kind="stable")[
        :MAX_WORST_EXAMPLES
    ]
    numbers = [int(losses.lines[place]) for place in order]
    texts = _example_texts(record, losses.file, numbers)
    champion = losses.champion
    rows = [
        (
            f"{losses.file}:{number}",
            truncated_text(texts.get(number, "–"), 240),
            _finite_or_none(differences[place]),
            _finite_or_none(losses.before[place]),
            _finite_or_none(losses.after[place]),
            *(() if champion is None else (_finite_or_none(champion[place]),)),
            int(losses.tokens[place]),
        )
        for place, number in zip(order, numbers, strict=True)
    ]
    figures = ("difference", "before", "after", *(() if champion is None else ("champion",)))
    columns = ("example", "text", *figures, "tokens")
    caption = f"The {len(rows)} examples with the worst difference; all: gate-losses.jsonl"
    share = f"{improved} of {len(losses)} examples have a lower loss than before."
    return join((paragraph(share), table(caption, columns, rows)))


def _finite_or_none(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _example_texts(record: Run, file: str, numbers: Sequence[int]) -> dict[int, str]:
    """Lines of a file of the data set by number; none where it is gone, packed, or too large."""
    if record.dataset is None or not file.endswith(".jsonl") or not numbers:
        return {}
    choice = "auto" if record.config is None else record.config.gate.held_out
    is_in_data_set = choice in SPLITS_BY_HELD_OUT_CHOICE
    path = Path(record.dataset.folder, file) if is_in_data_set else Path(file)
    texts: dict[int, str] = {}
    try:
        with open_regular(path, MAX_DATA_BYTES, follow_links=True) as (lines, _):
            for number, line in enumerate(lines, 1):
                if number in numbers:
                    texts[number] = line[:MAX_LINE_BYTES].decode(errors="replace").strip()
                if number >= max(numbers):
                    break
    except (DamagedError, OSError):
        return {}
    return texts


@dataclass(frozen=True)
class _ModuleChange:
    """The mean relative change of a module's tensors, and whether one of them did not change."""

    change: float | None
    tier: int | None
    is_unchanged: bool

    @classmethod
    def from_tensors(cls, tensors: Sequence[TensorChange]) -> _ModuleChange:
        """The figures of the tensors of one module."""
        known = [t.relative_delta for t in tensors if t.relative_delta is not None]
        change = sum(known) / len(known) if known else None
        return cls(change, tensors[0].tier, not all(tensor.changed for tensor in tensors))


def weight_change_section(record: Run) -> Html:
    """The relative change of each module as a map, layer by module, with the tiers marked."""
    heading = "Change by layer and module"
    if record.verdict is None or not record.verdict.tensors:
        return section("change", heading, paragraph("The gate has not compared the adapters yet."))
    modules = _changes_by_layer_and_name(record.verdict.tensors)
    columns = sorted({column for _, column in modules})
    layers = sorted({layer for layer, _ in modules})
    largest = max((m.change for m in modules.values() if m.change is not None), default=0) or 1.0
    lines = []
    for layer in layers:
        own = {column: m for (row, column), m in modules.items() if row == layer}
        tiers = sorted({m.tier for m in own.values() if m.tier is not None})
        is_mixed = len(tiers) > 1
        cells = "".join(_heat_cell(own.get(c), largest, with_tier=is_mixed) for c in columns)
        marks = f" · tier {', '.join(map(str, tiers))}" if tiers else ""
        name = "outside layers" if layer < 0 else f"layer {layer}"
        lines.append(f"<tr><th scope=row>{escaped_html(name + marks)}{cells}\n")
    head = "".join(f"<th scope=col>{escaped_html(column)}" for column in columns)
    caption = (
        "Mean relative change of a module's tensors, from initial to trained adapter. A "
        "fresh lora_b starts at zero, which counts as a change of 1."
    )
    body = Html(
        f'<table class="heat">{table_caption(caption)}'
        f"<thead><tr><th scope=col>layer{head}<tbody>{''.join(lines)}</table>"
    )
    unchanged = [tensor.name for tensor in record.verdict.tensors if not tensor.changed]
    note = Html("")
    if unchanged:
        shown = ", ".join(unchanged[:8]) + (" …" if len(unchanged) > 8 else "")
        note = paragraph(f"Not changed: {len(unchanged)} tensors, {shown}", class_="bad")
    return section("change", heading, note, scrolling("Change by layer and module", body))


def _changes_by_layer_and_name(
    tensors: Sequence[TensorChange],
) -> dict[tuple[int, str], _ModuleChange]:
    """Modules by layer, -1 outside of layers, and by their name within it."""
    grouped: dict[tuple[int, str], list[TensorChange]] = {}
    for tensor in tensors:
        module = tensor.name.rpartition(".")[0] or tensor.name
        matched = _LAYER_NAME_PATTERN.match(module)
        place = (int(matched[2]), matched[3]) if matched else (-1, module)
        grouped.setdefault(place, []).append(tensor)
    return {place: _ModuleChange.from_tensors(group) for place, group in grouped.items()}


def _heat_cell(module: _ModuleChange | None, largest: float, *, with_tier: bool) -> str:
    if module is None:
        return "<td>"
    share = MAX_HEAT_OPACITY * (module.change or 0.0) / largest
    value = "–" if module.change is None else f"{module.change:.2g}"
    tier = f" <small>tier {module.tier}</small>" if with_tier and module.tier is not None else ""
    mark = ' class="bad"' if module.is_unchanged else ""
    return f'<td{mark} style="background:rgba(var(--heat),{share:.2f})">{value}{tier}'


def tier_updates_section(record: Run) -> Html:
    """Updates that were due and that were applied, a row for each tier."""
    heading = "Updates expected and applied"
    if record.verdict is not None and record.verdict.tiers:
        rows: list[tuple[object, ...]] = [
            (
                f"tier {tier.tier}",
                tier.frequency,
                f"{tier.changed} of {tier.tensors}",
                tier.expected_updates,
                tier.applied_updates,
                tier.skipped_updates,
            )
            for tier in record.verdict.tiers
        ]
        caption = f"Up to step {record.verdict.adapter_step or 0:,}, the step that is offered"
        judged = ["tier", "updated every", "tensors changed", "expected", "applied", "skipped"]
        return section("updates", heading, table(caption, judged, rows))
    applied, skipped = record.last("updates"), record.last("skipped")
    if not isinstance(applied, list) or record.config is None:
        return section("updates", heading, paragraph("No step was reported yet."))
    frequencies = record.config.nested.frequencies
    missing = [0] * len(applied)
    rows = [
        (f"tier {number}", every, record.step // every, done, missed)
        for number, (every, done, missed) in enumerate(
            zip(frequencies, applied, skipped or missing, strict=False)
        )
    ]
    columns = ("tier", "updated every", "expected", "applied", "skipped")
    return section("updates", heading, table(f"Up to step {record.step:,}", columns, rows))


def tasks_section(record: Run) -> Html:
    """What base, parent, champion and candidate answered, the lost questions first."""
    heading = "Answers of base, champion and candidate"
    parts: list[Html] = []
    names = list(dict.fromkeys(answer.task for answer in record.answers))
    count = max(2, MAX_SHOWN_QUESTIONS // max(1, len(names)))
    for name in names[:MAX_SHOWN_QUESTIONS]:
        parts += [element("h3", name), _answers_table(record, name, count)]
    if record.sample_answers:
        parts += [element("h3", "To read, not scored"), _sample_answers_table(record)]
    judged = None if record.verdict is None else record.verdict.adapter_step
    samples = SampleTable.from_metrics(record.metrics, judged)
    if samples is not None:
        parts += [element("h3", "Samples"), _answers_by_evaluation_table(samples)]
    if not parts:
        none = "No question was asked: neither `gate.tasks` nor `samples` names one."
        parts = [paragraph(none if record.state != "running" else "No answer yet.")]
    return section("answers", heading, *parts)


def _answers_table(record: Run, task: str, count: int) -> Html:
    """The questions of a suite: those that the candidate lost first, at most `count`."""
    own = [answer for answer in record.answers if answer.task == task]
    roles = [
        r for r in ("candidate", "base", "parent", "champion") if any(a.model == r for a in own)
    ]
    by_line: dict[int, dict[str, tuple[str, float]]] = {}
    questions = {answer.line: (answer.question, answer.expected) for answer in own}
    for answer in own:
        by_line.setdefault(answer.line, {})[answer.model] = (answer.answer, answer.score)

    def gain(line: int) -> float:
        """The candidate's score minus the best of the others."""
        scores = {role: score for role, (_, score) in by_line[line].items()}
        candidate = scores.pop("candidate", 0.0)
        return candidate - max(scores.values(), default=0.0)

    lines = sorted(by_line, key=gain)
    rows = []
    for line in lines[:count]:
        question, expected = questions[line]
        answers = [_answer_cell(by_line[line].get(role)) for role in roles]
        rows.append((truncated_text(question, 200), expected, *answers))
    caption = f"{len(rows)} of {len(lines)} questions, lost ones first; all: answers.jsonl"
    return table(caption, ("question", "expected", *roles), rows)


def _answer_cell(answer: tuple[str, float] | None) -> Html:
    if answer is None:
        return escaped_html(None)
    text, score = answer
    mark = "✓ right" if score >= 1 else "✗ wrong" if score <= 0 else f"{score:.2g}"
    return join(
        (
            element("small", mark, class_="good" if score >= 1 else "bad"),
            truncated_text(shown_answer(text)),
        )
    )


def _sample_answers_table(record: Run) -> Html:
    """What the candidate answered at the end, beside the data's own answer, base and parent."""
    shown = record.sample_answers[:MAX_SHOWN_QUESTIONS]
    parent = ("parent",) if any(row.parent is not None for row in shown) else ()
    rows = []
    for row in shown:
        adapter = _sample_cell(row.adapter, row.adapter_broken)
        base = _sample_cell(row.base, row.base_broken)
        others = (row.expected, row.parent)[: 1 + len(parent)]
        expected, *of_parent = (None if one is None else truncated_text(one) for one in others)
        prompt = truncated_text(f"{row.place}: {row.prompt}")
        rows.append((prompt, adapter, expected, base, *of_parent))
    columns = ("prompt", "candidate", "expected", "base", *parent)
    return table("Greedy answers at the end of training; all: sample-answers.jsonl", columns, rows)


def _sample_cell(answer: str, broken: BrokenHow | None) -> Html:
    shown = truncated_text(shown_answer(answer))
    if broken is None:
        return shown
    return join((element("small", f"✗ broken: {BROKEN_WORDS[broken]}", class_="bad"), shown))


def _answers_by_evaluation_table(samples: SampleTable) -> Html:
    """The answers to each prompt of `samples`, a row for each evaluation."""
    columns = ("step", *(truncated_text(prompt, 200) for prompt in samples.prompts))
    rows = [
        (step, *(None if answer is None else truncated_text(answer, 200) for answer in answers))
        for step, answers in samples.rows
    ]
    return table(f"Greedy answers at {samples.describe()}; all: metrics.jsonl", columns, rows)
