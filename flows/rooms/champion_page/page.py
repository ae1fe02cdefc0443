"""A champion for Prefect: its page, and data set, run and champion as assets.

The open-source server keeps a materialization as an event whose related resources are what the
asset was made of; it has no page of assets (Prefect Cloud has), so the champion's page names
the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefect import get_run_logger
from prefect.assets import Asset, AssetProperties
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import Artifact
from prefect.context import AssetContext
from prefect.events import emit_event

from nested_core.config.schema import FineTuneConfig
from nested_core.errors import NestedTuneError
from nested_core.records.judged_run import JudgedRun
from nested_core.registry import read_champion, read_champion_changes
from nested_core.rooms.champion_page.champion import ChampionRecord, describe_champion
from nested_core.text.digest_format import shorten_digest
from nested_core.text.foreign_text import escape, escape_markdown
from tasks.artifact_client import artifact_key, find_newest_artifact, publish_page
from tasks.events import ServerPages
from tasks.prefect_server import related_resource

_INVALID_KEY_CHARACTERS = re.compile(r"[^A-Za-z0-9._~-]+")
MATERIALIZATION_EVENT = "prefect.asset.materialization.succeeded"
MATERIALIZED_BY = "nested-tune"


def dataset_asset(adapter: str, digest: str, source: str) -> Asset:
    """The data that a run was trained on, by its digest."""
    key = f"dataset://{adapter}/{shorten_digest(digest)}"
    return Asset(key=key, properties=AssetProperties(name=escape(f"data of {adapter}: {source}")))


def run_asset(adapter: str, folder: str) -> Asset:
    """A run that the gate verified, by the name of its folder."""
    name = _INVALID_KEY_CHARACTERS.sub("-", folder)
    properties = AssetProperties(name=escape(f"run of {adapter}: {folder}"))
    return Asset(key=f"run://{adapter}/{name}", properties=properties)


def champion_asset(adapter: str) -> Asset:
    """The champion of an adapter's name; each new champion materializes it anew."""
    properties = AssetProperties(name=f"champion of {adapter}")
    return Asset(key=f"champion://{adapter}", properties=properties)


def emit_materialization(
    asset: Asset, made_of: Sequence[Asset], adapter: str, metadata: Mapping[str, Any]
) -> None:
    """Emit the event that Prefect's `@materialize` emits, once it is certain that there is one.

    The decorator would emit it for every end of its task, and a promotion that is refused ends
    well too. The adapter is a related resource, so that its feed of events shows it.
    """
    related = [AssetContext.asset_as_related(source) for source in made_of]
    related.append(AssetContext.related_materialized_by(MATERIALIZED_BY))
    related.append(related_resource(f"adapter.{adapter}", "adapter"))
    emit_event(
        MATERIALIZATION_EVENT,
        resource=AssetContext.asset_as_resource(asset),
        related=related,
        payload=dict(metadata),
    )


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
        losses = champion.verdict.describe_losses()
        since = read_champion_changes(registry, name)[-1].time[:16].replace("T", " ")
        description = f"{shorten_digest(version)}: {losses}. Became champion at {since} UTC"
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
    """Publish the page where the one on the server is of another champion.

    Returns whether the server had a page, and of another champion.
    """
    version = read_champion(registry, name)
    if version is None:
        return False
    page = _read_newest_page(name)
    is_other = page is not None and not str(page.description).startswith(shorten_digest(version))
    if page is None or is_other:
        publish_champion(registry, name)
    return is_other


def had_champion(registry: Path, name: str) -> bool:
    """Whether the server has a page of a champion of this name, in this registry."""
    page = _read_newest_page(name)
    return page is not None and escape_markdown(str(registry.resolve() / name)) in str(page.data)


def _read_newest_page(name: str) -> Artifact | None:
    """The newest page of a name's champion; None without one."""
    with get_client(sync_client=True) as client:
        return find_newest_artifact(client, artifact_key(name, PAGE))


def tell_of_version(config: FineTuneConfig, judged: JudgedRun) -> None:
    """The verified run as an asset, made of its data set and of the champion that it began from."""
    name = str(config.registry.name)
    made_of = [dataset_asset(name, judged.dataset.digest, config.data)]
    if config.continual.start is not None:
        made_of.append(champion_asset(name))
    run, version = judged.folder.path.name, {"version": judged.version}
    emit_materialization(run_asset(name, run), made_of, name, version)


CHAMPION_PAGE = ServerPages(
    publish_champion, publish_champion_if_changed, had_champion, tell_of_version
)
