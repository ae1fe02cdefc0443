"""A flag for every key of the configuration, named as in `mlx_lm.lora`, and the run's own flags.

A key of a section is `--section.key`. What is neither text, number nor switch is given as YAML:
`--nested.frequencies '[1, 2]'`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from nested_core.config.key_properties import Key, iterate_keys
from nested_core.config.loading import load_config, parse_yaml
from nested_core.config.schema import FineTuneConfig

MLX_LM_GROUP = "as in mlx_lm.lora; a flag wins over the file"


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """Add -c/--config and a flag for each key, which wins over it."""
    parser.add_argument(
        "-c", "--config", type=Path, help="a YAML configuration, as for mlx_lm.lora"
    )
    groups = {"": parser.add_argument_group(MLX_LM_GROUP)}
    for key in _keys_with_flags():
        section, _, _ = key.name.rpartition(".")
        if section not in groups:
            groups[section] = parser.add_argument_group(section)
        flag = "--" + key.name.replace("_", "-")
        help_text = str(key.field.description).replace("%", "%%")  # % is argparse's own
        group, form = groups[section], _argparse_options(key)
        group.add_argument(flag, dest=_destination(key), default=None, help=help_text, **form)
        if section and "_" in key.name:  # as it is spelled in YAML, too
            form = {name: value for name, value in form.items() if name != "metavar"}
            hidden = argparse.SUPPRESS
            group.add_argument(
                f"--{key.name}", dest=_destination(key), default=None, help=hidden, **form
            )


def _keys_with_flags() -> list[Key]:
    """Every key but sections, whose keys have flags, and keys of lists, which are given whole."""
    keys = list(iterate_keys(FineTuneConfig))
    lists = tuple(f"{key.name}." for key in keys if key.section and not key.is_section)
    return [key for key in keys if not key.is_section and not key.name.startswith(lists)]


def _destination(key: Key) -> str:
    """Where argparse keeps the value: no key shares a name with a flag of the run."""
    return f"config.{key.name}"


def _argparse_options(key: Key) -> dict[str, Any]:
    """How argparse reads a key's flag."""
    value_type = _value_type(key.field.annotation)
    if key.name == "clear_cache_threshold":
        return {"type": _parse_size, "metavar": "SIZE"}
    if get_origin(value_type) is Literal:
        return {"choices": get_args(value_type)}
    if value_type is bool and "." not in key.name:  # mlx_lm.lora's are switches
        return {"action": "store_true"}
    if value_type is str:
        return {"metavar": "TEXT"}
    if value_type is int:
        return {"type": int, "metavar": "N"}
    if value_type is float:
        return {"type": float, "metavar": "NUMBER"}
    return {"type": parse_yaml, "metavar": "YAML"}


def _value_type(annotation: Any) -> Any:
    """A key's type without null and constraints."""
    if get_origin(annotation) is Annotated:
        return _value_type(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        others = [part for part in get_args(annotation) if part is not NoneType]
        return _value_type(others[0]) if len(others) == 1 else annotation
    return annotation


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Add where the run is kept and whether to go on with it."""
    parser.add_argument("--run-dir", type=Path, help="default: runs/<UTC time>-<8 hex digits>")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --run-dir")


def load_config_from_flags(arguments: argparse.Namespace) -> FineTuneConfig:
    """The configuration of a command line: flag, then YAML, then default."""
    flags = {key.name: getattr(arguments, _destination(key)) for key in _keys_with_flags()}
    return load_config(
        arguments.config, {name: value for name, value in flags.items() if value is not None}
    )


def _parse_size(text: str) -> int:
    from mlx_lm.utils import _parse_size as parse

    return int(parse(text))
