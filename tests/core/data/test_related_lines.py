"""Lines of train that are dropped are not reported as repeats too."""

from __future__ import annotations

import polars as pl

from nested_core.config.sections import DataPolicy
from nested_core.data.rules.related_lines import separate_dropped_lines

REPEATS = pl.Series("repeats", [None, 1, 1, None], pl.Int32)


def test_lines_that_were_held_out_before_repeat_nothing() -> None:
    train = pl.DataFrame({"line": pl.Series([1, 2, 3, 4], dtype=pl.Int32), "repeats": REPEATS})
    policy = DataPolicy(duplicates="keep", leakage="error")
    valid = pl.DataFrame({"line": [1, 2, 3], "repeats": [None, 2, 3]})
    kept, (held_out,), dropped = separate_dropped_lines(train, [valid], policy, frozenset({3, 4}))
    assert kept["repeats"].to_list() == [None, 1, None, None]
    assert held_out["repeats"].to_list() == [None, 2, None]
    assert dropped == {"held-out-before": frozenset({3, 4})}
    assert separate_dropped_lines(train, [], policy)[0].equals(train)
