"""Log messages about what a run begins now, for progress displays: `stages.info("...")`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

stages = logging.getLogger("nested_core.text.stages")


@contextmanager
def receiving_stages(take: Callable[[str], None]) -> Iterator[None]:
    """Pass each stage message to `take` during the block, instead of to a block around it."""

    def take_record(record: logging.LogRecord) -> bool:
        """Pass the message to `take`; False keeps the record from log handlers."""
        take(record.getMessage())
        return False

    level = stages.level
    stages.setLevel(logging.INFO)
    stages.filters.insert(0, take_record)  # the innermost block is asked first
    try:
        yield
    finally:
        stages.removeFilter(take_record)
        stages.setLevel(level)
