"""Edits of single files of a run folder or a registry version: each file x each way to spoil it.

Files of a copy are real copies, because some edits write through the name.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Edit = Callable[[Path, Path], None]  # the file, and the same file of another run


def truncated(path: Path, other: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def emptied(path: Path, other: Path) -> None:
    path.write_bytes(b"")


def zeroed(path: Path, other: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def doubled(path: Path, other: Path) -> None:
    path.write_bytes(2 * path.read_bytes())


def one_byte_flipped(path: Path, other: Path) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[len(content) // 3] ^= 0x10
    path.write_bytes(content)


def removed(path: Path, other: Path) -> None:
    path.unlink()


def replaced_by_link(path: Path, other: Path) -> None:
    kept = path.parents[2] / f"kept-{path.name}"
    path.rename(kept)
    path.symlink_to(kept)


def replaced_by_dangling_link(path: Path, other: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def replaced_by_link_to_zeros(path: Path, other: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def replaced_by_pipe(path: Path, other: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replaced_by_folder(path: Path, other: Path) -> None:
    path.unlink()
    path.mkdir()


def replaced_by_full_folder(path: Path, other: Path) -> None:
    replaced_by_folder(path, other)
    (path / "file").write_bytes(b"content")


def replaced_by_another_runs(path: Path, other: Path) -> None:
    shutil.copyfile(other, path)


def replaced_by_other_json(path: Path, other: Path) -> None:
    path.write_bytes(b'{"step": "x", "verdict": [], "tensors": 5}\n')


EDITS: tuple[Edit, ...] = (
    *(truncated, emptied, zeroed, doubled, one_byte_flipped, removed, replaced_by_link),
    *(replaced_by_dangling_link, replaced_by_link_to_zeros, replaced_by_pipe, replaced_by_folder),
    *(replaced_by_full_folder, replaced_by_another_runs, replaced_by_other_json),
)


@dataclass(frozen=True)
class Case:
    """One edit of one file, by its path in the folder."""

    file: str
    edit: Edit

    def __str__(self) -> str:
        return f"{self.file} {self.edit.__name__}"

    def apply(self, original: Path, other: Path, target: Path) -> None:
        """Copy a folder and spoil one file of the copy; the other run gives its own."""
        shutil.copytree(original, target, symlinks=True)
        path = target / self.file
        for name in (path, path.parent):
            name.chmod(0o755 if name.is_dir() else 0o644)  # versions are written read-only
        self.edit(path, other / self.file)


def cases(original: Path, other: Path) -> list[Case]:
    """Every edit of every file that both folders have."""
    files = [path.relative_to(original) for path in sorted(original.rglob("*")) if path.is_file()]
    shared = [str(path) for path in files if (other / path).is_file()]
    return [Case(file, edit) for file in shared for edit in EDITS]
