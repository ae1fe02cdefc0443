"""An adapter on the Hugging Face hub: its weights, what mlx_lm needs to load them, and its card.

Three files are uploaded and no others. adapter_config.json holds mlx_lm's keys alone, and names the
base by its name on the hub: nothing in the three says which folders this machine has.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nested_core.config.names import HUB_NAME_PATTERN
from nested_core.config.resume import read_run_config
from nested_core.errors import ConfigError, shorten
from nested_core.pipeline.named_adapters import NamedAdapter, find_named_adapter
from nested_core.pipeline.publishing import confirm_recorded_verdict, make_provenance
from nested_core.records.verdict_file import GATE_NAME
from nested_core.registry.versions import CARD_NAME, PROVENANCE_NAME
from nested_core.rooms.export.adapter_card import find_hub_name, render_card
from nested_core.storage.adapter import CONFIG_NAME, WEIGHTS_NAME, Adapter, read_adapter
from nested_core.storage.manifest import verify_manifest
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.untrusted_files import read_regular

LOADED_KEYS = ("fine_tune_type", "num_layers", "lora_parameters", "base_fingerprint")


@dataclass(frozen=True)
class Upload:
    """What is uploaded, or would be.

    repository: USER/NAME on the hub.
    files: the bytes by the name of each file.
    url: where it lies; None before it was uploaded.
    """

    repository: str
    files: Mapping[str, bytes]
    url: str | None = None

    @property
    def card(self) -> str:
        """The model card, markdown with YAML in front."""
        return self.files[CARD_NAME].decode()

    def to_json(self) -> dict[str, Any]:
        """Return plain values, as `export --push --json` prints them."""
        sizes = {name: len(content) for name, content in self.files.items()}
        return {"repository": self.repository, "url": self.url, "bytes": sizes, "card": self.card}


def prepare_upload(what: str | Path, repository: str, registry: Path | None = None) -> Upload:
    """Return the files that `upload` sends of a version, or of a run that passed the gate.

    repository: the name on the hub, USER/NAME.

    Raises ConfigError for an invalid name and an adapter without a verdict, GateRejected for a run
    that did not pass, and DamagedError for files that do not agree with their record.
    """
    if repository.count("/") != 1 or not HUB_NAME_PATTERN.fullmatch(repository):
        raise ConfigError(
            f"--push: {repository!r} is no name of the hub: expected USER/NAME of letters, "
            f"digits and ._- alone."
        )
    named = find_named_adapter(Path(what), registry)
    adapter, card = _read_version(named) if named.run is None else _read_run(named.run)
    model = named.model or str(adapter.config.get("model", ""))
    config = {key: adapter.config[key] for key in LOADED_KEYS if key in adapter.config}
    config["model"] = find_hub_name(model) or Path(model).name
    files = {
        CARD_NAME: card,
        CONFIG_NAME: f"{json.dumps(config, indent=2, sort_keys=True)}\n".encode(),
        WEIGHTS_NAME: bytes(adapter.files[WEIGHTS_NAME]),
    }
    return Upload(repository, files)


def _read_run(run: RunDirectory) -> tuple[Adapter, bytes]:
    """Return the adapter that the gate passed, and the card that it would have as a version."""
    config = read_run_config(run)
    judged = confirm_recorded_verdict(config, run)
    name = config.registry.name if config.registry.path else run.path.resolve().name
    provenance = make_provenance(config, judged, None)
    card = render_card(str(name), judged.version, provenance, judged.verdict)
    return judged.adapter, card.encode()


def _read_version(named: NamedAdapter) -> tuple[Adapter, bytes]:
    """Return the adapter of a version and its card, after its files were hashed."""
    folder = named.folder.resolve()
    if not all((folder / name).is_file() for name in (CARD_NAME, GATE_NAME, PROVENANCE_NAME)):
        raise ConfigError(
            f"--push: {named.folder} has no verdict of the gate, so a card could say nothing of "
            f"it. Give a run that passed, or a version of a registry. `hf upload` uploads any "
            f"folder as it is."
        )
    verify_manifest(folder)
    return read_adapter(folder), read_regular(folder / CARD_NAME)


def upload(prepared: Upload, *, public: bool = False) -> Upload:
    """Send an upload to the hub in one commit; return it with its address.

    A missing repository is created, private by default. The token is the one that `hf auth login`
    stored, or HF_TOKEN. Raises ConfigError if the hub refuses or does not answer, and for a public
    repository without `public`.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api, repository = HfApi(), prepared.repository
    operations = [CommitOperationAdd(name, content) for name, content in prepared.files.items()]
    try:
        url = api.create_repo(repository, private=not public, exist_ok=True)
        may_be_written = public or api.model_info(repository).private
        if may_be_written:
            api.create_commit(repository, operations, commit_message="Upload an adapter")
    except Exception as error:  # of the hub, its client or the network
        raise ConfigError(
            f"--push: {repository} could not be uploaded: {type(error).__name__}: "
            f"{shorten(error, 300).rstrip('.')}. `hf auth whoami` shows who you are there; "
            f"`hf auth login` stores a token that may write."
        ) from error
    if not may_be_written:
        raise ConfigError(
            f"--push: {repository} is public, and nothing was uploaded. Give --public too if "
            f"everybody may read it, or another name."
        )
    return Upload(repository, prepared.files, str(url))
