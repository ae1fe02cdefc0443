"""report.html in headless Chromium: nothing logged, nothing fetched, axe finds nothing serious.

The pictures, light, dark and at a phone's width, go to the folder that SCREENSHOTS names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from nested_core.pipeline import steps
from nested_core.records.run_status import read_run
from nested_core.records.verdict import Reason
from nested_core.report.run_report import RunReport
from nested_core.rooms.compare.comparison import compare_runs
from nested_core.storage.run_directory import RunDirectory
from nested_core.training.reports.training_callback import TrainingCallback
from tests.example import example_config, prepare, train
from tests.production.browser import Browser, find_chromium
from tests.production.stack import wait_for
from tests.runs import HOSTILE_ROW, add_metrics, begin_run, finished_run

pytestmark = [pytest.mark.production, pytest.mark.timeout(600)]

PHONE = 390
LOOKS = {"light": (1200, "light"), "dark": (1200, "dark"), "phone": (PHONE, "light")}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_chromium()
    if program is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    with Browser(program, tmp_path_factory.mktemp("browser") / "profile") as made:
        made.watch()
        yield made


def passed(path: Path) -> RunDirectory:
    return finished_run(path, steps=200, champion=True)


def rejected(path: Path) -> RunDirectory:
    return finished_run(path, reasons=[Reason("loss_regressed", "the loss rose")])


def going(path: Path) -> RunDirectory:
    run = begin_run(path, iters=100)
    add_metrics(run, 40)
    return run


def long(path: Path) -> RunDirectory:
    return finished_run(path, steps=10_000, text=HOSTILE_ROW, champion=True)


class Crash(TrainingCallback):
    """Ends training by an error at a report, beyond the last checkpoint."""

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        """Raise at step 30, of which nothing was saved since step 20."""
        if train_info["step"] == 30:
            raise RuntimeError("crashed")

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
        """Evaluations pass."""


def resumed(path: Path) -> RunDirectory:
    """A real run that crashed at step 30, went on from step 20, and was judged."""
    config = example_config(iters=60, steps_per_report=5, steps_per_eval=20, save_every=20)
    run = prepare(config, path)
    with pytest.raises(RuntimeError, match="crashed"):
        train(config, run, Crash())
    steps.write_run_config(config, run, resume=True)
    train(config, run)
    steps.judge(config, run)
    return run


CASES: dict[str, Callable[[Path], RunDirectory]] = {
    "passed": passed,
    "rejected": rejected,
    "going": going,
    "resumed": resumed,
    "long": long,
}


def look_at(browser: Browser, page: Path, name: str) -> None:
    """Open the page in each of its looks; fail on what it logs, fetches or axe finds."""
    for look, (width, scheme) in LOOKS.items():
        browser.events.clear()
        browser.prefer(scheme)
        browser.resize(900, width)
        browser.open(page.as_uri())
        assert set(browser.requests()) == {page.as_uri()}
        assert browser.messages() == []
        assert browser.run("document.documentElement.scrollWidth") <= width
        browser.resize(min(8_000, browser.run("document.documentElement.scrollHeight")), width)
        folder = Path(os.environ.get("SCREENSHOTS", page.parent))
        (folder / f"report-{name}-{look}.png").write_bytes(browser.whole_picture())
        assert serious_findings(browser) == []


def serious_findings(browser: Browser) -> list[Any]:
    """What axe-core calls serious or critical in the page that is open."""
    source = (files("axe_core_python") / "axe.min.js").read_text(encoding="utf-8")
    browser.run(f"{source}; window.findings = null; 0")
    browser.run("axe.run().then(done => window.findings = JSON.stringify(done.violations)); 0")
    found = json.loads(wait_for(lambda: browser.run("window.findings")))
    return [
        (finding["id"], [node["html"] for node in finding["nodes"]])
        for finding in found
        if finding["impact"] in ("serious", "critical")
    ]


@pytest.mark.parametrize("case", CASES)
def test_the_page_of_a_run_is_quiet_and_accessible(browser, tmp_path, case) -> None:
    run = CASES[case](tmp_path / "run")
    RunReport(read_run(run, has_ended=case != "going")).write(run.report)
    look_at(browser, run.report, case)
    assert browser.run("document.querySelectorAll('script').length") == 0
    assert run.report.stat().st_size <= 300 * 1024


def test_the_page_of_a_resumed_run_says_so_and_counts_each_step_once(browser, tmp_path) -> None:
    run = resumed(tmp_path / "run")
    RunReport(read_run(run, has_ended=True)).write(run.report)
    browser.open(run.report.as_uri())
    assert "The run was resumed at step 20: the curves continue" in browser.words()
    numbers = "[...document.querySelectorAll('#curves table')[0].querySelectorAll('tbody tr')]"
    cells = "row => [...row.children].slice(0, 2).map(cell => Number(cell.innerText))"
    browser.run("document.querySelectorAll('details').forEach(each => { each.open = true }); 0")
    rows = browser.run(f"{numbers}.map({cells})")
    assert [step for step, _ in rows] == list(range(0, 61, 5))
    assert [seconds for _, seconds in rows] == sorted({seconds for _, seconds in rows})


def test_the_page_of_a_comparison_is_quiet_and_accessible(browser: Browser, tmp_path: Path) -> None:
    runs = [finished_run(tmp_path / name, text=HOSTILE_ROW).path for name in ("one", "two")]
    page = tmp_path / "compared.html"
    page.write_text(compare_runs(runs).to_html(), encoding="utf-8")
    look_at(browser, page, "compared")
