"""Where a command may write: never in a registry, in another run's folder or in a model's folder.

All writers ask here: run directories, `adapter_path`, `-o`, `--out` and registries. A path is
    resolved first (`~`, links and `..`). Whether a folder above it is a registry, run or model is
    decided by the files in it, so no other spelling or mount of the same folder passes. Reading is
    allowed everywhere.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from nested_core.errors import ConfigError, list_first
from nested_core.storage.atomic import require_writable_place
from nested_core.storage.untrusted_files import FileType, file_type

# Files of a run directory, and of a registry and its names (see registry/).
RUN_CONFIG_NAME = "config.yaml"
RUN_LOCK_NAME = "run.lock"
RUN_DATASET_NAME = "dataset.json"
RUN_TIERS_NAME = "tiers.json"
RUN_REPORT_NAME = "report.html"
TRAINING_EXAMPLES_NAME = "training-examples.json"  # of a run, and beside an exported adapter
REGISTRY_LOCK_NAME = ".lock"
NAME_FOLDER_FILES = (REGISTRY_LOCK_NAME, "history.jsonl", "champion.json", "champion")

# What mlx_lm.lora or a run leaves in adapter_path, and a desktop in any folder that it shows
ADAPTER_FOLDER_FILES = re.compile(
    r"(\d{7}_)?adapters\.safetensors|adapter_config\.json|training-examples\.json"
    r"|\.tmp-.*|\.DS_Store"
)
RUNS_OWN_FOLDERS = ("initial", "checkpoints", "adapter")
ADAPTER_PATH_KEY = "adapter_path"
MAX_SHOWN_FILES = 3


def resolve_path(path: str | Path) -> Path:
    """Resolve `~`, links and `..` in a path, which need not exist.

    A path with a NUL character is returned as it is; opening it will fail.
    """
    try:
        return Path(os.path.realpath(os.path.expanduser(path)))
    except ValueError:
        return Path(path)


def require_free_place(
    path: str | Path, what: str, *, own_run: Path | None = None, registry: str | Path | None = None
) -> Path:
    """Return the resolved path; ConfigError if it lies in a registry, a run or a model's folder.

    what: the key or flag that named the path.
    own_run: the run that may be written to.
    registry: a folder that counts as a registry even if it is still empty.
    """
    place = resolve_path(path)
    _refuse_owned(place, path, what, own_run, registry)
    return place


def require_registry_place(registry: Path) -> None:
    """Raise ConfigError if a registry would lie inside an adapter's folder of another registry."""
    for folder in (place := resolve_path(registry), *place.parents):
        if _is_name_folder(folder):
            raise ConfigError(
                f"registry: {registry} lies in {folder}, an adapter's folder of another registry, "
                f"where nothing else writes. Give a place outside of it."
            )


def require_adapter_place(
    path: str | Path, *, own_run: Path | None = None, registry: str | Path | None = None
) -> Path:
    """Return the resolved folder of `adapter_path`, checked to be safe to write to.

    own_run: the folder of the run that writes the adapter; the adapter may be written to it, but
        not into the folders that the run keeps for itself.
    registry: the configured registry, into which no adapter may be written either.

    Files that mlx_lm.lora or an earlier run left in it may be overwritten. Raises ConfigError if it
    holds any other file, or lies in a registry, a run or a model's folder.
    """
    place = require_free_place(path, ADAPTER_PATH_KEY, own_run=own_run, registry=registry)
    own_folders = [] if own_run is None else [own_run / name for name in RUNS_OWN_FOLDERS]
    for run_folder in own_folders:
        if any(_is_same_folder(folder, run_folder) for folder in (place, *place.parents)):
            raise ConfigError(
                f"adapter_path: {path} is a folder that the run keeps for itself. The run's "
                f"adapter is in it anyway. Leave adapter_path out, or give another folder."
            )
    kind = file_type(place)
    # The run's own folder holds files of the run, which are not to be refused below
    if kind == "missing" or (own_run is not None and _is_same_folder(place, own_run)):
        return place
    if kind != "directory":
        raise ConfigError(f"adapter_path: {path} is a file. Give a folder.")
    others = sorted(file.name for file in place.iterdir() if not _is_adapter_file(file))
    if others:
        shown = ", ".join(list_first(others, MAX_SHOWN_FILES))
        raise ConfigError(
            f"adapter_path: {path} holds what no training has put there ({shown}). Give a new or "
            f"empty folder, or one with an adapter that may be written over."
        )
    return place


def require_output_file(path: Path, what: str, *, own_run: Path | None = None) -> Path:
    """Return the resolved path of a file to write; ConfigError if it must not be written.

    what: the flag or key that names the file, for messages.
    own_run: the folder of the run that writes the file.

    A regular file may be replaced; a folder, device, pipe, socket or link may not, and in `own_run`
    only the report may.
    """
    folder = resolve_path(Path(os.path.expanduser(path)).parent)
    place = folder / path.name
    _refuse_owned(place, path, what, own_run)
    kind = file_type(place)
    if kind not in ("file", "missing"):
        raise ConfigError(
            f"{what}: {path} is no regular file, and nothing else is replaced. Give another name."
        )
    own = None if own_run is None else resolve_path(own_run)
    if own is None or not folder.is_relative_to(own) or place == own / RUN_REPORT_NAME:
        return place
    if kind == "file" or folder != own:
        raise ConfigError(
            f"{what}: {path} is a file of the run itself, or lies in a folder that the run keeps "
            f"for itself. Give another name."
        )
    return place


def require_absent_or_empty(out: Path, own_run: Path | None = None, *, flag: str = "--out") -> None:
    """Raise ConfigError unless `out` does not exist or is an empty folder, and may be written.

    own_run: the run whose adapter is exported; `out` may lie in it.
    """
    require_free_place(out, flag, own_run=own_run)
    if not os.path.lexists(out):
        return require_writable_place(out, "a new folder", flag)
    if out.is_symlink() or not out.is_dir() or any(out.iterdir()):
        raise ConfigError(
            f"{out} exists already. Nothing is written over: give {flag} a new or an empty folder."
        )
    return require_writable_place(out.parent, "written to", flag)  # it is replaced


def _refuse_owned(
    place: Path,
    path: str | Path,
    what: str,
    own_run: Path | None = None,
    registry: str | Path | None = None,
) -> None:
    """Raise ConfigError if a path lies in a registry, a run directory or a model's folder.

    place: the resolved path. path, what: as a person gave it, and the key or flag, for the message.
    own_run: the run that may be written to. registry: a folder that counts as a registry.
    """
    for folder in (place, *place.parents):
        owner = _describe_owner(folder, own_run, registry)
        if owner is not None:
            raise ConfigError(
                f"{what}: {path} lies in {owner} {folder}, where nothing else writes. Give a place "
                f"outside of it."
            )


def _describe_owner(folder: Path, own_run: Path | None, registry: str | Path | None) -> str | None:
    """Describe what a folder is if it is a registry, a run directory or a model's folder.

    Returns None if it is none of them.
    """
    is_given = registry is not None and _is_same_folder(folder, resolve_path(registry))
    if is_given or _is_name_folder(folder) or _is_registry(folder):
        return "the registry"
    if _is_run_directory(folder) and not (own_run and _is_same_folder(folder, own_run)):
        return "the run directory"
    # mlx_lm would load a model from such a folder
    if os.path.isfile(folder / "config.json") and any(folder.glob("model*.safetensors")):
        return "the model's folder"
    return None


def _is_name_folder(folder: Path) -> bool:
    """Return whether a folder holds the versions of an adapter in a registry."""
    return _file_type(folder / "versions") == "directory" and any(
        os.path.lexists(folder / name) for name in NAME_FOLDER_FILES
    )


def _is_registry(folder: Path) -> bool:
    """Return whether a folder is a registry: it has a lock file and a name's folder."""
    if _file_type(folder / REGISTRY_LOCK_NAME) != "file":
        return False
    try:
        return any(map(_is_name_folder, folder.iterdir()))
    except PermissionError:  # it may be searched, and not listed
        return False


def _is_run_directory(folder: Path) -> bool:
    """Return whether a folder is a run directory.

    A lock file, a config.yaml or a dataset.json alone is not enough.
    """

    def has(name: str) -> bool:
        """Return whether the folder has a regular file of this name."""
        return _file_type(folder / name) == "file"

    is_begun = has(RUN_LOCK_NAME) or (has(RUN_DATASET_NAME) and has(RUN_TIERS_NAME))
    return is_begun and has(RUN_CONFIG_NAME)


def _file_type(path: Path) -> FileType:
    """Return the type of a path; "missing" if this user may not look."""
    try:
        return file_type(path)
    except PermissionError:
        return "missing"


def _is_same_folder(first: Path, second: Path) -> bool:
    """Return whether two paths are the same folder, even if one does not exist yet."""
    try:
        return os.path.samefile(first, second)
    except (OSError, ValueError):  # one of them is not there yet, or cannot be
        return resolve_path(first) == resolve_path(second)


def _is_adapter_file(path: Path) -> bool:
    """Return whether a file is one that mlx_lm.lora or a run leaves in its adapter_path."""
    return file_type(path) == "file" and ADAPTER_FOLDER_FILES.fullmatch(path.name) is not None


def require_new_output(output: Path | None) -> Path | None:
    """Return the resolved file of the flag `-o`; None for standard output.

    Raises ConfigError if the file exists or must not be written.
    """
    if output is not None and os.path.lexists(os.path.expanduser(output)):
        raise ConfigError(f"{output} exists, and is not written over. Give another name after -o.")
    return None if output is None else require_output_file(output, "-o")


def find_recorded_path(recorded: str, beside: Path) -> str:
    """Find a path that a run recorded relative to the folder that it was started in.

    It is looked for from the working directory, then from each folder above `beside`, the run or
    version that recorded it. Returns it unchanged if it is in none, as the name of a hub is.
    """
    if Path(recorded).exists():
        return recorded
    places = (folder / recorded for folder in beside.resolve().parents)
    return next((str(place) for place in places if place.exists()), recorded)
