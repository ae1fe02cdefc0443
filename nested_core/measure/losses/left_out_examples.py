"""Find held-out examples that an adapter or an ancestor was trained on, to leave them out.

The provenance of a registered version records digests of its training examples.
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
    """Return digests of what a version and its ancestors were trained on; empty if not recorded."""
    with suppress(DamagedError):  # `audit` and `promote` report the damage
        return decode_digests(read_provenance(version).get("training_examples"))
    return decode_digests(None)


def read_ancestor_training_digests(config: FineTuneConfig, initial_digest: str) -> Digests:
    """Return digests of what the version that a run started from was trained on.

    Empty if the run did not start from a registered version.
    """
    if (location := config.registry.location) is None:
        return decode_digests(None)
    folder = version_folder(*location, initial_digest)
    is_registered = (folder / PROVENANCE_NAME).is_file()
    return read_training_digests(folder) if is_registered else decode_digests(None)


def read_run_training_digests(
    config: FineTuneConfig, run: RunDirectory, initial_digest: str
) -> Digests | None:
    """Return digests of what a run and its ancestors were trained on; None if not recorded."""
    if not run.training_examples.is_file():
        return None
    run_digests = np.frombuffer(read_regular(run.training_examples), "<u8")
    ancestors = read_ancestor_training_digests(config, initial_digest)
    return np.concatenate([run_digests, ancestors], dtype=np.uint64)


def find_left_out(held_out: Digests, *trained_on: Digests) -> Bool:
    """Return for each held-out example, by digest, whether it was trained on, bool (n,)."""
    return np.isin(held_out, np.concatenate([*trained_on], dtype=np.uint64))
