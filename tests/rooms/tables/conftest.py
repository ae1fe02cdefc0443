"""What makes data sets for `init` is tried where the room planning, which has that command, is."""

from __future__ import annotations

from nested_core.seams import is_there

OF_INIT = ["test_asking.py", "test_init_split.py", "test_table_mistakes.py", "test_tables.py"]
collect_ignore = [] if is_there("planning") else OF_INIT
