"""An exported folder or GGUF as the model that a person names."""

from __future__ import annotations

from pathlib import Path

from nested_core.data.example_digests import TrainedRows
from nested_core.pipeline.named_models import ModelFormat, NamedModel, RecordedBase
from nested_core.rooms.export.export_record import read_export_record, require_recorded_files
from nested_core.rooms.export.gguf.gguf_file import is_gguf, unpack_gguf


def find_artefact(given: str, temporary: Path) -> NamedModel | None:
    """Return the exported model at a path: a folder with its record, or a GGUF.

    A GGUF is converted into the folder `temporary`, and needs no record. None for any other path,
    such as that of a model that was not exported. Raises ConfigError for a GGUF of an unknown
    family, DamagedError for files that are damaged or not those of the record.
    """
    path = model = Path(given)
    if is_gguf(path):
        unpack_gguf(path, temporary)
        model = temporary
    if not (model / "config.json").is_file():
        return None
    record = read_export_record(path)
    if record is None:
        unknown = TrainedRows(unknown=f"no record of an export lies beside {path.name}")
        return None if model == path else NamedModel(given, str(model), seen=unknown)
    require_recorded_files(path, record)
    made_of = RecordedBase(record.base, record.base_fingerprint)
    seen = TrainedRows.from_json(record.trained_on, str(path))
    rows = record.prompt_format
    return NamedModel(given, str(model), seen=seen, made_of=made_of, prompt_format=rows)


EXPORTED = ModelFormat(find_artefact)
