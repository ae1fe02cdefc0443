"""`demo`: the whole pipeline with the embedded server, and broken on purpose with a real one."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.settings import get_current_settings

from nested_core.registry import history, read_champion
from nested_core.storage.adapter import read_adapter
from tests.example import DATA, MODEL, generate_answers
from tests.flows.conftest import Ended, completed, ended, start
from tests.prefect_home import new_prefect_home

pytestmark = pytest.mark.timeout(300)  # several processes, one after the other

NAME = "geography"
README = Path(__file__).resolve().parents[2] / "README.md"


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


def test_the_demo_ends_with_exit_0_and_a_champion_that_passed(demos: Demos) -> None:
    assert demos.whole.code == 0, demos.whole.stderr
    registry = demos.folder / "whole" / "registry"
    (entry,) = history(registry, NAME)
    assert entry["version"] == read_champion(registry, NAME)
    run_dir = demos.run_dir("whole")
    verdict = json.loads((run_dir / "gate.json").read_bytes())
    assert verdict["verdict"] == "passed"
    assert [tier["frequency"] for tier in verdict["tiers"]] == [1, 2, 4]
    assert read_adapter(registry / NAME / "champion").tensors == (
        read_adapter(run_dir / "adapter").tensors
    )


def test_the_demo_learns_as_its_requirement_says(demos: Demos) -> None:
    verdict = json.loads((demos.run_dir("whole") / "gate.json").read_bytes())
    assert verdict["validation"]["loss_before"] > 4
    assert verdict["validation"]["loss_after"] < 2
    counts = re.search(r"right answers: (\d+) of 15 before, (\d+) of 15 after", demos.whole.stdout)
    assert counts is not None
    assert int(counts[1]) <= 2
    assert int(counts[2]) >= 12
    (suite,) = verdict["tasks"]
    assert [suite["questions"], suite["base"], suite["verdict"]] == [15, 0, "passed"]
    assert suite["candidate"] >= 12 / 15
    assert suite["interval"][0] > 0


def test_the_demo_shows_curve_tiers_verdict_answers_and_champion(demos: Demos) -> None:
    for words in ("training loss   o validation loss", "every 4", "gate: passed", "Where to?"):
        assert words in demos.whole.stdout
    assert "champion: whole/registry/geography/champion -> versions/" in demos.whole.stdout
    assert "Traceback" not in demos.whole.stderr


def test_the_champion_answers_through_plain_mlx_lm(demos: Demos) -> None:
    champion = demos.folder / "whole" / "registry" / NAME / "champion"
    lines = (DATA / "held_out.jsonl").read_text(encoding="utf-8").splitlines()[:5]
    questions = [json.loads(line) for line in lines]
    replies = generate_answers(
        str(MODEL), [q["messages"][0]["content"] for q in questions], adapter=champion
    )
    right = [q["expected"] in reply for q, reply in zip(questions, replies, strict=True)]
    assert sum(right) >= 3


def test_the_broken_demo_is_stopped_by_the_gate_with_exit_4(demos: Demos) -> None:
    assert demos.broken.code == 4
    message = demos.broken.message()
    assert "The gate rejected" in message
    assert "unchanged (all 84 tensors equal the initial adapter" in message
    assert "updates_not_applied" in demos.broken.stderr
    verdict = json.loads((demos.run_dir("broken") / "gate.json").read_bytes())
    assert [reason["code"] for reason in verdict["reasons"]] == ["unchanged"]


def test_the_readme_quotes_the_losses_of_the_broken_demo(demos: Demos) -> None:
    line = r"step 120: training loss ([\d.]+), validation loss ([\d.]+) \(valid.jsonl, "
    quoted = re.findall(line, README.read_text(encoding="utf-8"))
    said = re.findall(line, demos.broken.stderr)
    assert [len(quoted), len(said)] == [1, 1]
    losses = [float(loss) for loss in said[0]]
    assert losses == pytest.approx([float(loss) for loss in quoted[0]], abs=0.05)


def test_the_broken_demo_registers_nothing(demos: Demos) -> None:
    registry = demos.folder / "broken" / "registry"
    assert not registry.exists() or list(registry.iterdir()) == []


def test_the_flow_run_of_the_broken_demo_is_failed_and_says_unchanged(demos: Demos) -> None:
    with get_client(sync_client=True) as client:
        found: list[FlowRun] = client.read_flow_runs()
    (run,) = [run for run in found if "broken/runs" in str(run.parameters)]
    assert run.state is not None
    assert (run.state.name, run.state.type) == ("Rejected", StateType.FAILED)
    assert "unchanged" in str(run.state.message)
    assert run.run_count == 1


def test_both_demos_keep_everything_below_their_folder(demos: Demos) -> None:
    assert {path.name for path in demos.folder.iterdir()} == {"whole", "broken", "prefect"}
    for demo in ("whole", "broken"):
        names = {path.name for path in (demos.folder / demo).iterdir()}
        assert names <= {"runs", "registry"}
