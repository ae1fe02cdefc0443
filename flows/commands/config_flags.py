"""A flag for every key of the configuration, named as in `mlx_lm.lora`, and the run's own flags.

A key of a section is `--section.key`. What is neither text, number nor switch is given as YAML:
`--nested.frequencies '[1, 2]'`.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic_core import PydanticUndefined

from flows.process.environment import LOG_FORMAT_VARIABLE
from flows.terminal.console import print_progress
from nested_core.config.key_properties import Key, iterate_configured_paths, iterate_keys
from nested_core.config.loading import load_config, parse_yaml
from nested_core.config.schema import FineTuneConfig
from nested_core.errors import ConfigError
from nested_core.storage.run_directory import DEFAULT_RUNS_FOLDER, new_run_name
from nested_core.text.json_log import FORMATS

REQUIRED_KEYS = ("model", "data")  # mlx_lm.lora's defaults would be fetched from the hub
OUTPUT_PATH_KEYS = ("adapter_path", "registry.path")  # which need not exist
METAVARS = {str: "TEXT", int: "N", float: "NUMBER"}
MLX_LM_FLAG_GROUP_TITLE = "as in mlx_lm.lora; a flag wins over the file"


def add_log_format(parser: argparse.ArgumentParser) -> None:
    """Add --log-format, which the environment may choose for deployed flows too."""
    parser.add_argument(
        "--log-format",
        choices=FORMATS,
        default=os.environ.get(LOG_FORMAT_VARIABLE) or FORMATS[0],
        help="of the log on standard error; json: one line a record "
        f"(default: {LOG_FORMAT_VARIABLE}, else text)",
    )


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """Add -c/--config and a flag for each key, which wins over it."""
    parser.add_argument("-c", "--config", type=Path, help="YAML configuration, as for mlx_lm.lora")
    groups = {"": parser.add_argument_group(MLX_LM_FLAG_GROUP_TITLE)}
    for key in _keys_with_flags():
        section, _, _ = key.name.rpartition(".")
        if section not in groups:
            groups[section] = parser.add_argument_group(section)
        help_text = _help_text(key).replace("%", "%%")  # % is argparse's own
        group, form = groups[section], _argparse_options(key)
        group.add_argument(
            _flag(key), dest=_argparse_destination(key), default=None, help=help_text, **form
        )
        if section and "_" in key.name:  # as it is spelled in YAML, too
            form = {name: value for name, value in form.items() if name != "metavar"}
            hidden = argparse.SUPPRESS
            group.add_argument(
                f"--{key.name}", dest=_argparse_destination(key), default=None, help=hidden, **form
            )


def _keys_with_flags() -> list[Key]:
    """Every key but sections, whose keys have flags, and keys of lists, which are given whole."""
    keys = list(iterate_keys(FineTuneConfig))
    lists = tuple(f"{key.name}." for key in keys if key.section and not key.is_section)
    return [key for key in keys if not key.is_section and not key.name.startswith(lists)]


def _flag(key: Key) -> str:
    """The flag of a key: `--nested.learning-rate-scale`."""
    return "--" + key.name.replace("_", "-")


def _help_text(key: Key) -> str:
    """What a key does, and its default, as a file has it, where it has one."""
    default = key.field.default
    if key.name in REQUIRED_KEYS or default in (None, PydanticUndefined, (), {}):
        return str(key.field.description)
    text = default if isinstance(default, str) else json.dumps(default)
    return f"{key.field.description} (default: {text})"


def _argparse_destination(key: Key) -> str:
    """Where argparse keeps the value: no key shares a name with a flag of the run."""
    return f"config.{key.name}"


def _argparse_options(key: Key) -> dict[str, Any]:
    """How argparse reads a key's flag."""
    value_type = _value_type(key.field.annotation)
    if key.name == "clear_cache_threshold":
        return {"type": parse_size, "metavar": "SIZE"}
    if get_origin(value_type) is Literal:
        return {"choices": get_args(value_type)}
    if value_type is bool and "." not in key.name:  # mlx_lm.lora's are switches
        return {"action": "store_true"}
    if value_type in METAVARS:
        return {"type": value_type, "metavar": METAVARS[value_type]}
    return {"type": partial(parse_yaml, source=f"the value of {_flag(key)}"), "metavar": "YAML"}


def _value_type(annotation: object) -> object:
    """A key's type without null and constraints."""
    if get_origin(annotation) is Annotated:
        return _value_type(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        others = [part for part in get_args(annotation) if part is not NoneType]
        return _value_type(others[0]) if len(others) == 1 else annotation
    return annotation


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Add where the run is kept and whether to go on with it."""
    default = "default: runs/<UTC time>-<8 hex digits>"
    # A shell leaves `~` in `--run-dir=~/x`, and the flow expands it
    parser.add_argument("--run-dir", type=lambda text: Path(text).expanduser(), help=default)
    parser.add_argument("--resume", action="store_true", help="resume the run in --run-dir")


def choose_run_dir(arguments: argparse.Namespace, prefix: str = "") -> Path:
    """--run-dir, or a new folder whose name begins with `prefix`; ConfigError to resume none."""
    if arguments.run_dir is None and arguments.resume:
        raise ConfigError("--resume needs the --run-dir that it is to continue.")
    return arguments.run_dir or DEFAULT_RUNS_FOLDER / f"{prefix}{new_run_name()}"


def load_config_from_flags(
    arguments: argparse.Namespace, required: Sequence[str] = REQUIRED_KEYS
) -> FineTuneConfig:
    """The configuration of a command line: flag, then YAML, then default.

    Raises ConfigError, too, if no model or data was given, for which mlx_lm.lora would fetch its
    own, and if a path in the file only exists beside it.
    """
    given = {key.name: getattr(arguments, _argparse_destination(key)) for key in _keys_with_flags()}
    flags = {name: value for name, value in given.items() if value is not None}
    config = load_config(arguments.config, flags)
    missing = [name for name in required if name not in config.model_fields_set]
    if config.hf_dataset and "data" in missing:
        missing.remove("data")
    if missing:
        is_validation = arguments.command == "validate" and "model" in missing
        needs_none = " `validate --no-tokenize` needs no model." if is_validation else ""
        raise ConfigError(_describe_missing(missing, arguments.config) + needs_none)
    if "iters" in config.model_fields_set and (config.training.epochs or config.training.minutes):
        print_progress(f"the run has {config.length}: iters is not used")
    if arguments.config is not None:
        _refuse_paths_relative_to_file(config, arguments.config, set(flags))
    return config


def _describe_missing(names: list[str], file: Path | None) -> str:
    expected = {
        "model": "--model MODEL (a folder, or a name of the Hugging Face hub)",
        "data": "--data DATA (a folder with train.jsonl, or a data set of the hub)",
    }
    where = "on the command line" if file is None else f"in {file} or on the command line"
    advice = " and ".join(expected[name] for name in names)
    return (
        f"No {' and no '.join(names)} given {where}. Give {advice}, or the same keys in a file for "
        f"-c. `nested-tune demo` needs neither."
    )


def _refuse_paths_relative_to_file(config: FineTuneConfig, file: Path, flags: set[str]) -> None:
    """Paths start at the working directory; say so where one was meant to start at the file."""
    for name, _, value in iterate_configured_paths(config):
        path = Path(value)
        key = name.partition("[")[0]
        if key in flags or key in OUTPUT_PATH_KEYS or path.is_absolute() or path.exists():
            continue
        beside = file.absolute().parent / path
        if beside.exists():
            raise ConfigError(
                f"{name}: {path.absolute()} does not exist, but {beside} does: paths in {file} "
                f"start at the working directory, as with mlx_lm.lora. Write the whole path, or "
                f"start the command in {file.absolute().parent}."
            )


def parse_size(text: str) -> int:
    """A number of bytes as mlx_lm writes it, such as 4GB."""
    from mlx_lm.utils import _parse_size as parse

    return int(parse(text))
