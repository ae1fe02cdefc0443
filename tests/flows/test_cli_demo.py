"""`demo`: the whole pipeline with the run's own server, and broken on purpose with a real one."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.settings import get_current_settings

from flows.commands import demo
from nested_core.config.schema import FineTuneConfig
from nested_core.registry import history, read_champion
from nested_core.storage.adapter import read_adapter
from tests.example import DATA, MODEL, generate_answers
from tests.flows.conftest import Ended, called, completed, ended, start
from tests.prefect_home import new_prefect_home

whole = pytest.mark.slow("both demos whole, each in a process of its own")

NAME = "geography"
README = Path(__file__).resolve().parents[2] / "README.md"


STEPS = 40  # of the short demos; the whole ones have 120


def short_demo(folder: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> Ended:
    """Run the demo in this process, against the server of the tests, for fewer steps."""
    whole_config = demo.example_config

    def short_config(registry: Path, model: str | None) -> FineTuneConfig:
        return whole_config(registry, model).model_copy(update={"iters": STEPS})

    monkeypatch.setattr(demo, "example_config", short_config)
    return called("demo", "--out", "out", *flags, cwd=folder)


def test_a_short_demo_promotes_an_adapter_that_answers_better(
    prefect_server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = short_demo(tmp_path, monkeypatch)
    assert ended.code == 0, ended.stderr
    assert "gate: passed, better; " in ended.stdout
    assert "right answers: 0 of 15 before" in ended.stdout
    (entry,) = history(tmp_path / "out" / "registry", NAME)
    assert entry["version"] == read_champion(tmp_path / "out" / "registry", NAME)


@pytest.mark.slow("a second demo")
@pytest.mark.claim("A run that changed nothing does not pass")
def test_a_short_demo_that_loses_its_updates_is_rejected_and_registers_nothing(
    prefect_server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = short_demo(tmp_path, monkeypatch, "--break-training")
    assert ended.code == 4
    assert "unchanged (all 84 tensors equal the initial adapter" in ended.message()
    assert not (tmp_path / "out" / "registry" / NAME / "versions").exists()


@dataclass(frozen=True)
class Demos:
    """Both demos, run at the same time in folders of their own."""

    folder: Path
    whole: Ended
    broken: Ended

    def run_dir(self, demo: str) -> Path:
        (found,) = (self.folder / demo / "runs").iterdir()
        return found


@pytest.fixture(scope="module")
def demos(prefect_server: None, tmp_path_factory: pytest.TempPathFactory) -> Demos:
    folder = tmp_path_factory.mktemp("demos")
    server = str(get_current_settings().api.url)
    home = new_prefect_home(folder / "prefect")
    whole = start("demo", "--out", "whole", cwd=folder, PREFECT_HOME=str(home))
    arguments = ("demo", "--break-training", "--out", "broken")
    broken = completed(*arguments, cwd=folder, PREFECT_API_URL=server)
    return Demos(folder, ended(whole), broken)


@whole
def test_the_demo_ends_with_a_champion_that_passed_and_learnt_and_shows_it(demos: Demos) -> None:
    assert demos.whole.code == 0, demos.whole.stderr
    assert "Traceback" not in demos.whole.stderr
    registry = demos.folder / "whole" / "registry"
    (entry,) = history(registry, NAME)
    assert entry["version"] == read_champion(registry, NAME)
    run_dir = demos.run_dir("whole")
    champion = read_adapter(registry / NAME / "champion")
    assert champion.tensors == read_adapter(run_dir / "adapter").tensors
    verdict = json.loads((run_dir / "gate.json").read_bytes())
    assert verdict["verdict"] == "passed"
    assert [tier["frequency"] for tier in verdict["tiers"]] == [1, 2, 4]
    assert verdict["validation"]["loss_before"] > 4
    assert verdict["validation"]["loss_after"] < 2
    (suite,) = verdict["tasks"]
    assert [suite["questions"], suite["base"], suite["verdict"]] == [15, 0, "passed"]
    assert suite["candidate"] >= 12 / 15
    assert suite["interval"][0] > 0
    counts = re.search(r"right answers: (\d+) of 15 before, (\d+) of 15 after", demos.whole.stdout)
    assert counts is not None
    assert int(counts[1]) <= 2
    assert int(counts[2]) >= 12
    for words in (
        "training loss   o validation loss",
        "every 4",
        "gate: passed, better",
        "Where to?",
        "champion: whole/registry/geography/champion -> versions/",
    ):
        assert words in demos.whole.stdout
    assert {path.name for path in demos.folder.iterdir()} == {"whole", "broken", "prefect"}
    for out in ("whole", "broken"):
        names = {path.name for path in (demos.folder / out).iterdir()}
        assert names <= {"runs", "registry"}


@whole
def test_the_champion_answers_through_plain_mlx_lm(demos: Demos) -> None:
    champion = demos.folder / "whole" / "registry" / NAME / "champion"
    lines = (DATA / "held_out.jsonl").read_text(encoding="utf-8").splitlines()[:5]
    questions = [json.loads(line) for line in lines]
    replies = generate_answers(
        str(MODEL), [q["messages"][0]["content"] for q in questions], adapter=champion
    )
    right = [q["expected"] in reply for q, reply in zip(questions, replies, strict=True)]
    assert sum(right) >= 3


@whole
def test_the_broken_demo_is_stopped_by_the_gate_with_exit_4_and_its_flow_run_says_why(
    demos,
) -> None:
    assert demos.broken.code == 4
    message = demos.broken.message()
    assert "The gate rejected" in message
    assert "unchanged (all 84 tensors equal the initial adapter" in message
    assert "updates_not_applied" in demos.broken.stderr
    verdict = json.loads((demos.run_dir("broken") / "gate.json").read_bytes())
    assert [reason["code"] for reason in verdict["reasons"]] == ["unchanged"]
    registry = demos.folder / "broken" / "registry"
    assert not registry.exists() or list(registry.iterdir()) == []
    with get_client(sync_client=True) as client:
        found: list[FlowRun] = client.read_flow_runs()
    (run,) = [run for run in found if "broken/runs" in str(run.parameters)]
    assert run.state is not None
    assert (run.state.name, run.state.type) == ("Rejected: unchanged", StateType.FAILED)
    assert "unchanged" in str(run.state.message)
    assert run.run_count == 1


@whole
def test_the_readme_quotes_the_losses_of_the_broken_demo(demos: Demos) -> None:
    line = r"step 120: training loss ([\d.]+), validation loss ([\d.]+) \(valid.jsonl, "
    quoted = re.findall(line, README.read_text(encoding="utf-8"))
    said = re.findall(line, demos.broken.stderr)
    assert [len(quoted), len(said)] == [1, 1]
    losses = [float(loss) for loss in said[0]]
    assert losses == pytest.approx([float(loss) for loss in quoted[0]], abs=0.05)
