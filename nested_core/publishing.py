"""From a verified run to a registered version, and, where the policy says so, to champion."""

from __future__ import annotations

import json
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

from nested_core.config import FineTuneConfig
from nested_core.durable import file_sha256
from nested_core.errors import ConfigError
from nested_core.registry import Promotion, promote, read_champion, register
from nested_core.run_directory import RunDirectory

RECORDED_PACKAGES = ("nested-tune", "mlx", "mlx-lm", "safetensors", "numpy")


def register_run(config: FineTuneConfig, run: RunDirectory) -> str:
    """Add the run's adapter to the configured registry; return its version.

    Raises GateRejected where gate.json does not say that it passed.
    """
    path, name = _target(config)
    return register(run.path, path, name, provenance(config, run))


def provenance(config: FineTuneConfig, run: RunDirectory) -> dict[str, Any]:
    """Where a version comes from: configuration, data, base, gate, parent and tool versions."""
    path, name = _target(config)
    dataset = json.loads(run.dataset.read_bytes())
    return {
        "run_dir": str(run.path.resolve()),
        "config": config.model_dump(mode="json"),
        "dataset_digest": dataset["digest"],
        "validation_digest": _validation_digest(dataset, run.gate),
        "gate_sha256": file_sha256(run.gate),
        "parent": champion_or_none(path, name),
        "packages": {package: installed_version(package) for package in RECORDED_PACKAGES},
    }


def champion_or_none(registry: Path, name: str) -> str | None:
    """The champion's version; None too where registry or name do not exist yet."""
    return read_champion(registry, name) if (registry / name).is_dir() else None


def promote_by_policy(
    config: FineTuneConfig, run: RunDirectory, version: str, expected_champion: str | None
) -> Promotion | str:
    """Promote a registered version if `registry.promote` asks for it; else say why it was not.

    `expected_champion` is the champion that the version was judged against: where another stands by
    now, the promotion is superseded.
    """
    path, name = _target(config)
    refusal = _refusal(config, run, expected_champion)
    if refusal is not None:
        return refusal
    return promote(
        path, name, version, by="policy", expected_champion=expected_champion, automatic=True
    )


def _refusal(config: FineTuneConfig, run: RunDirectory, champion: str | None) -> str | None:
    section = config.registry
    if section.promote == "never":
        return "registry.promote is never"
    loss = _loss_after(run.gate)
    if loss is None and section.require_validation:
        return "there was no validation set, and registry.require_validation is on"
    if section.promote == "always" or champion is None:
        return None
    return _not_better(config, run, champion, loss)


def _not_better(
    config: FineTuneConfig, run: RunDirectory, champion: str, loss: float | None
) -> str | None:
    path, name = _target(config)
    folder = path / name / "versions" / champion
    before = json.loads((folder / "provenance.json").read_bytes())["validation_digest"]
    if before != _validation_digest(json.loads(run.dataset.read_bytes()), run.gate):
        return "the champion was validated on other data: the losses cannot be compared"
    best = _loss_after(folder / "gate.json")
    if loss is None or best is None or loss >= best - config.registry.min_improvement:
        return f"validation loss {loss} is not better than the champion's {best}"
    return None


def _validation_digest(dataset: dict[str, Any], gate: Path) -> str | None:
    """The digest of the examples that the gate's losses are of, or None where there are none."""
    validation = json.loads(gate.read_bytes())["validation"]
    if validation is None:
        return None
    split = "valid" if validation["selected_on_same_data"] else "test"
    digest: str = dataset["splits"][split]["digest"]
    return digest


def _loss_after(gate: Path) -> float | None:
    validation = json.loads(gate.read_bytes())["validation"]
    loss: float | None = validation["loss_after"] if validation else None
    return loss


def _target(config: FineTuneConfig) -> tuple[Path, str]:
    if config.registry.path is None or config.registry.name is None:
        raise ConfigError("registry: path and name are needed to register an adapter.")
    return Path(config.registry.path), config.registry.name
