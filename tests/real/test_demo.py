"""`demo --model` on SmolLM2-135M-Instruct: the same story, and its end where updates are lost."""

from __future__ import annotations

import pytest

from tests.real.conftest import MODEL, Project

pytestmark = pytest.mark.real


def test_the_demo_promotes_an_adapter_that_answers_better(project: Project) -> None:
    done = project.run("demo", "--model", MODEL)
    assert "gate: passed, better" in done.output
    assert (project.folder / "demo" / "registry" / "geography" / "champion").is_symlink()


def test_a_demo_that_loses_its_updates_is_rejected(project: Project) -> None:
    done = project.run("demo", "--model", MODEL, "--break-training", code=4)
    assert "unchanged (all 420 tensors equal the initial adapter" in done.errors
    assert not (project.folder / "demo-broken" / "registry" / "geography" / "versions").exists()
