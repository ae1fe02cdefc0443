"""report.html: what it says of a run at each state, in which order, and how it is written."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path

import pytest

from nested_core.errors import GateRejected
from nested_core.records.dataset import Finding
from nested_core.records.run_status import Run, read_run
from nested_core.records.verdict import Reason
from nested_core.report.run_report import (
    RunReport,
    describe_run,
    read_report,
    writing_report_at_end,
)
from nested_core.storage.run_directory import RunDirectory
from nested_core.text.document import Section, to_markdown
from tests.runs import (
    HOSTILE_ROW,
    add_metrics,
    begin_run,
    finished_run,
    judge,
    make_losses,
    make_verdict,
    write_plan_of,
)

ORDER = ["verdict", "answers", "checks", "pairs", "curves", "change"]
ORDER += ["updates", "data", "reproduce"]
MAX_BYTES = 300 * 1024


def sections_of(run: RunDirectory, error: str | None = None) -> dict[str, str]:
    """The words of each section of a run's page."""
    blocks = describe_run(read_run(run), error).blocks
    shown = {b.name: "\n".join(to_markdown(b)) for b in blocks if isinstance(b, Section)}
    assert list(shown) == ORDER
    return {name: text.replace("\\", "") for name, text in shown.items()}


def test_a_passed_run_says_so_first_and_everything_in_its_order(tmp_path: Path) -> None:
    page = sections_of(finished_run(tmp_path / "run", champion=True))
    lines = page["verdict"].splitlines()
    assert lines[2].startswith("Verified: passed, better; ")
    assert lines[4].startswith(lines[2].removeprefix("Verified: "))
    assert ": 24 of 24 tensors changed, validation loss 3.55 ->" in lines[4]
    name = f"champion {'c' * 12} vs this run, 12 examples"
    checks = page["checks"]
    assert f"| {name} | 3.05 | 2.675 | -0.375 (" in checks
    assert "| KL divergence from the initial adapter | - | 0.25 | - | at most 2.5 | passed |" in (
        checks.splitlines()
    )
    pairs = page["pairs"]
    assert "KL divergence from the initial adapter 0.25 nats/token" in pairs
    assert "11 of 12 examples have a lower loss than before." in pairs
    assert pairs.index("valid.jsonl:3") < pairs.index("valid.jsonl:1 ")  # the worst first
    assert "much is a pump?" in pairs
    assert "| tier 1 | every 2 | 6 of 6 | 4 | 4 | 0 |" in page["updates"]
    assert "layer 1 · tier 1" in page["change"]
    assert "lost ones first" in page["answers"]
    for words in ("nested-tune train -c", "learning_rate: 0.002", "a" * 64, "da7a" * 16, "mlx-lm"):
        assert words in page["reproduce"]


def test_a_run_without_drift_claims_none(tmp_path: Path) -> None:
    run = begin_run(tmp_path / "run")
    add_metrics(run, 8)
    losses = make_losses(with_drift=False)
    judge(run, make_verdict(losses), losses, "text")
    page = sections_of(run)
    assert "drift" not in (page["verdict"] + page["checks"] + page["pairs"]).lower()


def test_a_rejected_run_gives_its_outcome_and_its_reasons(tmp_path: Path) -> None:
    reasons = [
        Reason("loss_regressed", "the loss rose from 3.55 to 4.1"),
        Reason("tier_unchanged", "tier 2 did not move", ("a.lora_a",)),
    ]
    page = sections_of(finished_run(tmp_path / "run", reasons=reasons))
    verdict = page["verdict"]
    assert verdict.splitlines()[2] == "Rejected: worse"
    said = "Rejected: worse (loss_regressed: the loss rose from 3.55 to 4.1); also tier_unchanged."
    assert said in verdict
    assert "| tier_unchanged | tier 2 did not move | 1 |" in page["checks"]


def test_a_going_run_says_how_far_it_is(tmp_path: Path) -> None:
    run = begin_run(tmp_path / "run", iters=100)
    add_metrics(run, 40)
    with run.locked():
        page = sections_of(run)
    assert "Running\n\nAt step 40 of 100, training loss 1.1" in page["verdict"]
    assert "has no verdict yet" in page["pairs"]
    assert "| tier 2 | every 4 | 10 | 10 | 0 |" in page["updates"]


def test_a_resumed_run_says_where_it_went_on(tmp_path: Path) -> None:
    run = begin_run(tmp_path / "run", iters=100)
    add_metrics(run, 90)
    write_plan_of(run, first_step=80, resumed_at=(40, 80))
    said = "The run was resumed at steps 40, 80: the curves continue from the checkpoint"
    assert said in sections_of(run)["curves"]
    write_plan_of(run)
    assert "resumed" not in sections_of(run)["curves"]


def test_a_run_before_its_first_step_and_one_with_bad_data_have_a_page(tmp_path: Path) -> None:
    page = sections_of(begin_run(tmp_path / "run"))
    assert "Nothing was reported yet." in page["curves"]
    finding = Finding("train.jsonl", 7, "error", "bad-json", "column 46")
    page = sections_of(begin_run(tmp_path / "bad", findings=[finding]))
    assert "Failed: data\n\nNothing was trained." in page["verdict"]
    assert "| error | train.jsonl | 7 | 1 | bad-json | column 46 |" in page["data"]


def test_samples_are_shown_beside_their_prompts(tmp_path: Path) -> None:
    run = begin_run(tmp_path / "run")
    add_metrics(run, 20, samples=[{"prompt": "Where to?", "answer": "Go and see Rome."}])
    answers = sections_of(run)["answers"]
    assert "Greedy answers at 2 of 2 evaluations to 1 of 1 prompts" in answers
    assert "| step | Where to? |" in answers
    assert "| 20 | Go and see Rome. |" in answers


def test_tensors_that_did_not_change_are_named_above_the_map(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    verdict = make_verdict(make_losses())
    first, *others = verdict.tensors
    tensors = (replace(first, changed=False), *others)
    judge(run, replace(verdict, tensors=tensors), make_losses(), "text")
    assert "Not changed: 1 tensors, model.layers.0." in sections_of(run)["change"]


def run_of_steps(folder: Path, steps: int) -> RunDirectory:
    """A finished run of so many steps, with a thousand findings in hostile words."""
    run = begin_run(
        folder,
        text=HOSTILE_ROW * 100,
        iters=steps,
        findings=[
            Finding(f"{i % 50}.jsonl", i, "warning", f"check-{i % 7}", HOSTILE_ROW * 20)
            for i in range(1_000)
        ],
    )
    add_metrics(run, steps)
    losses = make_losses(champion=True)
    judge(run, make_verdict(losses, step=steps, layers=80), losses, HOSTILE_ROW * 100)
    return run


def seconds_of_writing(run: RunDirectory) -> float:
    """Processor time."""
    began = time.process_time()
    RunReport(read_run(run, has_ended=True)).write(run.report)
    return time.process_time() - began


@pytest.mark.slow("pages of ten thousand steps")
def test_ten_thousand_steps_stay_below_300_kilobytes_and_linear_in_their_lines(tmp_path) -> None:
    long, short = run_of_steps(tmp_path / "long", 10_000), run_of_steps(tmp_path / "short", 1_250)
    tries = [(seconds_of_writing(long), seconds_of_writing(short)) for _ in range(2)]
    assert long.report.stat().st_size <= MAX_BYTES
    longest, shortest = (min(seconds) for seconds in zip(*tries, strict=True))
    assert longest < 16 * shortest  # of 8 times the lines


def test_text_of_data_and_models_does_nothing_on_the_page(tmp_path: Path) -> None:
    page = read_report(run_of_steps(tmp_path / "run", 20).path).to_html()
    assert re.search(r"<(script|img|a|link)\b", page) is None
    assert "&lt;script&gt;alert(&quot;row&quot;)" in page
    assert len(page.encode()) <= MAX_BYTES


def test_the_page_is_written_when_a_run_ends_and_says_what_ended_it(tmp_path: Path) -> None:
    run = begin_run(tmp_path / "run", iters=100)
    add_metrics(run, 40)
    with run.locked(), pytest.raises(GateRejected), writing_report_at_end(run):
        raise GateRejected("the gate said <no>")
    assert '<p class="bad">the gate said &lt;no&gt;</p>' in run.report.read_text()
    assert "Resumable\n\nAt step 40 of 100" in sections_of(run)["verdict"]


def test_a_page_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    run = begin_run(tmp_path / "run")
    run.report.mkdir()
    with pytest.warns(UserWarning, match="was not written"), writing_report_at_end(run):
        pass


def test_a_run_whose_lock_is_gone_does_not_write_its_page_over_anothers(tmp_path: Path) -> None:
    run = begin_run(tmp_path / "run")
    run.report.write_text("of another process")
    with (
        pytest.warns(UserWarning, match="was not written"),
        run.locked(),
        writing_report_at_end(run),
    ):
        run.lock.unlink()
    assert run.report.read_text() == "of another process"


def test_the_page_disturbs_nothing_and_names_what_is_damaged(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    before = Run(run).to_json()
    read_report(run.path).write(run.report)
    assert Run(run).to_json() == before
    run.gate_losses.write_text("{")
    assert f"Damaged: {run.gate_losses} has changed" in sections_of(run)["verdict"]


def test_a_report_and_a_verdict_show_themselves_in_a_notebook(tmp_path: Path) -> None:
    text = read_report(finished_run(tmp_path / "run").path)._repr_html_()
    assert re.findall(r'<section id="([a-z]+)-', text) == ORDER
    verdict = make_verdict(None, reasons=[Reason("unchanged", "<b>nothing</b> moved")])
    text = verdict._repr_html_()
    assert '"verdict bad"' in text
    assert "unchanged (&lt;b&gt;nothing&lt;/b&gt; moved" in text
    assert "model.layers.0.mlp.down_proj.lora_a" in text
