"""The form that starts a run, in both UIs of Prefect: its fields, and what Submit sends."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from flows.finetune import FinetuneParameters
from tests.production.browser import Browser, find_chromium
from tests.production.stack import AUTH, NAME, Stack, wait_for

pytestmark = [pytest.mark.production, pytest.mark.timeout(600)]


@pytest.mark.parametrize("ui", ["", "v2/"])
def test_the_form_begins_with_model_and_data_and_sends_what_it_does_not_show(
    stack: Stack, tmp_path: Path, ui: str
) -> None:
    program = find_chromium()
    if program is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    root, manual = stack.url.removesuffix("/api"), f"finetune/{NAME}-manual"
    with stack.connected() as client:
        deployment = client.read_deployment_by_name(manual)
    config = deployment.parameters["config"]
    before = {run.id for run in stack.runs_of(manual)}
    stack.prefect("work-pool", "pause", "mlx-gpu")
    try:
        with Browser(program, tmp_path / "browser") as browser:
            browser.resize(6000)  # what is below the edge is not drawn yet
            browser.open(f"{root}/login")
            secret = base64.b64encode(AUTH.encode()).decode()
            browser.run(f"localStorage.setItem('prefect-password', '{secret}')")
            browser.open(f"{root}/{ui}deployments/deployment/{deployment.id}/run")
            seen = browser.wait_for_words(["Model", "Skip Unchanged", "Submit"]).splitlines()
            shown = [line.removesuffix(" (Optional)") for line in seen if line]
            fields = ("Model", "Data", "Iters", "Learning Rate", "Nested", "Registry", "Continual")
            places = [shown.index(field) for field in fields]
            assert places == sorted(places)
            assert not {"Train", "Steps Per Report", "Run Dir"} & set(shown)
            assert "Model (Optional)" not in seen
            browser.choose_tab("Submit")
            new = wait_for(lambda: [r for r in stack.runs_of(manual) if r.id not in before])
        sent = new[0].parameters["config"]
        assert sent["steps_per_report"] == config["steps_per_report"], "not shown, and kept"
        # A form writes the defaults of a section's other keys into it.
        validate = FinetuneParameters.model_validate
        assert validate(sent) == validate(config)
        with stack.connected() as client:
            client.delete_flow_run(new[0].id)
    finally:
        stack.prefect("work-pool", "resume", "mlx-gpu")
