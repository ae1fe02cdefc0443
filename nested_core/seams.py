"""What each room adds to the core, in one static table: all that the core says of a room.

A room is a capability that can be deleted: nested_core/rooms/ROOM with its ROOM.toml, its commands
and flows in flows/rooms/ROOM. The table names parts by strings, `module:name`, so that the core
imports no room; a part is loaded where it is used, and only where its room is there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from nested_core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TrainingFlow:
    """A flow of deployments that trains, or has others train.

    parameters: the class of its parameters.
    key: the key of its parameters under which the configuration of a fine-tune stands; None where
        the parameters are that configuration.
    """

    parameters: str
    key: str | None = None


@dataclass(frozen=True, slots=True)
class Room:
    """What a room adds.

    commands: words of the command line; flows/rooms/ROOM/command.py adds their parsers.
    public_names: what `nested_core` offers from Python, each under its own name.
    server_checks: what `doctor` says of the Prefect server of PREFECT_API_URL: a function without
        arguments, which yields lines as Check (flows/commands/check.py).
    model_format: a function of a path as a person gave it and of a temporary folder. It returns the
        NamedModel (nested_core/pipeline/named_models.py) there, None for a path of another format.
    training_flows: by the entrypoint that deployments name. The class of parameters has
        `deployment`, the deployment that trains, and `configurations()`, what that trains.
    """

    commands: tuple[str, ...] = ()
    public_names: tuple[str, ...] = ()
    server_checks: str | None = None
    model_format: str | None = None
    training_flows: Mapping[str, TrainingFlow] = field(default_factory=dict)


ROOMS: Mapping[str, Room] = {
    "deploy": Room(
        commands=("deploy",), server_checks="flows.rooms.deploy.server_checks:iterate_server_checks"
    ),
    "export": Room(
        commands=("export",),
        public_names=(
            "nested_core.rooms.export.exporting:Export",
            "nested_core.rooms.export.exporting:export",
        ),
        model_format="nested_core.rooms.export.named_artefact:find_artefact",
    ),
    "mlflow": Room(commands=("export-mlflow",)),
    "serve": Room(commands=("serve",)),
    "sweep": Room(
        commands=("sweep",),
        training_flows={
            "flows.rooms.sweep.flow.sweep": TrainingFlow(
                "flows.rooms.sweep.flow:SweepParameters", "base"
            )
        },
    ),
}


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


def load_model_formats() -> Iterator[Any]:
    """The functions that read the formats of models which rooms add."""
    for room in list_rooms().values():
        if room.model_format is not None:
            yield load(room.model_format)


def require(room: str, wanted: str) -> None:
    """Refuse what a deleted room would do.

    wanted: the command or key that asks for it, as a person wrote it.

    Raises ConfigError, which names the room, where it is not there.
    """
    if not is_there(room):
        raise ConfigError(f"`{wanted}` belongs to the room {room}, which is not installed here.")


def room_of(entrypoint: str) -> str | None:
    """The room that a flow belongs to, by its module and name; None for the core's."""
    words = entrypoint.split(".")
    return words[2] if words[:2] == ["flows", "rooms"] and len(words) > 2 else None


def find_training_flow(entrypoint: str) -> TrainingFlow | None:
    """The room's flow of this entrypoint that trains; None for any other."""
    room = ROOMS.get(room_of(entrypoint) or "")
    return None if room is None else room.training_flows.get(entrypoint)
