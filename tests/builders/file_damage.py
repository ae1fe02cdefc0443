"""Damage to a file that is there: to its bytes, or to what stands at its path."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

Damage = Callable[[Path], None]


def writable(path: Path) -> Path:
    """The same path, which its owner may write to, as files of a version may not be."""
    path.chmod(path.stat().st_mode | 0o200)
    return path


def flip_a_bit(path: Path) -> None:
    """One bit in the middle; of an empty file nothing changes."""
    content = bytearray(path.read_bytes())
    if content:
        content[len(content) // 2] ^= 4
    writable(path).write_bytes(content)


def truncate(path: Path) -> None:
    """Without its last byte."""
    writable(path).write_bytes(path.read_bytes()[:-1])


def halve(path: Path) -> None:
    """Only the first half of it."""
    writable(path).write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def append_space(path: Path) -> None:
    """With a space behind it."""
    writable(path).write_bytes(path.read_bytes() + b" ")


def double(path: Path) -> None:
    """Twice the same."""
    writable(path).write_bytes(2 * path.read_bytes())


def empty(path: Path) -> None:
    """No byte left."""
    writable(path).write_bytes(b"")


def zero(path: Path) -> None:
    """As many zeros."""
    writable(path).write_bytes(bytes(path.stat().st_size))


def delete(path: Path) -> None:
    """Nothing at the path."""
    path.unlink(missing_ok=True)


def link_to_itself_elsewhere(path: Path) -> None:
    """A link to the file, which lies in another folder."""
    elsewhere = Path(tempfile.mkdtemp(), path.name)
    shutil.move(path, elsewhere)
    path.symlink_to(elsewhere)


def link_to_nothing(path: Path) -> None:
    """A link that leads nowhere."""
    delete(path)
    path.symlink_to("nowhere")


def link_to_a_device(path: Path) -> None:
    """A link to zeros without end."""
    delete(path)
    path.symlink_to("/dev/zero")


def make_pipe(path: Path) -> None:
    """A pipe that nobody writes to."""
    delete(path)
    os.mkfifo(path)


def make_directory(path: Path) -> None:
    """An empty folder."""
    delete(path)
    path.mkdir()
