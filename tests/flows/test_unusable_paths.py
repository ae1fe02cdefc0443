"""Every command on paths that cannot be used: exit 2 with the path, never a temporary name."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.cli import list_command_modules
from tests.example import DATA, MODEL
from tests.flows.conftest import called
from tests.hostile_text import assert_safe

TRAIN = ("train", "--data", str(DATA), "--model", str(MODEL), "--iters", "1", "--num-layers", "1")
# "@" stands for the path.
COMMANDS: dict[str, tuple[str, ...]] = {
    "validate --config": ("validate", "-c", "@"),
    "validate --data": ("validate", "--data", "@", "--model", str(MODEL)),
    "validate --model": ("validate", "--data", str(DATA), "--model", "@"),
    "train --config": ("train", "-c", "@"),
    "train --run-dir": (*TRAIN, "--run-dir", "@"),
    "train --resume": (*TRAIN, "--run-dir", "@", "--resume"),
    "train --adapter-path": (*TRAIN, "--run-dir", "run", "--adapter-path", "@"),
    "train --resume-adapter-file": (*TRAIN, "--run-dir", "other", "--resume-adapter-file", "@"),
    "verify": ("verify", "@", "@"),
    "status": ("status", "@"),
    "stop": ("stop", "@"),
    "promote": ("promote", "@", "--registry", "registry", "--name", "name"),
    "rollback": ("rollback", "name", "--registry", "@"),
    "history": ("history", "name", "--registry", "@"),
    "audit": ("audit", "name", "--registry", "@"),
    "gc": ("gc", "name", "--registry", "@"),
    "import-peft": ("import-peft", "@", "--model", str(MODEL), "--out", "out"),
    "import-peft --out": ("import-peft", "folder", "--model", str(MODEL), "--out", "@"),
    "export": ("export", "@", "--fused", "out"),
    "export-peft": ("export-peft", "@", "--out", "out"),
}
PATHS: dict[str, str] = {
    "a name too long": "a" * 300,
    "a path too long": "/".join(["b" * 200] * 30),
    "below a file": "file/x",
    "a circle of links": "circle/x",
    "a link that leads nowhere, below": "dangling/x",
    "an escape sequence": "file/\x1b[2J",
    "a forged line": "file/x\nFORGED",
    "a name that is not UTF-8": "file/caf\udce9",
    "below a device": "/dev/null/x",
    "a folder that cannot be made": "/proc/x",
}
ALWAYS = {"below a file", "a name too long", "a forged line"}
MAKES_FOLDERS = {"train --run-dir", "train --adapter-path", "import-peft --out"}


def cases() -> list[object]:
    """A few paths for each command; all of them under the marker."""
    commands = [name for names in list_command_modules().values() for name in names]
    return [
        pytest.param(
            name,
            path,
            marks=[] if path in ALWAYS else [pytest.mark.reliability],
            id=f"{name}-{path}",
        )
        for name, words in COMMANDS.items()
        for path in PATHS
        if words[0] in commands
        and not (name in MAKES_FOLDERS and "nowhere" in path)  # that may be made
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("x")
    (tmp_path / "circle").symlink_to("circle2")
    (tmp_path / "circle2").symlink_to("circle")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "folder").mkdir()
    return tmp_path


@pytest.mark.parametrize(("name", "kind"), cases())
def test_a_path_that_cannot_be_used_is_exit_2_and_named_as_it_was_given(name, kind, folder) -> None:
    path = PATHS[kind]
    done = called(*(part.replace("@", path) for part in COMMANDS[name]), cwd=folder)
    message = done.message()
    assert_safe(done.stderr)
    assert "unexpected" not in message
    assert ".tmp-" not in message
    if name == "import-peft --out":  # the adapter is looked at first
        assert done.code in (2, 6)
        return
    assert done.code == 2, message
    assert path[:8] in message or "file/" in message


def test_a_message_about_a_long_path_is_not_as_long_as_the_path(folder: Path) -> None:
    named = ("--model", "m", "--data", DATA)
    done = called("train", "--run-dir", "/".join(["b" * 200] * 30), *named, cwd=folder)
    assert done.code == 2
    assert len(done.message()) < 1_500
    assert "(6,029 bytes)" in done.message()
