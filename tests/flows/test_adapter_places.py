"""One way to name an adapter, in every command that takes one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flows.commands.adapter_places import split_name
from nested_core.errors import ConfigError
from nested_core.pipeline.named_adapters import find_named_adapter
from tests.builders.registering import promote, register
from tests.core.registry.conftest import write_run
from tests.flows.conftest import called
from tests.left_out import needs_rooms


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with registry/bot, its champion a version of the run `run`."""
    version = register(write_run(tmp_path / "run", 1), tmp_path / "registry", "bot", {})
    promote(tmp_path / "registry", "bot", version, by="ann")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("given", ["bot", "registry/bot", "registry/bot/", "registry/bot/champion"])
def test_a_champion_has_one_folder_by_any_of_its_names(place: Path, given: str) -> None:
    champion = (place / "registry" / "bot" / "champion").resolve()
    found = find_named_adapter(Path(given))
    assert found.folder.name == champion.name  # resolved once: the link may move meanwhile
    assert found.describe() == f"registry/bot, version {champion.name[:12]}"


def test_a_name_is_looked_for_under_the_registry_that_is_given(place: Path) -> None:
    (place / "registry").rename(place / "other")
    with pytest.raises(ConfigError, match="the registry registry holds no name"):
        find_named_adapter(Path("bot"))
    assert find_named_adapter(Path("bot"), Path("other")).folder.is_dir()


def test_an_adapter_at_the_path_comes_before_a_name_but_not_before_one_under_registry(
    place: Path,
) -> None:
    assert find_named_adapter(Path("run/adapter")).folder == Path("run/adapter")
    champion = (place / "registry" / "bot" / "champion").resolve()
    (place / "bot").mkdir()  # such as a folder of data: it hides no name
    assert find_named_adapter(Path("bot")).folder.resolve() == champion
    (place / "bot").rmdir()
    (place / "run" / "adapter").rename(place / "bot")
    assert find_named_adapter(Path("bot")).folder == Path("bot")
    assert find_named_adapter(Path("bot"), Path("registry")).folder.resolve() == champion


def test_verify_takes_a_name_under_registry_although_a_folder_has_it(place: Path) -> None:
    (place / "bot").mkdir()
    command = ("verify", "run/adapter", "bot")
    named = called(*command, "--registry", "registry", cwd=place)
    assert named.stdout.startswith("Rejected: unchanged")  # its champion is that adapter
    assert "bot/adapter_config.json" in called(*command, cwd=place).message()


def test_what_is_none_of_them_is_told_the_names_that_there_are(place: Path) -> None:
    with pytest.raises(ConfigError, match=r"the registry registry holds bot\), nor an adapter"):
        find_named_adapter(Path("bto"))


@pytest.mark.parametrize("given", ["bot", "registry/bot", "registry/bot/champion"])
@pytest.mark.parametrize(
    "command",
    [
        "history",
        pytest.param("policy", marks=needs_rooms("policy")),
        pytest.param("audit", marks=needs_rooms("housekeeping")),
        pytest.param("gc", marks=needs_rooms("housekeeping")),
    ],
)
def test_commands_of_the_registry_take_every_form(place: Path, command: str, given: str) -> None:
    assert called(command, given, cwd=place).code == 0
    assert called(command, "--name", given, cwd=place).code == 0


def test_with_registry_the_name_is_a_name_alone(place: Path) -> None:
    assert split_name("registry/bot", Path("other")) == (Path("other"), "registry/bot")
    refused = called("history", "registry/bot", "--registry", "registry", cwd=place)
    assert "'registry/bot' is not a name for an adapter" in refused.message()


def test_verify_takes_names_and_folders(place: Path) -> None:
    version = register(write_run(place / "two", 2), place / "registry", "second", {})
    promote(place / "registry", "second", version, by="ann")
    done = called("verify", "bot", "registry/second/champion", "--json", cwd=place)
    assert done.code == 0
    assert json.loads(done.stdout)["trained"]["digest"] == version
    same = called("verify", "run/adapter", "bot", "--json", cwd=place)
    assert [r["code"] for r in json.loads(same.stdout)["reasons"]] == ["unchanged"]
