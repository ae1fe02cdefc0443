"""Find the adapter that a person names: NAME, NAME@VERSION, REGISTRY/NAME, a run, or a folder.

The command line imports this before it reads its arguments, so slow imports are in the functions.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from nested_core.errors import ConfigError
from nested_core.storage.output_places import find_recorded_path
from nested_core.storage.run_directory import DEFAULT_REGISTRY, RunDirectory
from nested_core.text.digest_format import shorten_digest

CHAMPION = "champion"
VERSIONS = "versions"


@dataclass(frozen=True)
class NamedAdapter:
    """An adapter's folder, and what is known about its base model.

    model: the base that the adapter's run names; None if adapter_config.json names it.
    trusts_remote_code: whether the run's configuration lets the base run its own code.
    run: the run that the adapter belongs to; None for a folder or a version.
    """

    folder: Path
    model: str | None = None
    trusts_remote_code: bool = False
    run: RunDirectory | None = None

    @property
    def training_record(self) -> Path:
        """The file with the `prompt_format` of its training rows, which may not exist."""
        return self.folder / "provenance.json" if self.run is None else self.run.dataset

    def describe(self) -> str:
        """Return the folder, or for a registry's version its name and first digits."""
        if self.folder.parent.name != VERSIONS:
            return str(self.folder)
        return f"{self.folder.parent.parent}, version {shorten_digest(self.folder.name)}"


def name_folder_of(path: Path) -> Path | None:
    """Return the folder REGISTRY/NAME for that path or its link `champion`.

    Returns None for another path.
    """
    folder = path.parent if path.name == CHAMPION else path
    folder = Path(os.path.normpath(folder))
    return folder if (folder / VERSIONS).is_dir() else None


def find_bare_name(given: Path, registry: Path | None) -> Path | None:
    """Return the folder of NAME in the registry.

    Returns None for a path with a slash or an unknown name.
    """
    if len(given.parts) != 1:
        return None
    return name_folder_of((registry or DEFAULT_REGISTRY) / given)


def find_named_adapter(given: Path, registry: Path | None = None) -> NamedAdapter:
    """Find the adapter that a person names by `given`; raises ConfigError if nothing matches.

    `given` may be, in the order in which they are tried:
    1. with `registry`: a name in it, which stands for its champion (the version in use);
    2. a run directory: the adapter that the run offers, or its newest checkpoint while it trains;
    3. a folder with an adapter;
    4. REGISTRY/NAME, or without `registry` a name in the default registry: the champion;
    5. NAME@VERSION: the version whose digest begins with these digits.
    """
    if registry is not None:
        from nested_core.registry.mirroring import update_copy

        name, _, digits = given.name.partition("@")
        update_copy(registry, name, digits or None)
    name_folder = find_bare_name(given, registry)
    if name_folder is not None and registry is not None:
        return NamedAdapter(champion_folder(name_folder))
    run = RunDirectory(given)
    if run.config.is_file() and run.has_run_files():
        from nested_core.config.resume import read_run_config

        run.require_begun()
        config = read_run_config(run)
        model = find_recorded_path(config.model, run.path)
        return NamedAdapter(_adapter_of_run(run), model, config.trust_remote_code, run)
    path_folder = name_folder_of(given)  # if the path leads to REGISTRY/NAME or its champion
    if path_folder is None and (given / "adapter_config.json").is_file():
        return NamedAdapter(given)
    name_folder = path_folder or name_folder
    if name_folder is not None:
        return NamedAdapter(champion_folder(name_folder))
    version = _version_folder(given, registry)
    if version is not None:
        return NamedAdapter(version)
    raise ConfigError(_describe_unknown(given, registry))


def _version_folder(given: Path, registry: Path | None) -> Path | None:
    """Return the folder of NAME@VERSION or REGISTRY/NAME@VERSION; None for another text.

    VERSION: the first digits of a version's digest. Raises ConfigError if they are too few, or do
    not belong to exactly one version, DamagedError if NAME is a link. None as well if there is no
    such NAME.
    """
    from nested_core.registry.folders import find_name_folder
    from nested_core.registry.ledger import Ledger
    from nested_core.registry.versions import resolve_version

    name, sign, prefix = given.name.partition("@")
    if not sign:
        return None
    name_path = given.parent / name
    found = name_folder_of(name_path) or find_bare_name(name_path, registry)
    if found is None:
        return None
    folder = find_name_folder(found.parent, found.name)
    return folder / VERSIONS / resolve_version(folder, prefix, Ledger())


def _describe_unknown(given: Path, registry: Path | None) -> str:
    """Describe, for an error, what was expected instead of an adapter name that matches nothing."""
    from nested_core.registry import list_names

    where = registry or DEFAULT_REGISTRY
    names = ", ".join(list_names(where)[:5])
    content = f"the registry {where} holds {names or 'no name'}"
    return (
        f"{given} is neither a run directory (it has no config.yaml) nor a name in a registry (it "
        f"has no {VERSIONS}/; {content}), nor an adapter's folder (it has no adapter_config.json). "
        f"Give what `nested-tune train` printed, NAME with --registry DIR, or REGISTRY/NAME."
    )


def champion_folder(folder: Path) -> Path:
    """Return the folder of an adapter name's champion; ConfigError without a champion."""
    from nested_core.registry import read_champion

    champion = read_champion(folder.parent, folder.name)
    if champion is None:
        raise ConfigError(f"{folder} has no champion yet: `nested-tune promote` makes one.")
    return folder / VERSIONS / champion


def _adapter_of_run(run: RunDirectory) -> Path:
    """Return the folder of a run's adapter or of its newest sound checkpoint; else ConfigError."""
    from nested_core.storage.checkpoint_verification import newest_sound_checkpoint

    if run.adapter.is_dir():
        return run.adapter
    checkpoint = newest_sound_checkpoint(run.checkpoints)
    if checkpoint is None:
        raise ConfigError(f"{run.path} has no adapter and no checkpoint yet: nothing to ask.")
    return checkpoint
