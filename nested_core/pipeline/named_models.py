"""Find the model that a person names: a base, an adapter by any of its names, or a room's format.

nested_core/rooms/ROOMS.toml names the rooms' formats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nested_core import seams
from nested_core.config.loading import parse_config
from nested_core.config.resume import read_run_config
from nested_core.config.schema import FineTuneConfig
from nested_core.data.example_digests import TrainedRows
from nested_core.errors import ConfigError
from nested_core.measure.losses.left_out_examples import find_trained_rows
from nested_core.models.adapter_formats import AdapterFormat
from nested_core.pipeline.named_adapters import find_named_adapter
from nested_core.records.dataset import PromptFormat
from nested_core.registry.versions import PROVENANCE_NAME, read_provenance
from nested_core.storage.adapter import CONFIG_NAME, Adapter, read_adapter, read_adapter_config
from nested_core.storage.output_places import find_recorded_path
from nested_core.storage.run_directory import RunDirectory

if TYPE_CHECKING:
    from nested_core.measure.answers.suite_answers import EncodedSuite
    from nested_core.models.generation import Answer

    Answers = Mapping[str, Sequence[Answer]]


@dataclass(frozen=True)
class RecordedBase:
    """The base that an exported model was made from: its folder or hub name, and fingerprint."""

    base: str
    fingerprint: str


@dataclass(frozen=True, eq=False)
class NamedModel:
    """A model as a person named it: a base, alone or with an adapter.

    name: as the person gave it; "base" for the base that others are compared with.
    model: the base's folder or its name on the hub.
    adapter: None for the base alone.
    seen: the rows that it was trained on.
    made_of: for an exported model, the base that its record names.
    prompt_format: how the rows that it was trained on begin; None if not recorded.
    answer: asks it suites in a program of its own: of the base's tokenizer, and suites encoded for
        it; None asks it in mlx_lm.
    """

    name: str
    model: str
    adapter: Adapter | None = None
    trust_remote_code: bool = False
    seen: TrainedRows = field(default_factory=TrainedRows)
    made_of: RecordedBase | None = None
    prompt_format: PromptFormat | None = None
    answer: Callable[[Any, Sequence[EncodedSuite]], Answers] | None = None


@dataclass(frozen=True)
class ModelFormat:
    """A room's format of models.

    find_model: returns the model at a path as a person gave it, None for a path of another format;
        what it has to unpack it writes to a temporary folder.
    find_in_program: returns it as one that a program of its own answers for; also given the base's
        place, None for the recorded one.
    """

    find_model: Callable[[str, Path], NamedModel | None]
    find_in_program: Callable[[str, str | None], NamedModel | None]


def find_model(
    given: str, registry: Path | None, base_model: str | None, temporary: Path
) -> tuple[NamedModel, RunDirectory | None]:
    """Find the model that a person names, and its run if it is a run's.

    given: a base or an exported model by its folder, an adapter, a run, or a name in the registry.
    base_model: the base to use instead of the recorded one.
    temporary: a folder for converted files: a PEFT adapter is converted, and a model of a room's
        format unpacked.

    Raises ConfigError for an unknown name and what a room's format refuses, DamagedError for
    damaged files.
    """
    path = Path(given)
    for model_format in seams.load_all(ModelFormat):
        if (model := model_format.find_model(given, temporary)) is not None:
            return model, None
    if (path / "config.json").is_file() and not (path / CONFIG_NAME).is_file():
        return NamedModel(given, given), None
    try:
        named = find_named_adapter(path, registry)
    except ConfigError as error:
        raise ConfigError(
            f"{error} A base or an exported model is given by its folder or its GGUF."
        ) from error
    stored = read_adapter_config(named.folder / CONFIG_NAME, follow_links=True)
    folder, base = named.folder, base_model or named.model
    if "peft_type" in stored:
        base = base or find_recorded_path(str(stored.get("base_model_name_or_path")), named.folder)
        seams.load_only(AdapterFormat, given).import_adapter(named.folder, temporary, base)
        folder = temporary
    adapter = read_adapter(folder, follow_links=True)
    base = base or adapter.base_model
    seen = find_trained_rows(adapter, registry, named.folder)
    prompt_format = PromptFormat.read(named.training_record)
    trusts = named.trusts_remote_code
    return NamedModel(given, base, adapter, trusts, seen, prompt_format=prompt_format), named.run


def read_training_config(folder: Path, run: RunDirectory | None) -> FineTuneConfig | None:
    """Read what an adapter was trained with, from its run or provenance; None if not recorded.

    The files of `gate.tasks` are found as `find_recorded_path` does.
    """
    if run is not None:
        config = read_run_config(run)
    elif (folder / PROVENANCE_NAME).is_file() and (
        recorded := read_provenance(folder).get("config")
    ):
        values = {key: value for key, value in recorded.items() if value is not None}
        config = parse_config(values, source=str(folder / PROVENANCE_NAME))
    else:
        return None
    tasks = tuple(
        task.model_copy(update={"file": find_recorded_path(task.file, folder)})
        for task in config.gate.tasks
    )
    return config.model_copy(update={"gate": config.gate.model_copy(update={"tasks": tasks})})


def find_rows_of_base(base: Path) -> TrainedRows:
    """Return the rows of the adapter that a base was exported with; none for any other base."""
    for model_format in seams.load_all(ModelFormat):
        if (model := model_format.find_model(str(base), base)) is not None:
            return model.seen
    return TrainedRows()
