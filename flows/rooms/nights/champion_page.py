"""The page of an adapter's champion on a Prefect server: published, and brought up to date."""

from __future__ import annotations

from pathlib import Path

from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import Artifact

from nested_core.errors import NestedTuneError
from nested_core.records.verdict_file import GATE_NAME, read_verdict
from nested_core.registry import read_champion, read_champion_changes
from nested_core.registry.versions import version_folder
from nested_core.rooms.nights.pages import describe_champion, format_minute
from nested_core.text.digest_format import shorten_digest
from nested_core.text.foreign_text import escape_markdown
from tasks.artifact_client import artifact_key, find_newest_artifact, publish_page
from tasks.events import ServerPages

PAGE = "champion"


def publish(registry: Path, name: str) -> None:
    """Publish the page of the present champion; do nothing without one.

    A file that cannot be read is only logged, since the change of the champion is done by then.
    """
    try:
        version = read_champion(registry, name)
        if version is None:
            return
        verdict = read_verdict(version_folder(registry, name, version) / GATE_NAME)
        since = format_minute(read_champion_changes(registry, name)[-1].time)
        losses = verdict.describe_losses()
        description = f"{shorten_digest(version)}: {losses}. Became champion at {since} UTC"
        publish_page(name, PAGE, describe_champion(registry, name, version, verdict), description)
    except (NestedTuneError, OSError) as error:
        get_run_logger().warning("The page of %s's champion is not up to date: %s", name, error)


def publish_if_changed(registry: Path, name: str) -> bool:
    """Publish the champion's page if the server has none, or has one of another champion.

    Returns whether the server had a page of another champion.
    """
    version = read_champion(registry, name)
    if version is None:
        return False
    page = _read_newest_page(name)
    is_other = page is not None and not str(page.description).startswith(shorten_digest(version))
    if page is None or is_other:
        publish(registry, name)
    return is_other


def had_champion(registry: Path, name: str) -> bool:
    """Return whether the server has a page of a champion of this name, in this registry."""
    page = _read_newest_page(name)
    return page is not None and escape_markdown(str(registry.resolve() / name)) in str(page.data)


def _read_newest_page(name: str) -> Artifact | None:
    """Read the newest page of a name's champion; None without one."""
    with get_client(sync_client=True) as client:
        return find_newest_artifact(client, artifact_key(name, PAGE))


CHAMPION_PAGE = ServerPages(publish, publish_if_changed, had_champion)
