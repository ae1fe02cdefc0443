"""Export to MLflow's model registry: versions, losses, files, and the champion as an alias.

It goes one way: nothing is ever decided by what MLflow holds. Needs the extra `mlflow`.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nested_core.errors import ConfigError
from nested_core.records.verdict_file import GATE_NAME, read_verdict
from nested_core.registry import list_versions, read_champion, verify
from nested_core.registry.versions import REGISTERED_AT_KEY, read_provenance, version_folder
from nested_core.text.digest_format import shorten_digest

CHAMPION_ALIAS = "champion"
VERSION_TAG = "nested_tune.version"
ARTIFACT_FOLDER = "adapter"
PROVENANCE_KEYS_AS_TAGS = (
    "parent",
    "dataset_digest",
    "train_digest",
    "base_fingerprint",
    REGISTERED_AT_KEY,
)


@dataclass(frozen=True)
class MlflowExport:
    """The result of an export: MLflow's number of each version, and the versions it added.

    store: the address that MLflow writes to; without one configured, a database that MLflow makes
        in the current folder, with `mlruns` beside it.
    """

    name: str
    store: str
    champion: str | None
    numbers: dict[str, str]
    added: tuple[str, ...]


def export_to_mlflow(registry: Path, name: str, tracking_uri: str | None = None) -> MlflowExport:
    """Add the versions of `name` that MLflow lacks, oldest first; point its alias at the champion.

    Without `tracking_uri` MLflow's own settings apply. Each version is re-hashed first:
    DamagedError if it is not what was registered. ConfigError if mlflow is not installed.
    """
    champion = read_champion(registry, name)  # first: a later one could be missing in the list
    versions = list_versions(registry, name)
    client = _make_client(tracking_uri)
    if not client.search_registered_models(filter_string=f"name = '{name}'"):
        client.create_registered_model(name, description="Adapters that passed nested-tune's gate.")
    numbers = _read_exported_versions(client, name)
    dates = {
        version: read_provenance(version_folder(registry, name, version))[REGISTERED_AT_KEY]
        for version in versions
        if version not in numbers
    }
    added = tuple(sorted(dates, key=dates.__getitem__))
    for version in added:
        verify(registry, name, version)
        numbers[version] = _export_version(
            client, name, version, version_folder(registry, name, version)
        )
    if champion in numbers:
        client.set_registered_model_alias(name, CHAMPION_ALIAS, numbers[champion])
    elif champion is None:  # and not where a gc took it meanwhile
        client.delete_registered_model_alias(name, CHAMPION_ALIAS)
    return MlflowExport(name, client.tracking_uri, champion, numbers, added)


def _make_client(tracking_uri: str | None) -> Any:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    try:
        mlflow = importlib.import_module("mlflow")
    except ImportError as error:
        raise ConfigError(
            "MLflow is not installed here. Install the extra: pip install 'nested-tune[mlflow]'."
        ) from error
    return mlflow.MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)


def _read_exported_versions(client: Any, name: str) -> dict[str, str]:
    """Read MLflow's version number by digest, of what was exported before."""
    known: dict[str, str] = {}
    token: str | None = None
    while True:
        page = client.search_model_versions(f"name = '{name}'", page_token=token)
        known |= {v.tags[VERSION_TAG]: str(v.version) for v in page if VERSION_TAG in v.tags}
        token = page.token
        if not token:
            return known


def _export_version(client: Any, name: str, version: str, folder: Path) -> str:
    """Record a version as a run with its losses and files, and as a version of the model."""
    validation = read_verdict(folder / GATE_NAME).validation
    provenance = read_provenance(folder)
    tags = {
        f"nested_tune.{key}": str(provenance[key])
        for key in PROVENANCE_KEYS_AS_TAGS
        if provenance.get(key)
    }
    tags[VERSION_TAG] = version
    run = client.create_run(
        _find_or_create_experiment(client, name), run_name=shorten_digest(version), tags=tags
    )
    run_id = run.info.run_id
    for key, loss in ({} if validation is None else asdict(validation)).items():
        if isinstance(loss, float):
            client.log_metric(run_id, key, loss)
    client.log_artifacts(run_id, str(folder), ARTIFACT_FOLDER)
    client.set_terminated(run_id)
    source = f"runs:/{run_id}/{ARTIFACT_FOLDER}"
    return str(client.create_model_version(name, source, run_id=run_id, tags=tags).version)


def _find_or_create_experiment(client: Any, name: str) -> str:
    existing = client.get_experiment_by_name(name)
    return str(client.create_experiment(name) if existing is None else existing.experiment_id)
