"""The files of nested_core that a value enters, in order: `python -m tests.tracer`.

A value enters a file when a function of it is called with the value, or returns it: alone, or in a
list, a dictionary, a data class or a table.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_tokenizer

from nested_core.pipeline import steps
from nested_core.records.verdict import Verdict
from tests.example import DATA, MODEL, example_config, prepare

ROOT = f"{Path(__file__).resolve().parents[1] / 'nested_core'}/"
MAX_BATCH = 512  # tokens; a larger array is the whole data set
Match = Callable[[Any], bool]
# They came after the bound on the files of a verdict was set.
WITHOUT_CONTROLS = {"controls": dict.fromkeys(("prompts", "plan", "lookup", "shapes"), False)}


def holds(value: Any, match: Match, depth: int = 4) -> bool:
    """Whether the value matches, or something in it."""
    parts: Iterable[Any] = ()
    if isinstance(value, (dict, list, tuple)):
        parts = value.values() if isinstance(value, dict) else value
    elif hasattr(value, "iter_rows"):  # a table of polars
        parts = value.iter_rows()
    elif is_dataclass(value):
        parts = [getattr(value, field.name, None) for field in fields(value)]
    return match(value) or depth > 0 and any(holds(part, match, depth - 1) for part in parts)


@contextmanager
def tracing(match: Match) -> Iterator[list[str]]:
    """Yield the files that matching values enter during the block, in all its threads."""
    entered: list[str] = []

    def look(frame: FrameType, event: str, returned: Any) -> None:
        code = frame.f_code
        if event in ("call", "return") and code.co_filename.startswith(ROOT):
            names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + 1]
            values = [frame.f_locals.get(name) for name in names] if event == "call" else returned
            file = code.co_filename.removeprefix(ROOT)
            if file not in entered and holds(values, match):
                entered.append(file)

    threading.setprofile(look)
    sys.setprofile(look)
    try:
        yield entered
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def trace_a_row(folder: Path) -> list[str]:
    """Validate the example and train on it: the way of its first row from the file to the loss."""
    data = Path(shutil.copytree(DATA, folder.parent / "data"))
    first, *others = (data / "train.jsonl").read_text("utf-8").splitlines()
    random.Random(str(folder)).shuffle(others)  # rows of an order that no cache holds
    (data / "train.jsonl").write_text("\n".join([first, *others]) + "\n", "utf-8")
    messages = json.loads(first)["messages"]
    text, tokens = messages[-1]["content"], load_tokenizer(MODEL).apply_chat_template(messages)
    needle = np.array(tokens[1:-1], np.int32).tobytes()  # a batch's inputs lack the last token

    def match(value: Any) -> bool:
        if isinstance(value, (str, bytes)):
            return text in (value if isinstance(value, str) else value.decode(errors="ignore"))
        if isinstance(value, list) and all(isinstance(part, int) for part in value):
            value = np.array(value)
        is_integral = isinstance(value, (mx.array, np.ndarray)) and "int" in str(value.dtype)
        return is_integral and value.size <= MAX_BATCH and needle in np.int32(value).tobytes()

    mx.disable_compile()  # a compiled step shows its functions no tokens
    try:
        with tracing(match) as entered:
            config = example_config(data=str(data), batch_size=8, iters=5, val_batches=0)
            steps.train(config, prepare(config, folder))
    finally:
        mx.enable_compile()
    return entered


def trace_a_verdict(folder: Path) -> list[str]:
    """Judge a run of the example: the way of the verdict in `judge`."""
    config = example_config(gate=WITHOUT_CONTROLS)
    run = prepare(config, folder)
    steps.train(config, run)
    with tracing(lambda value: isinstance(value, Verdict)) as entered, run.locked():
        steps.judge(config, run)
    return entered


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        for trace in (trace_a_row, trace_a_verdict):
            files = trace(Path(temporary) / trace.__name__)
            print(trace.__name__, len(files), *files, sep="\n  ")
