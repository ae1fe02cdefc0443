"""The list of failures, as failures.toml has it."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

When = Literal["before", "after", "use", "never", "not applicable", "not run"]
LIST = Path(__file__).with_name("failures.toml")


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


def read_failures() -> dict[str, Failure]:
    """All failures by name, in the order of the list."""
    tables = tomllib.loads(LIST.read_text("utf-8"))
    return {
        name: Failure(
            name=name,
            words=re.compile("|".join(table.pop("words")), re.IGNORECASE),
            **table,
        )
        for name, table in tables.items()
    }
