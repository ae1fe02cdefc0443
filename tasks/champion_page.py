"""Publishes an adapter's page, and what its champion was made of as an event."""

from __future__ import annotations

from pathlib import Path

from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter
from prefect.client.schemas.objects import Artifact
from prefect.client.schemas.sorting import ArtifactSort

from nested_core.errors import NestedTuneError
from nested_core.registry import read_champion
from nested_core.report.champion_page import ChampionRecord, describe_champion
from nested_core.report.verdict_page import describe_losses
from nested_core.text.digest_format import shorten_digest
from nested_core.text.foreign_text import escape_markdown
from tasks.artifact_client import artifact_key, publish_page
from tasks.lineage import champion_asset, emit_materialization, run_asset

PAGE = "champion"


def publish_champion(registry: Path, name: str) -> None:
    """Publish the page of the champion that stands now, and its lineage as an event.

    The champion has moved by then: a file that cannot be read is only logged.
    """
    try:
        version = read_champion(registry, name)
        if version is None:
            return
        champion = ChampionRecord.read(registry, name, version)
        loss = describe_losses(champion.verdict)
        description = f"{shorten_digest(version)}: {loss}. The champion now"
        publish_page(name, PAGE, describe_champion(champion), description)
        made_of = {
            "version": version,
            "dataset": champion.provenance.get("dataset_digest"),
            "parent": champion.provenance.get("parent"),
        }
        run = run_asset(name, champion.run_folder_name)
        emit_materialization(champion_asset(name), [run], name, made_of)
    except (NestedTuneError, OSError) as error:
        get_run_logger().warning("The page of %s's champion is not up to date: %s", name, error)


def publish_champion_if_changed(registry: Path, name: str) -> bool:
    """Publish the page where the one on the server is of another champion or of other servers.

    Returns whether the server had a page, and of another champion.
    """
    version = read_champion(registry, name)
    if version is None:
        return False
    page = _read_newest_page(name)
    is_other = page is not None and not str(page.description).startswith(shorten_digest(version))
    servers = ChampionRecord.read(registry, name, version).describe_servers()
    shown = "" if page is None else str(page.data)
    if page is None or is_other or not all(escape_markdown(text) in shown for text in servers):
        publish_champion(registry, name)
    return is_other


def had_champion(registry: Path, name: str) -> bool:
    """Whether the server has a page of a champion of this name, in this registry."""
    page = _read_newest_page(name)
    place = str(registry.resolve() / name)
    return page is not None and escape_markdown(place) in str(page.data)


def _read_newest_page(name: str) -> Artifact | None:
    """The newest page of a name's champion; None without one."""
    wanted = ArtifactFilter.model_validate({"key": {"any_": [artifact_key(name, PAGE)]}})
    with get_client(sync_client=True) as client:
        newest = client.read_artifacts(
            artifact_filter=wanted, sort=ArtifactSort.UPDATED_DESC, limit=1
        )
    return newest[0] if newest else None
