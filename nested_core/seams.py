"""What each room adds to the core, in one static table: all that the core says of a room.

A room is a capability that can be deleted: nested_core/rooms/ROOM with its ROOM.toml, its commands
and flows in flows/rooms/ROOM. The table names parts by strings, `module:name`, so that the core
imports no room; a part is loaded where it is used, and only where its room is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from nested_core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Room:
    """What a room adds.

    commands: words of the command line; flows/rooms/ROOM/command.py adds their parsers.
    flags: of a command of the core, by its name; `add_flags` in the same module adds them.
    readers: functions that give the lines of JSON in a data file, by the end of its name.
    data_tables: what `validate` shows of a data set: a function of DataSettings that gives Tables.
    answer_tables: what stands beside the answers to an eval set: a function of its name and of
        (model, expected answer, answer, score) of each, which gives Blocks.
    """

    commands: tuple[str, ...] = ()
    flags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    readers: Mapping[str, str] = field(default_factory=dict)
    data_tables: str | None = None
    answer_tables: str | None = None


ROOMS: Mapping[str, Room] = {
    "serve": Room(commands=("serve",)),
    "tables": Room(
        flags={
            "init": (
                *("--split", "--suite", "--prompt-feature", "--completion-feature"),
                *("--completion-features", "--template", "--system", "--system-file"),
            )
        },
        readers={".xlsx": "nested_core.rooms.tables.workbook:read_workbook"},
        data_tables="nested_core.rooms.tables.labels:tabulate_labels_of_data",
        answer_tables="nested_core.rooms.tables.labels:tabulate_labels_of_answers",
    ),
}


def is_there(room: str) -> bool:
    """Whether the room was not deleted."""
    return Path(__file__).with_name("rooms").joinpath(room, "ROOM.toml").is_file()


def list_rooms() -> dict[str, Room]:
    """The rooms that are there, by name, in the table's order."""
    return {name: room for name, room in ROOMS.items() if is_there(name)}


def require(room: str, wanted: str) -> None:
    """Refuse what a deleted room would do.

    wanted: the command or key that asks for it, as a person wrote it.

    Raises ConfigError, which names the room, where it is not there.
    """
    if not is_there(room):
        raise ConfigError(f"`{wanted}` belongs to the room {room}, which is not installed here.")


def load(part: str) -> Any:
    """Import a part, `module:name`."""
    module, _, name = part.partition(":")
    return getattr(import_module(module), name)


def collect(kind: str, *arguments: object) -> list[Any]:
    """What the parts of one kind, a field of Room, give for these arguments, of all rooms."""
    parts = (getattr(room, kind) for room in list_rooms().values())
    return [given for part in parts if part is not None for given in load(part)(*arguments)]
