"""What each room adds to the core, in one static table: all that the core says of a room.

A room is a capability that can be deleted: nested_core/rooms/ROOM with its ROOM.toml, its commands
and flows in flows/rooms/ROOM. The table names parts by strings, `module:name`, so that the core
imports no room; a part is loaded where it is used, and only where its room is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from nested_core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Room:
    """What a room adds.

    commands: words of the command line; flows/rooms/ROOM/command.py adds their parsers.
    count_processes, train_in_processes: functions that count a run's processes, and train in
        several.
    reference_schedule, reference_trainer: the StepSchedule and the Trainer of a run under
        `training.reference`.
    cuda_operations: the DeviceOperations of layers (kernels/device_operations.py) on CUDA.
    around_training: contexts around loading and training, of configuration, run directory, a
        function that takes a line for the person, and session.
    """

    commands: tuple[str, ...] = ()
    count_processes: str | None = None
    train_in_processes: str | None = None
    reference_schedule: str | None = None
    reference_trainer: str | None = None
    cuda_operations: str | None = None
    around_training: tuple[str, ...] = ()


ROOMS: Mapping[str, Room] = {
    "serve": Room(commands=("serve",)),
    "ranks": Room(
        count_processes="nested_core.rooms.ranks.mlx_launch:count_ranks",
        train_in_processes="nested_core.rooms.ranks.rank_group:train_in_ranks",
    ),
    "cuda": Room(
        cuda_operations="nested_core.rooms.cuda.operations:CUDA_OPERATIONS",
        around_training=("nested_core.rooms.cuda.first_kernels:compiling_first_kernels",),
    ),
    "reference": Room(
        reference_schedule="nested_core.rooms.reference.mlx_lm_schedule:MlxLmSchedule",
        reference_trainer="nested_core.rooms.reference.mlx_lm_trainer:MlxLmTrainer",
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


def load_only(field: str, wanted: str) -> Any:
    """Import the part that one room has in this field of the table.

    wanted: the key or command that asks for it, as a person wrote it.

    Raises ConfigError, which names the room, where it is not there.
    """
    (name,) = (name for name, room in ROOMS.items() if getattr(room, field))
    require(name, wanted)
    return load(getattr(ROOMS[name], field))
