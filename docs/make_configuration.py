"""Write docs/configuration.md and docs/coming-from.md: `make docs`.

From the schema, and from the files and flags of mlx_lm.lora that the tests try.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic_core import PydanticUndefined

from flows.commands.config_flags import REQUIRED_KEYS
from nested_core.config.key_properties import Key, iterate_keys
from nested_core.config.other_tools import HINTS_FOR_UNSUPPORTED_KEYS, OUR_KEYS_BY_OTHER_TOOLS_KEYS
from nested_core.config.resume import may_differ_on_resume
from nested_core.config.schema import FineTuneConfig
from tests.mlx_lm_variants import EXAMPLES, FLAGS, KEYS, REFUSED, TRAINED

PAGE = Path(__file__).with_name("configuration.md")
HEAD = """\
# Configuration

Written by `make docs` from the schema in `nested_core/config/`; do not edit it by hand.

mlx-lm's keys stand at the top level, with mlx-lm's names and defaults; ours are in sections. A key
is a flag too, which wins over the file, as are those of a section: `--learning-rate 1e-4`,
`--nested.frequencies '[1, 2, 4]'`. Unknown keys are refused with the nearest known one.

**Resume** says whether a run may be resumed with another value. **Adapter** says whether, in a run
from the champion (`continual`), another value is a reason to train again; `model` and `data` are
compared by what is in them, not by how their paths are written.

YAML is read strictly: each key once, nothing by reference (no anchors, no `<<`), no tags, at most
64 KiB. Plain words are what YAML 1.2 takes them for: `true`, `false`, `null` or `~`, decimal
numbers, and `1e-5`. All else is text: `on`, `yes`, `2026-11-21`, `1:30:00`, `0x10`. A number that
begins with a zero, such as `010`, is refused: readers differ. A switch takes `yes` and `on` for
`true`, as in mlx-lm's files.
"""
TABLE = """\
| key | default | what it does | resume | adapter |
|---|---|---|---|---|
"""


OTHERS_PAGE = Path(__file__).with_name("coming-from.md")
OTHERS_HEAD = """\
# Coming from another trainer

Written by `make docs` from `nested_core/config/other_tools.py` and `tests/mlx_lm_variants.py`; do
not edit it by hand.

## From mlx_lm.lora

Your file works as it is: `nested-tune train -c lora.yaml` in place of `mlx_lm.lora -c lora.yaml`.
Every key and flag is taken under its own name, with its default and its meaning. What differs:

- The model and the data have to be given: no default is fetched from the hub.
- `train` and `run` train and then judge. For `--test` without `--train` there is
  `nested-tune evaluate`, which measures an adapter that exists beside its base.
- The adapter is in the run's own directory, judged; `adapter_path` gets copies under the names of
  mlx_lm.lora. Its adapters.safetensors is the best one by validation loss, not the last one.
- Each example is seen once an epoch, the last batch included, and the loss of a batch is a mean
  over its tokens. `training: {reference: mlx_lm}` does what mlx_lm.lora does instead, bit for bit.
- A key that mlx_lm.lora would pass over in silence is refused, with the key that was meant.

`tests/flows/test_mlx_lm_variants.py` has both programs read what is listed below, and each flag
alone. `make reliability` also trains with each of them through the whole command, on tiny models
and data: both programs leave the same file names in `adapter_path`, with tensors of the same names,
shapes and types, which mlx_lm loads. Snapshots under `training.reference` are equal bit for bit.
`make test-all` trains some. A test fails where a release of mlx-lm has a key or a flag that is
not in these tables.

### Each key and flag

Same: as in mlx_lm.lora. Better: taken, and more is done or less goes wrong.

| key | flag | here | what to know |
|---|---|---|---|
"""
VARIANTS_HEAD = """
### Files and command lines that are tried

`lora_config.yaml` is mlx-lm's example file, `LORA.md` its documentation.

| name | what it shows | here |
|---|---|---|
"""
OTHERS_TABLE = """
## From axolotl, LLaMA-Factory, unsloth, TRL, PEFT and Soup

A file of theirs is not read, but their names are known: a key of theirs, in any section, is
answered with ours. What is not in the table is an unknown key, with the nearest of ours.

| their key | ours |
|---|---|
"""


def render_others_page() -> str:
    """The page for people who come from another trainer: what becomes of their files and keys."""
    rows = []
    for theirs, ours in OUR_KEYS_BY_OTHER_TOOLS_KEYS.items():
        key, _, remark = ours.partition("; ")
        rows.append(f"| `{theirs}` | `{key}`{f'; {remark}' if remark else ''} |\n")
    rows += [
        f"| `{theirs}` | {answer} |\n" for theirs, answer in HINTS_FOR_UNSUPPORTED_KEYS.items()
    ]
    tables = (OTHERS_HEAD, *_mlx_lm_keys(), VARIANTS_HEAD, *_mlx_lm_variants(), OTHERS_TABLE)
    return "".join((*tables, *sorted(rows)))


def _mlx_lm_keys() -> Iterator[str]:
    for key, (relation, remark) in KEYS.items():
        flag = "--" + key.replace("_", "-")
        shown = "`-c`, `--config`" if key == "config" else f"`{flag}`" if flag in FLAGS else ""
        yield f"| `{key}` | {shown} | {relation} | {_escape(remark)} |\n"


def _mlx_lm_variants() -> Iterator[str]:
    for variant in (*EXAMPLES, *TRAINED, *REFUSED):
        outcome: str = variant.relation
        if variant.code:
            also = "there too" if variant.there else "not there"
            outcome = f"refused, exit code {variant.code}; {also}: {_escape(variant.here)}"
        elif variant.there:
            outcome = f"better; there: {_escape(variant.there)}"
        yield f"| {variant.name} | {_escape(variant.shows)} | {outcome} |\n"


def render_page() -> str:
    """The page: a table of the top level, then one for each section and list of sections."""
    keys = list(iterate_keys(FineTuneConfig))
    parts = [HEAD, "\n## Top level\n\n", TABLE, *_rows(keys, "")]
    for key in keys:
        if key.section is not None:
            summary = str(key.section.__doc__).splitlines()[0]
            parts += [f"\n## {key.name}\n\n", f"{summary}\n\n", TABLE, *_rows(keys, key.name)]
    return "".join(parts)


def _rows(keys: list[Key], section: str) -> Iterator[str]:
    for key in keys:
        parent, _, name = key.name.rpartition(".")
        if parent == section:
            meaning = _escape(f"{key.field.description}{_choices(key)}")
            resume = "may differ" if may_differ_on_resume(key) else "fixed"
            adapter = "changes it" if key.changes_adapter else "same"
            yield f"| `{name}` | {_default(key)} | {meaning} | {resume} | {adapter} |\n"


def _default(key: Key) -> str:
    if key.name in REQUIRED_KEYS:
        return "required"
    if key.section is not None and key.field.default is not None:
        return f"[section](#{key.name.replace('.', '')})"
    if key.field.default is PydanticUndefined:
        return "required"
    return f"`{_escape(json.dumps(key.field.default))}`"


def _choices(key: Key) -> str:
    parts: list[Any] = [key.field.annotation, *get_args(key.field.annotation)]
    for part in parts:
        if get_origin(part) is Literal:
            return "; one of " + ", ".join(f"`{choice}`" for choice in get_args(part))
    return ""


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(render_page(), encoding="utf-8")
    OTHERS_PAGE.write_text(render_others_page(), encoding="utf-8")
