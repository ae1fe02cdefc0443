"""A base model that changed after training is seen by every command that relies on it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nested_core.pipeline import steps
from tests.example import MODEL, Finished, train_example, write_config
from tests.flows.conftest import Ended, called

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


def call(done: Finished, *arguments: object) -> Ended:
    return called(*arguments, cwd=done.run.path.parent)


def test_verify_rejects_the_adapter_for_its_base(changed: Finished) -> None:
    ended = call(changed, "verify", changed.run.initial, changed.run.adapter, "--json")
    assert ended.code == 4
    assert [reason["code"] for reason in ended.document["reasons"]] == ["base_mismatch"]


def test_promote_refuses_and_makes_no_registry(changed: Finished) -> None:
    folder = changed.run.path.parent
    ended = call(
        changed, "promote", changed.run.path, "--registry", folder / "registry", "--name", "a"
    )
    assert ended.code == 6
    assert str(folder / "base") in ended.message()
    assert not (folder / "registry" / "a" / "versions").exists()


def test_resume_refuses_to_train_on(changed: Finished) -> None:
    folder = changed.run.path.parent
    write_config(folder / "config.yaml", **SETTINGS | {"model": str(folder / "base"), "iters": 8})
    before = sorted(path.name for path in changed.run.checkpoints.iterdir())
    ended = call(changed, "train", "-c", "config.yaml", "--run-dir", changed.run.path, "--resume")
    assert ended.code == 6
    assert "base" in ended.message()
    assert sorted(path.name for path in changed.run.checkpoints.iterdir()) == before
