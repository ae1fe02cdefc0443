"""Edits of single files of a run folder or a registry version: each file x each way to spoil it.

Files of a copy are real copies, because some edits write through the name.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.builders.file_damage import (
    Damage,
    delete,
    double,
    empty,
    halve,
    link_to_a_device,
    link_to_itself_elsewhere,
    link_to_nothing,
    make_directory,
    make_pipe,
    zero,
)


def one_byte_flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[len(content) // 3] ^= 0x10
    path.write_bytes(content)


def full_directory(path: Path) -> None:
    make_directory(path)
    (path / "file").write_bytes(b"content")


def other_json(path: Path) -> None:
    path.write_bytes(b'{"step": "x", "verdict": [], "tensors": 5}\n')


def another_runs(path: Path) -> None:
    """In its place comes the same file of another run, which `Case.apply` has."""


EDITS: tuple[Damage, ...] = (
    *(halve, empty, zero, double, one_byte_flipped, delete, link_to_itself_elsewhere),
    *(link_to_nothing, link_to_a_device, make_pipe, make_directory, full_directory),
    *(another_runs, other_json),
)


@dataclass(frozen=True)
class Case:
    """One edit of one file, by its path in the folder."""

    file: str
    edit: Damage

    def __str__(self) -> str:
        return f"{self.file} {self.edit.__name__}"

    def apply(self, original: Path, other: Path, target: Path) -> None:
        """Copy a folder and spoil one file of the copy; the other run gives its own."""
        shutil.copytree(original, target, symlinks=True)
        path = target / self.file
        for name in (path, path.parent):
            name.chmod(0o755 if name.is_dir() else 0o644)  # versions are written read-only
        if self.edit is another_runs:
            shutil.copyfile(other / self.file, path)
        else:
            self.edit(path)


def cases(original: Path, other: Path) -> list[Case]:
    """Every edit of every file that both folders have."""
    files = [path.relative_to(original) for path in sorted(original.rglob("*")) if path.is_file()]
    shared = [str(path) for path in files if (other / path).is_file()]
    return [Case(file, edit) for file in shared for edit in EDITS]
