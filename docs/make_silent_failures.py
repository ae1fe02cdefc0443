"""Writes docs/silent-failures.md and its picture from the list of failures and the tools' rows.

python -m docs.make_silent_failures [--check]
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from xml.sax.saxutils import escape

from benchmarks.silent_failures.failures import Failure, read_failures
from benchmarks.silent_failures.tables import (
    Rows,
    count,
    draw_table,
    head,
    read_all_rows,
    read_misses,
)
from benchmarks.silent_failures.tools import TOOLS
from docs.generated_page import write_or_check

PAGE = Path(__file__).with_name("silent-failures.md")
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
INTRODUCTION = """# Silent failures

This page is for anyone who trains adapters, with any tool. A fine-tuning can fail in ways that no
error and no loss tells of. Here are thirty-five of them, each from a public report: how it
happens, how to see it, what to do. The table says which of them a tool notices. The failures and
the words that count were chosen by the makers of nested-tune, which is one of the tools.

`python -m benchmarks.silent_failures` plants each failure in a folder beside its healthy twin,
and runs a tool on both as its own documentation says, with the checks that are named below. The
[list](../benchmarks/silent_failures/failures.toml) was committed before any tool was run
on it, and has the plant and the twin of each.

*Noticed* means one of these, before the adapter is used: the command fails or refuses; or it
prints a warning that names the failure and that the healthy twin does not get. Doing the right
thing counts as well, such as a server that answers with the new adapter; what a training has learnt
is told by the loss of a turn, which it took more than half of. *Before*, *after* and
*use* say when: before training, in or after it, or when the adapter is promoted, fused, exported or
served. *Not named*: it failed or refused, and no line of it has a word that names the failure.
*Not applicable*: the tool has no such step, or its own code would have to be broken. A
*false alarm* is a healthy twin that is warned of in the same words, or refused. A loss that is
reported is no warning, even if it is NaN.

Both folders are walked step by step, until the tool notices.

Everything runs on a Linux CPU, and so does code that its makers wrote for Macs, on MLX's build for
Linux. What MLX cannot tell there, such as a Mac's memory, is given to the tool. A tool that looks
for macOS itself and does not begin without it is *not run*, and its words stand below.

Words decide: a line counts if it holds one of the words that the list has for a failure, and is not
what the model answered. So a tool can be said to notice by a line that meant something else, and be
said to miss by words that the list has not. The rows keep the last lines of what it said, eighty a
command, in both folders. Older rows of mlx_lm.lora, soup-cli and peft keep twelve a command, of the
planted folder alone.

A reader from outside checked ten rows on 27 November 2026, and would have written four of them
otherwise, all of soup-cli: checks of it that need no PyTorch had not been run, a training of it
that did the right thing was not asked what it had learnt, and rows counted for it because a file
changed after it was signed. The rows that this touches were run again with those checks, with that
question, and with adapters that are signed after the plant. Asked in the same way about
`weight: 0`, soup-cli and mlx_lm.lora learn the turn, which an earlier measure of ours had counted
for them. The programs of PEFT's quick tours mask nothing, so that no mask can be off there.

A second one checked ten other rows of that day: seven as they stand, three otherwise. The healthy
twin of the NaN had it too, where nothing reads it, and PEFT's check of weights rightly stopped both
folders: the twin is sound now, and the row was run again for every tool. The report about a fuse
that is applied twice is one that PEFT has mended since; what is planted is a fused folder as base.
And mlx-lm-lora's `--test` writes an adapter's configuration anew before it loads it, which undid
three plants: it is given a copy of the adapter now.

When the last rows were run on the same day, mlx-lm-lora's were read against its code, and all of
them were run again. Its MCP server has three checks, which had not been called. Its `--test` had
been run without the settings of training, so that its losses meant nothing, and a training of all
weights had been loaded as an adapter, which counted as a false alarm. It puts LoRA on every
projection, so that the layer that is never updated does not apply to it. And a text that the model
wrote, with a control token in it, had counted as a warning; no other row rested on such a text.

### Ten more, planted by somebody who did not know the gate

After all this, somebody who had read these pages, but neither the gate's code nor its tests,
planted ten more failures on the same day, each beside a healthy run. **nested-tune noticed one of
the ten**: a registry that was copied so that its link became a folder. It did not notice the other
nine, with the file that `init` writes, without an eval set and so without a canary.

Eight of the nine were mended later that day, so that **nested-tune notices nine of the ten now**.
That was done after they had been seen: only the first number says something of failures that
nobody has thought of yet. What notices each of them now:

- an old `train-2.jsonl` beside `train-1.jsonl`, the same questions with obsolete answers:
  `validate`, and what `init` and `train` say of the data, [`two-answers`](data.md#two-answers)
- UTF-8 that was read as Latin-1, in train and held-out: [`mojibake`](data.md#mojibake)
- a tokenizer that drops bytes it does not know: [`lost-character`](data.md#lost-character)
- two added tokens whose rows of the embedding are alike, and are not trained:
  [`tokens-alike`](data.md#tokens-alike)
- answers that their generator cut off in the middle: [`cut-off-answers`](data.md#cut-off-answers)
- prompt and completion exchanged: [`exchanged-columns`](data.md#exchanged-columns)
- rows of plain text (`Question: ... Answer: ...`), served through the chat template:
  [`handwritten-turns`](data.md#handwritten-turns)
- the base's weights changed on disk, with all times as they were: `serve`, `export` and `verify`,
  which read all bytes of the base again
- a registry that was copied so that its link became a folder: `serve` and the registry's commands
- another version of mlx_lm with other rotary positions, after the promotion: **nothing**, unless
  an eval set has `canary: true`, with which `serve` [refuses it](serving.md#canary)

### Fourteen more, planted by a second stranger

On 28 November somebody else, who had read README, these pages and `--help`, planted fourteen more
from public reports. **nested-tune noticed one of the fourteen**: turns that end with a token which
`generation_config.json` alone names, which exports do right. It missed answers that were shifted by
one row everywhere, wrong labels, groups of rows in train and held-out alike, numbers that a
spreadsheet had rounded, a warm-up longer than the run, a template that writes the date, and others:
most of them show only where two things are compared. The cases of both strangers, one a line, are
in `benchmarks/silent_failures/blind.jsonl`. The first rows of the list above, 23 of 25 noticed, are
in `first-count.jsonl` beside it.

The warnings are cautious. Of eight real data sets, the largest of which (banking77, CLINC150,
restaurant8k, SNIPS, NL2Bash and E2E) have 79,468 rows, none gets one, nor do our example and the
twins of the thirty-five. So a plant that is made otherwise can pass them: an old answer in the same
file, or a cut in a language whose words are not listed.

The base is the tiny model of `examples/`. The rows, with commands and the end of what was printed,
are in `benchmarks/silent_failures/results/`.
"""

PREFERENCES = """## Five more of training on preferences

`python -m benchmarks.silent_failures --list preferences` plants five failures of training on
[preferences](preferences.md) in the same way. Their kinds were chosen before that training was
written, and its own tests plant the same: this shows that they are noticed still, and compares no
tools. Only nested-tune was run. Two plants break its own code, for there is no shared library that
computes a reference or a mask. Sample answers do not decide here (`samples: warn`): the tiny base
says one sentence to every prompt, before training too. A sixth, labels that are all the same, was
noticed as well; it went with the loss that took labels.
"""


def render_page() -> str:
    """The whole page."""
    of_preferences = read_failures("preferences")
    failures, tools = read_failures(), read_all_rows()
    misses = read_misses()
    missed = [f"- {failures[name].kind}: {why}" for name, why in misses.items()]
    parts = [
        INTRODUCTION,
        "## What tools notice\n",
        *(describe_tool(name, rows) for name, rows in tools.items()),
        "",
        "![A line for each failure, a column for each tool, coloured by when it was noticed]"
        f"(images/{PICTURE.name})\n",
        draw_table(failures, tools) + "\n",
        "## What nested-tune misses, and why\n",
        "\n".join(missed or ["Nothing of these thirty-five."]) + "\n",
        "## What does not apply or was not run, and why\n",
        *(line for name, rows in tools.items() for line in explain_missing(failures, name, rows)),
        "",
        "## The failures\n",
        *(describe(failure) for failure in failures.values()),
        PREFERENCES,
        draw_table(of_preferences, read_all_rows("preferences")) + "\n",
        *(describe(failure) for failure in of_preferences.values()),
    ]
    return "\n".join(parts)


def describe_tool(name: str, rows: Rows) -> str:
    """A line with a tool's backend and versions, and what it was given to check with."""
    version = next(iter(rows.values()))["version"]
    backend = TOOLS[name].backend
    return f"- {name} ({f'{backend}; ' if backend else ''}{version}): {TOOLS[name].checks}."


def explain_missing(failures: Mapping[str, Failure], name: str, rows: Rows) -> list[str]:
    """A line for each reason why failures do not apply to a tool or it is not run, with those."""
    reasons: dict[str, list[str]] = {}
    for failure, row in rows.items():
        if row["noticed"] in {"not applicable", "not run"}:
            reasons.setdefault(row["said"], []).append(failures[failure].kind)
    return [
        f"- {name}: {reason} ({'all' if len(kinds) == len(failures) else '; '.join(kinds)})."
        for reason, kinds in reasons.items()
    ]


def describe(failure: Failure) -> str:
    """The heading of a failure and its three lines, with the report."""
    heading = failure.kind[0].upper() + failure.kind[1:]
    return (
        f"### {heading.replace('`', '')}\n\n"
        f"- How it happens: {failure.happens}\n"
        f"- How to see it: {failure.see}\n"
        f"- What to do: {failure.cure}\n\n"
        f"Report: {failure.report}. {failure.tells}\n"
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
    picture = render_picture(read_failures(), read_all_rows())
    wrong = write_or_check(PAGE, render_page(), sys.argv[1:])
    sys.exit(wrong or write_or_check(PICTURE, picture, sys.argv[1:]))
