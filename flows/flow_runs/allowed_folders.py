"""What the parameters of deployments' runs may name: files below the worker's folders, no code.

The worker's environment says it: `NESTED_TUNE_ROOTS` lists the folders to read and write in
(without it the folder that the flow runs in is the only one), `NESTED_TUNE_TRUSTED_MODELS` the
models whose own code may run, `NESTED_TUNE_REGISTRIES` the registries in which a run may begin a
new name, each separated as PATH is; and `NESTED_TUNE_BUCKETS` the addresses of object storage below
which a run may read data and mirror a registry, separated by spaces. A flow that a person starts at
a command line may do what that person may.
"""

from __future__ import annotations

import glob
import os
import sysconfig
import unicodedata
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import TypeVar

from prefect import runtime

from nested_core.config.key_properties import replace_configured_paths
from nested_core.config.names import HUB_NAME_PATTERN
from nested_core.config.schema import FineTuneConfig
from nested_core.config.section_base import PathRule
from nested_core.config.sections import HubDataset, RegistrySection
from nested_core.errors import ConfigError
from nested_core.process.our_packages import COMMON_NAMES, ROOT
from nested_core.storage.addresses import is_in_bucket
from nested_core.storage.untrusted_files import iterate_scalars
from nested_core.storage.user_cache import CACHE_VARIABLE
from nested_core.storage.user_tmpdir import KERNELS_FOLDER_VARIABLE

ROOTS_VARIABLE = "NESTED_TUNE_ROOTS"
TRUSTED_MODELS_VARIABLE = "NESTED_TUNE_TRUSTED_MODELS"
REGISTRIES_VARIABLE = "NESTED_TUNE_REGISTRIES"
BUCKETS_VARIABLE = "NESTED_TUNE_BUCKETS"
GUARDED_VARIABLES = (CACHE_VARIABLE, KERNELS_FOLDER_VARIABLE, "PREFECT_HOME")
_PURELIB = os.path.realpath(sysconfig.get_path("purelib"))
CODE_FOLDERS = (Path(_PURELIB), *(ROOT / name for name in ("nested_core", *COMMON_NAMES)))
HUB_SCHEME = "hf://"  # any other may be a local file, or an address inside this network
CONTROL_CATEGORIES = {"Cc", "Zl", "Zp"}  # NUL, line ends and their like

# What of `datasets` a parameter may ask for. Other loaders read pickles and databases, and other
# arguments name folders to write in, credentials and code.
DATASET_LOADERS = ("json", "csv", "text", "parquet", "arrow")
DATASET_ARGUMENTS = ("name", "revision", "data_dir", "data_files")

PYTHON_SCORERS_REFUSAL = (
    "gate.allow_python_scorers: a flow takes it from no parameter, for whoever may start a run "
    "could then run any function with the worker's rights. `nested-tune train` takes it from your "
    "own file."
)

Config = TypeVar("Config", bound=FineTuneConfig)


def allowed_roots() -> tuple[Path, ...]:
    """The folders that paths in parameters must lie in, resolved."""
    return tuple(Path(os.path.realpath(folder)) for folder in _listed(ROOTS_VARIABLE) or ["."])


def require_allowed(path: str, what: str) -> Path:
    """The path to open; ConfigError where a deployment's run may not use it.

    `~` is expanded and links are followed, of the files in a folder too: what leads out of the
    roots is refused, and so is what is hidden below them. What was looked at is what is returned.
    """
    return Path(path) if runtime.deployment.id is None else _allow_path(path, what)


def _allow_path(path: str, what: str) -> Path:
    """The path to open, as `require_allowed` of a deployment's run; ConfigError for others."""
    _refuse_control_characters(path, what)
    resolved = _resolve_allowed(Path(os.path.expanduser(path)), what, path)
    if resolved.is_dir():
        _require_allowed_files(filter(Path.is_symlink, resolved.iterdir()), what)
    elif not resolved.exists():  # a pattern of data files: its folders may be links, too
        _require_allowed_files(map(Path, glob.iglob(str(resolved), recursive=True)), what)
    return _as_opened(resolved)


def with_allowed_paths(config: Config) -> Config:
    """The configuration with every path as it is to be opened; ConfigError for one not allowed."""
    return config if runtime.deployment.id is None else allow_paths(config)


def allow_paths(config: Config) -> Config:
    """The configuration as a deployment's run opens its paths; ConfigError for one not allowed.

    A model or data set of the hub is no path.
    """

    def allow(name: str, rule: PathRule, value: str) -> str:
        """The path to open, the name of the hub, or the address."""
        if is_in_bucket(value):
            return _allow_bucket(value, name)
        if rule in ("local_or_hub", "local_hub_or_bucket") and _is_on_hub(value):
            return value
        return str(_allow_path(value, name))

    allowed = replace_configured_paths(config, allow)
    for index, entry in enumerate(allowed.hf_dataset):
        _require_allowed_dataset(entry, f"hf_dataset[{index}]")
    return allowed


def _allow_bucket(address: str, what: str) -> str:
    """The address; ConfigError unless the worker's environment lists one that it lies below."""
    listed = os.environ.get(BUCKETS_VARIABLE, "").split()
    if any(f"{address}/".startswith(f"{one.rstrip('/')}/") for one in listed):
        return address
    raise ConfigError(
        f"{what}: {address} would be used with this worker's credentials, and {BUCKETS_VARIABLE} "
        f"in its environment lists no address that this one lies below. A person who runs the "
        f"worker sets it, such as {BUCKETS_VARIABLE}=s3://rows/support."
    )


def with_trusted_code(config: Config) -> Config:
    """The configuration, where nothing runs code that the worker does not trust, or ConfigError.

    A trusted model of the hub is replaced by the folder of the revision that is trusted. What a
    person starts at a command line may run a model's code; Python scorers no flow takes.
    """
    if config.gate.allow_python_scorers:
        raise ConfigError(PYTHON_SCORERS_REFUSAL)
    if runtime.deployment.id is None or not config.trust_remote_code:
        return config
    folder = _find_trusted_model(config.model)
    if folder is None:
        raise ConfigError(
            f"trust_remote_code: the code of {config.model} would run with this worker's rights, "
            f"and {TRUSTED_MODELS_VARIABLE} in its environment does not list that model. A person "
            f"who runs the worker lists a folder, or OWNER/NAME@REVISION of the hub."
        )
    return config.model_copy(update={"model": folder})


def require_known_name(section: RegistrySection) -> None:
    """ConfigError where a deployment's run would begin a name that is not its to begin."""
    if runtime.deployment.id is None or section.path is None or section.name is None:
        return
    from nested_core.registry.folders import name_exists  # loads mlx

    registries = {os.path.realpath(folder) for folder in _listed(REGISTRIES_VARIABLE)}
    is_known = name_exists(Path(section.path), section.name)
    if not is_known and os.path.realpath(section.path) not in registries:
        raise ConfigError(
            f"registry.name: {section.path} has no adapter {section.name}, and "
            f"{REGISTRIES_VARIABLE} in this worker's environment does not list that registry as "
            f"one where runs begin new names. `nested-tune deploy -c CONFIG` begins the name of "
            f"its configuration."
        )


def _listed(variable: str) -> list[str]:
    return [entry for entry in os.environ.get(variable, "").split(os.pathsep) if entry]


def _guarded_places() -> Iterator[tuple[str, Path]]:
    """Yield the folders of caches and of code, resolved, each with what it is."""
    for variable in GUARDED_VARIABLES:
        for place in _listed(variable):
            yield variable, Path(os.path.realpath(place))
    yield from (("Python's packages", folder) for folder in CODE_FOLDERS)


def _resolve_allowed(path: Path, what: str, shown: str) -> Path:
    """The path with links resolved: inside of a root, clear of caches and code, not hidden."""
    resolved = Path(os.path.realpath(path))
    roots = allowed_roots()
    below = [resolved.relative_to(root) for root in roots if resolved.is_relative_to(root)]
    if not below:
        listed = ", ".join(map(str, roots))
        raise ConfigError(
            f"{what}: {shown} is outside of the folders that this worker may use ({listed}). Give "
            f"a path inside, or name that folder in {ROOTS_VARIABLE} of the worker, and where "
            f"`deploy` is typed."
        )
    for name, place in _guarded_places():
        if resolved.is_relative_to(place) or place.is_relative_to(resolved):
            raise ConfigError(
                f"{what}: {shown} lies in {name} or holds it ({place}). Give a folder of data, and "
                f"of that alone."
            )
    if all(any(part.startswith(".") for part in each.parts) for each in below):
        raise ConfigError(
            f"{what}: {shown} is hidden (a name in it begins with a dot), and holds settings, "
            f"caches and keys rather than data. Give another path, or start the worker with "
            f"{ROOTS_VARIABLE} naming that folder."
        )
    return resolved


def _as_opened(resolved: Path) -> Path:
    """Relative to the folder that the flow runs in where it lies below, so that it reads well."""
    here = Path(os.path.realpath("."))
    if not resolved.is_relative_to(here):
        return resolved
    relative = resolved.relative_to(here)
    return resolved if str(relative).startswith("~") else relative


def _refuse_control_characters(text: str, what: str) -> None:
    if any(unicodedata.category(character) in CONTROL_CATEGORIES for character in text):
        raise ConfigError(
            f"{what}: {text!r} has a line end, a NUL or another control character in it, which no "
            f"path and no address of a parameter has. Take it out."
        )


def _is_on_hub(value: str) -> bool:
    """OWNER/NAME is the hub's where nothing lies here under that name."""
    return HUB_NAME_PATTERN.fullmatch(value) is not None and not os.path.lexists(value)


def _find_trusted_model(model: str) -> str | None:
    """The folder of a model that the worker trusts; None for any other."""
    for entry in _listed(TRUSTED_MODELS_VARIABLE):
        name, _, revision = entry.rpartition("@")
        if HUB_NAME_PATTERN.fullmatch(name) and revision:
            if name == model and _is_on_hub(model):
                from nested_core.models.base_model import find_model_folder

                return str(find_model_folder(model, revision))
        elif os.path.isdir(model) and os.path.realpath(entry) == os.path.realpath(model):
            return model
    return None


def _require_allowed_dataset(entry: HubDataset, what: str) -> None:
    """`datasets` reads the folders and files that its arguments name too."""
    _refuse_other_loader(entry, what)
    for key in entry.config:
        if key not in DATASET_ARGUMENTS:
            raise ConfigError(
                f"{what}.config.{key}: a flow takes {', '.join(DATASET_ARGUMENTS)} from "
                f"parameters; other arguments of datasets.load_dataset can name code, credentials "
                f"and folders to write in. `nested-tune train` takes it from your own file."
            )
    folders = [Path(), Path(entry.path)]  # a relative name starts at either
    for value in _strings_in(entry.config.get("data_dir")):
        _require_below(folders, value, f"{what}.config.data_dir")
    folders += [base / one for base in folders for one in _strings_in(entry.config.get("data_dir"))]
    for value in _strings_in(entry.config.get("data_files")):
        _refuse_control_characters(value, f"{what}.config.data_files")
        if not value.startswith(HUB_SCHEME) or "::" in value:
            _require_below(folders, value, f"{what}.config.data_files")
    if os.path.isdir(entry.path):
        _require_allowed_files(Path(entry.path).rglob("*"), f"{what}.path")


def _refuse_other_loader(entry: HubDataset, what: str) -> None:
    """Of the loaders that come with `datasets`, a word each, only some read nothing but data."""
    if os.path.isdir(entry.path) or entry.path in DATASET_LOADERS:
        return
    if not HUB_NAME_PATTERN.fullmatch(entry.path):
        raise ConfigError(
            f"{what}.path: {entry.path} is neither a folder here nor OWNER/NAME of the hub."
        )
    try:
        loaders = import_module("datasets.packaged_modules")._PACKAGED_DATASETS_MODULES
    except ImportError:  # reading the data set says that it is not installed
        return
    if entry.path in loaders:
        raise ConfigError(
            f"{what}.path: {entry.path} is a loader of `datasets`, and of those a flow takes "
            f"{', '.join(DATASET_LOADERS)} from parameters. `nested-tune train` takes it from your "
            f"own file."
        )


def _require_below(folders: list[Path], value: str, what: str) -> None:
    """A path or pattern, wherever it may start; what a pattern matches now is followed too."""
    _refuse_control_characters(value, what)
    if "://" in value or "::" in value or "~" in value:
        raise ConfigError(
            f"{what}: {value!r} is neither a path nor an hf:// address. Give one of them: other "
            f"addresses can name what this worker may not read. Fetch such a file first."
        )
    for folder in folders:
        _resolve_allowed(folder / value, what, str(folder / value))
        found = glob.iglob(str(folder / value), recursive=True, include_hidden=True)
        _require_allowed_files(map(Path, found), what)


def _require_allowed_files(paths: Iterable[Path], what: str) -> None:
    for path in paths:
        _resolve_allowed(path, what, str(path))


def _strings_in(value: object) -> list[str]:
    """Every string in an argument that may be one, a list of them, or a mapping to either."""
    return [each for each in iterate_scalars(value) if isinstance(each, str)]
