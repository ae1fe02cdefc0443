"""`registry` and `continual`: where a verified adapter goes, and what a run starts from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveFloat

from nested_core.config.adapter_names import NAME_PATTERN, why_invalid_adapter_name
from nested_core.config.section import Section, key


def _require_adapter_name(name: Any) -> Any:
    """Refuse a text that is no name; the pattern beside it is for forms."""
    if isinstance(name, str) and (reason := why_invalid_adapter_name(name)) is not None:
        raise ValueError(reason.removesuffix("."))
    return name


AdapterName = Annotated[
    str, Field(pattern=f"^{NAME_PATTERN.pattern}$"), BeforeValidator(_require_adapter_name)
]


class RegistrySection(Section):
    """Where verified adapters go, and which of them become champion by themselves.

    `better` asks for a loss that is lower than the champion's on the same held-out examples (of a
    first version, than its initial adapter's) by more than `min_improvement`, with the 95 %
    interval of the difference below 0; `approve` leaves it to a person.
    """

    path: str | None = key(None, "the registry's folder, on the worker's machine", path="local")
    name: AdapterName | None = key(None, "the adapter's name in the registry")
    promote: Literal["never", "always", "better", "approve"] = key(
        "never",
        "whether a verified adapter becomes champion; better: on the same held-out data",
    )
    min_improvement: NonNegativeFloat = key(
        0.005, "for better: nats a token, of the difference itself"
    )
    require_validation: bool = key(True, "promote nothing that was not validated")
    await_serving: PositiveFloat | None = key(
        None, "seconds that a promotion waits for the servers of the name to follow", le=600
    )

    def problems(self) -> Iterator[str]:
        """Path, name and what is promoted agree."""
        if (self.path is None) != (self.name is None):
            yield "registry needs both path and name, or neither"
        if self.promote != "never" and self.path is None:
            yield f"promote: {self.promote} needs a registry path and name"


ServerAddress = Annotated[str, Field(pattern=r"^https?://[A-Za-z0-9.:_\[\]-]+/?$")]


class ServeSection(Section):
    """Servers of the name that cannot write into the registry, and so are asked."""

    urls: tuple[ServerAddress, ...] = key(
        (), "addresses, http://HOST:PORT, whose /health is asked for what they serve", max_length=16
    )


class ContinualSection(Section):
    """Whether a run goes on from the champion; `from` is the champion, or nothing.

    With `skip_unchanged`, a run on data and settings that the champion was trained with already
    ends before it begins.
    """

    start: Literal["champion"] | None = key(
        None, "champion: start from the registry's champion", alias="from"
    )
    skip_unchanged: bool = key(True, "end before training if data and settings are the same")
