"""Where a command may write: not in a registry, another's run or a model's folder, by any path."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from nested_core.errors import ConfigError
from nested_core.storage.output_places import (
    require_adapter_place,
    require_free_place,
    require_output_file,
    require_registry_place,
)
from nested_core.storage.run_directory import open_run
from tests.builders.registering import promote, register
from tests.core.registry.conftest import write_run
from tests.example import MODEL

NAME = "capitals"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a registry of one champion, a run, a model and links to them."""
    run = write_run(tmp_path / "runs" / "one", 1)
    for name in ("config.yaml", "run.lock"):
        (run / name).touch()
    version = register(run, tmp_path / "registry", NAME, {})
    promote(tmp_path / "registry", NAME, version, by="ann")
    shutil.copytree(MODEL, tmp_path / "model")
    (tmp_path / "version").symlink_to(tmp_path / "registry" / NAME / "versions" / version)
    (tmp_path / "deep").symlink_to(tmp_path / "registry" / NAME)
    (tmp_path / "a").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


PLACES_OF_OTHERS = [
    "registry",
    "registry/",
    "registry/new",
    "registry/new/deeper",
    f"registry/{NAME}",
    f"registry/{NAME}/champion",
    f"registry/{NAME}/champion/new",
    f"registry/{NAME}/versions/new",
    f"a/../registry/{NAME}/new",
    "version",
    "version/new",
    "deep/versions/new",
    "~/version",
    f"~/registry/{NAME}/champion",
    "runs/one",
    "runs/one/adapter",
    "runs/one/initial/new",
    "model",
    "model/new",
]


@pytest.mark.parametrize("path", PLACES_OF_OTHERS)
def test_a_place_of_another_is_refused_however_it_is_written(home: Path, path: str) -> None:
    with pytest.raises(ConfigError, match="^adapter_path: .* lies in the .*where nothing else wr"):
        require_adapter_place(path)
    with pytest.raises(ConfigError, match="lies in the"):
        require_output_file(Path(path) / "page.html", "-o")
    if not path.startswith("~"):  # which a shell expands
        with pytest.raises(ConfigError, match="^--run-dir or run_dir: .* lies in the"):
            open_run(path) if path != "runs/one" else open_run("runs/one/again")


def test_a_registry_is_known_before_its_first_promotion_and_before_its_first_file(home) -> None:
    register(write_run(home / "runs" / "two", 2), home / "fresh", NAME, {})
    with pytest.raises(ConfigError, match="lies in the registry"):
        require_free_place(f"fresh/{NAME}/versions/x", "run_dir")
    with pytest.raises(ConfigError, match="lies in the registry"):
        require_free_place("none/yet/x", "run_dir", registry="none/yet")
    require_free_place("none/yet", "run_dir")


def test_a_folder_under_another_name_of_the_same_registry_is_refused(home: Path) -> None:
    os.rename("registry", "moved")
    os.symlink("moved", "registry")
    with pytest.raises(ConfigError, match="lies in the registry"):
        require_free_place("moved/new", "run_dir", registry="registry")


@pytest.mark.parametrize(
    "path", ["adapters", "a/new", "runs/two", "runs", "unrelated/registry", ".", "data.jsonl"]
)
def test_what_is_nobodys_is_free(home: Path, path: str) -> None:
    (home / "config.yaml").touch()  # a person's own
    (home / "dataset.json").touch()
    assert require_free_place(path, "run_dir") == Path(os.path.realpath(path))


def test_a_run_writes_into_its_own_folder_and_not_over_what_it_keeps_there(home: Path) -> None:
    run = home / "runs" / "one"
    assert require_adapter_place(run / "copy", own_run=run) == run / "copy"
    for name in ("initial", "adapter", "checkpoints/new"):
        with pytest.raises(ConfigError, match="that the run keeps for itself"):
            require_adapter_place(run / name, own_run=run)
    for name in ("report.html", "new.html"):
        assert require_output_file(run / name, "-o", own_run=run) == run / name
    for name in ("gate.json", "adapter/new.html"):
        with pytest.raises(ConfigError, match="a file of the run itself"):
            require_output_file(run / name, "-o", own_run=run)


def test_adapter_path_takes_what_mlx_lm_left_there_and_nothing_of_others(home: Path) -> None:
    folder = home / "adapters"
    folder.mkdir()
    for name in ("adapters.safetensors", "adapter_config.json", "0000100_adapters.safetensors"):
        (folder / name).touch()
    assert require_adapter_place("adapters") == folder
    (folder / "README.md").touch()
    with pytest.raises(ConfigError, match=r"holds what no training has put there \(README.md\)"):
        require_adapter_place("adapters")
    (folder / "README.md").unlink()
    (folder / "adapters.safetensors").unlink()
    (folder / "adapters.safetensors").symlink_to(home / "version" / "adapters.safetensors")
    with pytest.raises(ConfigError, match="holds what no training has put there"):
        require_adapter_place("adapters")


def test_a_folder_above_a_registry_is_no_adapter_path(home: Path) -> None:
    with pytest.raises(ConfigError, match="holds what no training has put there"):
        require_adapter_place(home)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


KINDS: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "socket": make_socket,
    "folder": os.mkdir,
    "link": lambda path: path.symlink_to("page.html"),
    "dangling link": lambda path: path.symlink_to("nothing"),
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_only_a_regular_file_is_replaced(home: Path, make: Callable[[Path], object]) -> None:
    (home / "page.html").touch()
    make(Path("target"))
    before = os.lstat("target")
    with pytest.raises(ConfigError, match="-o: target is no regular file"):
        require_output_file(Path("target"), "-o")
    assert os.path.samestat(before, os.lstat("target"))
    assert require_output_file(Path("page.html"), "-o") == home / "page.html"


@pytest.mark.parametrize("path", ["/dev/null", "/dev/stdout", "/dev/full"])
def test_no_device_is_replaced(path: str) -> None:
    with pytest.raises(ConfigError, match="is no regular file"):
        require_output_file(Path(path), "-o")


def test_a_registry_does_not_lie_in_another(home: Path) -> None:
    for path in (f"registry/{NAME}", f"registry/{NAME}/versions", "version/x"):
        with pytest.raises(ConfigError, match="^registry: .* lies in .*an adapter's folder"):
            require_registry_place(Path(path))
        with pytest.raises(ConfigError, match="lies in"):
            register(write_run(home / "runs" / "three", 3), Path(path), "other", {})
        shutil.rmtree(home / "runs" / "three")
    require_registry_place(Path("registry"))
