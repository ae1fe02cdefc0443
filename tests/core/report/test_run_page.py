"""report.html: what it says of a run at each state, in which order, and what cannot get onto it."""

from __future__ import annotations

import json
import os
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import get_args

import pytest

from nested_core.errors import ConfigError, GateRejected
from nested_core.records.dataset import Finding
from nested_core.records.plan import list_resumptions, read_plan
from nested_core.records.run import Run, read_run
from nested_core.records.verdict import REASON_WORDS, Code, Reason
from nested_core.report.run_page import RunReport, read_report, writing_report_at_end
from nested_core.storage.run_directory import RunDirectory
from nested_core.text.html_markup import CONTENT_SECURITY_POLICY
from tests.hostile_text import HOSTILE, MARK, UNSAFE
from tests.left_out import slow_except
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

ORDER = ["verdict", "answers", "pairs", "curves", "change", "updates", "data", "reproduce"]
MAX_BYTES = 300 * 1024


class Page(HTMLParser):
    """The elements of a page, its words, and its sections by their id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.sections: dict[str, str] = {}
        self._section = ""
        self._is_style = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._is_style = tag == "style"
        if tag == "section":
            self._section = str(dict(attrs)["id"])
            self.sections[self._section] = ""

    def handle_endtag(self, tag: str) -> None:
        self._is_style = False

    def handle_data(self, data: str) -> None:
        if not self._is_style:
            self.words += f"{data} "
            if self._section:
                self.sections[self._section] += f"{data} "


def page_of(run: RunDirectory) -> Page:
    return Page(read_report(run.path).to_html())


def test_a_passed_run_says_so_first_and_everything_in_its_order(tmp_path: Path) -> None:
    page = page_of(finished_run(tmp_path / "run", champion=True))
    assert list(page.sections) == ORDER
    verdict = page.sections["verdict"]
    assert "Passed, better: loss 3.55 → 2.675 on valid.jsonl, 12 examples" in verdict
    assert "2 of 3 right answers to capitals" in verdict
    assert "24 of 24" in verdict  # tensors changed
    pairs = page.sections["pairs"]
    assert f"champion {'c' * 12}" in pairs
    assert "11 of 12 examples have a lower loss than before." in pairs
    assert pairs.index("valid.jsonl:3") < pairs.index("valid.jsonl:1 ")  # the worst first
    assert "How much is a pump?" in pairs
    assert re.search(r"tier 1\s+2\s+", page.sections["updates"])
    assert "layer 1 · tier 1" in page.sections["change"]
    assert "lost ones first" in page.sections["answers"]
    for words in (
        "nested-tune train -c",
        "learning_rate: 0.002",
        "a" * 64,
        "da7a" * 16,
        "mlx-lm",
    ):
        assert words in page.sections["reproduce"]


def test_drift_stands_beside_its_bound_where_it_was_measured(tmp_path: Path) -> None:
    page = page_of(finished_run(tmp_path / "run"))
    row = r"Drift\s+0\.25\s+KL from the initial adapter, nats a token; at most 2\.5 allowed"
    assert re.search(row, page.sections["verdict"])
    assert "Drift: the predictions moved by 0.25 nats a token" in page.sections["pairs"]
    assert "120 tokens of the held-out examples" in page.sections["pairs"]


def test_a_run_without_drift_claims_none(tmp_path: Path) -> None:
    run = begin_run(tmp_path / "run")
    add_metrics(run, 8)
    losses = make_losses(with_drift=False)
    judge(run, make_verdict(losses), losses, "text")
    page = page_of(run)
    assert "Drift" not in page.sections["verdict"]
    assert "Drift" not in page.sections["pairs"]


def test_each_reason_has_words_for_a_heading() -> None:
    assert REASON_WORDS.keys() == set(get_args(Code))


def test_a_rejected_run_gives_its_reason_in_the_first_sentence(tmp_path: Path) -> None:
    reasons = [
        Reason("loss_regressed", "the loss rose from 3.55 to 4.1"),
        Reason("tier_unchanged", "tier 2 did not move", ("a.lora_a",)),
    ]
    page = page_of(finished_run(tmp_path / "run", reasons=reasons))
    verdict = page.sections["verdict"]
    assert (
        "Rejected: the held-out loss is worse (loss_regressed), and 1 more reason. the loss rose "
        "from 3.55 to 4.1." in verdict
    )
    assert "tier_unchanged" in verdict
    assert "tier 2 did not move" in verdict


def test_a_going_run_says_how_far_it_is(tmp_path: Path) -> None:
    run = begin_run(tmp_path / "run", iters=100)
    add_metrics(run, 40)
    with run.locked():
        page = page_of(run)
    assert list(page.sections) == ORDER
    assert "Running: step 40 of 100, training loss 1.1" in page.sections["verdict"]
    assert "not judged yet" in page.sections["pairs"]
    assert re.search(r"tier 2\s+4\s+10\s+10\s+0", page.sections["updates"])


def test_a_resumed_run_says_where_it_went_on(tmp_path: Path) -> None:
    run = begin_run(tmp_path / "run", iters=100)
    add_metrics(run, 90)
    write_plan_of(run, first_step=80, resumed_at=(40, 80))
    curves = page_of(run).sections["curves"]
    assert "The run was resumed at steps 40, 80: the curves go on from the checkpoint" in curves
    write_plan_of(run)
    assert "resumed" not in page_of(run).sections["curves"]


@pytest.mark.parametrize(
    ("earlier", "first_step", "resumed_at"),
    [(None, 0, ()), (None, 40, (40,)), ((40,), 40, (40,)), ((40, 80), 60, (40, 60))],
)
def test_resumptions_beyond_the_checkpoint_are_forgotten(
    tmp_path: Path, earlier: tuple[int, ...] | None, first_step: int, resumed_at: tuple[int, ...]
) -> None:
    run = begin_run(tmp_path / "run")
    if earlier is not None:
        write_plan_of(run, resumed_at=earlier)
    assert list_resumptions(read_plan(run.plan), first_step) == resumed_at


def test_a_run_before_its_first_step_has_a_page(tmp_path: Path) -> None:
    page = page_of(begin_run(tmp_path / "run"))
    assert list(page.sections) == ORDER
    assert "Nothing was reported yet." in page.sections["curves"]


def test_a_rejected_data_set_is_named_with_its_lines(tmp_path: Path) -> None:
    finding = Finding("train.jsonl", 7, "error", "bad-json", "column 46")
    page = page_of(begin_run(tmp_path / "run", findings=[finding]))
    assert "Failed: the data set was rejected" in page.sections["verdict"]
    assert re.search(r"error\s+train\.jsonl\s+7\s+1\s+bad-json\s+column 46", page.sections["data"])


def test_samples_are_shown_beside_their_prompts(tmp_path: Path) -> None:
    run = begin_run(tmp_path / "run")
    add_metrics(run, 20, samples=[{"prompt": "Where to?", "answer": "Go and see Rome."}])
    answers = page_of(run).sections["answers"]
    assert "Greedy answers at 2 of 2 evaluations to 1 of 1 prompts" in answers
    assert re.search(r"step\s+Where to\?\s+10\s+Go and see Rome\.\s+20\s+Go", answers)


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
def test_ten_thousand_steps_stay_below_300_kilobytes_and_linear_in_their_lines(
    tmp_path: Path,
) -> None:
    long, short = run_of_steps(tmp_path / "long", 10_000), run_of_steps(tmp_path / "short", 1_250)
    tries = [(seconds_of_writing(long), seconds_of_writing(short)) for _ in range(2)]
    assert long.report.stat().st_size <= MAX_BYTES
    assert min(each[0] for each in tries) < 16 * min(
        each[1] for each in tries
    )  # of 8 times the lines


def test_a_page_holds_a_policy_and_nothing_that_runs_or_is_fetched(tmp_path: Path) -> None:
    page = page_of(finished_run(tmp_path / "run", text=HOSTILE_ROW))
    names = {tag for tag, _ in page.tags}
    assert names.isdisjoint({"script", "img", "link", "iframe", "object", "embed", "a", "base"})
    assert [tag for tag, _ in page.tags].count("style") == 1
    policies = [a["content"] for _, a in page.tags if a.get("http-equiv")]
    assert policies == [CONTENT_SECURITY_POLICY]
    assert CONTENT_SECURITY_POLICY.startswith("default-src 'none'")
    attributes = {name for _, values in page.tags for name in values}
    assert not {name for name in attributes if name.startswith("on") or name in ("src", "href")}
    assert '<script>alert("row")</script>' in page.words  # shown as text


@pytest.mark.parametrize(
    "attack", slow_except(HOSTILE, *list(HOSTILE)[::3], reason="a page for each text")
)
def test_hostile_text_is_shown_and_does_nothing(tmp_path: Path, attack: str) -> None:
    text = HOSTILE[attack].encode(errors="backslashreplace").decode()  # as a file can hold it
    finding = Finding(text, 1, "error", text, text)
    run = begin_run(tmp_path / "run", findings=[finding])
    add_metrics(run, 4, samples=[{"prompt": text, "answer": text}])
    losses = make_losses()
    reasons = [Reason("unchanged", text, (text,)), Reason("no_effect", text)]
    verdict = make_verdict(losses, reasons=reasons)
    judge(run, verdict, losses, text if text.isprintable() else ascii(text))
    written = RunReport(read_run(run), error=HOSTILE[attack]).to_html()
    page = Page(written)
    assert MARK in page.words
    assert UNSAFE.search(written) is None
    assert list(page.sections) == ORDER
    names = {tag for tag, _ in page.tags}
    assert names.isdisjoint({"script", "img", "a", "link"})
    assert not any(name.startswith("on") for _, values in page.tags for name in values)


def test_a_damaged_file_is_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    run.gate_losses.write_text("{")
    record = read_run(run)
    assert any(str(run.gate_losses) in problem for problem in record.problems)
    assert record.losses is None
    page = page_of(run)
    assert "Damaged files:" in page.sections["verdict"]
    assert list(page.sections) == ORDER


def test_a_file_of_the_verdict_that_has_grown_is_named_and_not_read(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    os.truncate(run.gate_losses, 50 * 2**30)  # sparse: it fits in no memory
    record = read_run(run)
    said = f"{run.gate_losses} has changed since the verdict was given."
    assert [problem for problem in record.problems if str(run.gate_losses) in problem] == [said]
    assert record.losses is None


def test_a_verdict_that_was_edited_is_not_shown_as_one(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", reasons=[Reason("unchanged", "nothing moved")])
    gate = json.loads(run.gate.read_bytes()) | {"verdict": "passed", "reasons": []}
    run.gate.write_text(json.dumps(gate))
    page = page_of(run)
    assert "Passed" not in page.sections["verdict"]
    assert "has changed since the verdict was given" in page.sections["verdict"]


def test_losses_that_were_exchanged_after_the_verdict_are_named(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    other = make_losses(champion=True)
    run.gate_losses.write_bytes(other.render())
    assert any("has changed since" in problem for problem in read_run(run).problems)


def test_the_page_is_written_when_a_run_ends_and_says_what_ended_it(tmp_path: Path) -> None:
    run = begin_run(tmp_path / "run", iters=100)
    add_metrics(run, 40)
    with run.locked(), pytest.raises(GateRejected), writing_report_at_end(run):
        raise GateRejected("the gate said <no>")
    page = Page(run.report.read_text())
    assert "the gate said <no>" in page.sections["verdict"]
    assert "Not judged: it ended at step 40 of 100" in page.sections["verdict"]


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


def test_the_page_disturbs_neither_status_nor_verdict(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    before = Run(run).to_json()
    read_report(run.path).write(run.report)
    assert Run(run).to_json() == before
    assert before["verdict"] == "passed"


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a run directory"):
        read_report(tmp_path)


def test_a_notebook_shows_the_sections_within_its_cell(tmp_path: Path) -> None:
    report = read_report(finished_run(tmp_path / "run").path)
    text = report._repr_html_()
    assert "<html" not in text
    assert [name.rpartition("-")[0] for name in Page(text).sections] == ORDER


def test_the_same_report_in_two_cells_shares_no_identifier(tmp_path: Path) -> None:
    report = read_report(finished_run(tmp_path / "run").path)
    tags = Page(report._repr_html_() + report._repr_html_()).tags
    identifiers = [values["id"] for _, values in tags if "id" in values]
    assert len(identifiers) == len(set(identifiers)) == 4 * len(ORDER)
    labels = {values["aria-labelledby"] for _, values in tags if "aria-labelledby" in values}
    assert labels <= set(identifiers)


def test_a_verdict_shows_itself_in_a_notebook() -> None:
    verdict = make_verdict(None, reasons=[Reason("unchanged", "<b>nothing</b> moved")])
    text = verdict._repr_html_()
    assert "unchanged" in text
    assert "&lt;b&gt;nothing&lt;/b&gt; moved" in text
    assert '"verdict bad"' in text
    assert "model.layers.0.mlp.down_proj.lora_a" in text
