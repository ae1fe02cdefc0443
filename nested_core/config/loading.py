"""Build a FineTuneConfig from YAML and flags: precedence is flag, then YAML, then default.

YAML with anchors, tags, merges, duplicate keys or more than 64 KiB is refused. Plain words have the
types of YAML 1.2: true and false, null, 12, 1.5 and 1e-5; all else is text.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from nested_core.config.error_messages import explain_problems, find_problems
from nested_core.config.schema import FineTuneConfig
from nested_core.config.sections import GateSection, TaskSection
from nested_core.errors import ConfigError, DamagedError, MissingFileError, describe_first_problem
from nested_core.storage.untrusted_files import UNBOUNDED, open_regular, read_start

MAX_YAML_BYTES = 64 * 1024
HOW_ASKED = {"score", "function", "tolerance", "max_tokens", "stop", "temperature", "seed"}
# Keys of which a flag for one wins over the others in the file.
SAYING_THE_SAME = (
    {"iters", "training.epochs", "training.minutes"},
    {"lora_parameters.scale", "lora_parameters.alpha"},
)
_PYYAML_TAB_ERROR = "found character '\\t' that cannot start any token"  # yaml/scanner.py
YAML_MERGE_TAG = "tag:yaml.org,2002:merge"


class _StrictYamlLoader(yaml.SafeLoader):
    """A YAML loader for configurations: plain values, unique keys, no references."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose a node; raise an error for an anchor, alias, tag or octal-looking number."""
        event = self.peek_event()
        if getattr(event, "anchor", None) is not None:
            raise _yaml_error("an anchor or alias (& or *)", event.start_mark)
        if getattr(event, "tag", None) is not None:
            raise _yaml_error("a tag (!)", event.start_mark)
        if (
            isinstance(event, yaml.ScalarEvent)
            and event.implicit[0]
            and _OCTAL_PATTERN.match(event.value)
        ):
            what = f"{event.value}, which is octal to some readers and decimal to others,"
            raise _yaml_error(what, event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Construct a mapping; raise an error for a duplicate key or a merge."""
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if key.tag == YAML_MERGE_TAG:
                raise _yaml_error("a merge (<<)", key.start_mark)
            if first := lines.get(str(key.value)):
                what = f"the key {key.value!r}, which is in line {first} too,"
                raise _yaml_error(what, key.start_mark)
            lines[str(key.value)] = key.start_mark.line + 1
        mapping: dict[Hashable, object] = super().construct_mapping(node, deep)
        return mapping


_OCTAL_PATTERN = re.compile(r"^[-+]?0[0-9_]+$")
# What a plain scalar is, by its first characters: YAML 1.2's core schema in decimal, with exponents
# as mlx_lm.lora's loader takes them (1e-5). YAML 1.1 alone takes yes, on and off for booleans, 010
# for 8, 1_000 for 1000, 1:30:00 for 5400 and 2026-11-21 for a date: here they are texts.
_SCALAR_PATTERNS: tuple[tuple[str, str, str], ...] = (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("null", r"^(?:~|null|Null|NULL)$", "~nN"),
    ("int", r"^[-+]?(?:0|[1-9][0-9]*)$", "-+0123456789"),
    (
        "float",
        r"^(?:[-+]?(?:0|[1-9][0-9]*)(?:\.[0-9]*(?:[eE][-+]?[0-9]+)?|[eE][-+]?[0-9]+)"
        r"|[-+]?\.[0-9]+(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        "-+0123456789.",
    ),
)
_StrictYamlLoader.yaml_implicit_resolvers = {"<": [(YAML_MERGE_TAG, re.compile("^<<$"))]}
for _name, _pattern, _first in _SCALAR_PATTERNS:
    _StrictYamlLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_name}", re.compile(_pattern), list(_first)
    )
_StrictYamlLoader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("^$"), [""])
_RETYPED_TAGS = frozenset(f"tag:yaml.org,2002:{name}" for name in ("bool", "int", "float"))


def _yaml_error(what: str, mark: Any) -> yaml.MarkedYAMLError:
    """Build the error for YAML that is not allowed; `mark` is its position."""
    return yaml.MarkedYAMLError(problem=f"{what} is not allowed here", problem_mark=mark)


class YamlFile(NamedTuple):
    """A mapping from YAML, and the line of each key by its dotted name, such as `nested.fast`."""

    values: dict[str, Any]
    lines: Mapping[str, int]


def read_yaml(path: Path) -> dict[str, object]:
    """Read a YAML mapping of at most 64 KiB; ConfigError says where it is wrong."""
    return read_yaml_with_lines(path).values


def read_yaml_with_lines(path: Path) -> YamlFile:
    """Read a YAML mapping of at most 64 KiB, with the lines of its keys; an empty file has none.

    Raises ConfigError if the file cannot be read, is too large, or is not YAML with a mapping; it
    says where the file is wrong.
    """
    if path.suffix == ".jsonl":
        raise ConfigError(
            f"{path} is a file of data by its name, where YAML is expected. Data is given by its "
            f"folder, as --data or as the key data of a configuration."
        )
    try:
        with open_regular(path, UNBOUNDED, follow_links=True) as (file, size):
            if size > MAX_YAML_BYTES:
                raise ConfigError(f"{path} is larger than 64 KiB. That is not a configuration.")
            content = read_start(file, size, path)
    except OSError as error:
        raise ConfigError(f"Cannot read the configuration {path}: {error.strerror}.") from error
    except MissingFileError as error:
        reason = os.strerror(errno.ENOENT)
        raise ConfigError(
            f"Cannot read the configuration {path}: {reason}. Give the path of a YAML file, such "
            f"as one of `nested-tune init --data DATA --model MODEL -o FILE`."
        ) from error
    except DamagedError as error:
        raise ConfigError(f"Cannot read the configuration: {error}") from error
    value, lines = parse_yaml_with_lines(content, str(path))
    if value is None:
        return YamlFile({}, {})
    if not isinstance(value, dict):
        raise ConfigError(f"{path} should hold keys and values; found a {type(value).__name__}.")
    return YamlFile(value, lines)


def parse_yaml(text: str | bytes, *, source: str = "the value") -> Any:
    """Parse strict YAML (no anchors, tags or duplicate keys); ConfigError names `source`."""
    return parse_yaml_with_lines(text, source)[0]


def parse_yaml_with_lines(
    text: str | bytes, source: str, text_names: re.Pattern[str] | None = None
) -> tuple[object, dict[str, int]]:
    """Parse strict YAML; also return the line of each key and item by its dotted name.

    source: the file, for messages.
    text_names: a number, true or false whose dotted name matches is kept as the text that was
        written.

    Raises ConfigError for text that is not YAML or that the strict loader refuses, such as a key
    that is given twice.
    """
    try:
        loader = _StrictYamlLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None, {}
        items = list(_named_items(node))
        for name, _, item in items:
            if text_names is not None and item.tag in _RETYPED_TAGS and text_names.fullmatch(name):
                # The tag is the type that YAML read the value as
                item.tag = "tag:yaml.org,2002:str"
        return loader.construct_document(node), {name: line for name, line, _ in items}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{source} is not usable YAML: {_describe_yaml_error(error)}.") from error


def _named_items(node: yaml.Node, prefix: str = "") -> Iterator[tuple[str, int, yaml.Node]]:
    """Yield dotted name, line and node of every value in a YAML node, at any depth."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            yield name, key.start_mark.line + 1, value
            yield from _named_items(value, f"{name}.")
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield f"{prefix}{index}", item.start_mark.line + 1, item
            yield from _named_items(item, f"{prefix}{index}.")


def _describe_yaml_error(error: Exception) -> str:
    """Describe a YAML error with its line and column."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}"
        if error.problem == _PYYAML_TAB_ERROR:
            return f"{place}: a tab; YAML is indented with spaces alone"
        return f"{place}: {error.problem}"
    return " ".join(str(error).split()) or type(error).__name__


def load_config(
    path: str | Path | None, flags: Mapping[str, object] = MappingProxyType({})
) -> FineTuneConfig:
    """Build the configuration from a YAML file, if given, and from flags.

    path: the YAML file; None for flags and defaults alone.
    flags: values by dotted name, such as `nested.fast`; None means not given. As in mlx_lm.lora, a
        flag wins over the file and a null means the default. `optimizer` may be a class
        of your own, which takes a learning_rate as mlx's optimizers do.

    Relative paths start at the working directory. Raises ConfigError with every problem.
    """
    values, lines = read_yaml_with_lines(Path(path)) if path is not None else YamlFile({}, {})
    source = str(path) if path is not None else "the command line"
    values = lay_over(values, flags)
    _let_flags_override_keys_that_say_the_same(values, flags)
    given_values = {key: value for key, value in values.items() if value is not None}
    given_by_flag = [name for name, value in flags.items() if value is not None]
    # Where each value was given, for messages: its line in the file, unless a flag replaced it
    replaced = tuple(f"{name}." for name in given_by_flag)
    places = {key: f"line {at}" for key, at in lines.items() if not f"{key}.".startswith(replaced)}
    places |= {name: f"--{name.replace('_', '-')}" for name in given_by_flag}
    return parse_config(given_values, source=source, places=places)


def lay_over(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, object]:
    """Return a copy of nested values, overridden by those of `given` (dotted names)."""
    laid = dict(values)
    for name, value in given.items():
        key, _, inner = name.partition(".")
        if not inner:
            laid[key] = value
        elif isinstance(laid.get(key) or {}, dict):
            laid[key] = lay_over(laid.get(key) or {}, {inner: value})
    return laid


def _let_flags_override_keys_that_say_the_same(
    values: dict[str, Any], flags: Mapping[str, object]
) -> None:
    """Remove keys of the file that conflict with a flag, such as epochs with --iters, in place.

    Raises ConfigError if flags give both iterations and minutes.
    """
    given = {name for name, value in flags.items() if value is not None}
    if {"iters", "training.minutes"} <= given:
        raise ConfigError(
            f"--iters {flags['iters']} and --minutes {flags['training.minutes']} both say how long "
            f"the run is: give one of them. With --minutes as many steps are trained as fit."
        )
    for names in SAYING_THE_SAME:
        for name in names - given if names & given else ():
            section, _, key = name.partition(".")
            if isinstance(values.get(section), dict):
                values[section].pop(key, None)


def parse_config(
    values: Mapping[str, object], *, source: str, places: Mapping[str, str] = MappingProxyType({})
) -> FineTuneConfig:
    """Validate values against the schema; ConfigError lists every problem, one a line.

    source: the file, for the message. places: where each key was given, by dotted name: `line 9`,
        or a flag.
    """
    try:
        return FineTuneConfig.model_validate(dict(values))
    except ValidationError as error:
        problems = find_problems(FineTuneConfig, values)
        raise ConfigError(explain_problems(problems, source, places)) from error


def parse_tasks(
    given: Iterable[str | Path | Mapping[str, Any] | TaskSection], configured: Sequence[TaskSection]
) -> tuple[TaskSection, ...]:
    """Convert file names or fields to suites as in `gate.tasks`; ConfigError if one is invalid.

    One without a name is called after its file. Without a score it is asked and scored as the same
    file in `configured`; else by `contains`.
    """
    tasks = [{"file": str(one)} if isinstance(one, (str, Path)) else dict(one) for one in given]
    files = [Path(os.path.abspath(str(task.get("file")))) for task in tasks]
    for file, task in zip(files, tasks, strict=True):
        task.setdefault("name", _name_suite(file, files))
        if "score" not in task:
            same = (one for one in configured if Path(one.file).resolve() == file.resolve())
            how = next((one.model_dump(include=HOW_ASKED) for one in same), {"score": "contains"})
            task |= how | task
    try:
        return GateSection.model_validate({"tasks": tasks, "allow_python_scorers": True}).tasks
    except ValidationError as error:
        raise ConfigError(f"an eval set: {describe_first_problem(error)}.") from error


def _name_suite(file: Path, files: Sequence[Path]) -> str:
    """The shortest end of its path that no other file has: `q`, `q.csv`, `folder-q.csv`."""
    others = [other for other in files if other != file]
    if file.stem not in (other.stem for other in others):
        return file.stem
    ends = (file.parts[-n:] for n in range(1, len(file.parts) + 1))
    return "-".join(next(e for e in ends if e not in [o.parts[-len(e) :] for o in others]))


def render_config(config: FineTuneConfig) -> bytes:
    """Return the bytes of config.yaml: every key with its resolved value."""
    values = config.model_dump(mode="json")
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True).encode()
