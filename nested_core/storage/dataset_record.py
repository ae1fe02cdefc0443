"""What other steps of a run need of dataset.json: the digests of the data, read strictly."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from nested_core.errors import DamagedError, describe_first_problem, go_on_with
from nested_core.storage.strict_files import read_json


@dataclass(frozen=True)
class SplitRecord:
    """One split: the digest of its examples, and how many there are."""

    digest: str
    rows: int = 0


@dataclass(frozen=True)
class DatasetRecord:
    """The digest of the whole data set, and the splits that it has."""

    digest: str
    splits: dict[str, SplitRecord]


_RECORD_VALIDATOR = TypeAdapter(DatasetRecord)


def read_dataset_record(path: Path) -> DatasetRecord:
    """Read dataset.json; DamagedError if it is not the report on a data set."""
    document = read_json(path, None)  # as large as the number of findings made it
    try:
        return _RECORD_VALIDATOR.validate_python(document, strict=False)
    except ValidationError as error:
        raise DamagedError(
            f"{path} is not the report on a data set ({describe_first_problem(error)}). It is "
            f"written anew where the run goes on.",
            advice=go_on_with(),
        ) from error
