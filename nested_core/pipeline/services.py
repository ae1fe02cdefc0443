"""The services of `report_to`, which are a room's."""

from __future__ import annotations

from typing import Any

from nested_core import seams
from nested_core.config.schema import FineTuneConfig


def load_services(config: FineTuneConfig) -> Any:
    """The room's Services for what `report_to` names; None if it names nothing.

    Raises ConfigError for a service that is not known or not installed, and without the room.
    """
    return seams.load_only("services", "report_to")(config) if config.report_to else None
