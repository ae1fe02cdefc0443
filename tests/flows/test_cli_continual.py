"""`train` and `run` on data that the champion was trained on already: a success that says so."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nested_core.registry import list_versions, read_champion
from tests.example import write_config
from tests.flows.conftest import Ended, called

pytestmark = pytest.mark.slow("trains and judges a run after another")

NAME = "capitals"


@pytest.fixture(scope="module")
def story(prefect_server, tmp_path_factory) -> tuple[Path, dict[str, Ended]]:
    """A first run that becomes champion, and three more on the same data."""
    folder = tmp_path_factory.mktemp("continual")
    target = {"path": "registry", "name": NAME}
    settings = {"registry": target, "continual": {"from": "champion"}, "val_batches": 1}
    write_config(folder / "config.yaml", iters=4, **settings)

    def command(*arguments: object) -> Ended:
        return called(*arguments, cwd=folder)

    return folder, {
        "first": command("train", "-c", "config.yaml", "--run-dir", "first"),
        "promote": command("promote", "first", "--registry", "registry", "--name", NAME),
        "second": command("train", "-c", "config.yaml", "--run-dir", "second"),
        "json": command("train", "-c", "config.yaml", "--run-dir", "third", "--json"),
        "flow": command("run", "-c", "config.yaml", "--run-dir", "fourth"),
    }


def test_the_first_run_says_that_there_is_no_champion(story) -> None:
    _, ran = story
    assert (ran["first"].code, ran["promote"].code) == (0, 0)
    assert (
        "had no champion when the run began: starting from a fresh adapter" in ran["first"].stderr
    )


def test_train_and_run_end_early_with_success(story: tuple[Path, dict[str, Ended]]) -> None:
    folder, ran = story
    champion = read_champion(folder / "registry", NAME)
    assert champion is not None
    line = f"Skipped: unchanged: data unchanged since {champion[:12]}\n"
    assert (ran["second"].code, ran["second"].stdout) == (0, line)
    assert (ran["flow"].code, ran["flow"].stdout) == (0, line)
    assert not (folder / "second" / "initial").exists()
    assert not (folder / "fourth" / "adapter").exists()
    assert list_versions(folder / "registry", NAME) == [champion]


def test_as_json_it_names_the_champion(story: tuple[Path, dict[str, Ended]]) -> None:
    folder, ran = story
    champion = read_champion(folder / "registry", NAME)
    assert ran["json"].document == {
        "run_dir": "third",
        "skipped": {
            "outcome": "Skipped: unchanged",
            "reason": f"data unchanged since {str(champion)[:12]}",
            "details": None,
            "version": champion,
        },
    }


def test_a_champion_whose_provenance_is_damaged_ends_with_6(story, tmp_path) -> None:
    folder = shutil.copytree(story[0], tmp_path / "copy", symlinks=True)
    path = folder / "registry" / NAME / "champion" / "provenance.json"
    path.chmod(0o644)
    path.write_text("{")
    refused = called("train", "-c", "config.yaml", "--run-dir", "fifth", cwd=folder)
    assert refused.code == 6
    assert "provenance.json: has changed since it was written" in refused.message()
