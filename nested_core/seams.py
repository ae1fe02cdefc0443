"""Access to the parts that rooms add to the core (the table in nested_core/rooms/__init__.py).

A room is an optional capability in its own folder, which may be deleted. A part is a function or
class of a room, named `module:name`; it is imported where it is used, and only if its room exists.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from nested_core.errors import ConfigError
from nested_core.rooms import ROOMS, Room, RoomLoss
from nested_core.text.loss_format import NATS_PER_TOKEN


@cache  # every data set that is read asks for all rooms, seven times
def is_there(room: str) -> bool:
    """Return whether a room (an optional component) is installed, that is, was not deleted."""
    return Path(__file__).with_name("rooms").joinpath(room, "ROOM.toml").is_file()


def list_rooms() -> dict[str, Room]:
    """Return the installed rooms (optional components) by name, in the table's order."""
    return {name: room for name, room in ROOMS.items() if is_there(name)}


def load(part: str) -> Any:
    """Import a part of a room (an optional component) by its name, `module:name`."""
    module, _, name = part.partition(":")
    return getattr(import_module(module), name)


def list_public_names(rooms: Mapping[str, Room]) -> dict[str, str]:
    """Return the parts that rooms offer to Python users, by their public names."""
    parts = [part for room in rooms.values() for part in room.public_names]
    return {part.partition(":")[2]: part for part in parts}


def load_all(kind: str) -> Iterator[Any]:
    """Import the part that each installed room (optional component) has in a field of the table.

    kind: the name of the field.
    """
    for room in list_rooms().values():
        if (part := getattr(room, kind)) is not None:
            yield load(part)


def require(room: str, wanted: str) -> None:
    """Raise ConfigError, naming the room (an optional component), if it is not installed.

    wanted: the command or key that needs it, as a person wrote it.
    """
    if not is_there(room):
        raise ConfigError(f"`{wanted}` belongs to the room {room}, which is not installed here.")


def list_deleted_keys() -> dict[str, str]:
    """Return the configuration keys of rooms that are not installed, each with its room's name."""
    return {key: name for name, room in ROOMS.items() if not is_there(name) for key in room.keys}


def require_command(command: str) -> None:
    """Raise ConfigError if a command belongs to a room that is not installed."""
    for name, room in ROOMS.items():
        if command in room.commands:
            require(name, command)


def require_flag(command: str, flag: str) -> None:
    """Raise ConfigError if a command's flag belongs to a room that is not installed."""
    for name, room in ROOMS.items():
        if flag in room.flags.get(command, ()):
            require(name, f"{command} {flag}")


def is_file_of_room(name: str) -> bool:
    """Return whether an installed room writes a file of this name (its path in the run)."""
    patterns = [pattern for room in list_rooms().values() for pattern in room.run_files]
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def room_of(entrypoint: str) -> str | None:
    """Return the name of the room (optional component) that a flow belongs to; None for the core.

    entrypoint: the flow's module and name, such as `flows.rooms.NAME...`.
    """
    words = entrypoint.split(".")
    return words[2] if words[:2] == ["flows", "rooms"] and len(words) > 2 else None


def load_only(kind: str, wanted: str) -> Any:
    """Import a part that exactly one room has.

    kind: the name of the table's field.
    wanted: the key or command that needs it, as a person wrote it.

    Raises ConfigError, naming the room, if it is not installed.
    """
    (name,) = (name for name, room in ROOMS.items() if getattr(room, kind))
    require(name, wanted)
    return load(getattr(ROOMS[name], kind))


def collect(kind: str, *arguments: object) -> list[Any]:
    """Call the part that each installed room has in a field, and join the lists that they return.

    kind: the name of the table's field.
    arguments: what the parts are called with.
    """
    return [given for part in load_all(kind) for given in part(*arguments)]


def join_mappings(kind: str, rooms: Mapping[str, Room] = ROOMS) -> dict[str, Any]:
    """Merge a field of the table that is a mapping, over the given rooms; by default over all."""
    return {key: value for room in rooms.values() for key, value in getattr(room, kind).items()}


def find_loss(name: str) -> RoomLoss:
    """Return the loss that `training.loss` names.

    Raises ConfigError for an unknown name, or if its room is not installed.
    """
    for room, added in ROOMS.items():
        if name in added.losses:
            require(room, f"training.loss: {name}")
            return added.losses[name]
    names = ", ".join(sorted(join_mappings("losses")))
    raise ConfigError(
        f"training.loss: {name!r} is none of {names or 'the losses here'}. What to do with answers "
        f"that have a label says docs/preferences.md#answers-with-a-label."
    )


def unit_of_loss(name: str | None) -> str:
    """Return the unit of a loss, such as nats/token.

    name: the value of `training.loss`; None is the cross-entropy.
    """
    return NATS_PER_TOKEN if name is None else str(join_mappings("losses")[name].unit)
