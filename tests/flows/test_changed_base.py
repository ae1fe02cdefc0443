"""A base model that changed after training is seen by every command that relies on it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nested_core.pipeline import steps
from tests.example import MODEL, Finished, train_example, write_config
from tests.flows.conftest import called

pytestmark = pytest.mark.slow("changes the base, and runs each command")

SETTINGS = {"iters": 4, "val_batches": 0}


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A verified run; since then one exponent bit amid its base's weights was flipped."""
    folder = tmp_path_factory.mktemp("changed")
    base = Path(shutil.copytree(MODEL, folder / "base"))
    done = train_example(folder / "run", model=str(base), **SETTINGS)
    steps.judge(done.config, done.run)
    weights = base / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2 | 1] ^= 0x04  # the upper byte of a bfloat16
    weights.write_bytes(content)
    return done


def test_verify_promote_and_resume_refuse_and_change_nothing(changed: Finished) -> None:
    run, folder = changed.run, changed.run.path.parent
    verified = called("verify", run.initial, run.adapter, "--json", cwd=folder)
    assert verified.code == 4
    assert [reason["code"] for reason in verified.document["reasons"]] == ["base_mismatch"]
    promoted = called("promote", run.path, "--registry", "registry", "--name", "a", cwd=folder)
    assert promoted.code == 6
    assert str(folder / "base") in promoted.message()
    assert not (folder / "registry" / "a" / "versions").exists()
    write_config(folder / "config.yaml", **SETTINGS | {"model": str(folder / "base"), "iters": 8})
    before = sorted(path.name for path in run.checkpoints.iterdir())
    resumed = called("train", "-c", "config.yaml", "--run-dir", run.path, "--resume", cwd=folder)
    assert resumed.code == 6
    assert "base" in resumed.message()
    assert sorted(path.name for path in run.checkpoints.iterdir()) == before
