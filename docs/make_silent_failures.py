"""Write docs/silent-failures.md, its picture, and the page of the study in benchmarks/.

They are made from the list of failures and the tools' rows.

python -m docs.make_silent_failures [--check]
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from xml.sax.saxutils import escape

from benchmarks.silent_failures.failures import Failure, read_failures
from benchmarks.silent_failures.tables import Rows, count, head, read_all_rows, read_misses
from benchmarks.silent_failures.tools import TOOLS
from docs.generated_page import write_or_check

GUIDE_PAGE = Path(__file__).with_name("silent-failures.md")
STUDY_PAGE = GUIDE_PAGE.parents[1] / "benchmarks" / "silent_failures" / "README.md"
PICTURE = Path(__file__).with_name("images") / "silent-failures.svg"
COLOURS = {
    "before": "#1a7f5a",
    "after": "#57a773",
    "use": "#b5d99c",
    "never": "#c8553d",
    "not applicable": "#d9d9d9",
    "not run": "#f2f2f2",
}
LEFT, TOP, ROW, COLUMN = 330, 66, 18, 150  # pixels of the picture
GUIDE = """# Silent failures

Each failure below is from a public report, and shows in no error and no loss. The picture shows
which of the first thirty-five a tool notices
([what was run](../benchmarks/silent_failures/README.md)).

![A line for each failure, a column for each tool, coloured by when it was
noticed](images/{picture})

## The failures
"""
STUDY = """# Silent failures: what tools notice

Which failures of [the list](../../docs/silent-failures.md) does a trainer notice?
`python -m benchmarks.silent_failures --tool NAME` plants each in a folder beside its healthy twin,
runs the tool on both, step by step, as its own documentation says, and prints a line a failure.
The list, `failures.toml`, was chosen by the makers of nested-tune, which is one of the tools. It
was committed before any tool was run on it; its head names what was changed afterwards. The base is
the tiny model of `examples/`, on a Linux CPU. Rows, with what was printed, are in `results/`.

*Noticed*: before the adapter is used, or as it is, the command fails, refuses, or prints a warning
that names the failure and that the healthy twin does not get. Doing the right thing counts too.
*Not applicable*: the tool has no such step, or its own code would have to be broken. *False
alarm*: the healthy twin is warned of in the same words, or refused.

A line counts if it holds one of the words that the list has for the failure. So a tool can be said
to notice by a line that meant something else, or to miss by words that the list lacks. Two readers
from outside checked twenty rows on 27 November 2026: seven were wrong, and what they touched was
run again.

## Planted by strangers

Six strangers, who knew the documents but not the gate's code, planted failures of their own
(`blind.jsonl`). nested-tune noticed **one of ten**, then of fourteen each **one**, **five** (six
with all controls), **six** (seven; one twin warned, rightly; four plants weak, one of them
noticed), **eight** (eight; no twin warned; five plants weak, four of them noticed; two of the eight
by doing what is right; the program was edited meanwhile, and of the six misses five were run again
at the end) and **nine** (nine; one twin warned, arguably wrongly; two of the nine are weak: the
headline of `evaluate` alone, a line in a server's log). Each number is from before the mends of
what was missed, which no row shows. What
lacks shows where two things are compared: shifted answers and wrong labels of a few rows, an answer
in its own prompt, which a task of finding has too. Only these first numbers tell of
failures that nobody has thought of yet. The list's own first rows are in `first-count.jsonl`: 23 of
25 noticed; the other ten had no row before mends began. Of eight real data sets with 79,468 rows in
the largest six none was warned of (rows not kept).
"""

PREFERENCES = """## Five more of training on preferences

nested-tune notices all five ([such a training](preferences.md)).
"""


def render_guide() -> str:
    """The page for users: each failure, how to see it and what to do."""
    parts = [
        GUIDE.format(picture=PICTURE.name),
        *map(describe, read_failures().values()),
        PREFERENCES,
        *map(describe, read_failures("preferences").values()),
    ]
    return "\n".join(parts)


def render_study() -> str:
    """The page of the study: how many failures each tool notices, and why not all are run."""
    failures, tools = read_failures(), read_all_rows()
    missed = [f"- {failures[name].kind}: {why}" for name, why in read_misses().items()]
    preferences = count(read_all_rows("preferences")["nested-tune"])
    parts = [
        STUDY,
        "## What tools notice\n",
        *(describe_tool(name, rows) for name, rows in tools.items()),
        f"\n![By failure, tool and time](../../docs/images/{PICTURE.name})\n",
        *(["nested-tune misses:\n", *missed, ""] if missed else []),
        "Of training on preferences nested-tune alone was run, with `samples: warn`, and noticed",
        f"{preferences}. Two plants break its own code.",
    ]
    return "\n".join(parts) + "\n"


def describe_tool(name: str, rows: Rows) -> str:
    """A line with a tool's count, versions and checks, and why it is not run on some failures."""
    version = next(iter(rows.values()))["version"]
    backend = TOOLS[name].backend
    setup = f"{f'{backend}; ' if backend else ''}{version}"
    told = f"- **{name}: {count(rows)}** ({setup}): {TOOLS[name].checks}."
    return told + explain_missing(name, rows)


def explain_missing(name: str, rows: Rows) -> str:
    """Why failures do not apply to a tool, or why it is not run; empty if all are run."""
    outside = {"not applicable", "not run"}
    reasons = dict.fromkeys(row["said"] for row in rows.values() if row["noticed"] in outside)
    return f" Not run: {'; '.join(reasons)}." if reasons else ""


def describe(failure: Failure) -> str:
    """The heading of a failure; why it happens, how to see it, what to do, and the report."""
    heading = failure.kind[0].upper() + failure.kind[1:]
    return (
        f"### {heading.replace('`', '')}\n\n"
        f"{failure.happens} **See:** {failure.see} **Do:** {failure.cure} ({failure.report})\n"
    )


def render_picture(failures: Mapping[str, Failure], tools: Mapping[str, Rows]) -> str:
    """An SVG: a line a failure, a column a tool, a colour for when it was noticed."""
    width, height = LEFT + COLUMN * len(tools) + 10, TOP + ROW * len(failures) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for column, (name, rows) in enumerate(tools.items()):
        left = LEFT + column * COLUMN
        lines = [*head(name), count(rows).partition(",")[0]]
        parts += [text(left, 16 + 18 * line, words) for line, words in enumerate(lines)]
        for line, failure in enumerate(failures):
            row = rows.get(failure)
            if row is not None:
                colour = COLOURS[row["noticed"]]
                top = TOP + line * ROW
                parts.append(
                    f'<rect x="{left}" y="{top}" width="{COLUMN - 8}" height="{ROW - 3}" '
                    f'fill="{colour}"/>'
                )
    for line, entry in enumerate(failures.values()):
        parts.append(text(6, TOP + line * ROW + 12, entry.kind.replace("`", "")))
    for place, (when, colour) in enumerate(COLOURS.items()):
        left, top = 6 + place * 110, height - 20
        parts += [
            f'<rect x="{left}" y="{top}" width="12" height="12" fill="{colour}"/>',
            text(left + 16, top + 11, when),
        ]
    return "\n".join([*parts, "</svg>\n"])


def text(left: int, baseline: int, words: str) -> str:
    """A text of the picture."""
    return f'<text x="{left}" y="{baseline}" fill="#222222">{escape(words)}</text>'


if __name__ == "__main__":
    written = {
        GUIDE_PAGE: render_guide(),
        STUDY_PAGE: render_study(),
        PICTURE: render_picture(read_failures(), read_all_rows()),
    }
    problems = [write_or_check(page, text, sys.argv[1:]) for page, text in written.items()]
    sys.exit("\n".join(filter(None, problems)) or None)
