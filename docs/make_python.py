"""Write docs/python.md from the docstrings of nested_core's public names: `make docs`.

With `--check` it writes nothing, and fails where the page is out of date or a name is not
documented (`make check`).
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import nested_core
from docs.generated_page import write_or_check
from nested_core.errors import NestedTuneError

PAGE = Path(__file__).with_name("python.md")
HEAD = """\
# From Python

`make docs` writes this page from the docstrings in `nested_core/`.

```python
from nested_core import prepare

prepare()  # before anything imports mlx
from nested_core import champion, evaluate, finetune, load_config, open_run, promote

result = finetune(load_config("lora.yaml"), open_run("runs/first"))
promote(result, "support-bot")
print(champion("registry/support-bot").ask("Where is Oslo?"))
found = evaluate(["registry/support-bot"], suites=["questions.jsonl"])
for row in found.rows():  # pandas.DataFrame(found.rows()) takes them
    print(row["model"], row["measured"], row["value"])
```

[notebook.ipynb](../examples/notebook.ipynb) goes the same way with the example.

The names below are public. Anything else may change in any release
([versions](README.md#versions)). What a notebook displays has `to_html` and `describe`, and
what `--json` prints has `to_json`. See also [notebooks](report.md#notebooks) and
[the optimizers](nested-optimizer.md).
"""
EVERY_SECTION = {
    "A fine-tune": (
        *("prepare", "load_config", "FineTuneConfig", "open_run"),
        *("finetune", "FinetuneResult", "Steps"),
    ),
    "Looking at runs": ("read_report", "RunReport", "compare_runs", "RunComparison"),
    "The registry": ("promote", "champion", "RegisteredAdapter"),
    "Judging without training": ("evaluate", "Evaluation"),
    "Taking a model elsewhere": ("export", "Export"),
    "Adapters": ("read_adapter", "Adapter"),
    "Optimizers with tiers": (
        *("Tiered", "NestedAdam", "NestedAdamW", "Tier", "TierStats"),
        *("assign_tiers", "TierMap"),
    ),
    "Updates by name": ("apply_flat_updates_to_nested", "verify_updates", "UpdateReport"),
    "Errors and warnings": (
        *("NestedTuneError", "ConfigError", "DatasetError", "GateRejected", "TrainingStopped"),
        *("DamagedError", "TrainingDiverged", "UpdateNotApplied", "SilentUpdateWarning"),
    ),
}
# Classes that functions return and nobody makes: their fields are in their docstrings.
RETURNED = {
    *("FinetuneResult", "RunReport", "RunComparison", "RegisteredAdapter", "Evaluation", "Export"),
    *("Adapter", "TierStats", "TierMap", "UpdateReport"),
}
OF_ROOMS = {
    name
    for modules in nested_core.PUBLIC_NAMES_BY_ROOM.values()
    for names in modules.values()
    for name in names
}
ABSENT = OF_ROOMS - {*nested_core.__all__}
SECTIONS = {
    section: [name for name in names if name not in ABSENT]
    for section, names in EVERY_SECTION.items()
    if not ABSENT.issuperset(names)
}


WRITTEN_DOWN = ("to_html", "to_json", "from_json", "describe")  # methods that the head names once
LONGEST_LINE = 85  # of a block, as wide as the site shows
DESCRIBED = r"`{0}`|^ *(\w+, )*{0}(, \w+)*: "  # a parameter, in a sentence or in a list


def find_undocumented(module: Any = nested_core) -> Iterator[str]:
    """What the docstrings of a module's public names lack: sentence, parameter or section."""
    placed = [name for names in SECTIONS.values() for name in names]
    for name in sorted({*module.__all__, *placed}):
        if name not in placed or name not in module.__all__:
            yield f"{name}: is in only one of nested_core.__all__ and make_python.py's SECTIONS"
            continue
        value = getattr(module, name)
        text = value.__doc__ or ""
        if not text.strip():
            yield f"{name}: has no docstring"
            continue
        known = text + "".join(base.__doc__ or "" for base in _public_bases(value, module))
        for parameter in _parameters(value):
            if not re.search(DESCRIBED.format(parameter), known, re.MULTILINE):
                yield f"{name}: the docstring does not say what {parameter} is"
        for method in _methods(value):
            if not inspect.getdoc(getattr(value, method)):
                yield f"{name}.{method}: has no docstring"


def render_page() -> str:
    """The page: a section for each subject, with signature, docstring and methods of each name."""
    parts = [HEAD]
    for section, names in SECTIONS.items():
        parts.append(f"\n## {section}\n")
        for name in names:
            parts += _describe(name, getattr(nested_core, name))
    return "".join(parts)


def _describe(name: str, value: Any) -> Iterator[str]:
    yield f"\n### {name}\n\n"
    if getattr(value, "__name__", name) != name:
        yield f"Another name of `{value.__name__}`.\n"
        return
    if not _is_exception(value) and name not in RETURNED:
        signature = _signature(name, value)
        is_long = "\n" in signature
        yield f"```text\n{signature}\n```\n\n" if is_long else f"`{signature}`\n\n"
    text = inspect.getdoc(value) or ""
    yield f"{_as_markdown(text)}\n"
    if isinstance(value, type) and issubclass(value, NestedTuneError):
        yield f"\nExit code [{value.exit_code}](exit-codes.md#exit-{value.exit_code}).\n"
    if methods := [name for name in _methods(value) if not name.startswith(WRITTEN_DOWN)]:
        yield "\nMethods:\n\n"
    for method in methods:
        first = inspect.getdoc(getattr(value, method)) or ""
        yield f"- `{method}`: {' '.join(first.split(chr(10) * 2)[0].split())}\n"


def _as_markdown(text: str) -> str:
    """A docstring's paragraphs; lines `name: meaning`, also under Args, become a list."""
    lines = [line for line in text.splitlines() if line.strip() != "Args:"]
    out: list[str] = []
    for line in lines:
        is_entry = re.match(r" {0,4}([a-z_]+(?:, [a-z_]+)*): \S", line)
        if is_entry:
            names = is_entry.group(1)
            out.append(f"- `{names.replace(', ', '`, `')}`: {line.split(': ', 1)[1]}")
        else:
            out.append(re.sub(r"^ +", "  ", line))
    return re.sub(r"(?m)^((?!- |  ).+)\n(?=- )", r"\1\n\n", "\n".join(out))


def _signature(name: str, value: Any) -> str:
    if isinstance(value, type) and issubclass(value, BaseModel):
        return f"{name}(**settings)  # every key: docs/configuration.md"
    signature = inspect.signature(value)
    described = signature.parameters.values()
    texts = [str(each.replace(annotation=each.empty)) for each in described]
    parameters = [re.sub(r"<function .+ at 0x\w+>", "...", text) for text in texts]
    kinds = [each.kind for each in described]
    if inspect.Parameter.KEYWORD_ONLY in kinds:
        parameters.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    returned = signature.return_annotation
    arrow = "" if isinstance(value, type) or returned is signature.empty else f" -> {returned}"
    line = f"{name}({', '.join(parameters)}){arrow}"
    if len(line) <= LONGEST_LINE:
        return line
    indented = "".join(f"    {each},\n" for each in parameters)
    return f"{name}(\n{indented}){arrow}"


def _parameters(value: Any) -> Iterator[str]:
    """The parameters that a docstring has to explain; a configuration's keys have help."""
    if _is_exception(value) or (isinstance(value, type) and issubclass(value, BaseModel)):
        return
    for name, parameter in inspect.signature(value).parameters.items():
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            yield name


def _methods(value: Any) -> Iterator[str]:
    """The public methods and properties that a class defines itself; none of a configuration's."""
    if not isinstance(value, type) or _is_exception(value) or issubclass(value, BaseModel):
        return
    for name, member in vars(value).items():
        if not name.startswith("_") and isinstance(member, (property, classmethod, _Function)):
            yield name


def _public_bases(value: Any, module: Any) -> list[type]:
    bases = value.__mro__[1:] if isinstance(value, type) else ()
    return [base for base in bases if base.__name__ in module.__all__]


def _is_exception(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, BaseException)


_Function = type(render_page)


def main(arguments: list[str]) -> str | None:
    """Write the page, or only look with --check; return what is wrong."""
    problems = list(find_undocumented())
    if problems:
        return "\n".join(problems)
    return write_or_check(PAGE, render_page(), arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
