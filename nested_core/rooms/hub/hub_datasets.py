"""Data sets of the Hugging Face hub -> lines of JSON.

Rows are chosen as mlx-lm chooses them (tuner/datasets.py). Needs the extra `hub`. Runs no code of a
data set unless trust_remote_code says so; HF_HUB_OFFLINE is the library's to respect.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from nested_core.config.sections import HubDataset
from nested_core.data.data_settings import SPLITS, DataSettings
from nested_core.data.lines.example_parsing import FORMATS, read_completion
from nested_core.data.sources.file_formats import NumberedLine, row_to_json_line
from nested_core.data.sources.split_files import HubReader
from nested_core.errors import ConfigError, shorten

HUB_TIMEOUT_SECONDS = 10.0  # to answer the first question
DEFAULT_FIELD_NAMES = ("prompt", "completion", "messages", "text")
COMPLETION_FIELD_NAMES = {"prompt", "completion"}
_log = logging.getLogger(__name__)
# By split: its name in findings, and its lines.
HubTables = dict[str, tuple[str, Iterable[NumberedLine]]]


def open_tables(settings: DataSettings) -> HubTables:
    """Return the data sets of `hf_dataset`, else the one that `data` names."""
    is_trusted = settings.trust_remote_code
    if settings.hf_dataset:
        return open_configured_datasets(settings.hf_dataset, trust_remote_code=is_trusted)
    return open_dataset_by_name(settings.data, trust_remote_code=is_trusted)


def open_dataset_by_name(name: str, *, trust_remote_code: bool) -> HubTables:
    """Return the train, valid and test that a data set has; all of its columns, as they are."""
    tables = _load_hub_split(name, "data", {}, trust_remote_code=trust_remote_code)
    return {
        split: (f"{name}:{split}", _number_rows(tables[split]))
        for split in SPLITS
        if split in tables
    }


def open_configured_datasets(
    entries: Sequence[HubDataset], *, trust_remote_code: bool
) -> HubTables:
    """Join the splits of all entries, their columns named as by default.

    Where the entries have different formats, completions become the chats that mlx-lm makes of
    them. `test_split` is read where it is given.
    """
    opened: HubTables = {}
    for split in SPLITS:
        chosen = [(entry, getattr(entry, f"{split}_split")) for entry in entries]
        chosen = [(entry, part) for entry, part in chosen if part is not None]
        tables = []
        for entry, part in chosen:
            arguments = {**entry.config, "split": part}
            table = _load_hub_split(
                entry.path, "hf_dataset", arguments, trust_remote_code=trust_remote_code
            )
            tables.append((entry, table))
        if tables:
            name = " + ".join(f"{entry.path}:{part}" for entry, part in chosen)
            opened[split] = (name, _number_rows(_chain_rows(tables)))
    return opened


def _load_hub_split(
    path: str, key: str, arguments: dict[str, Any], *, trust_remote_code: bool
) -> Any:
    """Load a data set of the hub with the library `datasets`; return what it returns.

    key: the key of the configuration that names the data set, for messages.
    arguments: of `datasets.load_dataset`.

    Raises ConfigError if the data set cannot be loaded, and OSError of this machine's disk.
    """
    try:
        datasets = import_module("datasets")  # an extra: absent from most environments
    except ImportError:
        raise ConfigError(
            f"{key}: {path!r} is not a folder here (looked for {Path(path).absolute()}), and a "
            "data set of the Hugging Face hub needs the package `datasets`, which is not "
            "installed. Install it with pip install 'nested-tune[hub]', or give a folder with "
            "train.jsonl in `data`."
        ) from None
    if arguments.get("trust_remote_code") and not trust_remote_code:
        raise ConfigError(
            f"{key}: {path!r} asks to run code of the data set. Set trust_remote_code at the top "
            "of the configuration where you have read that code and trust it."
        )
    try:
        with _offline_if_unreachable(datasets, path):
            return datasets.load_dataset(path, **arguments)
    except Exception as error:  # whatever the library and the format of the data set may raise
        if isinstance(error, OSError) and error.errno is not None:
            raise
        where = f"{path!r} is not a folder here, and " if key == "data" else ""
        asked = f" with {arguments}" if arguments else ""
        advice = (
            f" Looked for the folder {Path(path).absolute()}. Give a folder with train.jsonl, or "
            f"the name of a data set that can be reached from here."
        )
        raise ConfigError(
            f"{key}: {where}the data set {path!r} could not be loaded from the hub{asked}: "
            f"{type(error).__name__}: {shorten(error, 300)}.{advice if key == 'data' else ''}"
        ) from error


@contextmanager
def _offline_if_unreachable(datasets: Any, path: str) -> Iterator[None]:
    """Ask the hub for a data set once; where it cannot be reached, have only cached ones loaded.

    The library asks for each of several files and waits up to 23 seconds for each one to come. A
    data set that does not exist is the library's RepositoryNotFoundError, at the first question.
    """
    hub = import_module("huggingface_hub")
    errors = import_module("huggingface_hub.errors")
    packaged = import_module("datasets.packaged_modules")._PACKAGED_DATASETS_MODULES
    before = datasets.config.HF_HUB_OFFLINE
    is_elsewhere = path in packaged or "://" in path or Path(path).exists()
    try:
        if not before and not is_elsewhere:
            hub.HfApi(endpoint=datasets.config.HF_ENDPOINT).dataset_info(
                path, timeout=HUB_TIMEOUT_SECONDS
            )
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise
    except Exception as error:  # of the network or the server: the cache may have the data set
        _log.warning("The hub does not answer, so only its cache is used: %s", shorten(error, 200))
        datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _number_rows(rows: Iterable[dict[str, Any]]) -> Iterator[NumberedLine]:
    for number, row in enumerate(rows, start=1):
        yield NumberedLine(number, row_to_json_line(row))


def _chain_rows(tables: Sequence[tuple[HubDataset, Any]]) -> Iterator[dict[str, Any]]:
    names_of_tables = [
        _default_field_name_by_column(entry, set(table.column_names)) for entry, table in tables
    ]
    has_completions = [{*names.values()} >= COMPLETION_FIELD_NAMES for names in names_of_tables]
    is_mixed = len(set(has_completions)) > 1
    for (_, table), names, is_completion in zip(
        tables, names_of_tables, has_completions, strict=True
    ):
        for row in table:
            yield _rename(row, names, as_chat=is_mixed and is_completion)


def _default_field_name_by_column(entry: HubDataset, columns: set[str]) -> dict[str, str]:
    """Return the columns that hold an example, each with the default name of its field.

    Of the formats that the columns can be read as, the one that mlx-lm takes (create_dataset): one
    column may be named for two, as mlx-lm's own example has `prompt_feature: text`. A prompt
    without a completion is no example, and stays for the finding that says so.
    """
    if {entry.prompt_feature, entry.completion_feature} <= columns:
        return {entry.prompt_feature: "prompt", entry.completion_feature: "completion"}
    if entry.chat_feature in columns:
        return {entry.chat_feature: "messages"}
    if entry.text_feature in columns:
        return {entry.text_feature: "text"}
    halves = {entry.prompt_feature: "prompt", entry.completion_feature: "completion"}
    return {column: name for column, name in halves.items() if column in columns}


def _rename(row: dict[str, Any], names: Mapping[str, str], *, as_chat: bool) -> dict[str, Any]:
    """Give a row's fields their default names, and keep its other columns that stay free."""
    fields = {names[column]: value for column, value in row.items() if column in names}
    if as_chat:
        turns = {field: fields.pop(field) for field in FORMATS["completion"].fields}
        fields["messages"] = read_completion(turns).messages
    others = {
        column: value
        for column, value in row.items()
        if column not in names and column not in DEFAULT_FIELD_NAMES
    }
    return others | fields


HUB = HubReader(open_tables)
