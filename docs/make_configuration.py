"""Write docs/configuration.md and docs/coming-from.md: `make docs`.

From the schema, and from the files and flags of mlx_lm.lora that the tests try.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic_core import PydanticUndefined

from flows.commands.config_flags import REQUIRED_KEYS
from nested_core.config.error_messages import read_keys_of_other_trainers
from nested_core.config.key_properties import Key, iterate_keys
from nested_core.config.resume import may_differ_on_resume
from nested_core.config.schema import FineTuneConfig
from tests.mlx_lm_variants import KEYS

PAGE = Path(__file__).with_name("configuration.md")
HEAD = """\
# Configuration

`make docs` writes this page from the schema in `nested_core/config/`. A file of this size is enough
to begin with:

```yaml
model: mlx-community/Qwen3-0.6B-4bit
data: data
learning_rate: 1e-4
mask_prompt: true
training: {epochs: 3}
```

mlx-lm's keys are at the top level, with mlx-lm's names and defaults. Our own are in sections. Each
key is also a flag, which wins over the file: `--learning-rate 1e-4`, `--nested.frequencies '[1, 2,
4]'`. `nested-tune init` writes a commented file for your data.

Each line has a key, its default, other choices if they are few, and what it does. The last lines of
a section name the keys that **may differ** if a run is resumed, and those that are **no reason
to train again** in a run from the champion (`continual`). `model` and `data` are compared by
content, not by path.

YAML is read strictly: each key once, no anchors, no tags, at most 64 KiB. Words and numbers are
those of YAML 1.2; all else is text, such as `2026-11-21` or `0x10`. `010` is refused. A switch also
takes `yes` and `on`.
"""


OTHERS_PAGE = Path(__file__).with_name("coming-from.md")
OTHERS_HEAD = """\
# Coming from another trainer

This page is for anyone with a configuration of another trainer. `make docs` writes it.

## From mlx_lm.lora

Your file works as it is:

    nested-tune train -c lora.yaml --run-dir runs/first     # not mlx_lm.lora
    mlx_lm.generate --model MODEL --adapter-path runs/first/adapter -p "..."

Every key and flag keeps its name, default and meaning, apart from these:

1. After training, a [gate](gate.md) compares the adapter with the initial one. A rejected one is
   exit code 4.
2. The adapter is in the run directory.
3. Each example is used once an epoch, the last batch included, and the loss of a batch is a mean
   over its tokens. `training: {reference: mlx_lm}` does exactly what mlx_lm.lora does, bit for
   bit under one BLAS.
4. A key that mlx_lm.lora would ignore is refused, with the key that was probably meant.

For `--test` without `--train` there is `nested-tune evaluate`. For `mlx_lm.fuse`, see
[export.md](export.md).

### Keys with a difference

"""
SAME_HEAD = "\nAll other keys are as there.\n"
OTHERS_TABLE = """
## From axolotl, LLaMA-Factory, unsloth, TRL, PEFT and Soup

Their files are not read: start with `nested-tune init --data DATA --model MODEL -o lora.yaml`. A
key of theirs, in any section, gets an error with ours:

"""


def render_others_page() -> str:
    """The page for people who come from another trainer: what becomes of their keys."""
    others = read_keys_of_other_trainers()
    theirs_by_answer: dict[str, list[str]] = {}
    for theirs, ours in others.ours.items():
        key, _, remark = ours.partition("; ")
        theirs_by_answer.setdefault(f"`{key}`{f' ({remark})' if remark else ''}", []).append(theirs)
    for theirs, answer in others.hints.items():
        theirs_by_answer.setdefault(answer, []).append(theirs)
    rows = sorted(
        f"- {', '.join(f'`{name}`' for name in sorted(names))}: {answer}\n"
        for answer, names in theirs_by_answer.items()
    )
    return "".join((OTHERS_HEAD, *_mlx_lm_keys(), SAME_HEAD, OTHERS_TABLE, *rows))


def _mlx_lm_keys() -> Iterator[str]:
    for key, (relation, remark) in KEYS.items():
        if (relation, remark) != ("same", ""):
            yield f"- `{key}`: {remark}\n"


def render_page() -> str:
    """The page: the keys of the top level, then those of each section and list of sections."""
    keys = list(iterate_keys(FineTuneConfig))
    parts = [HEAD, "\n## Top level\n\n", *_describe_keys(keys, "")]
    for key in keys:
        if key.section is not None:
            form = "A list: " if key.field.default == () else ""
            null = " (default: null)" if key.field.default is None else ""
            sentence = f"{form}{key.field.description}{null}."
            parts += [f"\n## {key.name}\n\n{sentence[0].upper()}{sentence[1:]}\n\n"]
            parts += _describe_keys(keys, key.name)
    return "".join(parts)


def _describe_keys(keys: list[Key], section: str) -> Iterator[str]:
    """A line for each key of a section, and what holds for some of them."""
    of_section = [key for key in keys if key.name.rpartition(".")[0] == section]
    rows = [key for key in of_section if key.section is None]
    for key in rows:
        yield f"- `{_last(key)}` ({_values(key)}): {key.field.description}\n"
    yield _list_exceptions("May differ", rows, may_differ_on_resume)
    yield _list_exceptions("No reason to train again", rows, lambda key: not key.changes_adapter)


def _list_exceptions(label: str, keys: list[Key], holds: Callable[[Key], bool]) -> str:
    """A line with the keys that something holds for, or with the others if those are fewer."""
    names = [f"`{_last(key)}`" for key in keys if holds(key)]
    others = [f"`{_last(key)}`" for key in keys if not holds(key)]
    if not names:
        return ""
    if others and len(others) < len(names):
        return f"\n{label}: all but {', '.join(others)}.\n"
    return f"\n{label}: {', '.join(names) if others else 'all'}.\n"


def _last(key: Key) -> str:
    return key.name.rpartition(".")[2]


def _values(key: Key) -> str:
    """The default of a key, and what else it can be if there are choices."""
    if key.name in REQUIRED_KEYS or key.field.default is PydanticUndefined:
        return ", ".join(["required", *_choices(key)])
    default = f"`{json.dumps(key.field.default)}`".replace('"', "")
    return ", ".join(dict.fromkeys([default, *_choices(key)]))


def _choices(key: Key) -> list[str]:
    parts: list[Any] = [key.field.annotation, *get_args(key.field.annotation)]
    literals = [part for part in parts if get_origin(part) is Literal]
    return [f"`{choice}`" for part in literals[:1] for choice in get_args(part)]


if __name__ == "__main__":
    PAGE.write_text(render_page(), encoding="utf-8")
    OTHERS_PAGE.write_text(render_others_page(), encoding="utf-8")
