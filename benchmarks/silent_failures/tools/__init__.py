"""How each tool is called, as its own documentation says: one file a tool."""

from __future__ import annotations

from benchmarks.silent_failures.tools.mlx_lm import MlxLm
from benchmarks.silent_failures.tools.mlx_lm_lora import MlxLmLora
from benchmarks.silent_failures.tools.mlx_tune import MlxTune
from benchmarks.silent_failures.tools.nested_tune import NestedTune
from benchmarks.silent_failures.tools.peft import Peft
from benchmarks.silent_failures.tools.soup import Soup
from benchmarks.silent_failures.tools.tool import Tool
from benchmarks.silent_failures.tools.unsloth_zoo import UnslothZoo

TOOLS: dict[str, type[Tool]] = {
    tool.name: tool for tool in (NestedTune, MlxLm, MlxLmLora, MlxTune, UnslothZoo, Soup, Peft)
}
