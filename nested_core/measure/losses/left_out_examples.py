"""Which held-out examples are left out: those that an adapter or an ancestor of it was trained on.

What a registered version was trained on is recorded by digest in its provenance.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np

from nested_core.config.schema import FineTuneConfig
from nested_core.data.example_digests import Digests, decode_digests
from nested_core.data.tokens.tokenized_split import Bool
from nested_core.errors import DamagedError
from nested_core.registry.versions import PROVENANCE_NAME, read_provenance, version_folder
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.untrusted_files import read_regular


def read_training_digests(version: Path) -> Digests:
    """Digests of what a version and its ancestors were trained on; empty without a record."""
    with suppress(DamagedError):  # `audit` and `promote` tell what is damaged
        return decode_digests(read_provenance(version).get("training_examples"))
    return decode_digests(None)


def read_ancestor_training_digests(config: FineTuneConfig, initial_digest: str) -> Digests:
    """Digests of what the registered version that a run started from, if any, was trained on."""
    path, name = config.registry.path, config.registry.name
    if path is None or name is None:
        return decode_digests(None)
    folder = version_folder(Path(path), name, initial_digest)
    is_registered = (folder / PROVENANCE_NAME).is_file()
    return read_training_digests(folder) if is_registered else decode_digests(None)


def read_run_training_digests(
    config: FineTuneConfig, run: RunDirectory, initial_digest: str
) -> Digests | None:
    """Digests of what a run and its ancestors were trained on; None if it recorded none."""
    if not run.training_examples.is_file():
        return None
    own = np.frombuffer(read_regular(run.training_examples), "<u8")
    ancestors = read_ancestor_training_digests(config, initial_digest)
    return np.concatenate([own, ancestors], dtype=np.uint64)


def find_left_out(held_out: Digests, *trained_on: Digests) -> Bool:
    """Whether each held-out example, by digest, is among those that were trained on, bool [n]."""
    return np.isin(held_out, np.concatenate([*trained_on], dtype=np.uint64))
