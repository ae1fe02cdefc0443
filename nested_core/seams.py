"""Where the core meets its rooms: parts of the table in nested_core/rooms/__init__.py, loaded.

A part is loaded where it is used, and only where its room is there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from nested_core.errors import ConfigError
from nested_core.rooms import ROOMS, Room, RoomLoss, TrainingFlow
from nested_core.text.loss_format import NATS_PER_TOKEN


def is_there(room: str) -> bool:
    """Whether the room was not deleted."""
    return Path(__file__).with_name("rooms").joinpath(room, "ROOM.toml").is_file()


def list_rooms() -> dict[str, Room]:
    """The rooms that are there, by name, in the table's order."""
    return {name: room for name, room in ROOMS.items() if is_there(name)}


def load(part: str) -> Any:
    """Import a part, `module:name`."""
    module, _, name = part.partition(":")
    return getattr(import_module(module), name)


def list_public_names(rooms: Mapping[str, Room]) -> dict[str, str]:
    """The parts that rooms offer from Python, by their public names."""
    parts = [part for room in rooms.values() for part in room.public_names]
    return {part.partition(":")[2]: part for part in parts}


def load_all(kind: str) -> Iterator[Any]:
    """Import the parts that rooms have in this field of the table, one after the other."""
    for room in list_rooms().values():
        if (part := getattr(room, kind)) is not None:
            yield load(part)


def require(room: str, wanted: str) -> None:
    """Refuse what a deleted room would do.

    wanted: the command or key that asks for it, as a person wrote it.

    Raises ConfigError, which names the room, where it is not there.
    """
    if not is_there(room):
        raise ConfigError(f"`{wanted}` belongs to the room {room}, which is not installed here.")


def list_deleted_keys() -> dict[str, str]:
    """The keys of the configuration that ask for a deleted room, each with that room."""
    return {key: name for name, room in ROOMS.items() if not is_there(name) for key in room.keys}


def require_command(command: str) -> None:
    """Refuse a command of a deleted room, as `require` does; any other passes."""
    for name, room in ROOMS.items():
        if command in room.commands:
            require(name, command)


def require_flag(command: str, flag: str) -> None:
    """Refuse a flag that a deleted room adds to a command; any other passes."""
    for name, room in ROOMS.items():
        if flag in room.flags.get(command, ()):
            require(name, f"{command} {flag}")


def room_of(entrypoint: str) -> str | None:
    """The room that a flow belongs to, by its module and name; None for the core's."""
    words = entrypoint.split(".")
    return words[2] if words[:2] == ["flows", "rooms"] and len(words) > 2 else None


def find_training_flow(entrypoint: str) -> TrainingFlow | None:
    """The room's flow of this entrypoint that trains; None for any other."""
    room = ROOMS.get(room_of(entrypoint) or "")
    return None if room is None else room.training_flows.get(entrypoint)


def load_only(kind: str, wanted: str) -> Any:
    """Import the part that one room has in this field of the table.

    wanted: the key or command that asks for it, as a person wrote it.

    Raises ConfigError, which names the room, where it is not there.
    """
    (name,) = (name for name, room in ROOMS.items() if getattr(room, kind))
    require(name, wanted)
    return load(getattr(ROOMS[name], kind))


def collect(kind: str, *arguments: object) -> list[Any]:
    """What the parts of one field of the table give for these arguments, of all rooms."""
    return [given for part in load_all(kind) for given in part(*arguments)]


def join_mappings(kind: str, rooms: Mapping[str, Room] = ROOMS) -> dict[str, Any]:
    """The entries of one field of the table, of all rooms."""
    return {key: value for room in rooms.values() for key, value in getattr(room, kind).items()}


def find_loss(name: str) -> RoomLoss:
    """The loss that `training.loss` names.

    Raises ConfigError for an unknown name, or if its room is not there.
    """
    for room, added in ROOMS.items():
        if name in added.losses:
            require(room, f"training.loss: {name}")
            return added.losses[name]
    names = ", ".join(sorted(join_mappings("losses")))
    raise ConfigError(f"training.loss: {name!r} is none of {names or 'the losses here'}.")


def unit_of_loss(name: str | None) -> str:
    """The unit of the loss that `training.loss` names; None is the cross-entropy."""
    return NATS_PER_TOKEN if name is None else str(join_mappings("losses")[name].unit)
