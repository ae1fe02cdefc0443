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
    key: the key of its parameters under which the configuration of a fine-tune stands; None if
        the parameters are that configuration.
    """

    parameters: str
    key: str | None = None


@dataclass(frozen=True, slots=True)
class Room:
    """What a room adds.

    commands: words of the command line; flows/rooms/ROOM/command.py adds their parsers.
    flags: by `COMMAND --FLAG` of a command of the core, the function that runs the command where
        the flag is given, with the parsed arguments.
    public_names: what `nested_core` offers from Python, each under its own name.
    server_checks: what `doctor` says of the Prefect server of PREFECT_API_URL: a function without
        arguments, which yields lines as Check (flows/commands/check.py).
    watcher: what it does around the flows: a class that is a Watcher (flows/flow_runs/watchers.py).
    model_format: a function of a path as a person gave it and of a temporary folder. It returns the
        NamedModel (nested_core/pipeline/named_models.py) there, None for a path of another format.
    adapter_format: a class of AdapterFormat (nested_core/models/adapter_formats.py), by which
        adapters of another program are read and written.
    training_flows: by the entrypoint that deployments name. The class of parameters has
        `deployment`, the deployment that trains, and `configurations()`, what that trains.
    count_processes, train_in_processes: functions that count a run's processes, and train in
        several.
    reference_schedule, reference_trainer: the StepSchedule and the Trainer of a run under
        `training.reference`.
    cuda_operations: the DeviceOperations of layers (kernels/device_operations.py) on CUDA.
    around_training: a context around loading and training, of configuration, run directory, a
        function that takes a line for the person, and session.
    timed_training: a context that holds a run to `training.minutes`, of configuration, run
        directory and hooks.
    run_measurement: a function that measures how fast a run is, for `explain`.
    added_flags: of a command of the core, by its name; `add_flags` in flows/rooms/ROOM/command.py
        adds them.
    readers: functions that give the lines of JSON in a data file, by the end of its name.
    data_tables: what `validate` shows of a data set: a function of DataSettings that gives Tables.
    answer_tables: what stands beside the answers to an eval set: a function of its name and of
        (model, expected answer, answer, score) of each, which gives Blocks.
    """

    commands: tuple[str, ...] = ()
    flags: Mapping[str, str] = field(default_factory=dict)
    public_names: tuple[str, ...] = ()
    server_checks: str | None = None
    watcher: str | None = None
    model_format: str | None = None
    adapter_format: str | None = None
    training_flows: Mapping[str, TrainingFlow] = field(default_factory=dict)
    count_processes: str | None = None
    train_in_processes: str | None = None
    reference_schedule: str | None = None
    reference_trainer: str | None = None
    cuda_operations: str | None = None
    around_training: str | None = None
    timed_training: str | None = None
    run_measurement: str | None = None
    added_flags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    readers: Mapping[str, str] = field(default_factory=dict)
    data_tables: str | None = None
    answer_tables: str | None = None


ROOMS: Mapping[str, Room] = {
    "audit": Room(flags={"verify --model": "flows.rooms.audit.verify_model:run_adapter_audit"}),
    "deploy": Room(
        commands=("deploy",), server_checks="flows.rooms.deploy.server_checks:iterate_server_checks"
    ),
    "chat": Room(commands=("chat",)),
    "evaluate": Room(
        commands=("evaluate",),
        public_names=(
            "nested_core.rooms.evaluate.evaluating:evaluate",
            "nested_core.rooms.evaluate.page:Evaluation",
        ),
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
    "nights": Room(commands=("registry",), watcher="flows.rooms.nights.watcher:NightWatcher"),
    "peft": Room(
        commands=("import-peft", "export-peft"),
        adapter_format="nested_core.rooms.peft.adapter_format:PeftFormat",
    ),
    "serve": Room(commands=("serve",)),
    "sweep": Room(
        commands=("sweep",),
        training_flows={
            "flows.rooms.sweep.flow.sweep": TrainingFlow(
                "flows.rooms.sweep.flow:SweepParameters", "base"
            )
        },
    ),
    "ranks": Room(
        count_processes="nested_core.rooms.ranks.mlx_launch:count_ranks",
        train_in_processes="nested_core.rooms.ranks.rank_group:train_in_ranks",
    ),
    "cuda": Room(
        cuda_operations="nested_core.rooms.cuda.operations:CUDA_OPERATIONS",
        around_training="nested_core.rooms.cuda.first_kernels:compiling_first_kernels",
    ),
    "reference": Room(
        reference_schedule="nested_core.rooms.reference.mlx_lm_schedule:MlxLmSchedule",
        reference_trainer="nested_core.rooms.reference.mlx_lm_trainer:MlxLmTrainer",
    ),
    "minutes": Room(
        timed_training="nested_core.rooms.minutes.timed_training:TimedTraining",
        run_measurement="nested_core.rooms.minutes.sizes:measure_run",
    ),
    "tables": Room(
        added_flags={
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


def load_flag(flag: str) -> Any:
    """The function of the room that answers `COMMAND --FLAG`; ConfigError names a deleted room."""
    (name,) = (name for name, room in ROOMS.items() if flag in room.flags)
    require(name, flag)
    return load(ROOMS[name].flags[flag])


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
