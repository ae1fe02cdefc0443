"""`promote`, `rollback`, `history`, `audit` and `gc` over two real runs."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nested_core.pipeline import steps
from nested_core.records.verdict_file import read_verdict
from nested_core.seams import is_there
from nested_core.storage.adapter import read_adapter
from nested_core.text.loss_format import format_loss
from tests.example import train_example, train_until_answers_are_broken
from tests.flows.conftest import CommandRun, Ended, called
from tests.left_out import needs_rooms

pytestmark = pytest.mark.slow("runs each command of the registry")

NAME = "capitals"
Registry = Callable[..., Ended]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, command_run: CommandRun) -> Path:
    """Two runs that passed the gate, `first` and `second`, and the empty place of a registry."""
    folder = tmp_path_factory.mktemp("registry")
    shutil.copytree(command_run.run_dir, folder / "first")
    other = train_example(folder / "second", iters=4, seed=5)
    steps.judge(other.config, other.run)
    return folder


@pytest.fixture(scope="module")
def story(folder: Path) -> dict[str, Ended]:
    """Promote one, promote the other, go back, promote the first again, all by command."""

    def command(*arguments: object) -> Ended:
        return called(*arguments, "--registry", "registry", cwd=folder)

    first = read_adapter(folder / "first" / "adapter").digest()
    return {
        "first": command("promote", "first", "--name", NAME),
        "second": command("promote", "second", "--name", NAME, "--if-champion", first),
        "late": command("promote", "first", "--name", NAME, "--if-champion", first),
        "rollback": command("rollback", NAME, "--json"),
        "again": command("promote", "first", "--name", NAME),
        "history": command("history", NAME, "--json"),
        "table": command("history", NAME),
    }


@pytest.fixture(scope="module")
def versions(folder: Path) -> tuple[str, str]:
    first, second = (read_adapter(folder / name / "adapter") for name in ("first", "second"))
    return first.digest(), second.digest()


def test_the_champion_changes_by_each_command_as_it_says(story, versions, folder) -> None:
    first, second = versions
    short, other = first[:12], second[:12]
    assert {name: ended.code for name, ended in story.items()} == dict.fromkeys(story, 0)
    assert story["first"].stdout == f"promoted: {short} (before: none)\n"
    assert story["second"].stdout == f"promoted: {other} (before: {short})\n"
    assert "superseded" in story["late"].stdout
    assert ("next: `nested-tune chat" in story["first"].stderr) == is_there("chat")
    assert "--system" not in story["first"].stderr  # rows that have none
    assert "next:" not in story["late"].stderr  # the champion is not that run's adapter
    document = {"outcome": "rolled_back", "version": first, "previous": second}
    assert story["rollback"].document == document  # with all digits, for programs
    champion = folder / "registry" / NAME / "champion"
    assert champion.resolve().name == read_adapter(champion).digest() == first


@needs_rooms("housekeeping")
def test_a_sound_registry_is_told_so_and_keeps_what_a_rollback_needs(
    story: dict[str, Ended], folder: Path, versions: tuple[str, str]
) -> None:
    def command(*arguments: object) -> Ended:
        done = called(*arguments, NAME, "--registry", "registry", cwd=folder)
        assert done.code == 0
        return done

    assert list(command("audit", "--json").document["findings"]) == []
    assert command("audit").stdout == "2 versions, the champion and the history are sound\n"
    collected = command("gc", "--keep", 0, "--json").document
    assert (collected["collected"], collected["kept"]) == ([], sorted(versions))
    again = command("gc", "--keep", 0, "--dry-run")
    assert again.stdout.startswith("would remove 0 versions (0.0 MB), kept 2")


def test_a_promotion_tells_the_losses_and_warns_of_a_higher_one_on_the_same_data(
    story, folder, versions
) -> None:
    gates = [json.loads((folder / run / "gate.json").read_text()) for run in ("first", "second")]
    first, second = (gate["validation"] for gate in gates)
    before, after = first["loss_after"], second["loss_after"]
    assert after > before  # it was trained for half as long
    said = " ".join(story["second"].stderr.split())
    assert f"a higher validation loss on the same data, {after:.4g}, than the champion" in said
    assert f"{before:.4g}. To go back: `nested-tune rollback {NAME} --registry registry" in said
    rival = f"{after:.4g}, the champion before, {versions[0][:12]}: {before:.4g}"
    assert f"by training; on the same examples {rival}" in said
    said = " ".join(story["first"].stderr.split())
    assert "warning" not in said
    change = f"{first['loss_before']:.4g} -> {before:.4g} by training"
    words = read_verdict(folder / "first" / "gate.json").describe()
    assert words == "passed, better loss; no questions asked"
    told = f"{versions[0][:12]}: {words}; loss on {first['file']} {change}; there was no champion"
    assert told in said


def test_history_tells_every_change_oldest_first(story, versions) -> None:
    assert story["history"].code == 0
    document = story["history"].document
    assert (document["name"], document["champion"]) == (NAME, versions[0])
    changes = [(entry["version"], entry["previous"]) for entry in document["history"]]
    first, second = versions
    assert changes[:3] == [(first, None), (second, first), (first, second)]
    assert story["table"].code == 0
    told = re.search(rf"promote +│ {first[:12]} +│ ([0-9.]+)", story["table"].stdout)
    assert told is not None
    assert told[1] == format_loss(document["losses"][first]["loss"])
    assert document["losses"].keys() == {first, second}
    words = "passed, better loss; no questions asked"
    assert document["verdicts"] == {first: words, second: words}
    assert f"{first[:12]}: {words}\n{second[:12]}: {words}\n" in story["table"].stdout


def test_a_version_that_was_changed_is_damage_for_every_command(
    story: dict[str, Ended], folder: Path, tmp_path: Path, versions: tuple[str, str]
) -> None:
    registry = shutil.copytree(folder / "registry", tmp_path / "registry", symlinks=True)
    gate = registry / NAME / "versions" / versions[1] / "gate.json"
    gate.chmod(0o644)
    gate.write_text(gate.read_text() + " ")
    audit = [("audit", NAME, "--json")] if is_there("housekeeping") else []
    for arguments in (("rollback", NAME, "--to", versions[1]), *audit):
        done = called(*arguments, "--registry", registry, cwd=tmp_path)
        assert done.code == 6, done.stderr
        assert "gate.json" in done.stdout + done.stderr
        assert "Traceback" not in done.stderr


def test_a_configuration_that_was_edited_after_the_run_is_damage(folder, tmp_path) -> None:
    copy = shutil.copytree(folder / "first", tmp_path / "run")
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace("learning_rate: 0.002", "learning_rate: 0.001"))
    target = ("--registry", tmp_path / "registry", "--name", NAME)
    done = called("promote", copy, *target, cwd=tmp_path)
    assert done.code == 6
    assert "gate.json was not given on the config.yaml that" in done.message()
    assert not (tmp_path / "registry").exists()


@pytest.mark.usefixtures("story")
def test_a_rollback_says_who_and_why_in_the_history(folder, tmp_path, versions) -> None:
    registry = shutil.copytree(folder / "registry", tmp_path / "registry", symlinks=True)
    words = ("--to", versions[1], "--by", "bob", "--reason", "it was rude")
    assert called("rollback", NAME, "--registry", registry, *words, cwd=tmp_path).code == 0
    shown = called("history", NAME, "--registry", registry, cwd=tmp_path).stdout
    assert "bob: it was rude" in " ".join(shown.split())
    document = called("history", NAME, "--registry", registry, "--json", cwd=tmp_path).document
    last = document["history"][-1]
    assert (last["action"], last["by"], last["reason"]) == ("rollback", "bob", "it was rude")


def test_a_run_that_did_not_pass_is_refused_and_nothing_is_made(folder, tmp_path) -> None:
    copy = shutil.copytree(folder / "first", tmp_path / "run")
    gate = copy / "gate.json"
    gate.write_text(gate.read_text().replace('"verdict": "passed"', '"verdict": "failed"'))
    target = ("--registry", tmp_path / "registry", "--name", NAME)
    done = called("promote", copy, *target, cwd=tmp_path)
    assert done.code == 4
    assert "gate" in done.message()
    assert not (tmp_path / "registry" / NAME / "champion").exists()


@pytest.mark.slow("trains a run that breaks the model")
def test_a_person_who_promotes_broken_answers_is_warned(tmp_path: Path) -> None:
    done = train_until_answers_are_broken(tmp_path / "run")
    steps.judge(done.config, done.run)
    promoted = called("promote", "run", "--name", "x", cwd=tmp_path)
    assert promoted.code == 0
    told = " ".join(promoted.stderr.split())
    assert "warning: training broke the answers of this adapter: " in told
    assert "The run's page: run/report.html" in told
    assert "To go back" not in told  # nothing is there to go back to
