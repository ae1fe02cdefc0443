"""Finds rooms and what they add to the core (nested_core/rooms/ROOMS.toml).

A room is an optional capability in its own folder, which may be deleted. Its part at an extension
point, a class of the core, is imported where it is used, and only if its room exists.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from nested_core.errors import ConfigError
from nested_core.text.loss_format import NATS_PER_TOKEN

Part = TypeVar("Part")
ROOMS = Path(__file__).with_name("rooms")


@dataclass(frozen=True, slots=True)
class Room:
    """What a room adds, as ROOMS.toml has it.

    commands: words of the command line; flows/rooms/ROOM/command.py adds their parsers.
    flags: of a command of the core or of another room, by its name; `add_flags` in
        flows/rooms/ROOM/command.py adds them to its parser.
    copies: commands whose --registry may be an address that this room reads.
    keys: keys of the configuration that ask for it where they are not at their default.
    run_files: patterns of the files that it, or a service, writes in a run: their paths there.
    losses: values of `training.loss`; they count examples.
    loss_unit: the unit of their values, as pages and messages show it: "nats/example".
    loss_max_kl: what `gate.max_kl` is with these losses where the configuration gives none.
    verdict_blocks: keys of gate.json.
    reasons: codes of the gate's checks, each with the name of the Outcome that it stands for.
    parts: what it does at extension points: by the name of the point's class, an instance of it,
        `module:name`.
    """

    commands: Sequence[str] = ()
    flags: Mapping[str, Sequence[str]] = field(default_factory=dict)
    copies: Sequence[str] = ()
    keys: Sequence[str] = ()
    run_files: Sequence[str] = ()
    losses: Sequence[str] = ()
    loss_unit: str = NATS_PER_TOKEN
    loss_max_kl: float | None = None
    verdict_blocks: Sequence[str] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)
    parts: Mapping[str, str] = field(default_factory=dict)


@cache
def read_rooms() -> Mapping[str, Room]:
    """Return all rooms by name, in the order of ROOMS.toml, those that were deleted too."""
    import tomllib  # takes as long as all else that `import nested_core` imports

    table = tomllib.loads((ROOMS / "ROOMS.toml").read_text("utf-8"))
    return {name: Room(**row) for name, row in table.items()}


@cache  # every data set that is read asks for all rooms, seven times
def is_there(room: str) -> bool:
    """Return whether a room (an optional component) is installed, that is, was not deleted."""
    return (ROOMS / room / "ROOM.toml").is_file()


def list_rooms() -> dict[str, Room]:
    """Return the installed rooms (optional components) by name, in the order of ROOMS.toml."""
    return {name: room for name, room in read_rooms().items() if is_there(name)}


def load(name: str) -> Any:
    """Import what `module:name` names."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


def load_all(point: type[Part]) -> Iterator[Part]:
    """Import the part that each installed room (optional component) has at an extension point.

    Raises TypeError for a part that is no instance of `point`.
    """
    rooms = [name for name, room in list_rooms().items() if point.__name__ in room.parts]
    return (_load_part(room, point) for room in rooms)


def load_only(point: type[Part], wanted: str) -> Part:
    """Import the part at an extension point that exactly one room fills.

    wanted: the key or command that needs it, as a person wrote it.

    Raises ConfigError, naming the room, if it is not installed.
    """
    (room,) = (name for name, room in read_rooms().items() if point.__name__ in room.parts)
    require(room, wanted)
    return _load_part(room, point)


def load_for_loss(loss: str, point: type[Part]) -> Part:
    """Import the part at an extension point of the room that a value of `training.loss` is from.

    Raises ConfigError for an unknown loss, or if its room is not installed.
    """
    for name, room in read_rooms().items():
        if loss in room.losses:
            require(name, f"training.loss: {loss}")
            return _load_part(name, point)
    names = ", ".join(sorted(loss for room in read_rooms().values() for loss in room.losses))
    raise ConfigError(
        f"training.loss: {loss!r} is none of {names or 'the losses here'}. What to do with answers "
        f"that have a label says docs/preferences.md#answers-with-a-label."
    )


def _load_part(room: str, point: type[Part]) -> Part:
    """Import a room's part at an extension point; TypeError if it is something else."""
    name = read_rooms()[room].parts[point.__name__]
    part = load(name)
    if not isinstance(part, point):
        raise TypeError(f"{name}, a part of the room {room}, is no {point.__name__}")
    return part


def require(room: str, wanted: str) -> None:
    """Raise ConfigError, naming the room (an optional component), if it is not installed.

    wanted: the command or key that needs it, as a person wrote it.
    """
    if not is_there(room):
        raise ConfigError(f"`{wanted}` belongs to the room {room}, which is not installed here.")


def list_deleted_keys() -> dict[str, str]:
    """Return the configuration keys of rooms that are not installed, each with its room's name."""
    deleted = {name: room for name, room in read_rooms().items() if not is_there(name)}
    return {key: name for name, room in deleted.items() for key in room.keys}


def require_command(command: str) -> None:
    """Raise ConfigError if a command belongs to a room that is not installed."""
    for name, room in read_rooms().items():
        if command in room.commands:
            require(name, command)


def require_flag(command: str, flag: str) -> None:
    """Raise ConfigError if a command's flag belongs to a room that is not installed."""
    for name, room in read_rooms().items():
        if flag in room.flags.get(command, ()):
            require(name, f"{command} {flag}")


def may_read_copy(command: str) -> bool:
    """Return whether a command's --registry may be an address, which some room reads."""
    return any(command in room.copies for room in read_rooms().values())


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


def list_reasons() -> dict[str, str]:
    """Return the codes of rooms' checks in the gate, each with the name of its outcome."""
    return {code: name for room in read_rooms().values() for code, name in room.reasons.items()}


def find_room_of_loss(name: str | None) -> Room | None:
    """Return the room of a value of `training.loss`, installed or not; None for any other value."""
    return next((room for room in read_rooms().values() if name in room.losses), None)


def unit_of_loss(name: str | None) -> str:
    """Return the unit of a loss, such as nats/token.

    name: the value of `training.loss`; None is the cross-entropy.
    """
    room = find_room_of_loss(name)
    return NATS_PER_TOKEN if room is None else room.loss_unit
