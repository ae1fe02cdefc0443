"""The lists of failures, as failures.toml and preferences.toml have them."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

When = Literal["before", "after", "use", "never", "not applicable", "not run"]
LISTS = ("failures", "preferences")  # each a .toml file in this folder


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One silent failure; failures.toml says what each field holds."""

    name: str
    kind: str
    report: str
    tells: str
    earliest: When
    plant: str
    twin: str
    words: re.Pattern[str]
    happens: str
    see: str
    cure: str
    broken: str = ""


def read_failures(listed: str = "failures") -> dict[str, Failure]:
    """The failures of one of LISTS by name, in their order there."""
    tables = tomllib.loads(Path(__file__).with_name(f"{listed}.toml").read_text("utf-8"))
    return {
        name: Failure(
            name=name, words=re.compile("|".join(table.pop("words")), re.IGNORECASE), **table
        )
        for name, table in tables.items()
    }
