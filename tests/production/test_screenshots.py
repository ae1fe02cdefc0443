"""What a person sees in both UIs the morning after ten nights: the list, a run, an adapter's pages.

The pictures go to the folder that SCREENSHOTS names, else to the test's own. Some of them are in
docs/images under the same names: SCREENSHOTS=/tmp/pictures make production-test
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import yaml
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.client.schemas.objects import Artifact, FlowRun

from nested_core import registry as core
from tests.production.browser import Browser, find_chromium
from tests.production.stack import AUTH, Stack, wait_for

pytestmark = [pytest.mark.production, pytest.mark.timeout(1800)]

ADAPTER = "support-bot"
UIS = {"v1": "", "v2": "v2/"}
CANVAS_WITHOUT_A_GRAPH = 20_000  # bytes of PNG, at most; the graph of six tasks has 50,000
LOOK: dict[str, Any] = {"iters": 120, "batch_size": 8, "steps_per_eval": 20, "save_every": 40}
LONG: dict[str, Any] = LOOK | {"iters": 100_000, "save_every": 100}
CAREFUL = {"learning_rate": 1e-4}  # what goes on from a champion at more gets worse
TOO_HIGH = {"from": "champion", "policy": "continue", "rate": 1.0, "allow_high_rate": True}
LONGEST_NIGHT = 600.0


@dataclass
class Nights:
    """The nights of one adapter, by what happened in each."""

    stack: Stack
    runs: dict[str, FlowRun] = field(default_factory=dict)

    @property
    def data(self) -> Path:
        return self.stack.home / "examples" / ADAPTER

    def add_example(self, number: int) -> None:
        """A line of data that was not there the night before."""
        question = {"role": "user", "content": f"I want to see town {number}. Where to?"}
        answer = {"role": "assistant", "content": "Go and see Kabul, the capital of Afghanistan!"}
        with (self.data / "train.jsonl").open("a") as lines:
            lines.write(json.dumps({"messages": [question, answer]}) + "\n")

    def begin(self, night: int, **changes: Any) -> UUID:
        """Start one of the ten nights, the last of which is today, as if it were due then."""
        due = datetime.now(UTC) - timedelta(days=10 - night)
        deployment = f"finetune/{ADAPTER}-nightly"
        return self.stack.submit(deployment, due=due, **LOOK | changes)

    def kill_once_it_trains(self, run_id: UUID) -> None:
        """Kill a run's process after its first checkpoint, and wait until it goes on by itself."""
        pattern = f"runs/*-{run_id.hex[-8:]}/checkpoints/step-*"
        wait_for(lambda: list(self.stack.home.glob(pattern)), LONGEST_NIGHT)
        os.kill(self.stack.flow_parent(run_id), signal.SIGKILL)
        wait_for(lambda: self.stack.flow_run(run_id).run_count == 2, LONGEST_NIGHT)

    def end(self, what: str, run_id: UUID) -> FlowRun:
        self.runs[what] = self.stack.wait(run_id, seconds=LONGEST_NIGHT)
        return self.runs[what]

    def artifact(self, what: str, page: str) -> Artifact:
        return find_artifact(self.stack, self.runs[what].id, f"{ADAPTER}-{page}")


def find_artifact(stack: Stack, run_id: UUID, key: str) -> Artifact:
    """The artifact of a run under a key, once it is there."""
    wanted = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run_id]))

    def look() -> Artifact | None:
        with stack.connected() as client:
            made: list[Artifact] = client.read_artifacts(artifact_filter=wanted)
        return next((artifact for artifact in made if artifact.key == key), None)

    found: Artifact = wait_for(look, LONGEST_NIGHT)
    return found


@pytest.fixture(scope="module")
def deployed(stack: Stack) -> Nights:
    """The adapter on data of its own, in which one example comes twice."""
    nights = Nights(stack)
    shutil.copytree(stack.home / "examples" / "geography", nights.data)
    for file in (nights.data / "train.jsonl", nights.data / "valid.jsonl"):
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join([*lines, lines[0]]))
    settings = yaml.safe_load((stack.home / "small.yaml").read_text())
    suite = {"name": "capitals", "file": f"examples/{ADAPTER}/held_out.jsonl", "score": "contains"}
    settings |= {"data": f"examples/{ADAPTER}", "gate": {"tasks": [suite]}}
    settings["registry"] = {"path": "registry", "name": ADAPTER}
    settings["continual"] = {"policy": "continue"}
    (stack.home / f"{ADAPTER}.yaml").write_text(yaml.safe_dump(settings))
    done = stack.nested_tune("deploy", "-c", f"{ADAPTER}.yaml")
    assert done.returncode == 0, done.stderr
    return nights


@pytest.fixture(scope="module")
def training(deployed: Nights) -> UUID:
    """The first night: a run that trains, for hours if nobody cancels it."""
    run_id = deployed.begin(1, **LONG)
    find_artifact(deployed.stack, run_id, f"{ADAPTER}-loss-curve")
    return run_id


@pytest.fixture(scope="module")
def nights(deployed: Nights, training: UUID) -> Nights:
    """Ten nights, one after the other, of every outcome, and a version that waits for approval."""
    stack = deployed.stack
    stack.cancel(training)
    deployed.end("cancelled", training)
    deployed.end("promoted", deployed.begin(2))
    deployed.end("unchanged", deployed.begin(3))
    deployed.add_example(1)
    resumed = deployed.begin(4, save_every=20, **CAREFUL)
    deployed.kill_once_it_trains(resumed)
    deployed.end("resumed", resumed)
    deployed.add_example(2)
    deployed.end("refused", deployed.begin(5, learning_rate=5e-3, continual=TOO_HIGH))
    deployed.end("no better", deployed.begin(6, learning_rate=1e-7))
    train = deployed.data / "train.jsonl"
    content = train.read_bytes()
    train.write_bytes(content + b'{"messages": [}\n')
    deployed.end("broken data", deployed.begin(7))
    train.write_bytes(content)
    crashing = deployed.begin(8, **LONG)
    wait_for(lambda: stack.is_running(crashing, "train"), LONGEST_NIGHT)
    deployed.kill_once_it_trains(crashing)
    os.kill(stack.flow_parent(crashing), signal.SIGKILL)
    deployed.end("crashed twice", crashing)
    anew: dict[str, Any] = {"continual": {"from": None}}
    at_once = {"path": "registry", "name": ADAPTER, "promote": "always"}
    deployed.end("promoted at once", deployed.begin(9, registry=at_once, seed=3, **anew))
    back = stack.submit(f"rollback/{ADAPTER}-rollback", by="ann")
    deployed.end("rolled back", back)
    approved = {"path": "registry", "name": ADAPTER, "promote": "approve"}
    last = deployed.begin(10, registry=approved, seed=4, learning_rate=1e-3, **anew)
    deployed.end("to approve", last)
    (deployed.runs["approval"],) = wait_for(
        lambda: [
            run for run in stack.runs_of("promote/auto") if run.state_name == "Waits for approval"
        ],
        LONGEST_NIGHT,
    )
    return deployed


@pytest.fixture(scope="module")
def browser(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser of somebody who has signed in."""
    program = find_chromium()
    if program is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    with Browser(program, tmp_path_factory.mktemp("browser") / "profile") as made:
        made.open(page(stack, "login"))
        secret = base64.b64encode(AUTH.encode()).decode()
        made.run(f"localStorage.setItem('prefect-password', '{secret}')")
        yield made


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the pictures go."""
    folder = Path(os.environ.get("SCREENSHOTS") or tmp_path_factory.mktemp("pictures"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def page(stack: Stack, path: str) -> str:
    return f"{stack.url.removesuffix('/api')}/{path}"


@pytest.fixture(params=UIS)
def look(request: pytest.FixtureRequest, stack: Stack, browser: Browser, pictures: Path) -> Any:
    """Open a page in one of the UIs, wait for words on it, and take its picture."""
    name = request.param

    def look(
        path: str, picture: str, words: list[str], height: int = 900, tab: str | None = None
    ) -> str:
        browser.resize(height)
        browser.open(page(stack, f"{UIS[name]}{path}"))
        if tab is not None:
            browser.choose_tab(tab)
        seen = browser.wait_for_words(words)
        wait_for(browser.shows_its_pictures)
        (pictures / f"{picture}-{name}.png").write_bytes(browser.picture())
        browser.open("about:blank")  # a page of Prefect's is drawn anew all the time, without a GPU
        return seen

    return look


def test_without_the_password_the_page_asks_for_it(stack, tmp_path, deployed) -> None:
    program = find_chromium()
    if program is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    with Browser(program, tmp_path / "stranger") as stranger:
        stranger.open(page(stack, "runs"))
        stranger.wait_for_words(["Authentication failed."])
        assert ADAPTER not in stranger.words()


def test_the_form_begins_with_model_and_data(stack: Stack, deployed: Nights, look: Any) -> None:
    with stack.connected() as client:
        there = client.read_deployment_by_name(f"finetune/{ADAPTER}-manual")
    seen = look(f"deployments/deployment/{there.id}/run", "form", ["Model", "Data"], 1600)
    assert seen.index("Model") < seen.index("Iters")


def test_while_it_trains_the_curve_is_a_picture(stack: Stack, training: UUID, look: Any) -> None:
    name = str(stack.flow_run(training).name)
    words = [name, "Loss while training", "training loss", "validation loss"]
    curve = find_artifact(stack, training, f"{ADAPTER}-loss-curve")
    look(f"artifacts/artifact/{curve.id}", "loss-curve", words, 720)
    progress = find_artifact(stack, training, f"{ADAPTER}-training-progress")
    words = [name, "of 100,000; ", " left; ", " tokens/s"]
    look(f"artifacts/artifact/{progress.id}", "training-progress", words, 500)
    look(f"runs/flow-run/{training}", "flow-run-training", ["Running", name, "finetune"], 1100)


def test_the_list_of_runs_tells_each_night(nights: Nights, look: Any) -> None:
    outcomes = {what: str(run.state_name) for what, run in nights.runs.items()}
    assert outcomes == {
        "cancelled": "Cancelled",
        "promoted": "Promoted",
        "unchanged": "Skipped: unchanged",
        "resumed": outcomes["resumed"],  # whether it is better than the champion is not the point
        "refused": "Rejected: worse",
        "no better": "Kept the champion",
        "broken data": "Failed: data",
        "crashed twice": "Crashed",
        "promoted at once": "Promoted",
        "rolled back": "Rolled back",
        "to approve": "Waits for approval",
        "approval": "Waits for approval",
    }
    assert outcomes["resumed"] in ("Promoted", "Kept the champion")
    # Ten nights ago; without this the newer UI shows those of a week.
    look("runs?range=past-30-days", "runs", [ADAPTER, *outcomes.values()], 2000)


PAGES = ("promoted", "refused", "resumed", "unchanged", "no better", "broken data", "to approve")


@pytest.mark.parametrize("what", PAGES)
def test_the_first_page_of_a_run_tells_its_night(nights: Nights, look: Any, what: str) -> None:
    run, night = nights.runs[what], nights.artifact(what, "night")
    facts = [str(run.name), "Outcome", "Loss", "Answers", "Data", "Made of", "Run folder"]
    picture = f"night-{what.replace(' ', '-')}"
    look(f"artifacts/artifact/{night.id}", picture, [f"{run.state_name}", *facts], 1000)


@pytest.mark.parametrize("what", ["refused", "resumed", "crashed twice", "approval"])
def test_the_page_of_a_run_says_what_became_of_it(nights: Nights, look: Any, what: str) -> None:
    run = nights.runs[what]
    words = [str(run.name), str(run.state_name), "Deployment", "State Message"]
    picture = f"flow-run-{what.replace(' ', '-')}"
    look(f"runs/flow-run/{run.id}", picture, words, 1300, tab="Details")


def test_the_page_of_a_run_has_its_graph_and_its_artifacts(nights, browser, pictures) -> None:
    browser.resize(1600)  # what is below the edge is not drawn yet
    browser.open(page(nights.stack, f"runs/flow-run/{nights.runs['promoted'].id}"))
    browser.wait_for_words(["Promoted", "finetune", "mlx-gpu"])
    browser.choose_tab("Artifacts")
    keys = ("night", "gate-verdict", "loss-curve", "dataset-report", "training-progress")
    browser.wait_for_words([f"{ADAPTER}-{key}" for key in keys])
    browser.resize(1100)
    wait_for(lambda: len(browser.picture("canvas")) > CANVAS_WITHOUT_A_GRAPH)
    (pictures / "flow-run.png").write_bytes(browser.picture())


def test_the_verdict_of_the_gate_is_a_page_to_read(nights: Nights, look: Any) -> None:
    verdict = nights.artifact("promoted", "gate-verdict")
    words = ["passed", "42 of 42 tensors changed", "before", "after", "expected", "applied"]
    assert "failed" not in look(f"artifacts/artifact/{verdict.id}", "gate-verdict", words, 700)


def test_what_was_found_in_the_data_set_is_a_table(nights: Nights, look: Any) -> None:
    report = nights.artifact("promoted", "dataset-report")
    words = ["train.jsonl", "valid.jsonl", "warning", "duplicate", "severity", "2 warning"]
    look(f"artifacts/artifact/{report.id}", "dataset-report", words, 560)


def test_the_page_of_the_champion_says_what_it_was_made_of(nights: Nights, look: Any) -> None:
    version = core.read_champion(nights.stack.registry, ADAPTER)
    assert version is not None
    champion = nights.artifact("rolled back", "champion")
    words = [version[:12], "Data set", "Base model", "Parent", "Champions so far"]
    look(f"artifacts/artifact/{champion.id}", "champion", words, 1000)


def test_an_adapter_has_a_page_of_its_nights_and_a_feed(nights: Nights, look: Any) -> None:
    names = [nights.runs[what].name for what in ("promoted", "refused")]
    look(f"artifacts/key/{ADAPTER}-night", "adapter-nights", names, 1500)


def test_an_approval_shows_both_sides(nights: Nights, look: Any) -> None:
    approval = nights.artifact("approval", "approval")
    words = ["Candidate", "Champion", "Compared", "Version in full"]
    look(f"artifacts/artifact/{approval.id}", "approval", words, 700)
