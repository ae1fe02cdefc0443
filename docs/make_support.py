"""Write the table of families in docs/support.md again: `make docs`.

What a family uses is found in a tiny model of it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx import nn

from nested_core.rooms.cuda.call_tracing import (
    find_gated_mlps,
    group_layers_by_input,
    plain_swiglu,
    trace_calls,
)
from nested_core.rooms.cuda.padded_attention import PATCHED_FUNCTION_NAME as ATTENTION
from nested_core.rooms.cuda.padded_attention import plain_attention
from nested_core.rooms.cuda.rope import rotates_halves
from nested_core.rooms.delta_nets.gated_delta import PATCHED_FUNCTION_NAME as GATED_DELTA_RULE
from nested_core.rooms.delta_nets.gated_delta import plain_gated_delta_update
from tests.architectures import ARCHITECTURES, HYBRIDS, build

PAGE = Path(__file__).with_name("support.md")
TABLE = re.compile(r"(\|---[^\n]*\n)(?:\| `\w+` \|[^\n]*\n)+(?=\n\| column)")


def render_page() -> str:
    """The page as it is, with a new row for each family of tests/architectures.py."""
    rows = "".join(map(_row, sorted(ARCHITECTURES | HYBRIDS)))
    page, count = TABLE.subn(rf"\g<1>{rows}", PAGE.read_text(encoding="utf-8"))
    if count != 1:
        raise SystemExit(f"{PAGE.name} should have one table of families; found {count}.")
    return page


def _row(family: str) -> str:
    found = [list(_layers_used(build(family, rank=8, quantized=bits))) for bits in (False, True)]
    if found[0] != found[1]:
        raise SystemExit(f"{family} uses other layers in 4 bits: the page has one row for both.")
    return f"| `{family}` | {' | '.join('yes' if used else '' for used in found[0])} |\n"


def _layers_used(model: Any) -> Iterator[bool]:
    """Whether each column of the table is found in a model."""
    trace = trace_calls(model)
    modules = [module for _, module in model.named_modules()]
    code = [vars(sys.modules[name]) for name in {type(module).__module__ for module in modules}]
    yield any(type(module).__name__ == "LoRALinear" for module in modules)
    yield bool(find_gated_mlps(trace))
    yield bool(group_layers_by_input(trace))
    yield any(type(module) is nn.RMSNorm for module in modules)
    yield any(rotates_halves(module) for module in modules)
    yield any(names.get("swiglu") is plain_swiglu for names in code)
    yield any(names.get(ATTENTION) is plain_attention for names in code)
    yield any(names.get(GATED_DELTA_RULE) is plain_gated_delta_update for names in code)


if __name__ == "__main__":
    PAGE.write_text(render_page(), encoding="utf-8")
