"""What a champion was made of, for Prefect: data set, run and champion as assets.

The open-source server keeps a materialization as an event whose related resources are what the
asset was made of; it has no page of assets (Prefect Cloud has), so the champion's page has a
picture of the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from prefect.assets import Asset, AssetProperties
from prefect.context import AssetContext
from prefect.events import emit_event

from nested_core.text.digest_format import shorten_digest
from nested_core.text.foreign_text import escape
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
