"""An exported folder or GGUF as the model that a person names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nested_core.data.example_digests import TrainedRows
from nested_core.errors import ConfigError
from nested_core.measure.answers.suite_answers import EncodedSuite
from nested_core.models.base_model import find_model_folder
from nested_core.models.generation import Answer
from nested_core.pipeline.named_models import ModelFormat, NamedModel, RecordedBase
from nested_core.rooms.export.asked import Asked, has_llama_cpp, read_in_fresh_process
from nested_core.rooms.export.export_record import read_export_record
from nested_core.rooms.export.gguf.gguf_file import is_adapter, is_gguf, unpack_gguf


def find_artefact(given: str, temporary: Path) -> NamedModel | None:
    """Return the exported model at a path: a folder with its record, or a GGUF.

    A GGUF is converted into the folder `temporary`, and needs no record. None for any other path,
    such as that of a model that was not exported. Raises ConfigError for a GGUF of an unknown
    family, DamagedError for files that are damaged or not those of the record.
    """
    path = model = Path(given)
    if is_gguf(path):
        _require_model(path)
        unpack_gguf(path, temporary)
        model = temporary
    if not (model / "config.json").is_file():
        return None
    record = read_export_record(path)
    if record is None:
        unknown = TrainedRows(unknown=f"no record of an export lies beside {path.name}")
        return None if model == path else NamedModel(given, str(model), seen=unknown)
    made_of = RecordedBase(record.base, record.base_fingerprint)
    seen = TrainedRows.from_json(record.trained_on, str(path))
    rows = record.prompt_format
    return NamedModel(given, str(model), seen=seen, made_of=made_of, prompt_format=rows)


def find_in_llama_cpp(given: str, base: str | None) -> NamedModel | None:
    """Return the GGUF at a path as a model that llama.cpp answers for; None for another path.

    base: the base whose tokenizer encodes what is asked; None is the recorded one.

    Raises ConfigError without llama.cpp or a base, DamagedError for files that are not those of the
    record.
    """
    path = Path(given)
    if not is_gguf(path):
        return None
    _require_model(path)
    if not has_llama_cpp():
        raise ConfigError("--in llama.cpp: it is not here; pip install llama-cpp-python.")
    record = read_export_record(path)
    made_of = None if record is None else RecordedBase(record.base, record.base_fingerprint)
    named = base if base or made_of is None else made_of.base
    if named is None:
        raise ConfigError(
            f"--in llama.cpp: no record of an export lies beside {path.name}. --model BASE names "
            f"the base whose tokenizer encodes the questions."
        )

    def answer(tokenizer: Any, suites: Sequence[EncodedSuite]) -> Mapping[str, Sequence[Answer]]:
        asked = Asked(find_model_folder(named), tokenizer, suites=tuple(suites))
        return read_in_fresh_process(path, asked).answers

    return NamedModel(
        f"{given} in llama.cpp (llama-cpp-python {version('llama-cpp-python')})",
        named,
        made_of=made_of,
        prompt_format=None if record is None else record.prompt_format,
        answer=answer,
    )


def _require_model(path: Path) -> None:
    """Raise ConfigError for a GGUF that is no model."""
    if is_adapter(path):
        raise ConfigError(
            f"{path} is a LoRA alone, which answers on its base. Give the adapter that it was made "
            f"of, or a GGUF of both: `nested-tune export ADAPTER --gguf FILE`."
        )


EXPORTED = ModelFormat(find_artefact, find_in_llama_cpp)
