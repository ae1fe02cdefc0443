"""What a person sees in the UI the morning after: the run, the gate's verdict, the data set.

The pictures go to the folder that SCREENSHOTS names, else to the test's own. Three of them are in
docs/images: SCREENSHOTS=docs/images make production-test
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.client.schemas.objects import Artifact

from nested_core import registry as core
from tests.production.browser import Browser, find_chromium
from tests.production.stack import AUTH, Stack, wait_for

pytestmark = [pytest.mark.production, pytest.mark.timeout(600)]

PICTURED = "pictured"
CANVAS_WITHOUT_A_GRAPH = 20_000  # bytes of PNG, at most; the graph of six tasks has 50,000
LOOK: dict[str, Any] = {"iters": 120, "batch_size": 8, "steps_per_eval": 20, "save_every": 40}


@pytest.fixture(scope="module")
def finished(stack: Stack) -> UUID:
    """A run that was verified and promoted, on data that there is something to say about."""
    data = stack.home / "examples" / "pictured"
    data.mkdir()
    for file in (stack.home / "examples" / "geography").glob("*.jsonl"):
        lines = file.read_text().splitlines(keepends=True)
        (data / file.name).write_text("".join([*lines, lines[0]]))  # one example comes twice
    registry = {"path": "registry", "name": PICTURED, "promote": "always"}
    changes = LOOK | {"data": f"examples/{data.name}", "registry": registry}
    run_id = stack.submit("finetune/geography-manual", **changes)
    ended = stack.wait(run_id)
    assert ended.state is not None
    assert ended.state_name == "Completed", ended.state.message
    return run_id


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


def artifact(stack: Stack, run_id: UUID, key: str) -> Artifact:
    with stack.connected() as client:
        wanted = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run_id]))
        (found,) = [a for a in client.read_artifacts(artifact_filter=wanted) if a.key == key]
    made: Artifact = found
    return made


def test_without_the_password_the_page_asks_for_it(
    stack: Stack, tmp_path: Path, finished: UUID
) -> None:
    program = find_chromium()
    if program is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    with Browser(program, tmp_path / "stranger") as stranger:
        stranger.open(page(stack, f"runs/flow-run/{finished}"))
        stranger.wait_for_words(["Authentication failed."])
        assert PICTURED not in stranger.words()


def test_the_page_of_a_run_has_its_graph_its_result_and_its_artifacts(
    stack: Stack, browser: Browser, finished: UUID, pictures: Path
) -> None:
    browser.resize(1600)  # what is below the edge is not drawn yet
    browser.open(page(stack, f"runs/flow-run/{finished}"))
    browser.wait_for_words(["Completed", "finetune", "mlx-gpu"])
    browser.choose_tab("Artifacts")
    version = core.read_champion(stack.registry, PICTURED)
    assert version is not None
    keys = ("gate-verdict", "tier-table", "loss-curve", "dataset-report", "training-progress")
    browser.wait_for_words([*keys, "run-directory"])
    browser.resize(850)
    wait_for(lambda: len(browser.picture("canvas")) > CANVAS_WITHOUT_A_GRAPH)
    (pictures / "flow-run.png").write_bytes(browser.picture())
    browser.choose_tab("Details")
    browser.wait_for_words([f"verified {version[:6]}: val loss ", "; promoted"])


def test_the_verdict_of_the_gate_is_a_page_to_read(
    stack: Stack, browser: Browser, finished: UUID, pictures: Path
) -> None:
    verdict = artifact(stack, finished, "gate-verdict")
    browser.resize(560)
    browser.open(page(stack, f"artifacts/artifact/{verdict.id}"))
    tiers = json.loads(str(artifact(stack, finished, "tier-table").data))
    applied = [str(tier["applied_updates"]) for tier in tiers]
    words = ["passed", "84 of 84 tensors changed", "before", "after", "expected updates"]
    seen = browser.wait_for_words([*words, *applied])
    assert len(applied) == 3
    assert "failed" not in seen
    (pictures / "gate-verdict.png").write_bytes(browser.picture())


def test_what_was_found_in_the_data_set_is_a_table(
    stack: Stack, browser: Browser, finished: UUID, pictures: Path
) -> None:
    report = artifact(stack, finished, "dataset-report")
    browser.resize(560)
    browser.open(page(stack, f"artifacts/artifact/{report.id}"))
    words = ["train.jsonl", "valid.jsonl", "warning", "duplicate", "the same example as line 1"]
    browser.wait_for_words([*words, "severity", "1 warning"])
    (pictures / "dataset-report.png").write_bytes(browser.picture())
