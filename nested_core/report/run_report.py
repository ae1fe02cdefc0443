"""report.html: a run as one page, at any state of the run.

One file that runs nothing and fetches nothing, light and dark, readable on a phone. It is derived
from the run's other files, so it can be removed and written again.
"""

from __future__ import annotations

import platform
import re
import shlex
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version as installed_version
from itertools import groupby
from pathlib import Path

import numpy as np

from nested_core import seams
from nested_core.backend import RECORDED_PACKAGES
from nested_core.config.loading import render_config
from nested_core.config.sections import SPLITS_BY_HELD_OUT_CHOICE
from nested_core.data.data_settings import DataSettings
from nested_core.data.lines.example_parsing import FieldNames, parse_line, strip_line
from nested_core.data.lines.json_decoding import LineProblem
from nested_core.errors import DamagedError, join_first_values, shorten
from nested_core.records.answers import (
    BROKEN_WORDS,
    AnswerRecord,
    BrokenHow,
    SampleAnswers,
    shown_answer,
)
from nested_core.records.dataset import group_findings
from nested_core.records.losses import ExampleLosses
from nested_core.records.run_status import Run, read_run
from nested_core.records.verdict import TensorChange, Validation
from nested_core.records.verdict_table import check_tables, describe_verdict, tier_table
from nested_core.report.outcome import (
    describe_end,
    describe_outcome,
    describe_state,
    find_reason_kept,
)
from nested_core.report.page_blocks import PageBlocks, show_answers, show_rows
from nested_core.storage.atomic import finite_or_none, write_page
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.untrusted_files import open_regular
from nested_core.text.document import (
    Block,
    Cell,
    Code,
    Details,
    Document,
    Figures,
    Section,
    Table,
    Text,
)
from nested_core.text.loss_format import format_interval
from nested_core.text.svg_chart import Chart, Curve, Point
from nested_core.training.reports.sample_prompts import samples_by_step

MAX_SHOWN_FINDINGS = 60
MAX_SHOWN_RESUMPTIONS = 5
MAX_SHOWN_PROBLEMS = 20
MAX_SHOWN_FLAGS = 10
MAX_SHOWN_QUESTIONS = 12
MAX_SHOWN_EVALUATIONS = 8
MAX_SHOWN_PROMPTS = 4
MAX_SHOWN_ROWS = 10  # of each kind that a verdict warns of
MAX_SHOWN_CHARACTERS = 240  # of a finding, a question or an example
MAX_CONFIG_CHARACTERS = 12_000
MAX_WORST_EXAMPLES = 5
MAX_DATA_BYTES = 64 * 1024 * 1024  # of a file of data that examples are read from
MAX_LINE_BYTES = 64 * 1024
_LAYER_NAME_PATTERN = re.compile(r"^(.*?\blayers\.)(\d+)\.(.+)$")


@dataclass(frozen=True, repr=False)
class RunReport:
    """The page of a run; in a notebook it displays itself.

    run: the run's files.
    error: what ended the run, if this process knows.
    """

    run: Run
    error: str | None = None

    def to_html(self) -> str:
        """Return the whole page."""
        return describe_run(self.run, self.error).to_html()

    def __repr__(self) -> str:
        """Show the run's folder and outcome."""
        return f"RunReport({self.run.path}, {describe_outcome(self.run)})"

    def _repr_html_(self) -> str:
        """Return the page as HTML for a notebook's cell."""
        return describe_run(self.run, self.error).to_fragment()

    def write(self, path: Path) -> None:
        """Write the page, atomically."""
        write_page(path, self.to_html())


def describe_run(run: Run, error: str | None = None) -> Document:
    """Build the page of a run as a document; `error` is what ended the run, if one did."""
    now = datetime.now(UTC)
    checks: list[Block] = [] if run.verdict is None else [*check_tables(run.verdict)]
    checks += show_rows(run, MAX_SHOWN_ROWS)
    of_rooms = [block for room in seams.load_all(PageBlocks) for block in room.of_run(run)]
    return Document(
        f"Run {run.name}",
        [
            _describe_verdict(run, error),
            Section("Answers of base, champion and candidate", list_answers(run), "answers"),
            Section("Checks", checks or [Text("No check was made yet.")], "checks"),
            Section("Against the champion and the start", list(_compare_examples(run)), "pairs"),
            Section("Training", list(_describe_training(run)), "curves"),
            Section("Change by layer and module", list(_map_changes(run)), "change"),
            Section("Updates expected and applied", [_count_updates(run)], "updates"),
            Section("Data", [*_list_findings(run), *of_rooms], "data"),
            Section("To reproduce", list(_describe_reproduction(run)), "reproduce"),
        ],
        above=f"{describe_state(run)}, {run.describe_length()}; begun "
        f"{run.started:%Y-%m-%d %H:%M} UTC, this page {now:%Y-%m-%d %H:%M} UTC",
        below="Written by nested-tune from the files of the run; `nested-tune report` writes it "
        "again.",
    )


def _describe_verdict(run: Run, error: str | None) -> Section:
    """Build the section on the verdict: outcome, damaged files, training warnings."""
    headline = describe_outcome(run)
    blocks: list[Block] = [Text(headline, is_headline=True), Text(describe_end(run))]
    if run.verdict is not None:
        blocks = [*describe_verdict(run.verdict, headline)]
    if (reason := find_reason_kept(run)) is not None:
        blocks.insert(1, Text(f"The champion was kept: {reason}.", "note"))
    if error is not None and (run.verdict is None or run.verdict.has_passed):
        blocks.insert(1, Text(error, "bad"))
    damaged = [problem for problem in run.problems if problem not in headline]
    blocks[1:1] = [Text(f"Damaged: {problem}", "bad") for problem in damaged[:MAX_SHOWN_PROBLEMS]]
    flags = () if run.result is None else run.result.red_flags[:MAX_SHOWN_FLAGS]
    blocks += [Text(f"Red flag while it trained: {flag}", "warn") for flag in flags]
    return Section("Verdict", blocks, "verdict")


def _describe_training(run: Run) -> Iterator[Block]:
    """Yield the blocks of the page's section on training.

    These are sentences that explain the curves, and charts of losses, answers, learning rate,
    gradient norm, memory and speed; each inner list is one figure, with the same curves over
    different x.
    """
    figures = [
        [_loss_chart(run, "step"), _loss_chart(run, "seconds of training")],
        *_answer_figures(run),
        _metric_figure(run, "Learning rate", "rate", {"learning rate": "learning_rate"}),
        _metric_figure(
            run,
            "Gradient norm",
            "norm",
            {"before clipping": "grad_norm", "after clipping": "clipped_grad_norm"},
        ),
        _metric_figure(run, "Peak memory", "GB", {"peak memory": "peak_memory_gb"}),
        _metric_figure(
            run, "Speed", "trained-on tokens a second", {"tokens/s": "tokens_per_second"}
        ),
    ]
    if not run.metrics:
        yield Text("Nothing was reported yet.")
        return
    if sentences := " ".join(_describe_curves(run)):
        yield Text(sentences, "note")
    yield Figures(figures)


def _describe_curves(run: Run) -> Iterator[str]:
    """Yield sentences that explain the curves: resumptions, judged step, data, memory forecast."""
    plan = run.plan
    if plan is not None and plan.resumed_at:
        noun = "step" if len(plan.resumed_at) == 1 else "steps"
        steps = join_first_values([f"{step:,}" for step in plan.resumed_at], MAX_SHOWN_RESUMPTIONS)
        yield (
            f"The run was resumed at {noun} {steps}: the curves continue from the checkpoint "
            f"there, and each step and its seconds of training are counted once."
        )
    if plan is not None:
        yield from filter(None, (plan.describe_rank_counts(), plan.describe_ends(run.result)))
    if run.verdict is not None and run.verdict.adapter_step is not None:
        yield f"The adapter of step {run.verdict.adapter_step:,} is the one that was evaluated."
    if plan is not None and plan.validation_file is not None:
        yield f"Validation losses are of {plan.describe_validation()}."
    if plan is not None and plan.memory_forecast_gb is not None:
        yield (
            f"Memory: {plan.memory_forecast_gb:.3g} GB were forecast, {plan.memory_limit_gb:.3g} "
            f"GB may be used."
        )


def _loss_chart(run: Run, x: str) -> Chart:
    """Chart training and validation loss over steps or seconds."""
    curves = [
        Curve("training", run.points("loss", x)),
        Curve("validation", run.points("val_loss", x), has_dots=True),
    ]
    return Chart("Loss", x, run.loss_unit, curves)


def _answer_figures(run: Run) -> Iterator[list[Chart]]:
    """Yield a chart of the share of right answers to each suite asked during training."""
    names = dict.fromkeys(name for record in run.metrics for name in record.get("tasks", {}))
    curves = []
    for name in names:
        asked = [r for r in run.metrics if name in r.get("tasks", {})]
        points = [Point(float(r.get("step", 0)), r["tasks"][name]["right"]) for r in asked]
        curves.append(Curve(f"{name} ({asked[-1]['tasks'][name]['questions']})", points, True))
    if curves:
        yield [Chart("Right answers while training", "step", "share", curves, from_zero=True)]


def _metric_figure(run: Run, title: str, unit: str, keys: dict[str, str]) -> list[Chart]:
    """Chart metrics over steps; `keys` maps the curves' names to metrics."""
    curves = [Curve(name, run.points(key)) for name, key in keys.items()]
    return [Chart(title, "step", unit, curves, from_zero=title != "Gradient norm")]


def _compare_examples(run: Run) -> Iterator[Block]:
    """Yield the blocks of the section that compares losses of the same held-out examples.

    The candidate (the trained adapter) is compared with the adapter that training started from, and
    with the registry's champion if there was one; the examples that rose most are listed.
    """
    verdict = run.verdict
    if verdict is None or verdict.validation is None:
        why = (
            "the run has no verdict yet."
            if verdict is None
            else "there is no validation set and no test.jsonl, so that quality was not measured."
        )
        yield Text(f"No held-out example was compared: {why}")
        return
    yield Text(_describe_checkpoint_selection(verdict.validation), "note")
    if verdict.drift is not None:
        yield Text(f"{verdict.drift.describe()}.")
    if verdict.champion is None:
        yield Text("There was no champion when the run was evaluated.", "note")
    if run.losses is not None:
        yield from _list_worst_examples(run, run.losses.counted())


def _describe_checkpoint_selection(losses: Validation) -> str:
    """Say whether the held-out file also selected the checkpoint, which biases its loss."""
    if losses.chosen_among <= 1:
        return f"{losses.file} had no part in selecting the checkpoint."
    corrected = ""
    if losses.corrected_interval is not None:
        interval = format_interval(losses.corrected_interval)
        corrected = f" Corrected for that choice, the 95 % interval is {interval}."
    return (
        f"{losses.file} also selected the checkpoint, among {losses.chosen_among}, so that the "
        f"loss after is slightly optimistic. A test.jsonl would not have this bias.{corrected}"
    )


def _list_worst_examples(run: Run, losses: ExampleLosses) -> Iterator[Block]:
    """Yield a table of the examples whose loss rose most, with their text in the file now.

    losses: of each held-out example before and after training, and with the registry's champion if
        there is one. An example whose loss is not finite counts as one that rose most.
    """
    differences = losses.after - losses.before
    comparable = np.isfinite(differences)
    improved = int((differences[comparable] < 0).sum())
    all_rows = np.argsort(-np.where(comparable, differences, np.inf), kind="stable")
    worst_rows = all_rows[:MAX_WORST_EXAMPLES]
    texts = _example_texts(run, losses.file, [int(losses.lines[row]) for row in worst_rows])
    columns = {"difference": differences, "before": losses.before, "after": losses.after}
    if losses.champion is not None:
        columns["champion"] = losses.champion
    rows = [
        (
            f"{losses.file}:{losses.lines[row]}",
            texts.get(int(losses.lines[row]), "–"),
            *(finite_or_none(float(column[row])) for column in columns.values()),
            int(losses.tokens[row]),
        )
        for row in worst_rows
    ]
    yield Text(f"{improved} of {len(losses)} examples have a lower loss than before.")
    caption = (
        f"The {len(rows)} examples whose loss rose most or, where none rose, fell least; all: "
        "gate-losses.jsonl"
    )
    yield Table(caption, ("example", "text", *columns, "tokens"), rows)


def _example_texts(run: Run, file: str, numbers: Sequence[int]) -> dict[int, str]:
    """Read the last two turns, or the text, of examples by their lines in a data file.

    Empty if the file is gone, packed or too large.

    file: a file of the run's data set, or the path that gate.held_out names in place of one.
    """
    if run.dataset is None or not file.endswith(".jsonl") or not numbers:
        return {}
    choice = "auto" if run.config is None else run.config.gate.held_out
    path = Path(run.dataset.folder, file) if choice in SPLITS_BY_HELD_OUT_CHOICE else Path(file)
    texts: dict[int, str] = {}
    try:
        with open_regular(path, MAX_DATA_BYTES, follow_links=True) as (lines, _):
            for number, line in enumerate(lines, 1):
                if number in numbers:
                    texts[number] = _describe_example(line[:MAX_LINE_BYTES], run)
                if number >= max(numbers):
                    break
    except (DamagedError, OSError):
        return {}
    return texts


def _describe_example(line: bytes, run: Run) -> str:
    """Return the last two turns of an example, or its text, shortened; a bad line as it is."""
    try:
        config = run.config
        names = FieldNames() if config is None else DataSettings.from_config(config).field_names
        example = parse_line(strip_line(line, is_first=False), names)
    except LineProblem:
        return shorten(line.decode(errors="replace"), MAX_SHOWN_CHARACTERS)
    turns = [f"{turn['role']}: {turn.get('content')}" for turn in example.messages[-2:]]
    return "\n".join(shorten(text, MAX_SHOWN_CHARACTERS) for text in turns or [example.text])


def _map_changes(run: Run) -> Iterator[Block]:
    """Yield the section with a heat map of how much training changed each module.

    A row is a layer with the tiers of its tensors (a tier is a group of tensors that are updated
    equally often), a column a kind of module, a cell the mean relative change of its tensors.
    """
    tensors = () if run.verdict is None else run.verdict.tensors
    if not tensors:
        yield Text("The gate has not compared the adapters yet.")
        return
    unchanged = [tensor.name for tensor in tensors if not tensor.changed]
    if unchanged:
        shown = ", ".join(unchanged[:8]) + (" …" if len(unchanged) > 8 else "")
        yield Text(f"Not changed: {len(unchanged)} tensors, {shown}", "bad")
    located = sorted(((*_place_of(t), t) for t in tensors), key=lambda place: place[:2])
    # Tensors by layer and module
    modules = {
        key: [t for *_, t in group] for key, group in groupby(located, key=lambda place: place[:2])
    }
    change_of = {key: _mean_change(group) for key, group in modules.items()}
    # The darkest colour; 1 where nothing changed or could be measured, as it is divided by
    largest = max((c for c in change_of.values() if c is not None), default=0) or 1.0
    columns = sorted({column for _, column in modules})
    # A row for each layer, a column for each module name
    rows = []
    for layer in sorted({layer for layer, _ in modules}):
        tiers = {t.tier for c in columns for t in modules.get((layer, c), ()) if t.tier is not None}
        tier_note = f" · tier {', '.join(map(str, sorted(tiers)))}" if tiers else ""
        # Tensors of no layer, such as embeddings, are placed in layer -1
        label = "outside layers" if layer < 0 else f"layer {layer}"
        cells = [
            _heat_cell(modules.get((layer, c), ()), largest, with_tier=len(tiers) > 1)
            for c in columns
        ]
        rows.append((f"{label}{tier_note}", *cells))
    yield Table(
        "Mean relative change of a module's tensors, from initial to trained adapter. A fresh "
        "lora_b starts at zero, which counts as a change of 1.",
        ("layer", *columns),
        rows,
    )


def _place_of(tensor: TensorChange) -> tuple[int, str]:
    """Return the layer of a tensor's module (-1 outside of layers), and the module's name in it."""
    module = tensor.name.rpartition(".")[0] or tensor.name
    matched = _LAYER_NAME_PATTERN.match(module)
    return (int(matched[2]), matched[3]) if matched else (-1, module)


def _mean_change(tensors: Sequence[TensorChange]) -> float | None:
    """Return the mean relative change of tensors; None if no tensor has one."""
    known = [t.relative_delta for t in tensors if t.relative_delta is not None]
    return sum(known) / len(known) if known else None


def _heat_cell(tensors: Sequence[TensorChange], largest: float, *, with_tier: bool) -> Cell:
    """Build the heat map's cell of a module, coloured by its share of the largest change.

    largest: the largest change of a module in the map.
    with_tier: whether the cell names the tier.
    """
    if not tensors:
        return Cell("", heat=0.0)
    change = _mean_change(tensors)
    value = "–" if change is None else f"{change:.2g}"
    tier = f" tier {tensors[0].tier}" if with_tier and tensors[0].tier is not None else ""
    is_changed = all(tensor.changed for tensor in tensors)
    return Cell(f"{value}{tier}", "" if is_changed else "bad", heat=(change or 0.0) / largest)


def _count_updates(run: Run) -> Block:
    """Build a table of updates due and applied, one row for each tier."""
    if run.verdict is not None and run.verdict.tiers:
        return tier_table(run.verdict)
    applied, skipped, step = (run.last(key) for key in ("updates", "skipped", "step"))
    if not isinstance(applied, list) or run.config is None:
        return Text("No step was reported yet.")
    rows = [
        (f"tier {number}", f"every {every}", step // every, done, missed)
        for number, (every, done, missed) in enumerate(
            zip(run.config.nested.frequencies, applied, skipped or [0] * len(applied), strict=False)
        )
    ]
    columns = ("tier", "updated", "expected", "applied", "skipped")
    return Table(f"Up to step {step:,}", columns, rows)


def list_answers(run: Run) -> list[Block]:
    """Build the blocks of the page's section on answers.

    These are for each suite of questions a table of what base, parent (the adapter that training
    started from), champion and candidate (the trained adapter) answered, lost questions first; then
    sample answers that are not scored, and answers given during training.
    """
    blocks: list[Block] = []
    names = list(dict.fromkeys(answer.task for answer in run.answers))
    count = max(2, MAX_SHOWN_QUESTIONS // max(1, len(names)))
    for name in names[:MAX_SHOWN_QUESTIONS]:
        answers = [answer for answer in run.answers if answer.task == name]
        given = [(answer.model, answer.expected, answer.answer, answer.score) for answer in answers]
        blocks.append(Section(name, [*show_answers(name, given), _answers_table(answers, count)]))
    if run.sample_answers:
        shown = run.sample_answers[:MAX_SHOWN_QUESTIONS]
        blocks.append(Section("To read, not scored", [_sample_answers_table(shown)]))
    judged = None if run.verdict is None else run.verdict.adapter_step
    if (samples := tabulate_samples(run.metrics, judged)) is not None:
        blocks.append(Section("Samples", [samples]))
    none = "No question was asked: neither `gate.tasks` nor `samples` names one."
    return blocks or [Text(none if run.state != "running" else "No answer yet.")]


def _answers_table(answers: Sequence[AnswerRecord], count: int) -> Table:
    """Build a table of a suite's questions and answers, lost questions first.

    A question is lost if another model answered it better than the candidate (the trained adapter).

    count: how many questions to show at most.
    """
    roles = [
        r for r in ("candidate", "base", "parent", "champion") if any(a.model == r for a in answers)
    ]
    by_line: dict[int, dict[str, AnswerRecord]] = {}
    for answer in answers:
        by_line.setdefault(answer.line, {})[answer.model] = answer

    def gain(line: int) -> float:
        """Return the candidate's score minus the best of the other models."""
        scores = {role: answer.score for role, answer in by_line[line].items()}
        return scores.pop("candidate", 0.0) - max(scores.values(), default=0.0)

    lines = sorted(by_line, key=gain)
    rows = []
    for line in lines[:count]:
        by_role = by_line[line]
        asked = next(iter(by_role.values()))
        cells = [_answer_cell(by_role[role]) if role in by_role else None for role in roles]
        rows.append(
            (shorten(asked.question, MAX_SHOWN_CHARACTERS), cells[0], asked.expected, *cells[1:])
        )
    caption = f"{len(rows)} of {len(lines)} questions, lost ones first; all: answers.jsonl"
    return Table(caption, ("question", roles[0], "expected", *roles[1:]), rows)


def _answer_cell(answer: AnswerRecord) -> Cell:
    """Build the cell of an answer, marked right or wrong."""
    score = answer.score
    mark = "✓ right" if score >= 1 else "✗ wrong" if score <= 0 else f"{score:.2g}"
    text = shorten(shown_answer(answer.answer), MAX_SHOWN_CHARACTERS)
    return Cell(text, "good" if score >= 1 else "bad", mark)


def _sample_answers_table(shown: Sequence[SampleAnswers]) -> Table:
    """Build a table of the sample prompts with the models' and the data set's answers."""
    has_parent = any(row.parent is not None for row in shown)
    rows = [
        (
            f"{row.place}: {row.prompt}",
            _sample_cell(row.adapter, row.adapter_broken),
            row.expected,
            _sample_cell(row.base, row.base_broken),
            *((row.parent,) if has_parent else ()),
        )
        for row in shown
    ]
    columns = ("prompt", "candidate", "expected", "base", *(("parent",) if has_parent else ()))
    return Table("Greedy answers at the end of training; all: sample-answers.jsonl", columns, rows)


def _sample_cell(answer: str, broken: BrokenHow | None) -> Cell:
    """Build the cell of a sample answer, marked if it is broken."""
    text = shorten(shown_answer(answer), MAX_SHOWN_CHARACTERS)
    return Cell(text) if broken is None else Cell(text, "bad", f"✗ broken: {BROKEN_WORDS[broken]}")


def tabulate_samples(
    records: Iterable[Mapping[str, object]], judged_step: int | None
) -> Table | None:
    """Build a table of the answers to `samples` from records of metrics.jsonl; None without any.

    A row is an evaluation during training, "(selected)" the judged one; a column is a prompt. Of
    many only some are shown; the prompts of the latest evaluation come first. None is in the place
    of an answer where a prompt was not asked: `samples` may change when a run is resumed.
    """
    by_step = {
        step: {str(sample["prompt"]): str(sample["answer"]) for sample in samples}
        for step, samples in samples_by_step(records).items()
    }
    if not by_step:
        return None
    latest_first = reversed(by_step.values())
    prompts = tuple(dict.fromkeys(prompt for answers in latest_first for prompt in answers))
    shown = prompts[:MAX_SHOWN_PROMPTS]
    rows = [
        (
            f"{step:,} (selected)" if step == judged_step else f"{step:,}",
            *(by_step[step].get(prompt) for prompt in shown),
        )
        for step in _choose_shown_evaluations(by_step, judged_step)
    ]
    caption = (
        f"Greedy answers at {len(rows)} of {len(by_step)} evaluations to {len(shown)} of "
        f"{len(prompts)} prompts; all: metrics.jsonl"
    )
    return Table(caption, ("step", *shown), rows)


def _choose_shown_evaluations(steps: Iterable[int], judged_step: int | None) -> list[int]:
    """Return at most MAX_SHOWN_EVALUATIONS of the steps, evenly spaced.

    First, last and judged step are always among them.
    """
    ordered = sorted(set(steps))
    if len(ordered) <= MAX_SHOWN_EVALUATIONS:
        return ordered
    required = {step for step in ordered if step in (ordered[0], judged_step, ordered[-1])}
    count = max(2, MAX_SHOWN_EVALUATIONS - len(required) + 2)
    spaced = {ordered[n * (len(ordered) - 1) // (count - 1)] for n in range(count)}
    return sorted(required | spaced)


def _list_findings(run: Run) -> Iterator[Block]:
    """Yield the blocks on the findings of data validation, by file and line."""
    if run.dataset is None:
        yield Text("The data was not validated yet.")
        return
    groups = group_findings(run.dataset.findings)
    rows = [
        (g.severity, g.file, g.shown_lines, g.count, g.check, g.message[:MAX_SHOWN_CHARACTERS])
        for g in groups[:MAX_SHOWN_FINDINGS]
    ]
    serious = sum(group.severity != "info" for group in groups)
    columns = ("severity", "file", "line", "count", "check", "message")
    listed = Table(f"Findings in {run.dataset.folder}; all: dataset.json", columns, rows)
    yield Text(f"{serious} to look at, first." if serious else "No error and no warning.")
    yield listed if serious else Details("What was counted", [listed])


def _describe_reproduction(run: Run) -> Iterator[Block]:
    """Yield the blocks on how to reproduce the run: command, configuration, digests, versions."""
    command = f"nested-tune train -c {shlex.quote(str(run.folder.config))} --run-dir NEW_FOLDER"
    yield Code("Command", command)
    if run.config is not None:
        text = render_config(run.config).decode()
        cut = "" if len(text) <= MAX_CONFIG_CHARACTERS else "…\n"
        yield Details("config.yaml", [Code("config.yaml", text[:MAX_CONFIG_CHARACTERS] + cut)])
    yield Table("Digests", ("of", "digest"), list(_list_digests(run)))
    rows = [("Python", platform.python_version()), ("platform", platform.platform())]
    rows += [(package, installed_version(package)) for package in RECORDED_PACKAGES]
    caption = "Versions of the process that wrote this page"
    yield Details("Versions", [Table(caption, ("package", "version"), rows)])


def _list_digests(run: Run) -> Iterator[tuple[str, str]]:
    """Yield name and digest of the run's data, adapters and losses."""
    verdict, dataset = run.verdict, run.dataset
    if dataset is not None:
        yield "data set", dataset.digest
        for split, stats in dataset.splits.items():
            yield f"{split}, {stats.rows:,} examples", stats.digest
    if verdict is not None:
        yield "initial adapter", verdict.initial.digest
        yield "trained adapter", verdict.trained.digest
        if verdict.champion is not None:
            yield "champion", verdict.champion.version
        if verdict.validation is not None and verdict.validation.losses_sha256 is not None:
            yield "gate-losses.jsonl", verdict.validation.losses_sha256


def read_report(run_dir: str | Path) -> RunReport:
    """Read a run's files and return its page; ConfigError if `run_dir` is no run directory."""
    return RunReport(read_run(RunDirectory(Path(run_dir))))


@contextmanager
def writing_report_at_end(run: RunDirectory) -> Iterator[None]:
    """Write the run's report.html when the block ends, with the error that ended it, if any.

    The caller holds the run's lock. A page that cannot be written is only a warning.
    """
    error: str | None = None
    try:
        yield
    except BaseException as raised:
        error = str(raised) or type(raised).__name__
        raise
    finally:
        write_report_of_ended_run(run, error)


def write_report_of_ended_run(run: RunDirectory, error: str | None) -> None:
    """Write report.html with what ended the run; warn if that fails."""
    try:
        report = RunReport(read_run(run, has_ended=True), error)
        run.require_lock()
        report.write(run.report)
    except Exception as failure:
        warnings.warn(f"{run.report} was not written: {failure}", stacklevel=4)
