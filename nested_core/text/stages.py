"""What a run begins now, or will train with, logged for whoever shows it: `stages.info("...")`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

stages = logging.getLogger("nested_core.text.stages")


@contextmanager
def receiving_stages(take: Callable[[str], None]) -> Iterator[None]:
    """Have `take` told each stage that is logged while the block runs, in place of any handler."""

    def take_record(record: logging.LogRecord) -> bool:
        """Prefect's log would show it a second time."""
        take(record.getMessage())
        return False

    level = stages.level
    stages.setLevel(logging.INFO)
    stages.addFilter(take_record)
    try:
        yield
    finally:
        stages.removeFilter(take_record)
        stages.setLevel(level)
