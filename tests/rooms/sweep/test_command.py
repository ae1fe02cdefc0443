"""`nested-tune sweep`, as a person types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.example import write_config
from tests.flows.conftest import called


@pytest.mark.slow("trains two arms and judges the better one")
def test_a_sweep_says_what_was_tried_and_what_came_of_the_best(tmp_path: Path) -> None:
    write_config(tmp_path / "lora.yaml", iters=40, batch_size=4, nested={"frequencies": [1]})
    command = ("sweep", "-c", "lora.yaml", "--over", "learning_rate=1e-6", "--steps", "40")
    done = called(*command, "--run-dir", "found", "--json", cwd=tmp_path)
    assert done.code == 0, done.stderr
    said = json.loads(done.stdout)
    assert [arm["point"] for arm in said["arms"]] == [{}, {"learning_rate": 1e-6}]
    assert (said["chosen"], said["better"], said["steps"]) == (0, False, 30)
    assert said["summary"] == (
        "2 settings tried in 30 steps: none was better than the configuration itself."
    )
    assert "2 settings, compared at steps 10, 20 of 40" in done.stderr
    again = called(*command, "--run-dir", "found", cwd=tmp_path)
    assert (again.code, again.stdout) == (2, "")
    assert "found is not empty: add --resume" in again.message()
    judged = called(*command, "--run-dir", "found", "--resume", cwd=tmp_path)
    assert said["summary"] in judged.stdout
    assert "│ the configuration itself │ 20 " in judged.stdout
    assert f"side by side: nested-tune compare {tmp_path / 'found'}/arms/*" in judged.stdout
    assert "the configuration itself: to step" not in judged.stderr  # nothing is trained again
    assert "promote found" not in judged.stderr
    assert "next: nothing to promote: no setting is shown to be better" in judged.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--over", "learning_rate"), "--over learning_rate: expected KEY=V,V"),
        (("--over", "seed=1", "--over", "seed=2"), "--over seed=2: expected KEY=V,V"),
        (("--over", "data=a,b"), "the grid varies data"),
        (("--over", "iters=1,2"), "the grid varies iters"),
        (("--minutes", "0"), "sweep --minutes must be above 0"),
        (("--resume",), "--resume needs the --run-dir"),
    ],
)
def test_what_cannot_be_swept_is_refused(tmp_path, flags, message) -> None:
    write_config(tmp_path / "lora.yaml", iters=40)
    done = called("sweep", "-c", "lora.yaml", *flags, cwd=tmp_path)
    assert done.code == 2
    assert message in done.message()
    assert list((tmp_path / "runs").glob("*")) == []
