"""What each room adds to the core, in one static table: all that the core says of a room.

A room is a capability that can be deleted: nested_core/rooms/ROOM with its ROOM.toml, its commands
and flows in flows/rooms/ROOM. The table names parts by strings, `module:name`, so that the core
imports no room; a part is loaded where it is used, and only where its room is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nested_core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Room:
    """What a room adds.

    commands: words of the command line; flows/rooms/ROOM/command.py adds their parsers.
    """

    commands: tuple[str, ...] = ()


ROOMS: Mapping[str, Room] = {
    "serve": Room(commands=("serve",)),
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
